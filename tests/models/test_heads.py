import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tts_engine.attention import make_backend
from tts_engine.branch import root_branch
from tts_engine.engine import make_scorer
from tts_engine.errors import ModelError
from tts_engine.ledger import PRMLedger
from tts_engine.models import heads, linear
from tts_engine.models.heads import PairHead, TwoClassHead, ValueHead
from tts_engine.models.weights import Checkpoint, load_decoder
from tts_engine.prm.families import FAMILIES
from tts_engine.prm.scorer import ScoreContext
from tts_engine.runner import ModelRunner
from tts_engine.search import Driver
from tts_engine.search.requests import Score
from tts_engine.testing import random_model, random_prm_directory


def score_module(d, seed=0):
    """Qwen2.5-Math-PRM's `score`, written out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(d, d), torch.nn.ReLU(), torch.nn.Linear(d, 2))


def write(directory, tensors):
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(directory)


def test_two_class_head_equals_the_module_it_is_read_from(tmp_path):
    score = score_module(48)
    checkpoint = write(tmp_path, {f"score.{name}": tensor.data for name, tensor in score.named_parameters()})
    hidden = torch.randn(71, 48, generator=torch.Generator().manual_seed(1))
    ref = score(hidden).softmax(-1)[:, 1]
    out = TwoClassHead.load(checkpoint, 48)(hidden)
    assert out.dtype == torch.float32 and (out - ref).abs().max() <= 1e-6


@pytest.mark.parametrize("named", [{}, {"hidden": "a", "out": "b.c"}], ids=["usual", "named"])
def test_two_class_head_is_read_from_the_tensors_it_is_told(tmp_path, named):
    score = score_module(8)
    names = {"0": named.get("hidden", "score.0"), "2": named.get("out", "score.2")}
    tensors = {f"{names[n[0]]}.{n[2:]}": tensor.data for n, tensor in score.named_parameters()}
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    out = TwoClassHead.load(write(tmp_path, tensors), 8, **named)(hidden)
    assert (out - score(hidden).softmax(-1)[:, 1]).abs().max() <= 1e-6


@pytest.mark.parametrize("named", [{}, {"linear": "value.out"}], ids=["usual", "named"])
def test_value_head_is_the_sigmoid_of_a_linear_unit(tmp_path, named):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        unit = torch.nn.Linear(48, 1)
    name = named.get("linear", "v_head.summary")
    checkpoint = write(tmp_path, {f"{name}.weight": unit.weight.data, f"{name}.bias": unit.bias.data})
    hidden = torch.randn(71, 48, generator=torch.Generator().manual_seed(1))
    out = ValueHead.load(checkpoint, 48, **named)(hidden)
    assert out.dtype == torch.float32 and out.shape == (71,)
    assert (out - torch.sigmoid(unit(hidden))[:, 0]).abs().max() <= 1e-6


def test_pair_head_is_the_softmax_of_two_logits(tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    hidden = torch.randn(45, 48, generator=torch.Generator().manual_seed(2))
    ref = decoder.logits(hidden)[:, [64, 38]].softmax(-1)[:, 0]
    assert (PairHead.of(decoder, plus_id=64, minus_id=38)(hidden) - ref).abs().max() <= 1e-6
    with pytest.raises(ModelError, match="from tokens 64 and 97, and the model knows 97"):
        PairHead.of(decoder, plus_id=64, minus_id=97)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_pair_head_reads_rows_that_nothing_was_quantised_or_packed_of(tmp_path, monkeypatch, dtype, tied):
    monkeypatch.setattr(linear, "PACKED_FROM", dict.fromkeys(linear.PACKED_FROM, 0))
    model = random_model("qwen2", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype=dtype)
    rows = model.lm_head.weight.data.to(linear.activations(dtype))
    hidden = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(PairHead.of(decoder, plus_id=96, minus_id=0)(hidden), PairHead(rows[96], rows[0])(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [128, 224])
def test_a_score_has_the_same_bits_in_any_company(d, dtype):
    score = score_module(d)
    hidden = torch.randn(70, d, generator=torch.Generator().manual_seed(3)).to(dtype)
    unit = score[2].weight.data[:1], score[2].bias.data[:1]
    for head in (TwoClassHead(*(p.data for p in score.parameters())), PairHead(*score[2].weight.data), ValueHead(*unit)):
        together = head(hidden)
        assert torch.equal(torch.cat([head(row[None]) for row in hidden]), together)
        assert torch.equal(head(hidden.flip(0)).flip(0), together)
        assert head(hidden[:0]).shape == (0,)


def test_a_gpus_kernel_reads_what_the_definition_reads(monkeypatch):
    """The kernel interpreted in the place where the definition stands."""
    pytest.importorskip("triton")
    score, hidden = score_module(48), torch.randn(5, 48, generator=torch.Generator().manual_seed(6))
    w0, b0, w2, b2 = (p.data for p in score.parameters())
    made = TwoClassHead(w0, b0, w2, b2), PairHead(w2[0], w2[1]), ValueHead(w2[:1], b2[:1])
    ref = [head(hidden) for head in made]
    monkeypatch.setattr(heads, "_share", heads._on_gpu)
    for head, expected in zip(made, ref, strict=True):
        torch.testing.assert_close(head(hidden), expected, atol=2e-6, rtol=0)


class Seen(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_as_wide_as_the_vocabulary_is_made_when_a_prm_reads(tmp_path, kind):
    random_prm_directory(tmp_path, kind, seed=4)
    decoder = load_decoder(tmp_path)
    runner = ModelRunner(decoder, make_backend("per_branch"), num_blocks=40, block_size=4)
    scorer = make_scorer(runner, Checkpoint(tmp_path), None)
    step = root_branch([1], "a=3;b?")
    for text in ("a=3", "b=4"):
        step = type(step)(step, (1,), text, len(text) + step.depth)

    def program():
        return (yield Score([step]))

    driver = Driver(program())
    context = ScoreContext(driver=driver, opening=scorer.spec.opening("a=3;b?"), ledger=PRMLedger(), scored=lambda branch: None)
    with Seen() as seen:
        for ask in driver.asks():
            scorer.submit(context, ask)
        while scorer.num_open:
            scorer.tick()
    width, vocab = decoder.spec.hidden_size, decoder.spec.vocab_size
    assert (2, width) in seen.shapes and None not in driver.result[0].scores
    assert not [shape for shape in seen.shapes if len(shape) > 1 and shape[-1] == vocab]
    if decoder.weights.lm_head is not None:
        with Seen() as seen:
            decoder.logits(torch.zeros(1, width))
        assert (1, vocab) in seen.shapes  # it would have been noticed


def test_a_missing_or_misshapen_head_is_named(tmp_path):
    score = score_module(16)
    tensors = {f"score.{name}": tensor.data for name, tensor in score.named_parameters()}
    with pytest.raises(ModelError, match=r"'score.0.weight' has shape \[16, 16\], expected \[24, 24\]"):
        TwoClassHead.load(write(tmp_path, tensors), 24)
    with pytest.raises(ModelError, match=r"no tensor 'score.2.bias'; expected one of shape \[2\]"):
        TwoClassHead.load(write(tmp_path, {n: t for n, t in tensors.items() if n != "score.2.bias"}), 16)
    with pytest.raises(ModelError, match=r"no tensor 'v_head.summary.weight'; expected one of shape \[1, 16\]"):
        ValueHead.load(write(tmp_path, tensors), 16)
    with pytest.raises(ModelError, match=r"'score.2.weight' has shape \[2, 16\], expected \[1, 16\]"):
        ValueHead.load(write(tmp_path, tensors), 16, linear="score.2")
