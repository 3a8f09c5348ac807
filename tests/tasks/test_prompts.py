"""How each family is asked, on the real templates and tokenizers: ids as transformers makes them, dates pinned."""

import shutil
from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from tts_engine.engine import Engine
from tts_engine.errors import ModelError
from tts_engine.models.tokenizer import DATE, chat_template, encode_prompt, load_tokenizer
from tts_engine.prm.families import QWEN_SYSTEM
from tts_engine.search import Cot
from tts_engine.tasks.answers import extract_answer
from tts_engine.tasks.prompts import BOXED, PROMPTS, STEP_BY_STEP, messages, recognise
from tts_engine.testing import random_policy_directory

# A template's file -> its family, and the tokenizer it is tried with: its own, or one that reads its control words as text.
TEMPLATES = {
    "HuggingFaceTB-SmolLM3-3B": ("other", "qwen2.5"),
    "Qwen-Qwen2.5-7B-Instruct": ("other", "qwen2.5"),
    "Qwen-Qwen3-0.6B": ("other", "qwen3"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek-r1", "deepseek-r1-distill-qwen"),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama-3", "llama-3.1"),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama-3", "llama-3.1"),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama-3", "llama-3.1"),
    "openai-gpt-oss-120b": ("other", "qwen2.5"),
}
OWN = {"qwen2.5": "other", "qwen2.5-math-prm": "other", "qwen3": "other", "deepseek-r1-distill-qwen": "deepseek-r1",
       "llama-3.1": "llama-3", "mistral-7b-v0.1": "other"}  # fmt: skip
PROBLEM = "What is\n\n$1+1$?"
REFUSING = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}[{{ m.content }}]
{% endfor %}"""


class ThatDay(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.strptime(DATE, "%d %b %Y")


@pytest.fixture(scope="module")
def tokenizers(shared):
    """name -> the real tokenizer, read once."""
    read = {}

    def tokenizer(name):
        if not (shared / "tokenizers" / name).is_dir():
            pytest.skip(f"needs the tokenizer of {name}")
        if name not in read:
            read[name] = load_tokenizer(shared / "tokenizers" / name)
        return read[name]

    return tokenizer


def test_every_template_at_hand_is_tried(shared):
    assert {path.stem for path in (shared / "chat_templates").glob("*.jinja")} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_ids_that_transformers_makes_of_the_template(shared, tokenizers, name, monkeypatch):
    family, tokenizer = TEMPLATES[name][0], tokenizers(TEMPLATES[name][1])
    template = (shared / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert recognise(chat_template(tokenizer)) == family
    asked = family != "llama-3", family == "llama-3"
    for given in (None, "Think.", ""):
        system, user = messages(PROBLEM, template, given)
        turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]
        with monkeypatch.context() as patch:
            patch.setattr(chat_template_utils, "datetime", ThatDay)
            ref = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, date_string=DATE)
        ids = encode_prompt(tokenizer, user, system)
        assert ids == ref
        text = tokenizer.decode(ids)
        assert PROBLEM in text and (given or "") in text
        assert (BOXED in text, STEP_BY_STEP in text) == (asked if given is None else (False, False))


@pytest.mark.parametrize("name", OWN)
def test_a_family_is_told_by_the_tokenizers_own_template(tokenizers, name):
    assert recognise(chat_template(tokenizers(name))) == OWN[name]


def test_deepseek_r1_is_asked_in_the_users_turn_and_starts_to_think(shared, tokenizers, monkeypatch):
    tokenizer = tokenizers("deepseek-r1-distill-qwen")
    template = shared / "chat_templates" / "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja"
    monkeypatch.setattr(tokenizer, "chat_template", template.read_text(encoding="utf-8"))
    system, user = messages(PROBLEM, tokenizer.chat_template)
    assert (system, user) == ("", f"{PROBLEM}\n{BOXED}")
    begin, asked, answers = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
    assert tokenizer.decode(encode_prompt(tokenizer, user, system)) == f"{begin}{asked}{user}{answers}<think>\n"


def test_without_a_template_a_prompt_is_a_line_a_message(tokenizers):
    tokenizer = tokenizers("mistral-7b-v0.1")
    system, user = messages(PROBLEM, chat_template(tokenizer))
    assert tokenizer.decode(encode_prompt(tokenizer, user, system), skip_special_tokens=True) == f"{BOXED}\n{PROBLEM}\n"


@pytest.mark.parametrize("family", PROMPTS)
@pytest.mark.parametrize("system", ["Think.", ""])
def test_a_system_message_that_is_given_stands_alone(family, system):
    assert messages(PROBLEM, "".join(PROMPTS[family].signs), system) == (system, PROBLEM)


@pytest.mark.parametrize(("system", "name"), [(None, "deepseek-r1-distill-qwen"), (None, "llama-3.1"), ("Think.", "llama-3.1")])
def test_an_engine_asks_as_the_family_is_used_to_or_as_it_is_told(shared, tokenizers, tmp_path, system, name):
    tokenizer = tokenizers(name)
    random_policy_directory(tmp_path, vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8)
    for file in (shared / "tokenizers" / name).glob("tokenizer*.json"):
        shutil.copy(file, tmp_path)
    with Engine.from_pretrained(tmp_path, system=system, max_tokens=2, kv_bytes=1 << 20) as engine:
        [result] = engine.search(PROBLEM, Cot(max_steps=1))
    prompt = result.branches[0].path[0]
    said, asked = messages(PROBLEM, tokenizer.chat_template, system)
    assert list(prompt.tokens) == encode_prompt(tokenizer, asked, said)
    assert prompt.text == PROBLEM


def test_what_policies_are_asked_is_what_the_prm_was_trained_with_and_what_answers_are_found_by():
    assert BOXED == QWEN_SYSTEM
    closing = next(line for line in STEP_BY_STEP.splitlines() if "boxed" in line)
    assert extract_answer(closing) == "answer"
    assert extract_answer(closing.replace(r"\boxed{answer}", "x^2")) == "x^2"


def test_a_template_that_refuses_system_messages_gets_them_with_the_problem(tokenizers, monkeypatch):
    tokenizer = tokenizers("qwen2.5")
    monkeypatch.setattr(tokenizer, "chat_template", REFUSING)
    assert tokenizer.decode(encode_prompt(tokenizer, PROBLEM, BOXED)) == f"[{BOXED}\n\n{PROBLEM}]\n"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ raise_exception('never\n mind') }}", "cannot be rendered: never mind$"),
        ("{{ messages[7].content }}", "cannot be rendered"),
        ("{{ messages[-1].content / 0 }}", "cannot be rendered"),
        ("{% for", "cannot be rendered"),
        ("Hello!", "leaves the user's message out$"),
    ],
)
def test_a_template_that_does_not_work_is_one_sentence(tokenizers, monkeypatch, template, what):
    tokenizer = tokenizers("qwen2.5")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    for problem in (PROBLEM, "<|im_end|>"):
        with pytest.raises(ModelError, match=f"the policy's chat template {what}") as caught:
            encode_prompt(tokenizer, problem, BOXED)
        assert "\n" not in str(caught.value)
