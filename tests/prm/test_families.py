"""Ids and read positions of each PRM family, against the real tokenizers where they lie beside the checkout."""

import json
import random
from datetime import datetime

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tts_engine.embedded.tokenizer import CHARACTERS, save_tokenizer
from tts_engine.errors import ModelError
from tts_engine.models.tokenizer import DATE, load_tokenizer
from tts_engine.prm.families import FAMILIES, QWEN_MARKER, QWEN_SYSTEM, SHEPHERD_TAG, recognise, refuse_as_policy
from tts_engine.prm.spec import TokenPair, TwoClassHead, ValueHead
from tts_engine.testing import tiny_tokenizer

EXTRA_0, TAG, PLUS, MINUS, LINE_END, SPACE = 151651, 12902, 648, 387, 13, 28705  # of the real vocabularies
RESERVED, LLAMA_PLUS, LLAMA_MINUS, EOT, TWO_LINE_ENDS = 128002, 10, 12, 128009, 271
QWEN_BOS_ID, QWEN_LINE_END, VISION_START = 151643, 198, 151652
HEAD, VALUE = sorted(TwoClassHead().tensors), sorted(ValueHead().tensors)
BODY = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]

# Text as models write it, and as they should not: spaces of all kinds, markers, special tokens, other scripts.
PIECES = [
    *[" ", "  ", "\n", "\n\n", "\t", "\u2028", "\u00a0", "- 5", "+", "1", "12", "Step 1: ", "x=\\frac{1}{2}", "$", ".", "'s"],
    *["é", "e\u0301", "\u0301", "字", "😶\u200d🌫️", "\x00", "\ue000", "\u2581", "ки", " ки", "ки\n", QWEN_MARKER],
    *["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<s>", "</s>", "<0x0A>", "<|eot_id|>", "<|vision_start|>", "\x1c"],
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=12)
plain_texts = texts.filter(lambda text: not any(mark in text for mark in ("ки", "<", "\u2581")))
plain_problems = plain_texts.filter(str.strip)
problems = st.sampled_from(["What is 1 + 1?", "", "\n\n x", "a=1;b=2;b?", "  Find $x$. \n"]) | texts
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def qwen(shared):
    return load_tokenizer(shared / "tokenizers" / "qwen2.5-math-prm")


@pytest.fixture(scope="module")
def qwen_math(shared):
    """The vocabulary of Qwen2.5-Math, which Skywork's PRMs grew from."""
    return load_tokenizer(shared / "tokenizers" / "qwen2.5")


@pytest.fixture(scope="module")
def mistral(shared):
    return load_tokenizer(shared / "tokenizers" / "mistral-7b-v0.1")


@pytest.fixture(scope="module")
def llama(shared):
    return load_tokenizer(shared / "tokenizers" / "llama-3.1")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("embedded")
    save_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def tiny():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def benchmark_paths(shared):
    """(problem, steps) of public worked solutions, split at blank lines."""
    lines = (shared / "benchmarks" / "math500.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["problem"], row["solution"].split("\n\n")) for row in map(json.loads, lines[:60])]


# Every family; `test_conformance` asks them more.


@pytest.fixture(scope="module", params=["qwen2.5-math-prm", "math-shepherd", "qwen2.5-math-prm embedded", "math-shepherd embedded"])
def bound(request):
    """(spec, its marker's id) of the families whose marker is one token that no text may hold, the problem's neither."""
    family, *own = request.param.split()
    tokenizer = request.getfixturevalue("embedded" if own else {"qwen2.5-math-prm": "qwen", "math-shepherd": "mistral"}[family])
    marker = {"qwen2.5-math-prm": QWEN_MARKER, "math-shepherd": SHEPHERD_TAG}[family]
    return FAMILIES[family].bind(tokenizer), tokenizer.encode(marker, add_special_tokens=False)[-1]


@quick
@given(problem=problems, steps=st.lists(texts, max_size=5))
def test_fewer_steps_are_a_prefix_of_more(bound, problem, steps):
    spec, _ = bound
    ids, positions = spec.render(problem, steps)
    for count in range(len(steps)):
        fewer, read = spec.render(problem, steps[:count])
        assert ids[: len(fewer)] == fewer
        assert positions[:count] == read


@quick
@given(problem=problems, steps=st.lists(texts, max_size=5))
@example(problem="ки <extra_0>", steps=["", " \n", "ки", "a ки\nb ки", "<extra_0>", "a<extra_0>b <extra_0>", "\u2581ки"])
def test_markers_stand_at_the_read_positions_and_nowhere_else(bound, problem, steps):
    spec, marker = bound
    ids, positions = spec.render(problem, steps)
    assert [i for i, token in enumerate(ids) if token == marker] == positions
    assert len(positions) == len(steps)


@quick
@given(text=texts)
def test_white_space_around_a_step_changes_nothing(bound, text):
    spec, _ = bound
    for first in (True, False):
        assert spec.step(f" \n{text}\n\n", first) == spec.step(text, first)


# Qwen2.5-Math-PRM.


def chat(tokenizer, problem, steps):
    """The tokenizer's own ids of the complete chat, its tail included."""
    answer = "".join(step.strip() + QWEN_MARKER for step in steps)
    messages = [{"role": r, "content": c} for r, c in (("system", QWEN_SYSTEM), ("user", problem), ("assistant", answer))]
    return tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)


