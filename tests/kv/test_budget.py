"""How memory is read and split, and when the split moves."""

import random

import pytest

from tts_engine.errors import EngineError, OutOfBlocks
from tts_engine.kv.budget import PARTS, PATIENCE, Budget, Costs, divide, proposed, read_bytes, read_memory
from tts_engine.kv.tree import NO_NODE, KVTree


@pytest.mark.parametrize(
    ("memory", "num_bytes"),
    [
        (5, 5),
        ("5", 5),
        ("20GB", 20 * 10**9),
        ("1.5GiB", 3 << 29),
        ("512M", 512 << 20),
        ("80%", 800),
        ("12.5 %", 125),
        ("100%", 1000),
    ],
)
def test_memory_is_a_size_or_a_share_of_the_device(memory, num_bytes):
    assert read_memory(memory, lambda: 1000) == num_bytes


@pytest.mark.parametrize("memory", ["", "20XB", "-1", "0", 0, "0%", "101%", "%", "many", "1e9"])
def test_memory_that_is_neither_is_refused_in_one_sentence(memory):
    with pytest.raises(EngineError, match="neither a size such as 20GB nor a share"):
        read_memory(memory, lambda: 1000)


def test_bytes_are_asked_of_the_device_for_a_share_alone():
    assert read_memory("1K", lambda: pytest.fail("asked")) == read_bytes("1K") == 1024


def costs(billions: float) -> Costs:
    parameters = int(billions * 1e9)
    return Costs(weight_bytes=2 * parameters, token_flops=2 * parameters, token_bytes=int(30_000 * billions))


def test_what_is_proposed_follows_what_the_models_are():
    def share(policy, prm, gigabytes, balance=180):
        num_bytes = int(gigabytes * 1e9)
        return proposed(costs(policy), costs(prm), num_bytes, max_rows=1024, balance=balance) / num_bytes

    assert all(0 < share(a, b, size) < 1 for a in (0.5, 7) for b in (0.5, 7) for size in (0.01, 1, 50))
    assert share(7, 0.5, 2) > share(0.5, 7, 2)  # who waits longer for room gets more
    assert share(1, 1, 1, balance=400) >= share(1, 1, 1, balance=20)  # the dearer a byte, the more rows


@pytest.mark.parametrize(("first", "blocks"), [(50, [5, 25]), (1, [1, 45]), (99, [9, 5]), (100, [9, 5])])
def test_every_model_gets_a_block_and_all_together_the_whole(first, blocks):
    assert divide(100, first, [10, 2]) == blocks
    assert divide(100, 100, [10]) == [10]
    assert divide(10**999, 10**998, [10, 2])[0] == 10**997


