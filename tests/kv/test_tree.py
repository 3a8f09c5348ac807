"""The C++ tree against a small model of it, and its promises one by one."""

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tts_engine.kv.tree import NO_NODE, KVTree, blocks_needed

NUM_BLOCKS, BLOCK_SIZE = 16, 4
EXAMPLES, STEPS = 130, 100


class Model:
    """The tree as a dictionary: everything is recounted from what it means, nothing is kept up to date."""

    def __init__(self):
        self.nodes = {}  # handle -> [parent, tokens, computed, holds, last use]
        self.leases = {}  # handle -> [parent, tokens of room]
        self.dead = []
        self.clock = 0
        self.num_blocks = NUM_BLOCKS
        self.evicted = self.refused = 0

    def touch(self, node):
        self.clock += 1
        self.nodes[node][4] = self.clock

    def child(self, parent, tokens):
        return next((h for h, n in self.nodes.items() if n[0] == parent and n[1] == tokens), NO_NODE)

    def path(self, node):
        return [] if node == NO_NODE else [*self.path(self.nodes[node][0]), node]

    def pinned(self):
        tips = [h for h, n in self.nodes.items() if n[3]] + [parent for parent, _ in self.leases.values()]
        return {node for tip in tips for node in self.path(tip)}

    def counts(self):
        size = {h: blocks_needed(len(n[1]), BLOCK_SIZE) for h, n in self.nodes.items()}
        filling = sum(blocks_needed(room, BLOCK_SIZE) for _, room in self.leases.values())
        pinned = sum(size[h] for h in self.pinned())
        idle = sum(size.values()) - pinned
        return self.num_blocks - filling - pinned - idle, filling, pinned, idle

    def evict_one(self):
        keep = self.pinned() | {n[0] for n in self.nodes.values()}
        leaves = [h for h in self.nodes if h not in keep]
        if leaves:
            oldest = min(leaves, key=lambda h: (self.nodes[h][4], h))
            self.dead.append(oldest)
            return blocks_needed(len(self.nodes.pop(oldest)[1]), BLOCK_SIZE)

    def make_room(self, num_blocks):
        free, _, _, idle = self.counts()
        while self.counts()[0] < num_blocks <= free + idle:
            self.evicted += self.evict_one()
        self.refused += num_blocks > free + idle
        return num_blocks <= free + idle

    def extend(self, lease, num_tokens):
        room = self.leases[lease][1]
        fits = self.make_room(blocks_needed(room + num_tokens, BLOCK_SIZE) - blocks_needed(room, BLOCK_SIZE))
        self.leases[lease][1] += num_tokens if fits else 0
        return fits


index = st.integers(0, 1000)
few_tokens = st.lists(st.integers(0, 1), max_size=9)  # few distinct ones: twins, and paths that differ late