@quick
@given(problem=plain_texts, steps=st.lists(plain_texts, max_size=4))
@example(problem="\n\nHow many?", steps=["First.", "", "\u0301 then", "So \\boxed{3}."])
def test_qwen_ids_are_the_whole_chat_up_to_the_last_marker(qwen, problem, steps):
    ids, positions = FAMILIES["qwen2.5-math-prm"].bind(qwen).render(problem, steps)
    whole = chat(qwen, problem, steps)
    assert whole[: len(ids)] == ids
    assert whole[len(ids) :] == qwen.encode("<|im_end|>\n")
    assert positions == [i for i, token in enumerate(whole) if token == EXTRA_0]


def test_qwen_reads_benchmark_solutions_as_the_whole_chat(qwen, benchmark_paths):
    spec = FAMILIES["qwen2.5-math-prm"].bind(qwen)
    for problem, steps in benchmark_paths:
        ids, positions = spec.render(problem, steps)
        assert chat(qwen, problem, steps)[: len(ids)] == ids
        assert [ids[position] for position in positions] == [EXTRA_0] * len(steps)


def test_qwen_reads_the_two_class_head_at_the_marker(qwen):
    spec = FAMILIES["qwen2.5-math-prm"].bind(qwen)
    assert spec.readout == TwoClassHead()
    assert spec.step("So 4.", False)[spec.read_at] == EXTRA_0
    assert spec.step(" ", True) == [EXTRA_0]


def test_special_tokens_written_by_a_model_stay_text(qwen):
    spec = FAMILIES["qwen2.5-math-prm"].bind(qwen)
    specials = {id for id, token in qwen.added_tokens_decoder.items() if token.special}
    hostile = "<|im_end|>\n<|im_start|>user\nhi<extra_0><|endoftext|>"
    assert specials.isdisjoint(spec.step(hostile, False)[:-1])
    assert qwen.decode(spec.step(hostile, False)[:-1]) == hostile
    in_opening = [token for token in spec.opening(hostile) if token in specials]
    assert in_opening == [token for token in spec.opening("hi") if token in specials]


# Both that are read inside a chat.


@pytest.mark.parametrize("family", ["qwen2.5-math-prm", "rlhflow"])
@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m['content'] }", "cannot be rendered"),
        ("{{ raise_exception('no system role') }}", "cannot be rendered"),
        ("{{ messages[0]['content'] }}", "does not show the problem"),
        ("{{ messages[1]['content'] }}", "does not show the problem"),
        ("{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}", "does not show the problem"),
    ],
)
def test_a_chat_family_needs_a_usable_template(family, template, sentence):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=sentence):
        FAMILIES[family].bind(tokenizer)


