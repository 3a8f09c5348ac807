"""What a model is and whether two of them fit, from their config.json alone."""

import json

import pytest

from tts_engine.cli import main
from tts_engine.errors import ModelError
from tts_engine.report import info
from tts_engine.report.text import short

# Qwen2.5-0.5B and -1.5B, whose parameters are known: 494,032,768 and 1,543,714,304.
SMALL = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
LARGE = SMALL | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
WEIGHTS, TOKEN = 2 * (494_032_768 + 1_543_714_304), 2 * 2 * 2 * (24 * 64 + 28 * 128)  # bytes of both in bfloat16; of KV a token


@pytest.fixture
def configs(tmp_path):
    """A directory with a config.json, and a config.json by another name."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "large.json").write_text(json.dumps(LARGE))
    return tmp_path / "small", tmp_path / "large.json"


def run(capsys, *argv):
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_a_directory_and_a_config_are_read_alike(configs):
    directory, _ = configs
    by_directory, by_file = info.model("it", directory), info.model("it", directory / "config.json")
    assert by_directory == by_file and by_file["parameters"] == 494_032_768
    # In int8 a byte for every entry and 16 for every row of the layers' matrices and of the lm_head; the embedding, 49 norms and
    # the biases of 24 layers in bfloat16.
    entries, rows = 24 * 896 * (1152 + 896 + 9728 + 4864) + 151936 * 896, 24 * (1152 + 896 + 9728 + 896) + 151936
    rest = 151936 * 896 + 49 * 896 + 24 * 1152
    int8 = entries + 16 * rows + 2 * rest
    # In fp8 a byte for every entry and 4 for every row of the layers' matrices alone; tied, the lm_head is the embedding.
    fp8 = 24 * 896 * (1152 + 896 + 9728 + 4864) + 4 * 24 * (1152 + 896 + 9728 + 896) + 2 * rest
    assert by_file["weight_bytes"] == {"float32": 4 * 494_032_768, "bfloat16": 2 * 494_032_768, "int8": int8, "fp8": fp8}


# Qwen2.5-72B and -7B, whose parameters are known: 72,706,203,648 and 7,615,616,512.
BIG = SMALL | {"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
               "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
MIDDLE = BIG | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4}  # fmt: skip


def test_a_policy_of_72_billion_beside_a_prm_of_7_fits_141_gb_in_fp8_alone(tmp_path):
    models = []
    for name, config in {"policy": BIG, "prm": MIDDLE}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        models.append(info.model(name, tmp_path / f"{name}.json"))
    assert [model["parameters"] for model in models] == [72_706_203_648, 7_615_616_512]
    room = info.room(models, 141 * 10**9)["dtypes"]
    assert [name for name, held in room.items() if held["fits"]] == ["int8", "fp8"]  # of which a GPU has the latter
    assert 82e9 < room["fp8"]["weight_bytes"] < 86e9 and room["fp8"]["kv_tokens"] > 140_000


@pytest.mark.parametrize(("memory", "tokens"), [
    (WEIGHTS - 1, None), (WEIGHTS, None), (WEIGHTS + TOKEN - 1, None), (WEIGHTS + TOKEN, 1), (WEIGHTS + 1000 * TOKEN + 5, 1000),
])  # fmt: skip
def test_two_models_fit_where_there_is_room_for_a_token_of_both(configs, memory, tokens):
    room = info.room([info.model(str(path), path) for path in configs], memory)
    assert room["memory_bytes"] == memory
    assert room["dtypes"]["bfloat16"] == {"weight_bytes": WEIGHTS, "fits": tokens is not None, "kv_tokens": tokens or 0}
    assert room["dtypes"]["float32"] == {"weight_bytes": 2 * WEIGHTS, "fits": False, "kv_tokens": 0}


@pytest.mark.parametrize(("text", "size"), [
    ("24GB", 24 * 10**9), ("24 gb", 24 * 10**9), ("24GiB", 24 << 30), ("23.5GiB", 47 << 29), ("24G", 24 << 30),
    ("0.5TB", 5 * 10**11), ("25769803776", 24 << 30),
])  # fmt: skip
def test_the_command_line_tells_whether_a_pair_fits(capsys, configs, monkeypatch, text, size):
    monkeypatch.chdir(configs[1].parent)
    code, out, _ = run(capsys, "info", "--policy", "small", "--prm", "large.json", "--memory", text, "--json")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and [model["name"] for model in report["models"]] == ["small", "large.json"]
    assert report["room"]["memory_bytes"] == size
    assert report["room"]["dtypes"]["bfloat16"]["kv_tokens"] == (size - WEIGHTS) // TOKEN
    assert {" small", " large.json"} <= {line.rstrip() for line in out.splitlines()}
    assert f"fit {short(size)}B" in out and "KV tokens" in out and "494 M" in out and "yes" in out and "4.08 G" in out


def test_without_a_memory_the_weights_are_told_and_nothing_is_said_of_room(capsys, configs):
    code, out, _ = run(capsys, "info", "--policy", configs[0], "--json")
    assert code == 0 and "988 M" in out and "KV tokens" not in out
    nothing = {"fits": None, "kv_tokens": None}
    sizes = info.model("it", configs[0])["weight_bytes"]
    assert list(sizes) == ["float32", "bfloat16", "int8", "fp8"] and sizes["float32"] == 4 * 494_032_768
    dtypes = {name: {"weight_bytes": size} | nothing for name, size in sizes.items()}
    assert json.loads(out.splitlines()[-1])["room"] == {"memory_bytes": None, "dtypes": dtypes}


@pytest.mark.parametrize("text", ["", "much", "-4G", "4 T", "80GBB", "0", "1e9", "80,5GB", "9" * 400, "²GB", "nan"])
def test_a_bad_size_is_one_sentence(capsys, configs, text):
    code, out, err = run(capsys, "info", "--policy", configs[0], f"--memory={text}")
    assert (code, out) == (2, "")
    assert f"{text!r} is not a size of memory such as 80GB, 141GiB or a number of bytes" in err and err.count("\n") == 1


@pytest.mark.parametrize(("content", "words"), [
    ("{", "cannot be read"), ("[]", "JSON object"), ('{"architectures": ["GemmaForCausalLM"]}', "unknown architecture 'Gemma"),
    (json.dumps(SMALL | {"num_hidden_layers": 10**9}), "num_hidden_layers must be a whole number from 1 to 4096"),
])  # fmt: skip
def test_a_bad_config_is_one_sentence_with_its_path(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelError) as caught:
        info.model("it", path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_memory_without_a_model_is_one_sentence(capsys):
    code, out, err = run(capsys, "info", "--memory", "80GB")
    assert (code, out, err) == (2, "", "error: --memory is for models that are named: give --policy, --prm or both\n")
