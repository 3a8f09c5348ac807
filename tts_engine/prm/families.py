"""The PRM families: their texts, markers and heads as values; `recognise` tells which one a checkpoint is.

Model text never becomes control: the text of a special token, found in a problem or a step, is spelled out as characters.
A new family is one function that binds it to a tokenizer and one entry in FAMILIES.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..models.tokenizer import render_chat
from .spec import PRMSpec, TokenPair, TwoClassHead, ValueHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
QWEN_MARKER = "<extra_0>"
SHEPHERD_TAG = "ки"
QWEN_BOS = "<|endoftext|>"  # by Qwen's configs; their tokenizers name none
SLOTS = "\ue000\ue001\ue002\ue003"  # private-use characters, to find our own contents in a rendered template


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
    skip = len(tokenizer.encode(after, add_special_tokens=False, split_special_tokens=True)) if after else 0
    return tokenizer.encode(after + text, add_special_tokens=False, split_special_tokens=True)[skip:]


def marker_speller(tokenizer: "Tokenizer", marker: int) -> Callable[[list[int]], list[int]]:
    """ids -> ids with each occurrence of `marker` replaced by the tokens of its single characters: the same text, no marker."""
    text = str(tokenizer.convert_ids_to_tokens(marker))
    spelled = [token for character in text for token in encode_plain(tokenizer, character, after="\n")]

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


def own_bos(tokenizer: "Tokenizer") -> list[int]:
    """What the tokenizer puts before every text by itself: its bos, or nothing."""
    return [tokenizer.bos_token_id] if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else []


def special_pattern(tokenizer: "Tokenizer") -> str:
    """A regular expression of the texts that are special tokens; it matches nothing where there are none."""
    return "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special) or "(?!)"


def around_slots(tokenizer: "Tokenizer", turns: Iterable[tuple[str, str]], family: str) -> list[str]:
    """What the tokenizer's own chat template writes before, between and behind those contents of `turns` that are slots.

    turns: (role, content). The template is rendered once; a template that asks for the date always gets the same one.
    Raises ModelError where there is no template, or it does not show each slot once and in order.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"PRM family {family} is read inside a chat, and this tokenizer has no chat template")
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        rendered = render_chat(tokenizer, messages)
    except ModelError as error:
        raise ModelError(f"PRM family {family} is read inside a chat, and this tokenizer's template {error}") from error
    texts = re.split(f"([{SLOTS}])", rendered)
    if texts[1::2] != [message["content"] for message in messages if message["content"] in SLOTS]:
        raise ModelError(f"this tokenizer's chat template does not show the problem, then the solution; family {family} needs both")
    return texts[::2]


def framed(tokenizer: "Tokenizer", before: str, after: str) -> Callable[[str], list[int]]:
    """text -> ids of `before` + text + `after`; special tokens stand in the frame, and only there.

    What the frame says between the text and the nearest special token is tokenised together with the text.
    """
    special = special_pattern(tokenizer)
    *head, lead = re.split(f"({special})", before)
    trail, *tail = re.split(f"({special})", after)
    head_ids, tail_ids = (tokenizer.encode("".join(t), add_special_tokens=False, split_special_tokens=False) for t in (head, tail))

    def ids(text: str) -> list[int]:
        return head_ids + encode_plain(tokenizer, lead + text + trail) + tail_ids

    return ids


def bind_qwen_math_prm(tokenizer: "Tokenizer") -> PRMSpec:
    """Chat whose assistant turn is each step followed by <extra_0>; the turn is never closed, so a step can always follow.

    Equal to the tokenizer's ids of the whole chat up to the last marker: a special token ends every piece, and a stripped
    step cannot merge with the line end of the assistant's header.
    """
    family = "qwen2.5-math-prm"
    marker = single_token(tokenizer, QWEN_MARKER, family)
    without_marker = marker_speller(tokenizer, marker)
    before, between, _ = around_slots(tokenizer, [("system", QWEN_SYSTEM), ("user", SLOTS[0]), ("assistant", SLOTS[1])], family)
    chat = framed(tokenizer, before, between)

    def opening(problem: str) -> list[int]:
        return without_marker(chat(problem))

    def step(text: str, first: bool) -> list[int]:
        return [*without_marker(encode_plain(tokenizer, text.strip())), marker]

    return PRMSpec(family=family, opening=opening, step=step, read_at=-1, readout=TwoClassHead())