class TreeMachine(RuleBasedStateMachine):
    operations = 0

    def __init__(self):
        super().__init__()
        self.tree, self.model = KVTree(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE), Model()
        self.memory = np.full(NUM_BLOCKS * BLOCK_SIZE, -1)  # what attention would read at each slot

    def node(self, i):
        return list(self.model.nodes)[i % len(self.model.nodes)]

    def lease_of(self, i):
        return list(self.model.leases)[i % len(self.model.leases)]

    def write(self, handle, is_lease, start, values):
        self.memory[self.tree.write_slots([handle], [is_lease], [start], [len(values)])] = values

    def settle(self, node, parent, tokens, computed):
        """A new or known child was handed out, held."""
        if node not in self.model.nodes:
            assert node not in self.model.dead
            self.model.nodes[node] = [parent, tokens, computed, 0, 0]
            self.write(node, False, 0, tokens)
        assert self.model.nodes[node][:2] == [parent, tokens]
        self.model.nodes[node][3] += 1
        self.model.touch(node)

    @rule(i=index, top=st.booleans(), tokens=few_tokens)
    def insert(self, i, top, tokens):
        parent = NO_NODE if top or not self.model.nodes else self.node(i)
        twin = self.model.child(parent, tokens)
        if twin == NO_NODE and parent != NO_NODE:
            self.model.nodes[parent][3] += 1  # its path must survive making room
        fits = twin != NO_NODE or self.model.make_room(blocks_needed(len(tokens), BLOCK_SIZE))
        if twin == NO_NODE and parent != NO_NODE:
            self.model.nodes[parent][3] -= 1
        node = self.tree.insert(parent, tokens)
        assert (node != NO_NODE) == fits and (twin == NO_NODE or node == twin)
        if fits:
            self.settle(node, parent, tokens, 0)

    @precondition(lambda self: self.model.nodes)
    @rule(i=index, tokens=few_tokens, known=st.booleans())
    def find(self, i, tokens, known):
        parent, tokens = self.model.nodes[self.node(i)][:2] if known else (self.node(i), tokens)
        node = self.model.child(parent, tokens)
        assert self.tree.find(parent, tokens) == node
        if node != NO_NODE:
            self.model.touch(node)

    @precondition(lambda self: self.model.nodes)
    @rule(i=index)
    def hold(self, i):
        node = self.node(i)
        self.tree.hold(node)
        self.model.nodes[node][3] += 1
        self.model.touch(node)

    @precondition(lambda self: self.model.nodes)
    @rule(i=index)
    def drop(self, i):
        node = self.node(i)
        if self.model.nodes[node][3]:
            self.let_go(node)
        else:
            with pytest.raises(ValueError, match="dropped more often"):
                self.tree.drop(node)

    @rule(keep=st.sets(st.integers(0, 9), max_size=2))
    def drop_nearly_all(self, keep):  # so that much is idle and the order of eviction matters
        for i, (node, (_, _, _, holds, _)) in enumerate(list(self.model.nodes.items())):
            for _ in range(0 if i in keep else holds):
                self.let_go(node)

    def let_go(self, node):
        self.tree.drop(node)
        self.model.nodes[node][3] -= 1
        self.model.touch(node)

    @precondition(lambda self: self.model.nodes)
    @rule(i=index, share=st.floats(0, 1))
    def set_computed(self, i, share):
        node = self.node(i)
        num_tokens = int(share * len(self.model.nodes[node][1]))
        self.tree.set_computed(node, num_tokens)
        self.model.nodes[node][2] = num_tokens

    @precondition(lambda self: self.model.nodes and len(self.model.leases) < 5)
    @rule(i=index, num_tokens=st.integers(0, 9))
    def lease(self, i, num_tokens):
        parent = self.node(i)
        lease = self.tree.lease(parent)
        self.model.leases[lease] = [parent, 0]
        self.model.touch(parent)
        self.grow(lease, num_tokens)

    @precondition(lambda self: self.model.leases)
    @rule(i=index, num_tokens=st.integers(0, 9))
    def extend(self, i, num_tokens):
        self.grow(self.lease_of(i), num_tokens)

    def grow(self, lease, num_tokens):
        room = self.model.leases[lease][1]
        fits = self.model.extend(lease, num_tokens)
        assert self.tree.extend(lease, num_tokens) == fits
        if fits:
            self.write(lease, True, room, [lease] * num_tokens)

    @precondition(lambda self: self.model.leases)
    @rule(num_tokens=st.integers(1, 5))
    def extend_many(self, num_tokens):
        leases = list(self.model.leases)
        rooms = [self.model.leases[lease][1] for lease in leases]
        reached = next((i for i, lease in enumerate(leases) if not self.model.extend(lease, num_tokens)), len(leases))
        assert self.tree.extend_many(leases, num_tokens) == reached
        for lease, room in list(zip(leases, rooms, strict=True))[:reached]:
            self.write(lease, True, room, [lease] * num_tokens)

    @precondition(lambda self: self.model.leases)
    @rule(i=index, tokens=few_tokens, share=st.floats(0, 1))
    def seal(self, i, tokens, share):
        lease = self.lease_of(i)
        parent, room = self.model.leases[lease]
        tokens = tokens[:room]
        computed = int(share * len(tokens))
        twin = self.model.child(parent, tokens)
        node = self.tree.seal(lease, tokens, computed)
        assert twin in (node, NO_NODE)
        del self.model.leases[lease]
        self.settle(node, parent, tokens, computed)

    @precondition(lambda self: self.model.leases)
    @rule(i=index, tokens=few_tokens)
    def keep(self, i, tokens):
        lease = self.lease_of(i)
        parent, room = self.model.leases[lease]
        fits, computed = self.model.extend(lease, max(0, len(tokens) - room)), min(room, len(tokens))
        node = self.tree.keep(lease, tokens, computed)
        assert (node != NO_NODE) == fits
        del self.model.leases[lease]
        if fits:
            self.settle(node, parent, tokens, computed)
            self.model.nodes[node][3] -= 1

    @precondition(lambda self: 0 < len(self.model.leases) < 5)
    @rule(i=index)
    def fork(self, i):
        lease = self.lease_of(i)
        parent, room = self.model.leases[lease]
        self.model.touch(parent)
        self.model.leases["forked"] = [parent, 0]
        fits = self.model.extend("forked", room)
        forked, copies = self.tree.fork(lease)
        assert (forked != NO_NODE) == fits and len(copies) == fits * blocks_needed(room, BLOCK_SIZE)
        made = self.model.leases.pop("forked")
        if fits:
            self.model.leases[forked] = made
            blocks = self.memory.reshape(-1, BLOCK_SIZE)
            blocks[copies[:, 1]] = blocks[copies[:, 0]]
            assert self.memory[self.tree.write_slots([forked], [True], [0], [room])].tolist() == [lease] * room
            self.write(forked, True, 0, [forked] * room)

    @precondition(lambda self: self.model.leases)
    @rule(i=index)
    def release(self, i):
        lease = self.lease_of(i)
        self.tree.release(lease)
        del self.model.leases[lease]

    @precondition(lambda self: self.model.nodes)
    @rule(picked=st.lists(index, max_size=3))
    def retire(self, picked):
        nodes = [self.node(i) for i in picked]
        self.tree.retire([*nodes, *self.model.dead[-2:], NO_NODE])
        for node in nodes:
            self.model.nodes[node][4] = 0

    @rule(num_blocks=st.integers(0, 4))
    def evict(self, num_blocks):
        freed = 0
        while freed < num_blocks and (more := self.model.evict_one()) is not None:
            freed += more
        assert self.tree.evict(num_blocks) == freed

    @rule(num_blocks=st.integers(1, 2 * NUM_BLOCKS))
    def resize(self, num_blocks):
        _, filling, pinned, _ = self.model.counts()
        before = self.slots()
        moves = self.tree.resize(num_blocks)
        assert (moves is None) == (filling + pinned > num_blocks)
        if moves is None:
            assert self.slots() == before
            return
        while sum(self.model.counts()[1:]) > num_blocks:
            self.model.evicted += self.model.evict_one()
        assert moves.shape[1] == 2 and (moves[:, 0] >= num_blocks).all() and (moves[:, 1] < num_blocks).all()
        self.model.num_blocks = num_blocks
        blocks = np.full((num_blocks, BLOCK_SIZE), -1)
        old = self.memory.reshape(-1, BLOCK_SIZE)
        kept = min(num_blocks, len(old))
        blocks[:kept] = old[:kept]
        blocks[moves[:, 1]] = old[moves[:, 0]]
        blocks[self.tree.extent :] = -1  # nothing is there
        self.memory = blocks.ravel()

    def slots(self):
        nodes = [self.tree.write_slots([node], [False], [0], [len(n[1])]).tolist() for node, n in self.model.nodes.items()]
        return nodes + [self.tree.write_slots([lease], [True], [0], [n[1]]).tolist() for lease, n in self.model.leases.items()]

    @invariant()
    def agrees_with_the_model(self):
        TreeMachine.operations += 1
        tree, model = self.tree, self.model
        tree.check()
        assert sum(tree.counts()) == tree.num_blocks == model.num_blocks
        assert (tree.evicted, tree.refused) == (model.evicted, model.refused)
        assert tree.counts() == model.counts() and tree.available() == tree.counts().free + tree.counts().idle
        for node, (parent, tokens, computed, _, _) in model.nodes.items():
            assert (tree.parent(node), tree.num_tokens(node), tree.computed(node)) == (parent, len(tokens), computed)
        for node in model.dead[-3:]:
            with pytest.raises(ValueError, match="stale node"):
                tree.computed(node)

    @invariant()
    def every_path_reads_what_was_written_on_it(self):
        rows = list(self.model.nodes) + list(self.model.leases)
        texts = {node: sum((self.model.nodes[n][1] for n in self.model.path(node)), []) for node in self.model.nodes}
        for lease, (parent, room) in self.model.leases.items():
            texts[lease] = texts[parent] + [lease] * room
            assert self.tree.lease_start(lease) == self.tree.path_len(parent) == len(texts[parent])
        slots = self.tree.context_slots(rows, [row in self.model.leases for row in rows], [len(texts[row]) for row in rows])
        for row, out in zip(rows, slots, strict=True):
            assert self.memory[out[: len(texts[row])]].tolist() == texts[row]
            assert not out[len(texts[row]) :].any()