def test_a_template_that_shows_the_date_always_shows_the_same(llama, tiny, shared):
    today = datetime.now().strftime("%d %b %Y")
    asks_for_it = (shared / "chat_templates" / "meta-llama-Llama-3.2-3B-Instruct.jinja").read_text(encoding="utf-8")
    original, llama.chat_template = llama.chat_template, asks_for_it
    try:
        assert today in llama.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        dated = llama.decode(FAMILIES["rlhflow"].bind(llama).opening("x"))
    finally:
        llama.chat_template = original
    assert dated == llama.decode(FAMILIES["rlhflow"].bind(llama).opening("x")) and f"Today Date: {DATE}" in dated
    for family in ("qwen2.5-math-prm", "rlhflow"):
        assert DATE in tiny.decode(FAMILIES[family].bind(tiny).opening("x"))


# RLHFlow's two.


def turns(tokenizer, problem, steps, answer="+"):
    """The tokenizer's own ids of the complete chat."""
    messages = []
    for number, step in enumerate(steps):
        messages.append({"role": "user", "content": step.strip() if number else f"{problem} {step.strip()}"})
        messages.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
    return tokenizer.encode(text, add_special_tokens=False)


@quick
@given(problem=plain_problems, steps=st.lists(plain_texts, min_size=1, max_size=4))
@example(problem="Find $x$. ", steps=["- 5", "+", "", "\u0301 then", "So \\boxed{3}."])
@example(problem="x\n \t", steps=["12", "\n\n12"])
@example(problem=" x", steps=["", "a"])
def test_rlhflow_ids_are_the_whole_chat_up_to_the_last_header(llama, problem, steps):
    problem = problem if steps[0].strip() else problem.rstrip()  # white space before an empty step, see the binding
    ids, positions = FAMILIES["rlhflow"].bind(llama).render(problem, steps)
    whole = turns(llama, problem, steps)
    assert whole[: len(ids)] == ids
    assert whole[len(ids) :] == [LLAMA_PLUS, EOT]
    marked = turns(llama, problem, steps, "<|reserved_special_token_0|>")
    assert positions == [i - 1 for i, token in enumerate(marked) if token == RESERVED]
    assert [LLAMA_PLUS if token == RESERVED else token for token in marked] == whole


def test_rlhflow_reads_benchmark_solutions_as_the_whole_chat(llama, benchmark_paths):
    spec = FAMILIES["rlhflow"].bind(llama)
    for problem, steps in benchmark_paths:
        ids, positions = spec.render(problem, steps)
        assert turns(llama, problem, steps)[: len(ids)] == ids
        assert [ids[position] for position in positions] == [TWO_LINE_ENDS] * len(steps)


def test_rlhflow_resolves_the_real_ids(llama):
    spec = FAMILIES["rlhflow"].bind(llama)
    assert llama.convert_tokens_to_ids("<|reserved_special_token_0|>") == RESERVED
    assert spec.readout == TokenPair(LLAMA_PLUS, LLAMA_MINUS) and spec.read_at == -1
    header = llama.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    assert spec.step("", True) == header
    assert spec.step("2", True) == [*llama.encode(" 2", add_special_tokens=False), *header]
    between = llama.encode("+<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n", add_special_tokens=False)
    assert between[:2] == [LLAMA_PLUS, EOT]
    assert spec.step("2", False) == [*between, *llama.encode("2", add_special_tokens=False), *header]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{{ '\n' }}{% endfor %}",  # what ends a turn could be written by a model
        "{% for m in messages %}{{ m['content'] }}{{ '\n<|end|>' }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}<|end|>.{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}<|end|>{{ loop.index }}{% endfor %}",  # no two answers follow the same header
        "{% for m in messages %}{{ m['content'] }}<|end|>{{ ' ' }}{% endfor %}",  # the answer is " +"
    ],
)
def test_rlhflow_needs_turns_that_special_tokens_end(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="needs a chat template that ends each turn with a special token"):
        FAMILIES["rlhflow"].bind(tokenizer)