class Blocks:
    """A pool without tensors."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.tree, self.block_bytes, self.tokens_recomputed = KVTree(num_blocks=num_blocks, block_size=4), block_bytes, 0
        self.sound = True

    def resize(self, num_blocks: int) -> bool:
        return self.sound and self.tree.resize(num_blocks) is not None

    def use(self, num_blocks: int) -> int:
        """A node of so many blocks, held."""
        node = self.tree.insert(NO_NODE, [random.randrange(1 << 20) for _ in range(4 * num_blocks)])
        assert node != NO_NODE
        return node

    def starve(self) -> None:
        assert not self.tree.has_room(self.tree.num_blocks + 1)


def budget_of(policy: int = 64, prm: int = 64, block_bytes: tuple[int, int] = (1, 1), needs: tuple[int, int] = (8, 8)) -> Budget:
    pools = [Blocks(policy, block_bytes[0]), Blocks(prm, block_bytes[1])]
    budget = Budget(pools, policy * block_bytes[0] + prm * block_bytes[1])
    assert budget.reserve([needs])
    return budget


def sizes(budget: Budget) -> list[int]:
    now = [pool.tree.num_blocks for pool in budget.pools]
    held = sum(count * pool.block_bytes for count, pool in zip(now, budget.pools, strict=True))
    assert 0 <= budget.num_bytes - held < max(pool.block_bytes for pool in budget.pools)
    for pool in budget.pools:
        pool.tree.check()
    return now


def test_without_want_nothing_moves():
    budget = budget_of()
    for pool in budget.pools:
        pool.use(60)
    for _ in range(5 * PATIENCE):
        budget.look()
    assert sizes(budget) == [64, 64] and budget.moves == 0


def test_pressure_takes_what_the_prm_keeps_in_case_a_part_at_a_time_down_to_its_floor():
    budget = budget_of(needs=(8, 10))
    prm = budget.pools[1]
    prm.tree.drop(prm.use(60))
    taken = []
    while budget.press():
        taken.append(sizes(budget)[1])
    assert taken[:2] == [64 - 128 // PARTS, 64 - 2 * 128 // PARTS] and taken[-1] == 10
    assert prm.tree.counts().idle == 0


def test_what_the_prm_needs_now_is_never_taken():
    budget = budget_of()
    budget.pools[1].use(61)
    assert budget.press() and sizes(budget) == [67, 61]
    assert not budget.press() and sizes(budget) == [67, 61]


def test_a_wanting_policy_gets_back_what_was_proposed_for_it_and_no_more():
    budget = budget_of()
    for _ in range(9):
        budget.pools[0].starve()
        budget.look()
    assert sizes(budget) == [64, 64]  # beyond it the PRM gives only before a draw is preempted
    for _ in range(PATIENCE + 2):
        budget.pools[1].tokens_recomputed += 1
        budget.look()
    assert sizes(budget) == [48, 80]
    for _ in range(9):
        budget.pools[0].tokens_recomputed += 1
        budget.look()
    assert sizes(budget) == [64, 64]


def test_a_short_prm_gets_what_the_policy_has_idle_once_that_is_not_short_itself():
    budget = budget_of(needs=(8, 8))
    policy, prm = budget.pools
    policy.use(40)
    for _ in range(PATIENCE):
        prm.starve()
        budget.look()
    assert budget.moves == 0
    for _ in range(10):
        prm.starve()
        budget.look()
    assert sizes(budget) == [40, 88]  # what is held stays


def test_two_short_models_do_not_thrash():
    """The policy presses as soon as anything was taken from it; the PRM is short always."""
    budget, looks = budget_of(policy=64, prm=64), 20_000
    policy, prm = budget.pools
    for _ in range(looks):
        prm.starve()
        budget.look()
        if policy.tree.num_blocks < 64:
            policy.starve()
            assert budget.press()
    assert 2 <= budget.moves <= 2 * (looks // PATIENCE).bit_length()


def test_what_searches_need_is_reserved_and_moved_to_where_it_is_needed():
    budget = budget_of(policy=20, prm=20, block_bytes=(1, 3), needs=(2, 2))
    assert budget.reserve([(2, 2), (50, 3), (7, 9)])
    assert sizes(budget)[0] >= 50 and sizes(budget)[1] >= 9
    assert budget.reserve([(2, 24)]) and sizes(budget)[1] >= 24
    before = sizes(budget)
    assert not budget.reserve([(50, 3), (2, 24)]) and sizes(budget) == before  # each alone would fit
    budget.pools[1].use(24)
    assert not budget.reserve([(50, 3)]) and sizes(budget) == before  # not now


def test_what_searches_will_come_to_moves_the_split_as_far_as_the_other_model_can_spare():
    budget = budget_of()
    budget.expect((60, 64))
    budget.expect((70, 57))  # less than a part can be spared
    assert budget.moves == 0
    budget.expect((100, 20))
    assert sizes(budget) == [100, 28]
    budget.expect((101, 20))
    assert sizes(budget) == [108, 20]  # a part at a time, as far as the other can spare it
    budget.expect((128, 0))
    assert sizes(budget) == [120, 8]  # what is reserved stays
    budget.expect((30, 98))
    assert sizes(budget) == [30, 98]
    budget.pools[1].use(90)
    budget.expect((128, 0))
    assert sizes(budget) == [38, 90]  # and so does what is in use


def test_a_policy_beside_an_idle_prm_has_the_room():
    budget = budget_of()
    budget.expect((50, 0))
    for _ in range(20):
        budget.pools[0].starve()
        budget.look()
    assert sizes(budget) == [120, 8]


def test_nothing_moves_while_a_forward_is_under_way():
    budget = budget_of()
    budget.at_rest = lambda: False
    budget.pools[0].starve()
    budget.look()
    budget.expect((100, 0))
    assert not budget.press() and not budget.reserve([(100, 1)]) and sizes(budget) == [64, 64]
    assert budget.reserve([(64, 64)])  # nothing has to move


@pytest.mark.parametrize("broken", [0, 1])
def test_memory_that_cannot_be_had_leaves_the_split(broken):
    budget = budget_of()
    budget.pools[broken].sound = False
    assert not budget.press() and sizes(budget) == [64, 64]


@pytest.mark.parametrize("needs", [(65, 64), (1, 128), (129, 1)])
def test_what_can_never_fit_is_refused_with_the_numbers(needs):
    budget = budget_of()
    budget.refuse_unless_fits("problem 7", (64, 64), "9 prompt tokens")
    with pytest.raises(OutOfBlocks) as refused:
        budget.refuse_unless_fits("problem 7", needs, "9 prompt tokens")
    said = str(refused.value)
    assert f"{needs[0]} for the policy and {needs[1]} for the PRM (9 prompt tokens)" in said and "\n" not in said
    assert "raise kv_bytes or memory" in said


def test_a_policy_alone_has_it_all():
    budget = Budget([Blocks(30, 2)], 60)
    budget.pools[0].starve()
    budget.look()
    budget.expect([90])
    assert budget.reserve([[30], [2]]) and not budget.press() and not budget.reserve([[31]])
    with pytest.raises(OutOfBlocks, match="31 for the policy "):
        budget.refuse_unless_fits("problem 1", [31], "it is long")
