"""The other kernels checked, against float64 and against definitions; and all of them where addresses need more than 32 bits."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tts_engine.attention.triton_tree import TritonTreeAttention
from tts_engine.models.ops import LEAST_PEAK, TorchOps
from tts_engine.sampling import Sampling, log_probabilities, philox_key, sample_slowly
from tts_kernels import advance, fp8_rows, lm_head_sample, merge, prm_score, rms_norm, sample, store_kv, swiglu

from .plans import Case, poisoned
from .setting import Bench, most_off, near
from .trees import BLOCK, planted, random_grove

EPSILON = 1e-5
TOKENS = 37
SAMPLINGS = (
    Sampling(temperature=0.7),
    Sampling(temperature=0.0),
    Sampling(temperature=1.3, top_k=20),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=0.9, min_p=0.02),
    Sampling(temperature=1.1, top_k=50, top_p=0.8, min_p=0.01),
)


def kernels(bench: Bench) -> None:
    for dtype in bench.sizes.checked:
        name = str(dtype).removeprefix("torch.")
        for shape in bench.sizes.heads.values():
            told = f"{shape[0]}/{shape[1]} of {shape[2]}, {name}"
            bench.check(f"merge, {told}", partial(_merge, bench, shape, dtype))
            bench.check(f"store_kv, {told}", partial(_store_kv, bench, shape, dtype))
            width = shape[0] * shape[2]
            bench.check(f"rms_norm, {width} {name}", partial(_rms_norm, bench, (width,), dtype))
            bench.check(f"rms_norm of heads, {told}", partial(_rms_norm, bench, shape[::2], dtype))
            bench.check(f"prm_score, {width} {name}", partial(_prm_score, bench, width, dtype))
        bench.check(f"swiglu, {name}", partial(_swiglu, bench, dtype))
        bench.check(f"fp8_rows, {name}", partial(_fp8_rows, bench, dtype))
        bench.check(f"sample, {name}", partial(_sample, bench, dtype))
        bench.check(f"lm_head_sample, {name}", partial(_lm_head_sample, bench, dtype))
    for counts in (False, True):
        bench.check(f"advance, {'drawn lengths' if counts else 'markers'}", partial(_advance, bench, counts))
    bench.settle()


def normal(bench: Bench, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=bench.generator(seed), device=bench.device).to(dtype)


def _merge(bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Some tokens are sums of up to five parts, some of which saw no key; the others are not to be touched."""
    heads, _, dim = shape
    rng, parts = np.random.default_rng(0), 40
    partials, lse = normal(bench, parts, heads, dim), 3 * normal(bench, parts, heads, seed=1)
    lse[::7] = -torch.inf
    partials[::7] = 0.0
    counts = rng.integers(1, 6, TOKENS // 2)
    slots = [rng.permutation(parts - 3)[:count] for count in counts]
    offsets, firsts = rng.integers(0, 3, len(counts)), np.cumsum(counts) - counts
    table = np.column_stack([np.arange(len(counts)), offsets, firsts, counts])
    order = rng.permutation(TOKENS)
    given = [torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(bench.device)
             for x in (order, table, np.concatenate(slots), [0, len(counts)])]  # fmt: skip
    out = torch.full((TOKENS, heads, dim), -7.0, dtype=dtype, device=bench.device)
    merge.merge(partials, lse, out, *given, num_programs=7)
    tokens = torch.from_numpy(order[: len(counts)]).to(bench.device)
    at = [torch.from_numpy(own + offset).to(bench.device) for own, offset in zip(slots, offsets, strict=True)]

    def summed(wide: torch.dtype) -> Tensor:
        weights = [(lse[own].to(wide) * np.log(2.0)).softmax(0).nan_to_num(0.0) for own in at]
        return torch.stack([(partials[own].to(wide) * weight[..., None]).sum(0) for own, weight in zip(at, weights, strict=True)])

    untouched = torch.ones(TOKENS, dtype=torch.bool, device=bench.device)
    untouched[tokens] = False
    assert bool((out[untouched] == -7.0).all()), "a token that nothing is merged for was written"
    return near(out[tokens], summed(torch.float64), summed(torch.float32).to(dtype), most_off(dtype))


def _store_kv(bench: Bench, shape: tuple[int, int, int], dtype: torch.dtype, first: int = 0, slots: int = 200) -> dict[str, Any]:
    heads, kv_heads, dim = shape
    qkv = normal(bench, TOKENS, heads + 2 * kv_heads, dim, dtype=dtype)
    angles, weight = 9 * normal(bench, TOKENS, dim // 2), normal(bench, heads + kv_heads, dim, dtype=dtype, seed=1)
    caches = [torch.full((slots, kv_heads, dim), -7.0, dtype=dtype, device=bench.device) for _ in "kv"]
    to = first + torch.randperm(slots - first, generator=bench.generator(), device=bench.device)[:TOKENS]
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat((low * c - high * s, high * c + low * s), -1)

    told: dict[str, Any] = {}
    for norm in (None, weight):
        x = qkv[:, : heads + kv_heads]
        x = x if norm is None else TorchOps().norm(x, norm, EPSILON)
        with poisoned():
            q = store_kv.store_kv(qkv, cos, sin, to, *caches, norm=norm, epsilon=EPSILON)
        got = torch.cat((q, caches[0][to]), 1)
        told = near(got, turned(x.double()), turned(x.float()).to(dtype), 3 * most_off(dtype))
        assert torch.equal(caches[1][to], qkv[:, heads + kv_heads :]), "values are not stored as they are"
    for cache in caches:
        cache[to] = -7.0
        assert all(bool((part == -7.0).all()) for part in cache.split(1 << 18)), "a slot was written that is nobody's"
    return told


def _rms_norm(bench: Bench, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    x = 3 * normal(bench, TOKENS, *[2 * shape[0], *shape[1:]], dtype=dtype)[:, : shape[0]]  # a slice, as of a wider matrix
    weight = normal(bench, *shape, dtype=dtype, seed=1)
    with poisoned():
        got = rms_norm.rms_norm(x, weight, EPSILON)
    wide = x.double()
    exact = weight.double() * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON))
    return near(got, exact, TorchOps().norm(x, weight, EPSILON), most_off(dtype))


def _swiglu(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    x = 2 * normal(bench, TOKENS, 2 * bench.sizes.policy["intermediate_size"], dtype=dtype)
    with poisoned():
        got = swiglu.swiglu(x)
    gate, up = x.double().chunk(2, -1)
    return near(got, F.silu(gate) * up, TorchOps().swiglu(x), most_off(dtype))


def _fp8_rows(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    x = normal(bench, TOKENS, bench.sizes.policy["intermediate_size"], dtype=dtype) * 10.0 ** normal(bench, TOKENS, 1, seed=1)
    x = x.to(dtype)
    x[3] = 0.0
    with poisoned():
        got, scales = fp8_rows.fp8_rows(x, LEAST_PEAK)
    expected, expected_scales = TorchOps().fp8_rows(x)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0.0)
    away = (got.float() - expected.float()).abs() > 0.0
    apart = (got.float() - expected.float()).abs() > 0.13 * expected.float().abs() + 2.0**-9
    assert not bool(apart.any()), "a byte is more than one step of e4m3 away"
    return {"other bytes": float(away.float().mean())}


def _prm_score(bench: Bench, width: int, dtype: torch.dtype, tokens: int = TOKENS) -> dict[str, Any]:
    """Rows that no score is read from are NaN; pairs behind the norm, and the tail of two classes."""
    x = torch.full((tokens, width), torch.nan, dtype=dtype, device=bench.device)
    at = torch.randperm(TOKENS, generator=bench.generator(), device=bench.device)[:9] + tokens - TOKENS
    x[at] = 3 * normal(bench, 9, width, dtype=dtype)
    norm, direction = normal(bench, width, dtype=dtype, seed=1), normal(bench, width, seed=2) / width**0.5
    hidden = TorchOps().norm(x[at], norm, EPSILON).double()
    with poisoned():
        pair = prm_score.prm_score(x, at, direction, norm=norm, epsilon=EPSILON)
        tail = prm_score.prm_score(x, at, direction, offset=0.3, relu=True)
    exact = torch.sigmoid((hidden * direction.double()).sum(-1))
    worst = float((pair.double() - exact).abs().max())
    exact = torch.sigmoid((x[at].double().relu() * direction.double()).sum(-1) + 0.3)
    worst = max(worst, float((tail.double() - exact).abs().max()))
    bound = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert worst <= bound, f"a score is off by {worst:.3g}, {bound:.3g} allowed"
    return {"worst": worst}


def _draws(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """keys, identities and positions of draws, their bits all over the range."""
    rng = np.random.default_rng(0)
    keys = np.array([philox_key(i, f"p{i}") for i in range(count)], np.uint32)
    return keys, rng.integers(0, 2**64, count, np.uint64, endpoint=False), rng.integers(0, 5000, count)


def _on_device(bench: Bench, rows: np.ndarray, given: tuple[np.ndarray, ...]) -> list[Tensor]:
    keys, identities, positions = given
    return [torch.from_numpy(x).to(bench.device) for x in (rows, keys.view(np.int32), identities.view(np.int64), positions)]


def _settings(bench: Bench, count: int) -> tuple[list[Sampling], list[Tensor]]:
    """A kind of sampling for each draw, and the kernel's columns of them."""
    kinds = [SAMPLINGS[i % len(SAMPLINGS)] for i in range(count)]
    columns = (("temperature", torch.float32), ("top_k", torch.int32), ("top_p", torch.float32), ("min_p", torch.float32))
    return kinds, [torch.tensor([getattr(kind, name) for kind in kinds], dtype=dtype, device=bench.device)
                   for name, dtype in columns]  # fmt: skip


def _sample(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    """One launch with all kinds of sampling side by side: the definition's tokens, to the last one."""
    count, vocab = bench.sizes.draws, bench.sizes.vocab
    logits = 3 * normal(bench, max(2, count // 2), vocab, dtype=dtype)
    logits[1, : vocab // 2] = -torch.inf
    rows, given = np.random.default_rng(1).integers(0, len(logits), count), _draws(count)
    kinds, columns = _settings(bench, count)
    logprobs = torch.empty(count, device=bench.device)
    with poisoned():
        got = sample.sample(logits, *_on_device(bench, rows, given), *columns, logprobs=logprobs).cpu().numpy()
    wide = logits.float().cpu()
    expected = np.array([sample_slowly(wide, rows[i : i + 1], kinds[i], *(column[i : i + 1] for column in given))[0]
                         for i in range(count)])  # fmt: skip
    assert got.tolist() == expected.tolist(), f"draws {np.flatnonzero(got != expected).tolist()} of {count} are other tokens"
    known = log_probabilities(wide, rows, expected)
    worst = float(np.abs(logprobs.cpu().numpy() - known).max())
    assert worst <= 1e-4, f"a log-probability is off by {worst:.3g}"
    return {"draws": count, "worst logprob": worst}


def _lm_head_sample(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens behind logits that nobody wrote: the definition's, or one that a logit's last bit decides."""
    count, vocab, width = bench.sizes.draws, bench.sizes.vocab, bench.sizes.policy["hidden_size"]
    hidden, weight = normal(bench, count, width, dtype=dtype), (2 * normal(bench, vocab, width, seed=1) / width**0.5).to(dtype)
    rows, given = np.random.default_rng(1).integers(0, count, count), _draws(count)
    temperatures = [0.0 if i % 5 == 0 else 0.9 for i in range(count)]
    column = torch.tensor(temperatures, device=bench.device)
    with poisoned():
        got = lm_head_sample.lm_head_sample(hidden, weight, *_on_device(bench, rows, given), column).cpu().numpy()
    logits = torch.cat([hidden.double() @ part.double().T for part in weight.split(8192)], 1).to(dtype).float().cpu()
    other = 0
    for i, temperature in enumerate(temperatures):
        kind, own = Sampling(temperature=temperature), [column[i : i + 1] for column in given]
        [expected] = sample_slowly(logits, rows[i : i + 1], kind, *own)
        if got[i] != expected:
            raised = logits[rows[i]].clone()
            raised[got[i]] += 2 * torch.finfo(dtype).eps * raised.abs().max()
            [second] = sample_slowly(raised[None], np.zeros(1, np.int64), kind, *own)
            assert second == got[i], f"draw {i} is token {got[i]}, not {expected}, and no rounding makes it so"
            other += 1
    assert other <= max(1, count // 10), f"{other} of {count} draws are other tokens"
    return {"draws": count, "decided by rounding": other}


def _advance(bench: Bench, counts: bool) -> dict[str, Any]:
    """The end of some ticks, row by row."""
    rng, rows, ticks, vocab, states, last = np.random.default_rng(counts), 300, 5, 50, 6, 2
    slots = rng.permutation((ticks + 1) * rows).reshape(ticks + 1, rows)
    position = rng.integers(0, 1000, rows)
    host: dict[str, np.ndarray] = {
        "token": rng.integers(0, vocab, rows), "position": position, "next_position": position + 1, "slot": slots[0].copy(),
        "slots": slots, "state": rng.choice([0, 3, 4, 5], rows).astype(np.int32),
        "room": rng.integers(1, 2 * ticks, rows).astype(np.int32), "grown": np.zeros(rows, np.int32),
        "drawn": np.zeros(rows, np.int32), "stop": np.where(rng.random(rows) < 0.2, advance.NOBODY, 0).astype(np.int32),
        "tokens": np.full((ticks, rows), -1, np.int32),
    }  # fmt: skip
    after, ends = rng.integers(0, states, (states, vocab)).astype(np.uint8), (np.arange(vocab) == 3).astype(np.uint8)
    device = advance.Rows(**{name: torch.from_numpy(column.copy()).to(bench.device) for name, column in host.items()})
    for _ in range(ticks):
        new = np.where(rng.random(rows) < 0.03, -1, rng.integers(0, vocab, rows))
        given = [torch.from_numpy(x).to(bench.device) for x in (new, after, ends)]
        advance.advance(device, given[0], None if counts else given[1], given[2], last_state=last)
        live = np.flatnonzero(host["stop"] == 0)
        token = np.maximum(new[live], 0)
        host["tokens"][host["drawn"][live], live] = new[live]
        host["drawn"][live] += 1
        host["room"][live] -= 1
        before = host["state"][live]
        host["state"][live] = np.maximum(before - 1, last) if counts else after[before, token]
        reasons = ((ends[token] > 0, advance.ENDED), (host["state"][live] == last, advance.CLOSED),
                   (host["room"][live] <= 0, advance.CUT), (new[live] < 0, advance.FAULT))  # fmt: skip
        host["stop"][live] = sum(holds * reason for holds, reason in reasons)
        on, off = live[host["stop"][live] == 0], live[host["stop"][live] > 0]
        host["token"][on] = new[on]
        host["slot"][on] = slots[host["drawn"][on], on]
        for name in ("position", "next_position", "grown"):
            host[name][on] += 1
        host["slot"][off], host["grown"][off] = slots[-1, off], advance.STOPPED
    wrong = [name for name, column in host.items() if not np.array_equal(getattr(device, name).cpu().numpy(), column)]
    assert not wrong, f"{', '.join(wrong)} are not what the definition says"
    return {"rows": rows, "ticks": ticks}


def large(bench: Bench) -> None:
    """Pools, logits and hidden states of more elements than 32 bits count, used at their far end."""
    shape, dtype = (*bench.sizes.heads.values(),)[-1], bench.sizes.dtype
    slots = -(-bench.sizes.pool // (shape[1] * shape[2])) // BLOCK * BLOCK
    bench.check("store_kv", partial(_store_kv, bench, shape, dtype, slots - 64, slots))
    bench.check("tree attention", partial(_far_attention, bench, shape, slots))
    bench.check("sample", partial(_far_sample, bench))
    width = bench.sizes.policy["hidden_size"]
    bench.check("prm_score", partial(_prm_score, bench, width, dtype, TOKENS + bench.sizes.pool // width))
    bench.settle()


def _far_attention(bench: Bench, shape: tuple[int, int, int], slots: int) -> dict[str, Any]:
    near_end = random_grove(0, bench.sizes.nodes, bench.sizes.longest)
    grove = planted(near_end.parents, near_end.lens, near_end.rows, near_end.new, first=slots - near_end.num_slots)
    case = Case(bench, grove, shape, bench.sizes.dtype, num_slots=slots)
    backend = TritonTreeAttention(bench.device)
    with poisoned():
        return case.judged(backend.run(case.q, None, None, case.cache, 0, backend.plan(case.layout)))


def _far_sample(bench: Bench) -> dict[str, Any]:
    vocab, count = bench.sizes.vocab, 3
    logits = torch.full((-(-bench.sizes.pool // vocab) + count, vocab), torch.nan, dtype=bench.sizes.dtype, device=bench.device)
    logits[-count:] = 3 * normal(bench, count, vocab, dtype=bench.sizes.dtype)
    rows, given = np.arange(len(logits) - count, len(logits)), _draws(count)
    temperatures = torch.full((count,), 0.8, device=bench.device)
    got = sample.sample(logits, *_on_device(bench, rows, given), temperatures).cpu()
    expected = sample_slowly(logits[-count:].float().cpu(), np.arange(count), Sampling(temperature=0.8), *given)
    assert got.tolist() == expected.tolist(), f"tokens {got.tolist()} instead of {expected.tolist()}"
    return {"elements": logits.numel()}
