"""The embedded models' tokenizer: one token a character, a few specials, the PRM markers. Made here, saved as ordinary HF files."""

import json
from pathlib import Path

from ..prm.families import QWEN_MARKER, SHEPHERD_TAG
from ..tasks.programs import STEP_END

END = "<|endoftext|>"
PAD = "<|pad|>"
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*/%=;?{}\\ .,:()\n"

# A turn is its text and a line end; there are no roles to tell apart, and a system prompt has nothing to say here.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}" + END + "{% endif %}{% endfor %}"
)


def build_tokenizer():
    """The `tokenizers.Tokenizer`: 64 ids at most, a blank line is one token, everything else a character each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = [END, PAD, QWEN_MARKER, SHEPHERD_TAG, "<unk>", STEP_END, *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END, PAD, QWEN_MARKER])
    tokenizer.add_tokens([SHEPHERD_TAG])
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`."""
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