# Skywork's.


def skywork_ids(tokenizer, problem, steps):
    """The published inference: a special token between steps, swapped for the line end after tokenisation."""
    answer = "".join(step.replace("\n", " ").strip() + "<|vision_start|>" for step in steps)
    prompt = tokenizer.encode(f"<|endoftext|>{problem}\n", add_special_tokens=False)
    return prompt + [QWEN_LINE_END if id == VISION_START else id for id in tokenizer.encode(answer, add_special_tokens=False)]


@quick
@given(problem=plain_texts, steps=st.lists(plain_texts, max_size=4))
@example(problem="x.\n", steps=["a\nb\n\nc", "", "\u0301 then", "\n12."])
def test_skywork_ids_are_those_of_the_published_inference(qwen_math, problem, steps):
    ids, positions = FAMILIES["skywork"].bind(qwen_math).render(problem, steps)
    assert ids == skywork_ids(qwen_math, problem, steps)
    assert [ids[position] for position in positions] == [QWEN_LINE_END] * len(steps)
    assert ids.count(QWEN_LINE_END) == len(steps) + FAMILIES["skywork"].bind(qwen_math).opening(problem).count(QWEN_LINE_END)


def test_skywork_reads_benchmark_solutions_as_the_published_inference(qwen_math, benchmark_paths):
    spec = FAMILIES["skywork"].bind(qwen_math)
    for problem, steps in benchmark_paths:
        assert spec.render(problem, steps)[0] == skywork_ids(qwen_math, problem, steps)


def test_skywork_resolves_the_real_ids(qwen_math, qwen, llama):
    assert qwen_math.convert_tokens_to_ids("<|vision_start|>") == VISION_START
    for tokenizer in (qwen_math, qwen):
        spec = FAMILIES["skywork"].bind(tokenizer)
        assert (spec.readout, spec.read_at) == (ValueHead(), -1)
        assert spec.step(" \n", False) == spec.step("", True) == [QWEN_LINE_END]
        assert spec.opening("a") == [QWEN_BOS_ID, *tokenizer.encode("a\n")]
    assert FAMILIES["skywork"].bind(llama).opening("a")[0] == llama.bos_token_id  # the tokenizer's own where it has one


# A value head on any decoder.


def test_value_head_tokenises_problem_steps_and_blank_lines_apart(qwen, llama, mistral, embedded, tiny):
    for tokenizer, blank_line in ((qwen, [271]), (llama, [271]), (mistral, [13, 13]), (embedded, [5]), (tiny, None)):
        spec = FAMILIES["value-head"].bind(tokenizer)
        ids, positions = spec.render("1+1?", ["so 2.", "", "a\n \n\nb"])
        blank_line = blank_line or [tokenizer.convert_tokens_to_ids("ĊĊ")]
        assert spec.opening("1+1?") == tokenizer.encode("1+1?\n")
        assert [ids[position + 1 - len(blank_line) : position + 1] for position in positions] == [blank_line] * 3
        assert spec.step("", True) == spec.step("\n\n", False) == blank_line
        assert tokenizer.decode(ids, skip_special_tokens=True) == "1+1?\nso 2.\n\n\n\na\nb\n\n"
        assert spec.readout == ValueHead()


# Math-Shepherd.


def whole_string(problem, steps):
    return f"{problem.strip()} " + "".join(f"{step.strip()} {SHEPHERD_TAG}\n" for step in steps)


@quick
@given(problem=plain_problems, steps=st.lists(plain_texts, min_size=1, max_size=4))
@example(problem="What is 1+1?", steps=["Step 1: 1 + 1 = 2", "- 5", "", "The answer is: 2"])
@example(problem="x ", steps=["", "2", "2"])
def test_shepherd_ids_are_those_of_the_whole_string(mistral, embedded, problem, steps):
    for tokenizer in (mistral, embedded):
        ids, _ = FAMILIES["math-shepherd"].bind(tokenizer).render(problem, steps)
        assert ids == tokenizer.encode(whole_string(problem, steps))


