"""Runs over nodes and leases against transformers; holding paths; what a branch may need."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_engine.attention import make_backend
from tts_engine.kv.tree import NO_NODE, blocks_needed
from tts_engine.ledger import ModelLedger, Work
from tts_engine.models.weights import load_decoder
from tts_engine.runner import ModelRunner, Segments
from tts_engine.testing import ChainDecoder, check_blocks, random_policy_directory, tiny_spec


def runner(num_blocks: int = 32, block_size: int = 4) -> ModelRunner:
    return ModelRunner(ChainDecoder(tiny_spec(), {}), make_backend("reference"), num_blocks=num_blocks, block_size=block_size)


@pytest.mark.parametrize("backend", ["reference", "per_branch", "native"])
def test_a_prompt_its_steps_and_open_leases_in_one_forward_give_transformers_logits(tmp_path, backend):
    model = random_policy_directory(tmp_path, seed=3)
    out = ModelRunner(load_decoder(tmp_path), make_backend(backend), num_blocks=24, block_size=4)
    out.cache.k[0].fill_(torch.nan)
    prompt, left, right, tail = [7, 8, 9, 10, 11], [12], [13, 14, 15, 16], [17, 18]
    a = out.hold_path([prompt, left])
    b = out.hold_path([prompt, right])
    lease = out.tree.lease(b[1])
    assert a[0] == b[0] and out.tree.extend(lease, 2)
    runs = [(a[0], False, 0, prompt), (a[1], False, 5, left), (b[1], False, 5, right), (lease, True, 9, tail)]
    runs = [runs[i] for i in (3, 1, 0, 2)]  # in any order
    segments = Segments(
        handles=np.array([run[0] for run in runs]),
        is_lease=np.array([run[1] for run in runs]),
        starts=np.zeros(4, np.int32),
        counts=np.array([len(run[3]) for run in runs], np.int32),
        path_starts=np.array([run[2] for run in runs], np.int32),
        token_ids=np.concatenate([run[3] for run in runs]),
    )
    hidden = out.forward(segments, np.arange(12))
    with torch.no_grad():
        ref_left = model(torch.tensor([prompt + left])).logits[0]
        ref_right = model(torch.tensor([prompt + right + tail])).logits[0]
    ref = torch.cat([ref_right[9:], ref_left[5:], ref_left[:5], ref_right[5:9]])
    assert (out.decoder.logits(hidden) - ref).abs().max() <= 1e-4 * ref.abs().max()


def test_a_held_path_is_made_once_and_only_its_last_node_is_held():
    out = runner()
    nodes = out.hold_path([[1, 2, 3], [4], [5, 6]])
    assert out.hold_path([[1, 2, 3], [4], [5, 6]]) == nodes
    assert [out.tree.parent(node) for node in nodes] == [NO_NODE, *nodes[:2]]
    assert check_blocks(out.tree).pinned == 3
    for node in nodes[:2]:
        with pytest.raises(ValueError):
            out.tree.drop(node)
    out.tree.drop(nodes[2])
    out.tree.drop(nodes[2])
    assert check_blocks(out.tree).idle == 3


def test_a_path_without_room_holds_nothing():
    out = runner(num_blocks=3)
    kept = out.hold_path([[1]])
    assert out.hold_path([[2], [3], [4]]) is None
    out.tree.drop(kept[0])
    assert check_blocks(out.tree).pinned == 0
    assert out.hold_path([[2], [3], [4]]) is not None


def test_an_evicted_path_comes_back_uncomputed():
    out = runner()
    nodes = out.hold_path([[1, 2], [3]])
    for node, count in zip(nodes, (2, 1), strict=True):
        out.tree.set_computed(node, count)
    out.tree.drop(nodes[1])
    out.tree.evict_all()
    again = out.hold_path([[1, 2], [3]])
    assert [out.tree.computed(node) for node in again] == [0, 0]


def test_flops_of_a_run_are_two_a_weight_and_four_a_pair_and_head_unit():
    """And for a token that is not read, the last layer's are those of its key and value."""
    ledger, keys_and_values = ModelLedger(), 8 * 2 * 4  # two heads of 4
    layer = 8 * 8 + keys_and_values + 8 * 8 + 3 * 8 * 10  # queries, out, gate, up and down
    runner().charge(ledger, Work(tokens=5, pairs=15), head_flops=0)
    assert (ledger.linear_flops, ledger.attention_flops) == (5 * 2 * (2 * layer + keys_and_values), 15 * 4 * 8 * 2)
    runner().charge(ledger, Work(reads=5, read_pairs=15), head_flops=0)
    assert (ledger.tokens_computed, ledger.linear_flops, ledger.attention_flops) == (5, 5 * 2 * 3 * layer, 15 * 4 * 8 * 3)
    runner().charge(ledger, Work(reads=2), head_flops=1000)
    assert ledger.head_flops == 2 * 1000
    assert ledger.flops == ledger.linear_flops + ledger.attention_flops + ledger.head_flops


