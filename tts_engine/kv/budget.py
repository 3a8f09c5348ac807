"""One budget of memory: how much of it is for keys and values, and which of two models has how many blocks of that.

The first split is what a roofline model of both phases proposes. From there on it moves with demand, between forwards: to what the
searches under way are expected to come to, and a part at a time where one model is short of room all the same and the other has
blocks that nobody needs now. A model never has fewer blocks than the searches under way may need for one branch each, so results do
not depend on any of it. Knows bytes and pools of blocks, neither models nor tensors.

On a CPU memory is taken as it is written: the budget there is what both models' keys and values may come to, not what they take
from the start.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from ..errors import EngineError, OutOfBlocks

if TYPE_CHECKING:
    from .tree import KVTree

PARTS = 16  # of the budget; one of them changes hands at a time
PATIENCE = 64  # looks at a policy that is not short before the PRM may take; twice as many each time that it was too soon
# What the roofline model takes for granted. A path of so many tokens, the newest step so many of them.
PATH_TOKENS, STEP_TOKENS = 1000, 100
BALANCE = {"cpu": 20, "cuda": 180}  # by kind of device: FLOPs that it does while it reads one byte of memory

BYTE_UNITS = {"": 1} | {unit: 1024**i for i, unit in enumerate("KMG", 1)}
BYTE_UNITS |= {f"{unit}{end}": base**i for i, unit in enumerate("KMGT", 1) for end, base in (("B", 1000), ("IB", 1024))}


def read_bytes(text: str) -> int:
    """K, M and G are powers of 1024, as are KiB to TiB; KB to TB are powers of 1000, as memory is sold. Raises ValueError."""
    read = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text)
    if read is None or read[2].upper() not in BYTE_UNITS:
        raise ValueError(text)
    return int(Fraction(read[1]) * BYTE_UNITS[read[2].upper()])


def read_memory(memory: int | str, whole: Callable[[], int]) -> int:
    """Bytes: a number of them, "20GB", or a share like "80%" of `whole`. Raises EngineError."""
    share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", str(memory))
    try:
        num_bytes = int(Fraction(share[1]) / 100 * whole()) if share else read_bytes(str(memory))
    except ValueError:
        num_bytes = 0
    if num_bytes < 1 or (share is not None and Fraction(share[1]) > 100):
        raise EngineError(f"memory={memory!r} is neither a size such as 20GB nor a share of the device such as 80%")
    return num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """One model as the roofline knows it."""

    weight_bytes: int
    token_flops: int  # through its layers
    token_bytes: int  # of keys and values


def proposed(policy: Costs, prm: Costs, num_bytes: int, *, max_rows: int, balance: int) -> int:
    """The policy's bytes of the budget with which a token is drawn and scored soonest.

    Rows wait for memory or for arithmetic, whichever is slower; the more the policy's blocks have room for, the fewer bytes of
    weights a token waits for. A step is read by the PRM with as much of the path above it as is no longer there.
    """

    def flops_passed(policy_bytes: int) -> float:  # while a token is drawn and scored: time, in what the device might have computed
        rows = min(max(policy_bytes // policy.token_bytes // STEP_TOKENS, 1), max_rows)
        read = policy.weight_bytes + rows * PATH_TOKENS * policy.token_bytes
        drawn = max(policy.token_flops, read / rows * balance)
        kept = min((num_bytes - policy_bytes) // prm.token_bytes, rows * STEP_TOKENS) / (rows * STEP_TOKENS)
        return drawn + prm.token_flops * (1 + (1 - kept) * PATH_TOKENS / STEP_TOKENS)

    return min((num_bytes * part // PARTS for part in range(1, PARTS)), key=flops_passed)


class Pool(Protocol):
    """Blocks of one model."""

    tree: "KVTree"
    tokens_recomputed: int  # so far, after they were evicted

    @property
    def block_bytes(self) -> int: ...

    def resize(self, num_blocks: int) -> bool: ...


def divide(num_bytes: int, first_bytes: int, block_bytes: Sequence[int]) -> list[int]:
    """Blocks of each of one or two models, about so many bytes being the first's; one block of each fits."""
    first = max(1, min(first_bytes, num_bytes - sum(block_bytes[1:])) // block_bytes[0])
    return [first, *((num_bytes - first * block_bytes[0]) // other for other in block_bytes[1:])]


class Budget:
    """The split of `num_bytes` between the policy's pool and the PRM's, where there is one."""

    def __init__(self, pools: Sequence[Pool], num_bytes: int, *, at_rest: Callable[[], bool] = lambda: True) -> None:
        """pools: the policy's first, as large as was proposed. at_rest: whether no forward is under way that knows slots."""
        self.pools, self.num_bytes, self.at_rest = pools, num_bytes, at_rest
        self.moves = 0  # of the split
        self._proposed = [pool.tree.num_blocks for pool in pools]
        self._floors = [1 for _ in pools]
        self._expected = list(self._proposed)
        self._seen = [(0, 0) for _ in pools]  # refusals and tokens recomputed at the last look
        self._calm = 0  # looks since the policy was short
        self._patience = PATIENCE
        self._returned = False  # the last move was back to the PRM

    def refuse_unless_fits(self, what: str, needs: Sequence[int], why: str) -> None:
        """Raise OutOfBlocks where pools of so many blocks do not fit beside one another: then no eviction ever helps."""
        if not self._fits(needs):
            size = self.pools[0].tree.block_size
            named = " and ".join(f"{need} for the {model}" for need, model in zip(needs, ("policy", "PRM"), strict=False))
            raise OutOfBlocks(f"{what} may need KV blocks of {size} tokens for a single branch, {named} ({why}): "
                              f"{self._bytes(needs) / 1e6:.1f} MB, and there is room for {self.num_bytes / 1e6:.1f} MB; raise "
                              "kv_bytes or memory, or lower max_tokens, max_step_tokens or max_steps")  # fmt: skip

    def reserve(self, needs: Sequence[Sequence[int]]) -> bool:
        """See that each pool has room for one branch of any of these searches, whatever else is evicted; False where that cannot be
        now. What was reserved before is given up."""
        floors = [max(need) for need in zip(*needs, strict=True)]
        if not self._fits(floors):
            return False
        sizes = [pool.tree.num_blocks for pool in self.pools]
        for taker, (size, floor) in enumerate(zip(sizes, floors, strict=True)):
            if size < floor and not (self.at_rest() and self._give(1 - taker, taker, self._surplus(1 - taker, taker, floor))):
                return False
        self._floors = floors
        return True

    def expect(self, num_bytes: Sequence[int]) -> None:
        """Move the split, as far as that can be now, so that each pool has room for what the searches under way will come to; not
        for less than a part of the budget, as a pool of another size has its price."""
        self._expected = [-(-wanted // pool.block_bytes) for wanted, pool in zip(num_bytes, self.pools, strict=True)]
        if len(self.pools) < 2 or not self.at_rest():
            return
        for giver, taker in ((1, 0), (0, 1)):
            tree, wanted = self.pools[giver].tree, self._expected[taker]
            if wanted > self.pools[taker].tree.num_blocks:
                least = self._blocks_of_part(giver)
                spare = min(tree.num_blocks - max(self._floors[giver], self._expected[giver]), tree.available())
                if spare >= least:
                    self._give(giver, taker, min(max(self._surplus(giver, taker, wanted), least), spare))

    def look(self) -> None:
        """Move the split where a model has been short since the last look: it asked for room and had none, or computed anew what it
        had evicted. Between forwards."""
        if len(self.pools) < 2 or not self.at_rest():
            return
        now = [(pool.tree.refused, pool.tokens_recomputed) for pool in self.pools]
        short, prm_short = (new != old for new, old in zip(now, self._seen, strict=True))
        self._seen = now
        self._calm = 0 if short else self._calm + 1
        if short and self._part(1, keep=max(self._floors[1], min(self._proposed[1], self._expected[1]))):
            self._take_back()
        elif prm_short and self._calm > self._patience:
            self._returned |= self._part(0, keep=self._floors[0])

    def press(self) -> bool:
        """More room for the policy at once, out of the PRM's keys and values, as it would have to preempt a draw otherwise; whether
        there is any."""
        if len(self.pools) < 2 or not self.at_rest():
            return False
        tree = self.pools[1].tree
        count = min(self._blocks_of_part(1), tree.num_blocks - self._floors[1], tree.available())
        if not self._give(1, 0, count):
            return False
        self._take_back()
        return True

    def _take_back(self) -> None:
        """The policy took: what was given back to the PRM before was given too soon."""
        if self._returned:
            self._patience *= 2
        self._returned = False

    def _bytes(self, blocks: Sequence[int]) -> int:
        return sum(count * pool.block_bytes for count, pool in zip(blocks, self.pools, strict=True))

    def _fits(self, blocks: Sequence[int]) -> bool:
        return self._bytes(blocks) <= self.num_bytes

    def _blocks_of_part(self, giver: int) -> int:
        """As many as a part of the budget, and one of the other's, take."""
        least = max(self.num_bytes // PARTS, self.pools[1 - giver].block_bytes)
        return -(-least // self.pools[giver].block_bytes)

    def _surplus(self, giver: int, taker: int, floor: int) -> int:
        """Blocks to be given so that the other has its floor."""
        others = (self.num_bytes - floor * self.pools[taker].block_bytes) // self.pools[giver].block_bytes
        return self.pools[giver].tree.num_blocks - others

    def _part(self, giver: int, keep: int) -> bool:
        """Give a part of the budget to the other, where so many blocks nobody needs now and so many are left."""
        count, tree = self._blocks_of_part(giver), self.pools[giver].tree
        return count <= min(tree.available(), tree.num_blocks - keep) and self._give(giver, 1 - giver, count)

    def _give(self, giver: int, taker: int, count: int) -> bool:
        """Blocks of one model become blocks of the other; False, with nothing changed, where there are none or it cannot be."""
        mine, theirs = self.pools[giver], self.pools[taker]
        before = mine.tree.num_blocks
        rest = before - count
        size = (self.num_bytes - rest * mine.block_bytes) // theirs.block_bytes
        if count < 1 or size <= theirs.tree.num_blocks or not mine.resize(rest):
            return False
        if not theirs.resize(size):
            mine.resize(before)
            return False
        self.moves += 1
        return True