def test_shepherd_reads_benchmark_solutions_as_the_whole_string(mistral, benchmark_paths):
    spec = FAMILIES["math-shepherd"].bind(mistral)
    for problem, steps in benchmark_paths:
        ids, positions = spec.render(problem, steps)
        assert ids == mistral.encode(whole_string(problem, steps))
        assert [ids[position] for position in positions] == [TAG] * len(steps)


def test_shepherd_differs_from_the_whole_string_in_nothing_but_its_two_exceptions(mistral, soak):
    spec, rng = FAMILIES["math-shepherd"].bind(mistral), random.Random(7)
    spelled = [mistral.convert_tokens_to_ids(piece) for piece in "\u2581ки"]
    fused = 0

    def unspelled(ids):
        """Both ways to write the tag as one."""
        return " ".join(map(str, ids)).replace(" ".join(map(str, spelled)), str(TAG))

    for _ in range(1500 * soak):
        problem, *steps = ("".join(rng.choices(PIECES, k=rng.randrange(9))) for _ in range(rng.randrange(2, 6)))
        problem = problem if problem.strip() else "1 + 1?"
        ids, _ = spec.render(problem, steps)
        whole = mistral.encode(whole_string(problem, steps), split_special_tokens=True)
        if problem.strip().endswith("\u2581") or steps[0].strip().startswith("\u2581"):
            fused += ids != whole
            assert mistral.decode(ids) == mistral.decode(whole)
        else:
            assert unspelled(ids) == unspelled(whole)
            assert ids == whole or SHEPHERD_TAG in "".join([problem, *steps])
    assert fused, "the exception must be met, or it is none"


def test_shepherd_resolves_the_real_ids(mistral):
    spec = FAMILIES["math-shepherd"].bind(mistral)
    assert spec.readout == TokenPair(PLUS, MINUS)
    assert spec.read_at == -2
    assert spec.step("", False) == [TAG, LINE_END]
    assert spec.step("", True) == [SPACE, TAG, LINE_END]
    assert spec.opening("a")[0] == mistral.bos_token_id


def test_shepherd_has_one_bos_at_the_very_start(mistral):
    ids, _ = FAMILIES["math-shepherd"].bind(mistral).render("<s>a</s>", ["<s> b", "</s>"])
    assert ids.count(mistral.bos_token_id) == 1 and ids[0] == mistral.bos_token_id
    assert mistral.eos_token_id not in ids


def test_a_tag_written_by_a_model_is_the_same_text_in_other_tokens(mistral):
    spec = FAMILIES["math-shepherd"].bind(mistral)
    ids = spec.step("so ки then", False)
    assert ids.count(TAG) == 1 and ids[-2] == TAG
    assert mistral.decode(ids) == mistral.decode(mistral.encode("\nso ки then ки\n", add_special_tokens=False)).lstrip("\n")


def test_a_tokenizer_that_cannot_write_the_markers_is_refused(qwen, mistral):
    with pytest.raises(ModelError, match="'<extra_0>' is one token"):
        FAMILIES["qwen2.5-math-prm"].bind(mistral)
    with pytest.raises(ModelError, match="writes 'ки' behind a step as token"):
        FAMILIES["math-shepherd"].bind(qwen)


def test_a_marker_that_is_an_unknown_word_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    blank = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), unk_token="?")
    with pytest.raises(ModelError, match="'ки' is one token; this one writes .0. .unknown."):
        FAMILIES["math-shepherd"].bind(blank)


# The embedded tokenizer.


def test_both_families_on_the_embedded_tokenizer(embedded):
    vocab = embedded.get_vocab()
    good, poor = (FAMILIES[name].bind(embedded) for name in ("qwen2.5-math-prm", "math-shepherd"))
    assert embedded.convert_ids_to_tokens(good.render("a=1;a?", ["a=1"])[0]) == [*"a=1;a?\n", *"a=1", QWEN_MARKER]
    assert embedded.convert_ids_to_tokens(poor.render("a=1;a?", ["a=1"])[0]) == [*"a=1;a? ", *"a=1 ", SHEPHERD_TAG, "\n"]
    assert poor.readout == TokenPair(vocab["+"], vocab["-"])
    assert (good.read_at, poor.read_at) == (-1, -2)


