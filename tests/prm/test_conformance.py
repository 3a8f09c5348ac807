"""Every family through the conformance kit, on the tokenizers that can write it; and the kit against specs that break a law."""

import dataclasses

import pytest

from tts_engine.embedded.tokenizer import save_tokenizer
from tts_engine.models.tokenizer import DATE, load_tokenizer
from tts_engine.prm.families import FAMILIES, QWEN_MARKER, QWEN_SYSTEM, SHEPHERD_TAG, PRMFamily
from tts_engine.prm.spec import PRMSpec
from tts_engine.testing import check_prm_family, prm_marker, tiny_tokenizer


def chat_ids(tokenizer, messages):
    return tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE), add_special_tokens=False)


def qwen_ids(tokenizer, problem, steps):
    said = (QWEN_SYSTEM, problem, "".join(step.strip() + QWEN_MARKER for step in steps))
    return chat_ids(tokenizer, [{"role": r, "content": c} for r, c in zip(("system", "user", "assistant"), said, strict=True)])


def shepherd_ids(tokenizer, problem, steps):
    return tokenizer.encode(f"{problem.strip()} " + "".join(f"{step.strip()} {SHEPHERD_TAG}\n" for step in steps))


def rlhflow_ids(tokenizer, problem, steps):
    said = [f"{problem} {steps[0].strip()}".strip(), *(step.strip() for step in steps[1:])]
    answered = [(("user", text), ("assistant", "+")) for text in said]
    return chat_ids(tokenizer, [{"role": role, "content": content} for turn in answered for role, content in turn])


def skywork_ids(tokenizer, problem, steps):
    lines = [tokenizer.encode(step.replace("\n", " ").strip(), add_special_tokens=False) for step in steps]
    line_end = tokenizer.encode("\n", add_special_tokens=False)
    opening = tokenizer.encode(f"{tokenizer.bos_token or '<|endoftext|>'}{problem}\n", add_special_tokens=False)
    return opening + [token for line in lines for token in line + line_end]


WHOLE = {"qwen2.5-math-prm": qwen_ids, "math-shepherd": shepherd_ids, "rlhflow": rlhflow_ids, "skywork": skywork_ids}
MARKERS = {  # by family and tokenizer
    ("qwen2.5-math-prm", "qwen2.5-math-prm"): [151651],
    ("math-shepherd", "mistral-7b-v0.1"): [12902],
    ("rlhflow", "llama-3.1"): [128009, 128006, 78191, 128007, 271],
    ("skywork", "qwen2.5"): [198],
    ("value-head", "qwen2.5"): [271],
    ("value-head", "llama-3.1"): [271],
    ("value-head", "mistral-7b-v0.1"): [13, 13],
}


def check(family, tokenizer, **how):
    whole = WHOLE.get(family)
    own = whole and (lambda problem, steps: whole(tokenizer, problem, steps))
    return check_prm_family(FAMILIES[family], tokenizer, whole=own, **how)


@pytest.mark.parametrize(("family", "name"), MARKERS)
def test_every_family_keeps_the_laws_on_the_real_tokenizers(family, name, shared, soak):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    assert prm_marker(FAMILIES[family].bind(tokenizer)) == MARKERS[family, name]
    assert check(family, tokenizer, examples=200 * soak) > 5_000


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_laws_on_a_made_up_tokenizer(family, soak):
    assert check(family, tiny_tokenizer(), examples=200 * soak) > 5_000


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "rlhflow"])
def test_every_family_that_can_be_bound_to_the_embedded_tokenizer_keeps_the_laws(family, tmp_path):
    save_tokenizer(tmp_path)
    assert check(family, load_tokenizer(tmp_path)) > 5_000


# What the kit is for: a family that breaks a law does not pass.


def bind_lines(tokenizer) -> PRMSpec:
    """A good one: problem and steps a line each, nothing else."""

    def line(text: str) -> list[int]:
        return [*tokenizer.encode(" ".join(text.split()), split_special_tokens=True), end]

    (end,) = tokenizer.encode("\n")
    return PRMSpec(family="lines", opening=line, step=lambda text, first: line(text), read_at=-1, readout=None)


def changed(**changes):
    """The good one with some fields replaced: each a function from the tokenizer and the good spec to the new value."""

    def bind(tokenizer) -> PRMSpec:
        spec = bind_lines(tokenizer)
        return dataclasses.replace(spec, **{field: change(tokenizer, spec) for field, change in changes.items()})

    return PRMFamily(name="changed", architectures=(), head=frozenset(), bind=bind)


def step_of(rule):
    """The `step` of a spec from a rule (tokenizer, the good ids, text, first) -> ids."""
    return lambda tokenizer, spec: lambda text, first: rule(tokenizer, spec.step(text, first), text, first)


def remembering(tokenizer, spec):
    """An `opening` that is not a function of its problem."""
    calls = []

    def opening(problem):
        calls.append(problem)
        return spec.opening(problem) + [0] * (len(calls) > 20)

    return opening


END = "<|end|>"
BROKEN = {
    "reads otherwise the second time": {"opening": remembering},
    "ids that the vocabulary does not have": {"step": step_of(lambda t, ids, text, first: [len(t), *ids])},
    "the problem's text became control": {"opening": lambda t, spec: lambda problem: t.encode(problem)},
    "the text of step . became control": {
        "step": step_of(lambda t, ids, text, first: t.encode(" ".join(text.split())) + ids[-1:]),
    },
    "steps share no marker up to": {"read_at": lambda t, spec: -2},
    "holds the marker up to": {"step": step_of(lambda t, ids, text, first: t.encode(text, split_special_tokens=True) + ids[-1:])},
    "steps share no marker": {"step": step_of(lambda t, ids, text, first: ids[:-1] + t.encode("1" if text else "2"))},
    "something closes the text behind step": {
        "step": step_of(lambda t, ids, text, first: [*ids, t.convert_tokens_to_ids(END)]),
        "read_at": lambda t, spec: -2,
    },
}


def test_a_good_family_passes_the_kit():
    assert check_prm_family(changed(), tiny_tokenizer()) > 5_000


@pytest.mark.parametrize("law", BROKEN)
def test_a_family_that_breaks_a_law_does_not_pass(law):
    with pytest.raises(AssertionError, match=law):
        check_prm_family(changed(**BROKEN[law]), tiny_tokenizer())


def test_a_family_whose_ids_are_not_those_of_the_whole_text_does_not_pass():
    tokenizer = tiny_tokenizer()

    def whole(problem, steps):
        return tokenizer.encode("\n".join(" ".join(text.split()) for text in [problem, *steps, ""]))

    with pytest.raises(AssertionError, match="not the ids of the whole text"):  # ".\n" is one token there
        check_prm_family(changed(), tokenizer, whole=whole)


def test_a_path_that_changes_behind_itself_does_not_pass():
    class Rereading(PRMSpec):
        """Closes the text after the last step, as a chat template would."""

        def render(self, problem, texts):
            ids, positions = super().render(problem, texts)
            return [*ids, 0], positions

    def bind(tokenizer):
        spec = bind_lines(tokenizer)
        return Rereading(**{field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)})

    with pytest.raises(AssertionError, match="changes what was read before it"):
        check_prm_family(PRMFamily(name="x", architectures=(), head=frozenset(), bind=bind), tiny_tokenizer())