@pytest.mark.timeout(0)
def test_ten_thousand_operations_agree_with_the_model_and_conserve_blocks(soak):
    TreeMachine.operations = 0
    # no shrinking: a failure is told at once rather than after minutes
    run_state_machine_as_test(
        TreeMachine,
        settings=settings(
            max_examples=EXAMPLES * soak,
            stateful_step_count=STEPS,
            derandomize=soak == 1,
            deadline=None,
            database=None,
            phases=[Phase.generate],
        ),
    )
    assert TreeMachine.operations >= 10_000 * soak


def tree_of(num_blocks=8, block_size=4):
    return KVTree(num_blocks=num_blocks, block_size=block_size)


def step(tree, parent, tokens):
    """A closed step, drawn under `parent` and let go: idle."""
    lease = tree.lease(parent)
    assert tree.extend(lease, len(tokens))
    node = tree.seal(lease, tokens, len(tokens))
    tree.drop(node)
    return node


def test_a_stale_handle_raises_even_when_its_place_is_used_again():
    tree = tree_of()
    old = tree.insert(NO_NODE, [1])
    lease = tree.lease(old)
    tree.release(lease)
    tree.drop(old)
    tree.evict_all()
    new = tree.insert(NO_NODE, [2])
    assert new != old and new & 0xFFFFFFFF == old & 0xFFFFFFFF
    for use in (tree.hold, tree.computed, tree.parent, tree.lease, lambda node: tree.find(node, [1])):
        with pytest.raises(ValueError, match=f"stale node {old}"):
            use(old)
    for use in (tree.release, tree.extend, tree.lease_start):
        with pytest.raises(ValueError, match=f"stale lease {lease}"):
            use(lease)
    with pytest.raises(ValueError, match="stale"):
        tree.context_slots([old], [False], [1])
    with pytest.raises(ValueError, match="stale"):
        tree.extend_many([lease])
    tree.check()