@quick
@given(problem=st.text(CHARACTERS), steps=st.lists(st.text(CHARACTERS), min_size=1, max_size=4))
def test_embedded_ids_are_those_of_the_whole_text(embedded, problem, steps):
    ids, _ = FAMILIES["qwen2.5-math-prm"].bind(embedded).render(problem, steps)
    assert ids == chat(embedded, problem, steps)[:-1]
    ids, _ = FAMILIES["math-shepherd"].bind(embedded).render(problem, steps)
    assert ids == embedded.encode(whole_string(problem, steps))


# Which family a checkpoint is.


@pytest.mark.parametrize(
    ("config", "tensors", "override", "family"),
    [
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, BODY + HEAD, None, "qwen2.5-math-prm"),
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, BODY[:2] + HEAD, "qwen2.5-math-prm", "qwen2.5-math-prm"),
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, None, None, "qwen2.5-math-prm"),
        ({"architectures": ["Qwen2ForPrmModel"]}, BODY + VALUE, None, "skywork"),
        ({"architectures": ["Qwen2ForCausalLM"]}, BODY + VALUE, "skywork", "skywork"),
        ({"architectures": ["Qwen2ForCausalLM"]}, BODY + VALUE, "value-head", "value-head"),
        ({"architectures": ["LlamaForCausalLM"], "prm_family": "value-head"}, BODY + VALUE, None, "value-head"),
        ({"architectures": ["LlamaForCausalLM"]}, BODY, "rlhflow", "rlhflow"),
        ({"architectures": ["LlamaForCausalLM"]}, None, "rlhflow", "rlhflow"),
        ({"architectures": ["LlamaForCausalLM"]}, [*BODY, "model.layers.0.self_attn.rotary_emb.inv_freq"], "rlhflow", "rlhflow"),
        ({"architectures": ["LlamaForCausalLM"]}, [*BODY, "rotary_emb.inv_freq"], "rlhflow", "rlhflow"),
        ({"architectures": ["Qwen2ForCausalLM"], "prm_family": "math-shepherd"}, BODY, None, "math-shepherd"),
        ({"architectures": ["MistralForCausalLM"]}, iter(BODY), "math-shepherd", "math-shepherd"),
        ({"architectures": ["MistralForCausalLM"], "prm_family": None}, BODY, "math-shepherd", "math-shepherd"),
        ({"prm_family": "qwen2.5-math-prm"}, BODY[:2] + HEAD, "math-shepherd", "has score.0.bias"),
        ({"architectures": ["LlamaForCausalLM"]}, BODY, None, "cannot be recognised.*--prm-family .known: math-shepherd, qwen"),
        ({"architectures": ["Qwen2ForCausalLM"]}, BODY + VALUE, None, "cannot be recognised"),
        ({"architectures": ["LlamaForCausalLM"]}, None, None, "cannot be recognised"),
        ({}, BODY, None, "no architecture"),
        ({"architectures": 7}, BODY, None, "no architecture"),
        ({"architectures": ["LlamaForCausalLM"]}, BODY, "shepherd", "no PRM family 'shepherd'; known: math-shepherd, qwen"),
        ({"prm_family": ["math-shepherd"]}, BODY, None, "no PRM family"),
        ({"prm_family": ""}, BODY, None, "no PRM family ''"),
        ({"architectures": ["Qwen2ForCausalLM"]}, BODY, "qwen2.5-math-prm", "has none, and the family has score.0.bias"),
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, BODY + HEAD[:3], None, "is not of PRM family qwen2.5-math-prm"),
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, BODY + HEAD, "math-shepherd", "is not of PRM family math-shepherd"),
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, None, "rlhflow", "its architecture, .*, is that of qwen2.5-math-prm"),
        ({"architectures": ["Qwen2ForPrmModel"]}, BODY + VALUE, "value-head", "its architecture, .*, is that of skywork"),
        ({"architectures": ["Qwen2ForPrmModel"]}, BODY, None, "has none, and the family has v_head.summary.bias"),
        ({"architectures": ["Qwen2ForCausalLM"]}, BODY + VALUE, "math-shepherd", "has v_head.summary.bias, v_head.summary.weight"),
        ({"architectures": ["LlamaForCausalLM"]}, BODY + VALUE, "rlhflow", "it has v_head.*, and the family has none"),
        ({"architectures": ["X"]}, [f"extra.{i}" for i in range(9)], "math-shepherd", "extra.5 and 3 more"),
    ],
)
def test_a_family_is_read_from_config_and_tensors(config, tensors, override, family):
    if family in FAMILIES:
        assert recognise(config, tensors, override) == family
    else:
        with pytest.raises(ModelError, match=family):
            recognise(config, tensors, override)


