"""Text to token ids and back: the checkpoint's own tokenizer and chat template, and the bytes each id stands for."""

import json
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from time import thread_time
from typing import Any

from jinja2 import Environment

from ..errors import ModelError
from .spec import LARGEST
from .weights import read_json

# Templates write today's date into the prompt. Some can be told one, and this is the default that Llama's carry; the others ask
# for the time, and are given a clock that stands still.
DATE = "26 Jul 2024"
_CLOCK = "".join(f"|replace('%{c}','{datetime.strptime(DATE, '%d %b %Y'):%{c}}')" for c in "aAbBdHIjmMpSyY")
STOPPED_CLOCK = f"{{% macro strftime_now(form) %}}{{{{ form{_CLOCK} }}}}{{% endmacro +%}}"
ODD = "a \x00\u00e9\U0010ffff\n"  # what a vocabulary may lack: one that cannot do without fails at once, not in a search
LONGEST_TEMPLATE = 1 << 20  # characters
RENDER_SECONDS, RENDER_BYTES = 3, 256 << 20
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer (transformers' fast class, no remote code). Raises ModelError if it cannot be read.

    A tokenizer.json is read as it stands. AutoTokenizer chooses a class by the *model's* type first, and that class may put its
    own splitting rules over the file's (a Qwen2 model with any other tokenizer): it is asked only where there is no such file.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((Path(directory) / name).is_file() for name in VOCABULARIES):  # transformers would make an empty one up
        raise ModelError(f"{directory} holds no tokenizer; expected tokenizer.json")
    strange = next((p for p in Path(directory).iterdir() if p.exists() and not (p.is_file() or p.is_dir())), None)
    if strange is not None:  # whoever opens a pipe may wait for ever
        raise ModelError(f"{strange} is not a file; take it out of the checkpoint")
    loader = PreTrainedTokenizerFast if (Path(directory) / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(Path(directory), trust_remote_code=False, local_files_only=True)
        tokenizer(ODD)
        _ = tokenizer.all_special_ids
    except Exception as error:  # transformers raises a dozen types here, from OSError to the Rust side's bare Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{directory} holds no tokenizer that can be read, expected tokenizer.json: {reason}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{directory} has only a slow tokenizer; expected a tokenizer.json")
    return tokenizer


def chat_template(tokenizer: Any) -> str | None:
    """The template that a conversation is rendered with; None where the tokenizer has none. Raises ModelError for an odd one."""
    try:
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    except ValueError as error:  # several, and none of them is the default
        raise ModelError(f"the chat template cannot be told: {error}") from error
    if template is not None and not isinstance(template, str):
        raise ModelError(f"the chat template is no text but {template!r}")
    if template is not None and len(template) > LONGEST_TEMPLATE:
        raise ModelError(f"the chat template has {len(template)} characters, and more than {LONGEST_TEMPLATE} are not read")
    return template


def render_chat(tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it, dates pinned.

    A template is a program by someone else. It runs in transformers' sandbox, and is stopped where it takes RENDER_SECONDS of a
    processor, or memory grows by RENDER_BYTES: both are looked at from line to line of what it is compiled to, and from call to
    call. A single operation is not interrupted; the one that can take for ever, a power, is not allowed. Raises ModelError.
    """
    try:
        template = STOPPED_CLOCK + (chat_template(tokenizer) or "")
        if any(kind == "operator" and value == "**" for _, kind, value in Environment().lex(template)):
            raise ModelError("it raises to a power")
        with _bounded():
            return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, date_string=DATE,
                                                     add_generation_prompt=add_generation_prompt))  # fmt: skip
    except Exception as error:  # it may fail in any way
        raise ModelError(f"cannot be rendered: {' '.join(str(error).split()) or type(error).__name__}") from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop what runs inside where it takes too long or too much. Whoever traced this thread before does so again behind it."""
    traced, deadline = sys.gettrace(), thread_time() + RENDER_SECONDS
    most = _peak_bytes() + RENDER_BYTES

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if thread_time() > deadline:
            raise TimeoutError(f"it takes more than {RENDER_SECONDS} seconds")
        if _peak_bytes() > most:
            raise MemoryError(f"it takes more than {RENDER_BYTES >> 20} MiB")
        return watch if frame.f_code.co_filename == "<template>" else None

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(traced)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def encode_prompt(tokenizer: Any, user: str, system: str = "") -> list[int]:
    """Ids of the prompt up to where the policy starts to write: the chat template where there is one, else a line a message.

    Made once for a problem: whatever the policy writes is appended as the ids that it drew. Rendering the conversation again would
    lose some of it, for templates rewrite what an assistant said (DeepSeek-R1's leaves out all that was thought).

    Text of a control token (one that the checkpoint marks special, or that its template writes) stays text inside a message: the
    pieces around it are then encoded apart, so a merge across their borders is lost in that case only. A template that refuses a
    system message has it at the head of the user's. Raises ModelError for a template that fails, or shows no message of the user.
    """
    template = chat_template(tokenizer)
    if template is None:
        text = "".join(f"{message}\n" for message in (system, user) if message)
        return tokenizer(text, split_special_tokens=True)["input_ids"]
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special]
    written = [token.content for token in added if not token.special and token.content in template]
    shown, apart = [system, user], {}  # placeholder -> the content that stands there
    for i, content in enumerate(shown):
        if any(control in content for control in special + written):
            shown[i] = f"\ue000{i}\ue000"
            apart[shown[i]] = content
    text = _render(tokenizer, *shown)
    ids: list[int] = []
    for placeholder, content in apart.items():
        before, _, text = text.partition(placeholder)
        ids += _encode(tokenizer, before) + _encode_plain(tokenizer, content, written)
    return ids + _encode(tokenizer, text)


def end_ids(tokenizer: Any, directory: Path) -> list[int]:
    """Every id that ends a text: the tokenizer's, and those of generation_config.json and config.json (a number or a list)."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        if path.is_file():
            value = read_json(path).get("eos_token_id")
            ids = value if isinstance(value, list) else [value]
            if not all(token is None or type(token) is int for token in ids):
                raise ModelError(f"{path}: eos_token_id must be a whole number or a list of them, got {value!r}")
            found.update(ids)
    return sorted(found - {None})


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes each id adds to the text, b"" for special tokens and unused ids; joined, they are what `decode` returns.

    Three kinds of vocabulary, told apart by the tokenizer's decoder: byte-level BPE (GPT-2's alphabet), SentencePiece (the
    underline for a space, <0xNN> for a byte; its decoder also drops one space at the very start of a text, which belongs to no
    token), and plain text. Ids that a model's padded embedding has beyond the tokenizer's are not in the list.
    """
    spell = _spelling(tokenizer)
    pieces = tokenizer.get_vocab()
    if max(pieces.values()) >= LARGEST:
        raise ModelError(f"the tokenizer has an id of {max(pieces.values())}; expected ids below {LARGEST}")
    silent = {id for id, added in tokenizer.added_tokens_decoder.items() if added.special}
    table = [b""] * (max(pieces.values()) + 1)
    for piece, id in pieces.items():
        if id not in silent:
            table[id] = spell(piece)
    return table


def _render(tokenizer: Any, system: str, user: str) -> str:
    """The conversation as its template writes it up to the assistant's turn, dates pinned."""
    conversations = [[{"role": "user", "content": user}]]
    if system:
        conversations = [[{"role": "system", "content": system}, *conversations[0]],
                         [{"role": "user", "content": f"{system}\n\n{user}"}]]  # fmt: skip
    reasons = []
    for messages in conversations:
        try:
            text = render_chat(tokenizer, messages, add_generation_prompt=True)
        except ModelError as error:
            reasons.append(str(error))
            continue
        if user.strip() in text:
            return text
        reasons.append("leaves the user's message out")
    raise ModelError(f"the policy's chat template {reasons[0]}")


def _encode(tokenizer: Any, text: str, **options: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=False, **options)["input_ids"] if text else []


def _encode_plain(tokenizer: Any, text: str, written: Sequence[str]) -> list[int]:
    """Ids of `text` without a control token. Those not marked special would be found all the same: their text is cut in two."""
    cuts = "|".join(f"(?<={re.escape(control[0])})(?={re.escape(control[1:])})" for control in written) or "(?!)"
    return [token for piece in re.split(cuts, text) for token in _encode(tokenizer, piece, split_special_tokens=True)]


def _spelling(tokenizer: Any) -> Any:
    """The function from a vocabulary entry to its bytes."""
    decoder = tokenizer.backend_tokenizer.decoder
    step: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "Fuse"}
    steps = step["decoders"] if step["type"] == "Sequence" else [step]
    kinds = {s["type"] for s in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"Metaspace", "ByteFallback"}:
        return _sentence_piece
    if kinds == {"Fuse"}:
        return str.encode
    found = ", ".join(sorted(kinds))
    raise ModelError(f"the tokenizer's decoder ({found}) is unknown; known: ByteLevel, ByteFallback, Metaspace, Fuse")


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


def _byte_level(piece: str) -> bytes:
    """Entries with a character outside the alphabet are added tokens and stand for themselves."""
    alphabet = _byte_alphabet()
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()


def _sentence_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