def bind_math_shepherd(tokenizer: "Tokenizer") -> PRMSpec:
    """`{problem} {step 1} ки\\n{step 2} ки\\n...`, problem and steps stripped, scored at the tag before each line end.

    Equal to the tokenizer's ids of the whole string, in Mistral's vocabulary too: no piece reaches from a word into the space
    behind it, none across a line end. The first step carries the space that parts it from the problem, so its ids are not those
    of the same text later on. Two exceptions, and a blank problem, which no search has. The tag is an ordinary word here: where a
    problem or a step says " ки" itself, the whole string would hold a tag that ends no step, so that word is spelled with other
    tokens (▁, к, и). And SentencePiece's own space mark ▁, written out at the end of a problem or the start of a first step, does
    not merge with the space between them.
    """
    family = "math-shepherd"
    tag, plus, minus = (single_token(tokenizer, text, family) for text in (SHEPHERD_TAG, "+", "-"))
    ending = encode_plain(tokenizer, f" {SHEPHERD_TAG}\n", after="\n")
    if ending.count(tag) != 1:
        raise ModelError(f"PRM family {family} needs a tokenizer that writes {SHEPHERD_TAG!r} behind a step as token {tag}; "
                         f"this one writes {ending}")  # fmt: skip
    read_at = ending.index(tag) - len(ending)
    without_marker = marker_speller(tokenizer, tag)
    bos = own_bos(tokenizer)

    def opening(problem: str) -> list[int]:
        return bos + without_marker(encode_plain(tokenizer, problem.strip()))

    def step(text: str, first: bool) -> list[int]:
        ids = encode_plain(tokenizer, f"{' ' * first}{text.strip()} {SHEPHERD_TAG}\n", after="\n")
        return without_marker(ids[:read_at]) + ids[read_at:]

    return PRMSpec(family=family, opening=opening, step=step, read_at=read_at, readout=TokenPair(plus, minus))


def bind_rlhflow(tokenizer: "Tokenizer") -> PRMSpec:
    """Chat in which each step is a turn of the user and "+" the assistant's answer; the first turn is `{problem} {step 1}`.

    Scored at the end of the assistant's header, where "+" or "-" would come next. That answer and the header of the next turn
    open the next step's ids, so nothing stands behind a read position until a step follows.

    Equal to the tokenizer's ids of the whole chat up to the last assistant's header, in Llama 3's vocabulary: special tokens end
    every turn, no piece reaches from a header's line ends into a stripped step or from the problem into the space behind it. The
    template trims its turns, so white space at the problem's start goes; were the first step empty, it would trim the end too.
    """
    family = "rlhflow"
    plus, minus = (single_token(tokenizer, text, family) for text in "+-")
    before, to_answer, to_step, again, _ = around_slots(tokenizer, zip(("user", "assistant") * 2, SLOTS, strict=True), family)
    opened, answered = framed(tokenizer, before, ""), framed(tokenizer, "", to_answer)
    followed = framed(tokenizer, "+" + to_step, to_answer)

    def opening(problem: str) -> list[int]:
        return opened(problem.lstrip())

    def step(text: str, first: bool) -> list[int]:
        return answered(f" {text.strip()}".rstrip()) if first else followed(text.strip())

    spec = PRMSpec(family=family, opening=opening, step=step, read_at=-1, readout=TokenPair(plus, minus))
    sample = tokenizer.encode(f"{before}1+1? So 2.{to_answer}+{to_step}Yes.{to_answer}+", add_special_tokens=False)
    special = special_pattern(tokenizer)
    set_off = to_answer == again and re.match(special, to_answer) and re.match(special, to_step)
    if not set_off or [*spec.render("1+1?", ["So 2.", "Yes."])[0], plus] != sample:
        raise ModelError(f"PRM family {family} needs a chat template that ends each turn with a special token")
    return spec


def bind_skywork(tokenizer: "Tokenizer") -> PRMSpec:
    """`{bos}{problem}\n`, then each step on one line of its own, scored at its line end: sigmoid of a value head.

    Line ends inside a step become spaces, so a step has one line end. It is always the same token: a step's text is tokenised
    alone. Qwen's tokenizers name no bos; the published inference code puts Qwen's there.
    """
    family = "skywork"
    bos = single_token(tokenizer, tokenizer.bos_token or QWEN_BOS, family)
    line_end = single_token(tokenizer, "\n", family)

    def opening(problem: str) -> list[int]:
        return [bos, *encode_plain(tokenizer, problem + "\n")]

    def step(text: str, first: bool) -> list[int]:
        return [*encode_plain(tokenizer, text.replace("\n", " ").strip()), line_end]

    return PRMSpec(family=family, opening=opening, step=step, read_at=-1, readout=ValueHead())


