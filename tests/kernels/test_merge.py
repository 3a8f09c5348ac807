"""Partial results put together, against one softmax over all keys."""

import pytest
import torch

from tts_kernels.merge import merge


@pytest.mark.parametrize("heads", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parts_become_the_whole(heads, dtype):
    gen = torch.Generator().manual_seed(heads)
    queries, parts, dim = 5, 4, 16
    scores = 9 * torch.randn(queries, heads, parts, 6, generator=gen)
    scores[:, :, 2] = -torch.inf  # a part without keys
    scores[1] = -torch.inf  # and a query without any
    values = torch.randn(heads, parts, 6, dim, generator=gen)
    weights = scores.softmax(-1).nan_to_num()
    # Parts lie in the table as the planner leaves them: part by part, query by query, after three places of nobody.
    partial = torch.full((3 + queries * parts, heads, dim), torch.nan)
    lse = torch.full((3 + queries * parts, heads), torch.nan)
    places = torch.randperm(parts, generator=gen) * queries + 3
    for part, place in enumerate(places.tolist()):
        partial[place : place + queries] = torch.einsum("qhk,hkd->qhd", weights[:, :, part], values[:, part])
        lse[place : place + queries] = scores[:, :, part].logsumexp(-1) / torch.tensor(2.0).log()
    out = torch.full((queries + 2, heads, dim), 7.0, dtype=dtype)
    order = torch.tensor([9, 6, 0, 3, 2, 4], dtype=torch.int32)  # queries 1 to 5 are tokens 6, 0, 3, 2 and 4
    merges = torch.tensor([*([1 + i, i, 0, parts] for i in range(queries)), [9, 9, 9, 9]], dtype=torch.int32)
    merge(partial, lse, out, order, merges, places.int(), torch.tensor([0, queries], dtype=torch.int32), num_programs=2)
    whole = scores.flatten(2).softmax(-1).nan_to_num()
    expected = torch.einsum("qhk,hkd->qhd", whole, values.flatten(1, 2))
    torch.testing.assert_close(out[order[1:]].float(), expected, atol=1e-6 if dtype == torch.float32 else 2e-3, rtol=1e-5)
    assert (out[[1, 5]] == 7).all() and not out[0].any()  # tokens 1 and 5 are nobody's


def test_a_part_that_saw_nothing_changes_no_bit():
    partial, lse = torch.randn(2, 3, 16), torch.randn(2, 3)
    partial[1], lse[1] = 0, -torch.inf
    for slots in ([0, 1], [1, 0]):
        out = torch.empty(1, 3, 16)
        order, merges, counts = (torch.tensor(x, dtype=torch.int32) for x in ([0], [[0, 0, 0, 2]], [0, 1]))
        merge(partial, lse, out, order, merges, torch.tensor(slots, dtype=torch.int32), counts, num_programs=1)
        assert torch.equal(out[0], partial[0])