def test_a_lease_is_not_taken_for_a_node_nor_a_node_for_a_lease():
    tree = tree_of()
    node = tree.insert(NO_NODE, [1])
    lease = tree.lease(node)
    with pytest.raises(ValueError, match="stale node"):
        tree.hold(lease)
    with pytest.raises(ValueError, match="stale lease"):
        tree.release(node)


def test_a_fork_copies_nothing():
    tree = tree_of()
    prompt = tree.insert(NO_NODE, [1, 2, 3, 4, 5])
    before = tree.counts()
    leases = [tree.lease(prompt) for _ in range(6)]
    assert tree.counts() == before
    assert tree.extend_many(leases, 1) == 6
    assert tree.counts() == (0, 6, 2, 0)
    slots = tree.context_slots(leases, [True] * 6, [6] * 6)
    assert (slots[:, :5] == slots[0, :5]).all() and len(set(slots[:, 5])) == 6


def test_eviction_goes_leaf_first_and_oldest_first():
    tree = tree_of()
    prompt = tree.insert(NO_NODE, [0])
    old, new = step(tree, prompt, [1]), step(tree, prompt, [2])
    below_old = step(tree, old, [3])
    tree.drop(prompt)
    tree.find(prompt, [2])
    gone = []
    while tree.evict(1):
        for node in {prompt, old, new, below_old} - set(gone):
            try:
                tree.num_tokens(node)
            except ValueError:
                gone.append(node)
    assert gone == [below_old, old, new, prompt]


def test_a_used_leaf_outlives_one_that_was_not():
    tree = tree_of()
    first, second = tree.insert(NO_NODE, [1]), tree.insert(NO_NODE, [2])
    tree.drop(first)
    tree.drop(second)
    assert tree.find(NO_NODE, [1]) == first
    assert tree.evict(1) == 1
    assert tree.find(NO_NODE, [1]) == first and tree.find(NO_NODE, [2]) == NO_NODE


def test_a_pinned_path_is_never_evicted():
    tree = tree_of(num_blocks=4)
    prompt = tree.insert(NO_NODE, [1])
    middle = step(tree, prompt, [2])
    tip = step(tree, middle, [3])
    lease = tree.lease(tip)
    tree.drop(prompt)
    assert tree.evict_all() == 0
    assert tree.extend(lease, 4) and not tree.extend(lease, 1)
    assert [tree.parent(node) for node in (tip, middle, prompt)] == [middle, prompt, NO_NODE]
    tree.release(lease)
    assert tree.counts() == (1, 0, 0, 3)
    assert tree.evict_all() == 3