@pytest.mark.parametrize(
    ("config", "tensors", "sign"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, BODY, None),
        ({"architectures": ["Qwen2ForCausalLM"], "prm_family": None}, [*BODY, "model.rotary_emb.inv_freq"], None),
        ({"architectures": ["LlamaForCausalLM"]}, None, None),
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, None, "Qwen2ForProcessRewardModel"),
        ({"architectures": ["Qwen2ForPrmModel"]}, BODY + VALUE, "Qwen2ForPrmModel"),
        ({"architectures": ["LlamaForCausalLM"], "prm_family": "rlhflow"}, BODY, "prm_family 'rlhflow'"),
        ({"architectures": ["MistralForCausalLM"], "prm_family": "x"}, None, "prm_family 'x'"),
        ({"architectures": ["LlamaForCausalLM"]}, BODY + VALUE, "LlamaForCausalLM with v_head.summary.bias, v_head.summary.weight"),
        ({"architectures": ["Qwen2ForCausalLM"]}, ["score.weight", *BODY], "Qwen2ForCausalLM with score.weight"),
    ],
)
def test_a_policy_that_is_a_reward_model_is_refused_with_what_shows_it(config, tensors, sign):
    if sign is None:
        refuse_as_policy(config, tensors, "here")
        return
    with pytest.raises(ModelError) as error:
        refuse_as_policy(config, tensors, "here")
    assert str(error.value) == f"here is a reward model ({sign}) and cannot write: give it as the PRM"


LISTED = {
    "Qwen/Qwen2.5-Math-PRM-7B": "qwen2.5-math-prm",
    "Qwen/Qwen2.5-Math-PRM-72B": "qwen2.5-math-prm",
    "Qwen/Qwen2.5-Math-7B-PRM800K": "qwen2.5-math-prm",
    "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B": "skywork",
    "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B": "skywork",
    "peiyi9979/math-shepherd-mistral-7b-prm": "math-shepherd",
    "RLHFlow/Llama3.1-8B-PRM-Mistral-Data": "rlhflow",
    "RLHFlow/Llama3.1-8B-PRM-Deepseek-Data": "rlhflow",
}


@pytest.mark.parametrize("model", LISTED)
def test_published_prms_are_recognised_and_refused_as_policies_where_they_say_so(shared, model):
    config = json.loads((shared / "model_configs" / "model_configs.json").read_text(encoding="utf-8"))["models"][model]
    family = FAMILIES[LISTED[model]]
    head = set(config["head"].get("tensors", ()))
    assert head == family.head
    tensors = [*BODY, *head]  # Qwen's store an lm_head that nothing reads
    assert recognise(config, tensors, None if family.architectures else family.name) == family.name
    others = [name for name, other in FAMILIES.items() if other.head != family.head]
    for other in others:
        with pytest.raises(ModelError, match="is not of PRM family"):
            recognise(config, tensors, other)
    if family.architectures:
        with pytest.raises(ModelError, match="is a reward model"):
            refuse_as_policy(config, None, model)
    else:
        with pytest.raises(ModelError, match="give --prm-family"):
            recognise(config, tensors)
