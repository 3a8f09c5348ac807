"""Against transformers on small random checkpoints, and the promise of deterministic=True."""

import importlib.util
import random
from contextlib import contextmanager

import pytest
import torch

from tts_engine.attention import BACKENDS, make_backend
from tts_engine.models import linear
from tts_engine.models.ops import TritonOps
from tts_engine.models.weights import load_decoder
from tts_engine.testing import LLAMA3_ROPE, poisoned_cache, random_model, run_rows

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
# (query heads, KV heads): groups 1, 2, 3, 4, 6, 7, 8
HEADS = [(3, 3), (4, 2), (6, 2), (4, 1), (12, 2), (7, 1), (16, 2)]
SIZES = [(64, 2, 1, 176), (128, 4, 2, 350), (224, 7, 1, 600), (896, 14, 2, 1217)]  # hidden, heads, KV heads, intermediate
FAMILIES = [
    pytest.param("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}, id="llama-tied"),
    pytest.param("llama", {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5}, id="llama-untied"),
    pytest.param("qwen2", {"tie_word_embeddings": True}, id="qwen2-tied"),
    pytest.param("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, id="qwen2-untied"),
    pytest.param("qwen3", {"head_dim": 10, "tie_word_embeddings": True}, id="qwen3-tied"),
]
WINDOWS = [
    pytest.param("mistral", {"sliding_window": 16}, id="mistral"),
    pytest.param("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, id="qwen2-upper-layers"),
    pytest.param("qwen3", {"use_sliding_window": True, "sliding_window": 1, "head_dim": 10,
                           "layer_types": ["sliding_attention", "full_attention"]}, id="qwen3-listed-layers"),
]  # fmt: skip


def saved(tmp_path, family, **sizes):
    """A random model and the directory it was saved to."""
    model = random_model(family, **sizes)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def paths(seed, lengths, vocab_size, num_slots):
    """Random tokens and scattered slots for paths of these lengths."""
    rng = random.Random(seed)
    free = rng.sample(range(num_slots), sum(lengths))
    slots = [[free.pop() for _ in range(length)] for length in lengths]
    return slots, [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


@contextmanager
def num_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_near(out, ref, bound=1e-4):
    assert out.shape == ref.shape
    assert (out - ref).abs().max() <= bound * ref.abs().max()


def assert_equals_transformers(model, directory, backend):
    """In one go and token by token."""
    decoder, attention = load_decoder(directory), make_backend(backend)
    lengths = [1, 17, 53]  # 53 is beyond the 32 positions from which llama3 scaling was stretched
    slots, tokens = paths(0, lengths, 97, 160)
    with torch.no_grad():
        ref = torch.cat([model(torch.tensor([path])).logits[0] for path in tokens])

    cache = poisoned_cache(decoder.spec, 160)
    at_once = decoder.logits(run_rows(decoder, attention, cache, slots, lengths, tokens))

    cache = poisoned_cache(decoder.spec, 160)
    single = torch.empty_like(ref)
    starts = [0, 1, 18]
    for i in range(max(lengths)):
        live = [b for b, length in enumerate(lengths) if i < length]
        hidden = run_rows(decoder, attention, cache, [slots[b][: i + 1] for b in live], [1] * len(live),
                          [tokens[b][: i + 1] for b in live])  # fmt: skip
        single[[starts[b] + i for b in live]] = decoder.logits(hidden)

    assert_near(at_once, ref)
    assert_near(single, ref)


@pytest.mark.parametrize("backend", ["reference", "per_branch"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"group{h[0] // h[1]}")
@pytest.mark.parametrize(("family", "flags"), FAMILIES)
def test_logits_equal_transformers_in_one_go_and_token_by_token(tmp_path, family, flags, heads, backend):
    num_heads, num_kv_heads = heads
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_size": num_heads * 6}
    assert_equals_transformers(*saved(tmp_path, family, **sizes, **flags), backend)


@pytest.mark.parametrize(("family", "flags"), WINDOWS)
def test_logits_within_sliding_windows_equal_transformers(tmp_path, family, flags):
    model, directory = saved(tmp_path, family, **flags)
    assert any(load_decoder(directory).spec.windows)
    assert_equals_transformers(model, directory, "reference")


def test_a_forked_path_reads_the_tokens_its_parent_writes_in_the_same_forward(tmp_path):
    model, directory = saved(tmp_path, "qwen2")
    decoder, attention = load_decoder(directory), make_backend("per_branch")
    (stem, left, right), (a, b, c) = paths(1, [19, 5, 2], 97, 64)
    slots, tokens = [stem, stem + left, stem + right], [a, a + b, a + c]
    with torch.no_grad():
        each = [model(torch.tensor([path])).logits[0] for path in tokens]
    out = decoder.logits(run_rows(decoder, attention, poisoned_cache(decoder.spec, 64), slots, [19, 5, 2], tokens))
    assert_near(out, torch.cat([each[0], each[1][19:], each[2][19:]]))


@pytest.mark.parametrize("backend", ["reference", "per_branch"])
@pytest.mark.parametrize(("family", "flags"), FAMILIES)
def test_bfloat16_is_no_further_from_float32_than_transformers_is(tmp_path, family, flags, backend):
    model, directory = saved(tmp_path, family, **flags)
    (slots,), (tokens,) = paths(2, [61], 97, 64)
    decoder = load_decoder(directory, dtype=torch.bfloat16)
    cache = poisoned_cache(decoder.spec, 64, torch.bfloat16)
    out = decoder.logits(run_rows(decoder, make_backend(backend), cache, [slots], [61], [tokens]))
    with torch.no_grad():
        exact = model(torch.tensor([tokens])).logits[0]
        theirs = model.bfloat16()(torch.tensor([tokens])).logits[0].float()
    assert (out - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()
    assert (out - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize(("family", "flags"), FAMILIES)
def test_packed_matrices_give_transformers_logits_too(tmp_path, monkeypatch, family, flags):
    monkeypatch.setattr(linear, "PACKED_FROM", dict.fromkeys(linear.PACKED_FROM, 0))
    assert_equals_transformers(*saved(tmp_path, family, **flags), "reference")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.04), (torch.float8_e4m3fn, 0.1)], ids=str)
@pytest.mark.parametrize(("family", "flags"), FAMILIES)
def test_8_bit_logits_are_within_a_few_percent_of_transformers(tmp_path, family, flags, dtype, bound):
    """A byte is half a percent of its row's peak off at most, an 8-bit float a 16th of itself; of a product's many such errors most
    cancel."""
    model, directory = saved(tmp_path, family, **flags)
    (slots,), (tokens,) = paths(2, [61], 97, 64)
    decoder = load_decoder(directory, dtype=dtype)
    cache = poisoned_cache(decoder.spec, 64, decoder.dtype)
    out = decoder.logits(run_rows(decoder, make_backend("native"), cache, [slots], [61], [tokens]))
    with torch.no_grad():
        ref = model(torch.tensor([tokens])).logits[0]
    assert out.dtype == torch.float32
    assert 1e-4 < (out - ref).square().mean().sqrt() / ref.square().mean().sqrt() <= bound


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("backend", ["reference", "per_branch", "native"])
def test_the_last_layer_works_for_the_read_tokens_only(tmp_path, backend, deterministic):
    """A prompt, a step under it and two under that: read at their ends, in between, or not at all."""
    if deterministic and not BACKENDS[backend].batch_invariant:
        pytest.skip(f"{backend} is never deterministic")
    _, directory = saved(tmp_path, "llama")
    decoder, attention = load_decoder(directory, deterministic=deterministic), make_backend(backend, deterministic=deterministic)
    prompt, step, left, right = [*range(40, 49)], [*range(60, 64)], [*range(70, 77)], [1, 2, 3]
    slots, new = [prompt, prompt + step, prompt + step + left, prompt + step + right], [9, 4, 7, 3]
    (_, (ids,)) = paths(3, [23], 97, 80)
    tokens = [ids[:9], ids[:13], ids[:20], ids[:13] + ids[20:]]
    whole = run_rows(decoder, attention, poisoned_cache(decoder.spec, 80), slots, new, tokens)
    for read in ([8, 12, 19, 22], [2, 10, 14], [11], [21], []):
        cache = poisoned_cache(decoder.spec, 80)
        out = run_rows(decoder, attention, cache, slots, new, tokens, read)
        torch.testing.assert_close(out, whole[read], rtol=1e-5, atol=1e-6)
        if deterministic:
            assert torch.equal(out, whole[read])
        written = torch.tensor(prompt + step + left + right)
        assert all(table[written].isfinite().all() for table in cache.tables)
        assert decoder.logits(out).shape == (len(read), 97)


@pytest.mark.parametrize("head_dim", [10, 16, 48])
def test_an_angle_hangs_on_its_position_alone(tmp_path, head_dim):
    _, directory = saved(tmp_path, "qwen3", head_dim=head_dim)
    decoder = load_decoder(directory, deterministic=True)
    positions = torch.tensor([0, 5, 1023, 1024, 7, 131071, *range(2000, 2040)])
    frequencies = decoder._frequencies
    whole = decoder._by_rows(decoder._angles, frequencies, positions)
    exact = (positions[:, None].float() * frequencies).double()
    for out, ref in zip(whole, (exact.cos(), exact.sin()), strict=True):
        torch.testing.assert_close(out.double(), ref, rtol=0, atol=2e-7)
    for some in ([3], [45, 2, 5], range(1, 40)):
        part = decoder._by_rows(decoder._angles, frequencies, positions[list(some)])
        assert all(torch.equal(a, b[list(some)]) for a, b in zip(part, whole, strict=True))


@needs_triton
@pytest.mark.parametrize(("family", "flags", "backend"), [
    ("llama", {"rope_parameters": LLAMA3_ROPE}, "reference"), ("qwen2", {}, "per_branch"),
    ("qwen3", {"head_dim": 10}, "per_branch"), ("qwen3", {"head_dim": 16}, "triton_tree"),
])  # fmt: skip
def test_what_a_gpu_runs_between_products_is_what_a_cpu_runs(tmp_path, monkeypatch, family, flags, backend):
    """Kernels put keys and values in their slots; a prompt with two steps behind it, read at three places, then a tick."""
    _, directory = saved(tmp_path, family, **flags)
    attention = BACKENDS[backend]("cpu")
    decoders = [load_decoder(directory) for _ in range(2)]
    monkeypatch.setattr(decoders[1], "_ops", TritonOps())
    slots, (ids,) = [[*range(9)], [*range(9), 20, 21, 22], [*range(9), 11]], paths(3, [14], 97, 30)[1]
    tokens = [ids[:9], ids[:12], ids[:9] + ids[12:13]]
    told = []
    for decoder in decoders:
        cache = poisoned_cache(decoder.spec, 30)
        states = [run_rows(decoder, attention, cache, slots, [9, 3, 1], tokens, [4, 11, 12])]
        longer = [slots[1] + [25], slots[2] + [14]]
        states.append(run_rows(decoder, attention, cache, longer, [1, 1], [tokens[1] + [3], tokens[2] + [8]]))
        told.append((torch.cat(states), *cache.tables))
    for out, ref in zip(told[1], told[0], strict=True):
        assert torch.equal(out.isnan(), ref.isnan())
        assert_near(out.nan_to_num(), ref.nan_to_num(), 3e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "sizes", "flags"), [
    *(pytest.param("qwen2", sizes, {}, id=f"qwen2-d{sizes[0]}") for sizes in SIZES),
    pytest.param("qwen3", (128, 4, 2, 350), {"head_dim": 48}, id="qwen3"),
    pytest.param("mistral", (128, 4, 2, 350), {"sliding_window": 13}, id="mistral"),
])  # fmt: skip
def test_a_deterministic_row_has_the_same_bits_in_any_company(tmp_path, family, sizes, flags, dtype, threads):
    hidden, heads, kv_heads, inner = sizes
    _, directory = saved(tmp_path, family, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         intermediate_size=inner, num_hidden_layers=2, vocab_size=301, **flags)  # fmt: skip
    assert_rows_keep_their_bits(directory, dtype, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_deterministic_row_keeps_its_bits_in_packed_matrices_and_in_bytes(tmp_path, monkeypatch, dtype, threads):
    monkeypatch.setattr(linear, "PACKED_FROM", dict.fromkeys(linear.PACKED_FROM, 0))
    _, directory = saved(tmp_path, "qwen2", hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=350,
                         num_hidden_layers=2, vocab_size=301)  # fmt: skip
    assert_rows_keep_their_bits(directory, dtype, threads)


def assert_same_tables(cache, kept, slots):
    assert all(torch.equal(mine[slots], theirs[slots]) for mine, theirs in zip(cache.tables, kept.tables, strict=True))


def assert_rows_keep_their_bits(directory, dtype, threads):
    decoder, attention = load_decoder(directory, dtype=dtype, deterministic=True), make_backend("reference")
    dtype, lengths = decoder.dtype, [21, 3, 40, 17]
    slots, tokens = paths(4, lengths, 301, 100)

    def run(rows, new=None, cache=None):
        cache = cache or poisoned_cache(decoder.spec, 100, dtype)
        new = new or [len(slots[b]) for b in rows]
        hidden = run_rows(decoder, attention, cache, [slots[b] for b in rows], new, [tokens[b] for b in rows])
        return decoder.logits(hidden), cache

    with num_threads(threads):
        alone, kept = run([0])
        for company in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0]):
            logits, cache = run(company)
            start = sum(lengths[b] for b in company[: company.index(0)])
            assert torch.equal(logits[start : start + lengths[0]], alone)
            assert_same_tables(cache, kept, slots[0])
        # Decoded one by one beside another path, then evicted (poisoned) and recomputed in one run: the same.
        cache = poisoned_cache(decoder.spec, 100, dtype)
        for i in range(lengths[0]):
            rows = [(slots[0][: i + 1], tokens[0][: i + 1]), (slots[2][: i + 1], tokens[2][: i + 1])]
            step = run_rows(decoder, attention, cache, [s for s, _ in rows], [1, 1], [t for _, t in rows])
            assert torch.equal(decoder.logits(step)[0], alone[i])
        assert_same_tables(cache, kept, slots[0])
        for table in cache.tables:
            table[slots[0][:12]] = torch.nan
        run_rows(decoder, attention, cache, [slots[0][:12]], [12], [tokens[0][:12]])
        assert_same_tables(cache, kept, slots[0])