def test_an_idle_parent_survives_the_room_made_for_its_child():
    tree = tree_of(num_blocks=2)
    prompt, other = tree.insert(NO_NODE, [1]), tree.insert(NO_NODE, [2])
    tree.drop(prompt)
    tree.drop(other)
    child = tree.insert(prompt, [3])
    assert tree.parent(child) == prompt and tree.find(NO_NODE, [2]) == NO_NODE


def test_sealing_a_duplicate_returns_its_twin_and_frees_the_lease():
    tree = tree_of()
    prompt = tree.insert(NO_NODE, [0])
    first, second = tree.lease(prompt), tree.lease(prompt)
    assert tree.extend_many([first, second], 9) == 2
    node = tree.seal(first, [5, 6, 7, 8, 9], 4)
    assert tree.counts() == (2, 3, 3, 0)
    assert tree.seal(second, [5, 6, 7, 8, 9], 5) == node
    assert tree.computed(node) == 4
    assert tree.counts() == (5, 0, 3, 0)
    tree.drop(node)
    assert tree.counts().idle == 0
    tree.drop(node)
    assert tree.counts().idle == 2
    with pytest.raises(ValueError, match="stale lease"):
        tree.seal(second, [5], 0)


def test_insert_fails_cleanly_when_everything_is_pinned():
    tree = tree_of(num_blocks=2)
    prompt = tree.insert(NO_NODE, [1, 2, 3])
    before = tree.counts()
    assert tree.insert(prompt, list(range(5))) == NO_NODE
    assert tree.insert(NO_NODE, list(range(5))) == NO_NODE
    assert tree.counts() == before
    tree.check()


def test_a_smaller_pool_evicts_no_more_than_it_must_and_moves_what_lies_beyond_it():
    tree = tree_of(num_blocks=8)
    old, new = tree.insert(NO_NODE, [1]), tree.insert(NO_NODE, [2])
    lease = tree.lease(new)
    assert tree.extend(lease, 4 * 6)
    tree.release(lease)
    lease = tree.lease(new)
    assert tree.extend(lease, 4 * 3)
    tree.drop(old)
    assert tree.resize(3) is None and tree.num_blocks == 8
    moves = tree.resize(4)
    assert tree.num_blocks == 4 and tree.counts() == (0, 3, 1, 0) and tree.find(NO_NODE, [1]) == NO_NODE
    assert tree.evicted == 1 and (moves[:, 0] >= 4).all() and moves[:, 1].tolist() != [] and tree.extent == 4
    assert not tree.extend(lease, 1)
    assert tree.resize(6).shape == (0, 2) and tree.extend(lease, 8)
    tree.check()


@pytest.mark.parametrize("num_blocks", [0, -1, 1 << 31])
def test_a_pool_of_no_size_is_refused_and_nothing_changes(num_blocks):
    tree = tree_of()
    with pytest.raises(ValueError, match="blocks"):
        tree.resize(num_blocks)
    assert tree.num_blocks == 8


def test_what_cannot_fit_evicts_nothing():
    tree = tree_of(num_blocks=3)
    idle = tree.insert(NO_NODE, [1])
    tree.drop(idle)
    assert tree.insert(NO_NODE, range(13)) == NO_NODE
    assert tree.find(NO_NODE, [1]) == idle


