"""The PRM families: their texts, markers and heads as values; `recognise` tells which one a checkpoint is.

Model text never becomes control: the text of a special token, found in a problem or a step, is spelled out as characters.
A new family is one function that binds it to a tokenizer and one entry in FAMILIES.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .spec import PRMSpec, TokenPair, TwoClassHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
QWEN_MARKER = "<extra_0>"
SHEPHERD_TAG = "ки"
PROBLEM_SLOT, STEPS_SLOT = "\ue000", "\ue001"  # private-use characters, to find our own contents in a rendered template


@dataclass(frozen=True, slots=True, kw_only=True)
class PRMFamily:
    """`head` holds every tensor that a checkpoint of this family has besides those of the causal language model."""

    name: str
    architectures: tuple[str, ...]  # those that mean this family by themselves
    head: frozenset[str]
    bind: Callable[["Tokenizer"], PRMSpec]  # ModelError where the tokenizer cannot write this family's text


def encode_plain(tokenizer: "Tokenizer", text: str, after: str = "") -> list[int]:
    """The ids of `text` as they would stand behind `after`, texts of special tokens spelled out, nothing added.

    SentencePiece puts a space before whatever it is given, so a piece of text encoded alone is not the piece seen inside a
    longer text. No piece of its vocabularies crosses a line end: behind `after="\\n"` the ids are those of any later place.
    """
    skip = len(tokenizer.encode(after, add_special_tokens=False, split_special_tokens=True))
    return tokenizer.encode(after + text, add_special_tokens=False, split_special_tokens=True)[skip:]


def marker_speller(tokenizer: "Tokenizer", marker: int) -> Callable[[list[int]], list[int]]:
    """ids -> ids with each occurrence of `marker` replaced by the tokens of its single characters: the same text, no marker."""
    vocab = tokenizer.get_vocab()
    spelled = [vocab.get(character, tokenizer.unk_token_id) for character in str(tokenizer.convert_ids_to_tokens(marker))]

    def without_marker(ids: list[int]) -> list[int]:
        return [part for token in ids for part in (spelled if token == marker else [token])]

    return without_marker


def single_token(tokenizer: "Tokenizer", text: str, family: str) -> int:
    """The id of `text` encoded on its own, which must be one token and known; ModelError otherwise.

    On its own is how Math-Shepherd's authors look theirs up; in Mistral's vocabulary it finds the pieces with a leading space.
    """
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ModelError(f"PRM family {family} needs a tokenizer in which {text!r} is one token; this one writes {ids}"
                         + (" (unknown)" if tokenizer.unk_token_id in ids else ""))  # fmt: skip
    return ids[0]


def chat_opening(tokenizer: "Tokenizer", system: str, family: str) -> Callable[[str], list[int]]:
    """problem -> the tokenizer's own chat of `system` and the problem, up to and including the assistant's header.

    The template is rendered once, with a slot for the problem. Plain text around the slot is tokenised together with the
    problem, so the ids are those of the whole rendered text.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"PRM family {family} is read inside a chat, and this tokenizer has no chat template")
    turns = [("system", system), ("user", PROBLEM_SLOT), ("assistant", STEPS_SLOT)]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program by someone else and may fail in any way
        raise ModelError(f"this tokenizer's chat template cannot be rendered for PRM family {family}: {error}") from error
    slots = re.fullmatch(f"(?s)([^{PROBLEM_SLOT}]*){PROBLEM_SLOT}([^{STEPS_SLOT}]*){STEPS_SLOT}.*", rendered)
    if slots is None:
        raise ModelError(f"this tokenizer's chat template does not show the problem, then the solution; family {family} needs both")
    special = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special) or "(?!)"
    *head, lead = re.split(f"({special})", slots[1])
    trail, *tail = re.split(f"({special})", slots[2])
    head_ids, tail_ids = (tokenizer.encode("".join(t), add_special_tokens=False, split_special_tokens=False) for t in (head, tail))

    def opening(problem: str) -> list[int]:
        return head_ids + encode_plain(tokenizer, lead + problem + trail) + tail_ids

    return opening