@settings(max_examples=60, deadline=None)
@given(prompt=st.integers(1, 9), tokens=st.integers(1, 9), steps=st.integers(1, 4), size=st.integers(1, 5))
def test_a_branch_needs_what_its_worst_division_into_steps_takes(prompt, tokens, steps, size):
    divisions = (d for d in itertools.product(range(tokens + 1), repeat=steps) if sum(d) <= tokens)
    need = blocks_needed(prompt, size) + max(sum(blocks_needed(t, size) for t in d) for d in divisions)
    assert runner(block_size=size).blocks_for_branch(prompt, tokens, steps) == need


# Another size of its pool.


def chain_of(out: ModelRunner, steps):
    """A path, computed step by step; its nodes, the last one held."""
    nodes = out.hold_path(steps)
    before = 0
    for node, tokens in zip(nodes, steps, strict=True):
        out.forward(segments_of([(node, False, 0, before, tokens)]), np.array([], np.int64))
        out.tree.set_computed(node, len(tokens))
        before += len(tokens)
    return nodes


def segments_of(runs) -> Segments:
    """(handle, is lease, tokens written of it, tokens before it, new tokens) each."""
    return Segments(
        handles=np.array([run[0] for run in runs]),
        is_lease=np.array([run[1] for run in runs]),
        starts=np.array([run[2] for run in runs], np.int32),
        counts=np.array([len(run[4]) for run in runs], np.int32),
        path_starts=np.array([run[3] for run in runs], np.int32),
        token_ids=np.concatenate([run[4] for run in runs]),
    )


@pytest.mark.parametrize("backend", ["reference", "per_branch", "native"])
def test_a_lease_reads_the_same_path_after_every_change_of_size(tmp_path, backend):
    """Token by token, so that a backend that keeps its plan has one to keep."""
    model = random_policy_directory(tmp_path, seed=3)
    out = ModelRunner(load_decoder(tmp_path), make_backend(backend), num_blocks=40, block_size=4)
    for table in out.cache.tables:
        table.fill_(torch.nan)
    junk = out.hold_path([list(range(4 * 20))])[0]  # what lies low, so that the rest lies high
    prompt, step, tail = [7, 8, 9, 10, 11], [13, 14, 15, 16], [17, 18, 19, 20, 21, 22, 23]
    nodes = chain_of(out, [prompt, step])
    out.tree.drop(junk)
    out.tree.evict(20)
    lease, sizes, states = out.tree.lease(nodes[-1]), [40, 9, 9, 30, 5, 6, 40], []
    for i, (token, size) in enumerate(zip(tail, sizes, strict=True)):
        assert out.tree.extend(lease, 1) and out.resize(size) and out.tree.num_blocks == out.cache.num_blocks == size
        states.append(out.forward(segments_of([(lease, True, i, 9, [token])]), np.array([0])))
        check_blocks(out.tree)
    with torch.no_grad():
        ref = model(torch.tensor([prompt + step + tail])).logits[0, 9:]
    assert (out.decoder.logits(torch.cat(states)) - ref).abs().max() <= 1e-4 * ref.abs().max()


def test_a_size_that_does_not_fit_or_cannot_be_had_changes_nothing(monkeypatch):
    out = runner(num_blocks=8)
    out.hold_path([[1] * 9])
    idle = out.hold_path([[2] * 9])[0]
    out.tree.drop(idle)
    counts = out.tree.counts()
    assert not out.resize(2) and out.tree.counts() == counts

    def failing(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(out.cache, "_sized", failing)
    assert not out.resize(20) and out.tree.counts() == counts
    assert not out.resize(4) and out.tree.num_blocks == out.cache.num_blocks == 8
    check_blocks(out.tree)