@pytest.mark.parametrize(
    "misuse",
    [
        lambda tree, node, lease: tree.seal(lease, [1, 2, 3, 4], 0),
        lambda tree, node, lease: tree.seal(lease, [1], 2),
        lambda tree, node, lease: tree.keep(lease, [1, 2, 3, 4], 5),
        lambda tree, node, lease: tree.set_computed(node, 6),
        lambda tree, node, lease: tree.extend(lease, -1),
        lambda tree, node, lease: tree.context_slots([node], [False], [6]),
        lambda tree, node, lease: tree.context_slots([lease], [True], [3], np.zeros((1, 2), np.int32)),
        lambda tree, node, lease: tree.context_slots([lease], [True], [3], np.zeros((1, 3), np.int64)),
        lambda tree, node, lease: tree.context_slots([lease], [True, False], [3]),
        lambda tree, node, lease: tree.write_slots([node], [False], [3], [3]),
        lambda tree, node, lease: tree.write_slots([node], [False], [-1], [1]),
        lambda tree, node, lease: tree.write_slots([node], [False], [0], [2], np.zeros(3, np.int64)),
        lambda tree, node, lease: tree.fork(node),
        lambda tree, node, lease: KVTree(num_blocks=0, block_size=4),
        lambda tree, node, lease: KVTree(num_blocks=1 << 30, block_size=4),
    ],
)
def test_misuse_is_refused_with_numbers_and_changes_nothing(misuse):
    tree = tree_of()
    node = tree.insert(NO_NODE, [1, 2, 3, 4, 5])
    lease = tree.lease(node)
    assert tree.extend(lease, 3)
    before = tree.counts()
    with pytest.raises(ValueError, match=r"\d"):
        misuse(tree, node, lease)
    assert tree.counts() == before
    tree.check()


@pytest.mark.parametrize("size", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 123])
@pytest.mark.parametrize("is_lease", [False, True])
def test_context_slots_cover_a_path_of_odd_sizes_and_are_zero_beyond(size, is_lease):
    tree = tree_of(num_blocks=200)
    prompt = tree.insert(NO_NODE, range(7))
    middle = step(tree, prompt, range(size))
    lease = tree.lease(middle)
    assert tree.extend(lease, size)
    row = lease if is_lease else tree.seal(lease, range(size), size)
    chain = [(prompt, False, 7), (middle, False, size), (row, is_lease, size)]
    ref = tree.write_slots(*zip(*[(node, flag, 0, count) for node, flag, count in chain], strict=True))
    for length in {0, 1, 7, 7 + size, 7 + 2 * size - 1, 7 + 2 * size}:
        out = np.full((2, 7 + 2 * size + 5), 0x5A5A5A5A, np.int32)
        tree.context_slots([row, prompt], [is_lease, False], [length, 7], out)
        assert out[0, :length].tolist() == ref[:length].tolist() and not out[0, length:].any()
        assert out[1, :7].tolist() == ref[:7].tolist() and not out[1, 7:].any()


def test_runs_are_laid_out_on_the_paths_they_continue():
    tree = tree_of(num_blocks=20)
    prompt = tree.insert(NO_NODE, range(7))
    middle = step(tree, prompt, range(5))
    lease = tree.lease(middle)
    assert tree.extend(lease, 6)
    given = [[middle, lease, prompt, lease], [False, True, False, True], [1, 2, 0, 0], [4, 3, 7, 0], [7, 12, 0, 12]]
    columns = [np.array(column, dtype) for column, dtype in zip(given, (np.int64, bool, np.int32, np.int32, np.int32), strict=True)]
    places = tree.lay_out(*columns)
    assert places.row_starts.tolist() == [0, 4, 7, 14, 14]
    assert places.ends.tolist() == [5, 5, 7, 0] and places.context_lens.tolist() == [12, 17, 7, 12]
    assert places.positions.tolist() == [*range(8, 12), *range(14, 17), *range(7)]
    assert places.write_slots.tolist() == tree.write_slots(*columns[:4]).tolist()
    with pytest.raises(ValueError, match="asks for tokens 5 to 9 of 6"):
        tree.lay_out(*(column[1:2] for column in (*columns[:2], columns[2] + 3, columns[3] + 1, columns[4])))


def test_slots_are_block_times_size_plus_offset_and_no_two_tokens_share_one():
    tree = tree_of()
    first, second = tree.insert(NO_NODE, range(6)), tree.insert(NO_NODE, range(1, 7))
    out = tree.write_slots([first, second, first], [False] * 3, [0, 0, 2], [6, 6, 3])
    assert out.dtype == np.int64 and len(set(out[:12])) == 12
    assert (out[:4] - out[0]).tolist() == [0, 1, 2, 3] and out[0] % 4 == 0 and out[4] % 4 == 0
    assert out[12:].tolist() == out[2:5].tolist()


def test_more_than_a_shrunken_pool_can_ever_hold_is_no_room_rather_than_an_error():
    tree = KVTree(num_blocks=4, block_size=4)
    lease = tree.lease(tree.insert(NO_NODE, [1, 2, 3]))
    tree.resize(2)
    assert not tree.extend(lease, 9) and tree.extend_many([lease], 9) == 0
    tree.resize(4)
    assert tree.extend(lease, 9)