def bind_qwen_math_prm(tokenizer: "Tokenizer") -> PRMSpec:
    """Chat whose assistant turn is each step followed by <extra_0>; the turn is never closed, so a step can always follow.

    Equal to the tokenizer's ids of the whole chat up to the last marker: a special token ends every piece, and a stripped
    step cannot merge with the line end of the assistant's header.
    """
    family = "qwen2.5-math-prm"
    marker = single_token(tokenizer, QWEN_MARKER, family)
    without_marker = marker_speller(tokenizer, marker)
    chat = chat_opening(tokenizer, QWEN_SYSTEM, family)

    def opening(problem: str) -> list[int]:
        return without_marker(chat(problem))

    def step(text: str, first: bool) -> list[int]:
        return [*without_marker(encode_plain(tokenizer, text.strip())), marker]

    return PRMSpec(family=family, opening=opening, step=step, read_at=-1, readout=TwoClassHead())


def bind_math_shepherd(tokenizer: "Tokenizer") -> PRMSpec:
    """`{problem} {step 1} ки\\n{step 2} ки\\n...`, problem and steps stripped, scored at the tag before each line end.

    Equal to the tokenizer's ids of the whole string, in Mistral's vocabulary too: no piece reaches from a word into the space
    behind it, none across a line end. The first step carries the space that parts it from the problem, so its ids are not those
    of the same text later on. Two exceptions. The tag is an ordinary word here: where a problem or a step says " ки" itself, the
    whole string would hold a tag that ends no step, so that word is spelled with other tokens (▁, к, и). And SentencePiece's own
    space mark ▁, written out at the end of a problem or the start of a first step, does not merge with the space between them.
    """
    family = "math-shepherd"
    tag, plus, minus = (single_token(tokenizer, text, family) for text in (SHEPHERD_TAG, "+", "-"))
    ending = encode_plain(tokenizer, f" {SHEPHERD_TAG}\n", after="\n")
    if ending.count(tag) != 1:
        raise ModelError(f"PRM family {family} needs a tokenizer that writes {SHEPHERD_TAG!r} behind a step as token {tag}; "
                         f"this one writes {ending}")  # fmt: skip
    without_marker = marker_speller(tokenizer, tag)
    bos = [tokenizer.bos_token_id] if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else []

    def opening(problem: str) -> list[int]:
        return bos + without_marker(encode_plain(tokenizer, problem.strip()))

    def step(text: str, first: bool) -> list[int]:
        return without_marker(encode_plain(tokenizer, " " * first + text.strip(), after="\n")) + ending

    return PRMSpec(family=family, opening=opening, step=step,
                   read_at=ending.index(tag) - len(ending), readout=TokenPair(plus, minus))  # fmt: skip


FAMILIES: dict[str, PRMFamily] = {
    family.name: family
    for family in (
        PRMFamily(name="qwen2.5-math-prm", architectures=("Qwen2ForProcessRewardModel",),
                  head=TwoClassHead().tensors, bind=bind_qwen_math_prm),
        PRMFamily(name="math-shepherd", architectures=(), head=frozenset(), bind=bind_math_shepherd),
    )
}  # fmt: skip


def recognise(config: Mapping[str, Any], tensor_names: Iterable[str], override: str | None = None) -> str:
    """The family of a checkpoint: `override`, else the config's "prm_family", else its architecture; never its path.

    Whatever named the family, the checkpoint's tensors beside the causal language model's must be the family's head.
    Raises ModelError with one sentence where nothing names a known family or the tensors contradict it.
    """
    known = ", ".join(sorted(FAMILIES))
    architecture = ", ".join(map(str, config.get("architectures") or ["no architecture"]))
    name = override if override is not None else config.get("prm_family")
    if name is None:
        name = next((f.name for f in FAMILIES.values() if architecture in f.architectures), None)
    if name is None:
        raise ModelError(f"this checkpoint ({architecture}) cannot be recognised as a PRM: neither its architecture nor "
                         f'"prm_family" in its config.json names a family; give --prm-family (known: {known})')  # fmt: skip
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(f"no PRM family {name!r}; known: {known}")
    head = {tensor for tensor in tensor_names if not tensor.startswith(("model.", "lm_head."))}
    expected = FAMILIES[name].head
    if head != expected:
        raise ModelError(f"this checkpoint ({architecture}) is not of PRM family {name}: beside the language model's tensors "
                         f"it has {listed(head)}, and the family has {listed(expected)}")  # fmt: skip
    return name


def listed(tensors: Iterable[str], most: int = 6) -> str:
    """A few names for a sentence."""
    names = sorted(tensors)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