def bind_value_head(tokenizer: "Tokenizer") -> PRMSpec:
    """Problem and line end, then each step and a blank line, scored at its end: sigmoid of a value head, on any decoder.

    Problem, steps and blank lines are tokenised apart, as whoever trains on labelled steps does; the whole text's own tokens
    may reach from a step into the blank line. Blank lines inside a step become line ends.
    """
    family = "value-head"
    ending = encode_plain(tokenizer, "\n\n", after="a")  # a letter: no piece reaches from one into a line end
    bos = own_bos(tokenizer)

    def opening(problem: str) -> list[int]:
        return bos + encode_plain(tokenizer, problem + "\n")

    def step(text: str, first: bool) -> list[int]:
        return encode_plain(tokenizer, re.sub(r"\n\s*\n", "\n", text.strip()), after="\n") + ending

    return PRMSpec(family=family, opening=opening, step=step, read_at=-1, readout=ValueHead())


FAMILIES: dict[str, PRMFamily] = {
    family.name: family
    for family in (
        PRMFamily(name="qwen2.5-math-prm", architectures=("Qwen2ForProcessRewardModel",),
                  head=TwoClassHead().tensors, bind=bind_qwen_math_prm),
        PRMFamily(name="math-shepherd", architectures=(), head=frozenset(), bind=bind_math_shepherd),
        PRMFamily(name="rlhflow", architectures=(), head=frozenset(), bind=bind_rlhflow),
        PRMFamily(name="skywork", architectures=("Qwen2ForPrmModel",), head=ValueHead().tensors, bind=bind_skywork),
        PRMFamily(name="value-head", architectures=(), head=ValueHead().tensors, bind=bind_value_head),
    )
}  # fmt: skip


def recognise(config: Mapping[str, Any], tensor_names: Iterable[str] | None, override: str | None = None) -> str:
    """The family of a checkpoint: `override`, else the config's "prm_family", else its architecture; never its path.

    Whatever named the family, neither the architecture nor the tensors beside the causal language model's may be another's.
    tensor_names: None where there are no tensors yet, because they will be random. Raises ModelError with one sentence.
    """
    known = ", ".join(sorted(FAMILIES))
    architecture, claimed = architecture_of(config)
    name = override if override is not None else config.get("prm_family")
    if name is None:
        name = claimed
    if name is None:
        raise ModelError(f"this checkpoint ({architecture}) cannot be recognised as a PRM: neither its architecture nor "
                         f'"prm_family" in its config.json names a family; give --prm-family (known: {known})')  # fmt: skip
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(f"no PRM family {name!r}; known: {known}")
    if claimed not in (None, name):
        raise ModelError(f"this checkpoint is not of PRM family {name}: its architecture, {architecture}, is that of {claimed}")
    head = FAMILIES[name].head if tensor_names is None else beyond_language_model(tensor_names)
    if head != FAMILIES[name].head:
        raise ModelError(f"this checkpoint ({architecture}) is not of PRM family {name}: beside the language model's tensors "
                         f"it has {listed(head)}, and the family has {listed(FAMILIES[name].head)}")  # fmt: skip
    return name


def refuse_as_policy(config: Mapping[str, Any], tensor_names: Iterable[str] | None, source: str) -> None:
    """Raise ModelError where the config or the tensors of a checkpoint that is to write say that it is a reward model."""
    architecture, claimed = architecture_of(config)
    head = beyond_language_model(tensor_names or ())
    if claimed is not None:
        sign = architecture
    elif config.get("prm_family") is not None:
        sign = f"prm_family {config['prm_family']!r}"
    elif head:
        sign = f"{architecture} with {listed(head)}"
    else:
        return
    raise ModelError(f"{source} is a reward model ({sign}) and cannot write: give it as the PRM")


def architecture_of(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The architectures that a config names, for a sentence, and the family that they mean by themselves, if they do."""
    names = config.get("architectures")
    architecture = ", ".join(map(str, names)) if isinstance(names, list) and names else "no architecture"
    return architecture, next((f.name for f in FAMILIES.values() if architecture in f.architectures), None)


def beyond_language_model(tensor_names: Iterable[str]) -> frozenset[str]:
    """The tensors that no causal language model has: a head. Rotary frequencies, which old checkpoints store, are nobody's."""
    return frozenset(n for n in tensor_names if not n.startswith(("model.", "lm_head.")) and not n.endswith(".inv_freq"))


def listed(tensors: Iterable[str], most: int = 6) -> str:
    """A few names for a sentence."""
    names = sorted(tensors)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
