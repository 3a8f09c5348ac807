"""Bad input of every kind a user can hand over: each is refused in one sentence with exit code 2, soon, and costs no record.

Tables of damages, each with words of its sentence, through the command line as it is called; then a seeded mutator over all the
files, which may meet anything but another kind of exception. --soak multiplies its mutations.
"""

import gc
import json
import os
import random
import re
import shutil
import struct
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tts_engine import cli, options
from tts_engine.embedded.tokenizer import SHEPHERD_TAG
from tts_engine.models.tokenizer import encode_prompt, load_tokenizer
from tts_engine.runs import PROBLEMS, RUN
from tts_engine.testing import random_policy_directory, random_prm_directory, tiny_tokenizer

PROBLEM = "a=47+38;b=a-6;b?"
SMALL = ["--max-step-tokens", "8", "--max-tokens", "24", "--max-steps", "3", "--block-size", "8", "--kv-bytes", "4M"]
LONGEST_SENTENCE = options.LONGEST + 100  # characters, without paths
LONGEST_SECONDS = 30  # for any one refusal, on a machine that is busy with other things
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TASK = [{"id": f"p{i}", "problem": f"a={i}+5;b=a-{i};b?", "answer": "5"} for i in range(4)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A policy, a PRM of two families, a task and a finished run of it; nothing is amiss with any."""
    here = tmp_path_factory.mktemp("sound")
    random_policy_directory(here / "policy")
    random_prm_directory(here / "prm", "math-shepherd")
    random_prm_directory(here / "qwen-prm", "qwen2.5-math-prm")
    (here / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASK))
    assert cli.main(evaluated(here, here / "run")) == 0
    return here


@pytest.fixture
def here(sound, tmp_path):
    """A copy of all that, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "here"))


def solved(here, *more, problem=PROBLEM):
    return ["solve", problem, "--policy", here / "policy", "--method", "cot", "--system", "", *SMALL, *more]


def scored(here, *more, prm="prm"):
    return ["solve", PROBLEM, "--policy", here / "policy", "--prm", here / prm, "--method", "best_of_n", "--n", 2, "--system", "",
            *SMALL, *more]  # fmt: skip


def evaluated(here, out, *more):
    """Deterministic, so that what is done again comes out as it did beside others."""
    models = ["--policy", here / "policy", "--prm", here / "prm", "--deterministic"]
    argv = ["eval", *models, "--task", here / "task.jsonl", "--method", "best_of_n", "--n", 2, "--system", "", *SMALL, "--out", out]
    return [str(argument) for argument in (*argv, *more)]


@pytest.fixture
def call(run, capfd):
    """`run` for an argv in one piece; what was written before it is not the command's."""

    def call(argv):
        capfd.readouterr()
        return run(*argv)

    return call


@pytest.fixture
def refuse(call, here):
    """Run argv; the one sentence that refuses it, which must hold `words` (a regular expression)."""

    def refuse(argv, words):
        started = time.monotonic()
        code, out, err = call(argv)
        assert time.monotonic() - started < LONGEST_SECONDS
        assert code == 2 and not out, (code, out, err)
        sentence = err.replace(str(here), "").removeprefix("error: ")
        assert err.startswith("error: ") and err.count("\n") == 1 and len(sentence) <= LONGEST_SENTENCE, err[:2000]
        assert "Traceback" not in err and re.search(words, sentence), err
        return sentence

    return refuse


def table(*rows):
    """Rows of (name, ...) for parametrize, each called by its name."""
    assert len({row[0] for row in rows}) == len(rows)
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


# --- how things are damaged: file -> what is done to it -------------------------------------------------------------------


def change(**fields):
    """Set fields of a JSON object; `...` takes one away."""

    def damage(file):
        value = json.loads(file.read_text()) if file.exists() else {}
        value.update(fields)
        file.write_text(json.dumps({key: field for key, field in value.items() if field is not ...}))

    return damage


def write(content):
    return lambda file: file.write_bytes(content if isinstance(content, bytes) else content.encode())


def instead(make):
    """Something else at the file's place."""

    def damage(file):
        file.unlink(missing_ok=True)
        make(file)

    return damage


def keep(count):
    return lambda file: file.write_bytes(file.read_bytes()[:count])


def deep(count=100_000):
    return write("[" * count + "]" * count)


def tensors(edit):
    """Change the tensors of a safetensors file by a function on their dictionary."""

    def damage(file):
        held = load_file(file)
        edit(held)
        save_file(held, file)

    return damage


def header(edit):
    """Change a safetensors file's header by a function on its dictionary; a result that is bytes stands for the whole header."""

    def damage(file):
        content = file.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        told = json.loads(content[8 : 8 + size])
        text = edit(told)
        text = json.dumps(told).encode() if text is None else text
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return damage


def template(text):
    return change(chat_template=text)


fifo, directory, gone, empty = instead(os.mkfifo), instead(Path.mkdir), instead(lambda file: None), write("")
dangling = instead(lambda file: file.symlink_to("nowhere"))
circular = instead(lambda file: file.symlink_to(file.name))
garbage = write(random.Random(0).randbytes(5000))

# --- configs --------------------------------------------------------------------------------------------------------------

SIZE = "must be a whole number from"
CONFIGS = table(
    ("missing", gone, "config.json is missing"),
    ("empty", empty, "config.json cannot be read"),
    ("garbage", garbage, "config.json cannot be read"),
    ("not utf-8", write(b'{"architectures": ["\xff\xfe"]}'), "config.json cannot be read"),
    ("utf-16", write('{"vocab_size": 3}'.encode("utf-16")), "config.json cannot be read"),
    ("cut", keep(100), "config.json cannot be read"),
    ("list", write("[]"), "JSON object"),
    ("number", write("1e999"), "JSON object"),
    ("text", write('"config"'), "JSON object"),
    ("nested", deep(), "config.json cannot be read.*nested"),
    ("nested in a field", write('{"architectures": ' + "[" * 50_000 + "]" * 50_000 + "}"), "config.json cannot be read"),
    ("long number", write('{"vocab_size": ' + "9" * 100_000 + "}"), "config.json cannot be read"),
    ("directory", directory, "config.json cannot be read"),
    ("fifo", fifo, "config.json.*not a file|config.json is missing"),
    ("dangling link", dangling, "config.json is missing"),
    ("circular link", circular, "config.json"),
    ("empty object", write("{}"), "names no architecture"),
    ("no architecture", change(architectures=...), "names no architecture"),
    ("architecture null", change(architectures=None), "names no architecture"),
    ("architecture text", change(architectures="Qwen2ForCausalLM"), "names no architecture"),
    ("architecture unknown", change(architectures=["GPT2LMHeadModel"]), "unknown architecture 'GPT2LMHeadModel'; supported: Llama"),
    ("architecture object", change(architectures=[{"a": 1}]), "unknown architecture"),
    ("architecture endless", change(architectures=["A" * 100_000]), "unknown architecture 'AAA"),
    ("remote code alone", change(architectures=["OwnForCausalLM"], auto_map={"AutoConfig": "own.OwnConfig"}),
     "unknown architecture"),
    ("vocab_size missing", change(vocab_size=...), f"vocab_size {SIZE}"),
    ("vocab_size zero", change(vocab_size=0), f"vocab_size {SIZE} 1"),
    ("vocab_size text", change(vocab_size="64"), f"vocab_size {SIZE}"),
    ("vocab_size too small", change(vocab_size=3), "has shape"),
    ("vocab_size absurd", change(vocab_size=10**18), f"vocab_size {SIZE}"),
    ("vocab_size list", change(vocab_size=[64] * 10_000), f"vocab_size {SIZE}"),
    ("hidden_size negative", change(hidden_size=-32), f"hidden_size {SIZE}"),
    ("hidden_size float", change(hidden_size=32.0), f"hidden_size {SIZE}"),
    ("hidden_size true", change(hidden_size=True), f"hidden_size {SIZE}"),
    ("hidden_size null", change(hidden_size=None), f"hidden_size {SIZE}"),
    ("hidden_size 30", change(hidden_size=30), "multiple of num_attention_heads|has shape"),
    ("hidden_size of terabytes", change(hidden_size=1 << 24, vocab_size=1 << 24, head_dim=8), "cannot be held|has shape"),
    ("intermediate_size missing", change(intermediate_size=...), f"intermediate_size {SIZE}"),
    ("intermediate_size absurd", change(intermediate_size=1 << 24), "has shape"),
    ("intermediate_size huge", change(intermediate_size=10**4000), f"intermediate_size {SIZE}"),
    ("no layers", change(num_hidden_layers=0), f"num_hidden_layers {SIZE}"),
    ("too many layers", change(num_hidden_layers=10**9), f"num_hidden_layers {SIZE}"),
    ("more layers than tensors", change(num_hidden_layers=4096, layer_types=None), "no tensor 'model.layers.2"),
    ("layers object", change(num_hidden_layers={}), f"num_hidden_layers {SIZE}"),
    ("no heads", change(num_attention_heads=0), f"num_attention_heads {SIZE}"),
    ("heads do not divide", change(num_attention_heads=5, num_key_value_heads=1), "multiple of num_attention_heads"),
    ("kv heads do not divide", change(num_key_value_heads=3), "multiple of num_key_value_heads"),
    ("more kv heads than heads", change(num_key_value_heads=8), "multiple of num_key_value_heads"),
    ("head_dim odd", change(head_dim=7), "head_dim=7 must be even"),
    ("head_dim negative", change(head_dim=-8), f"head_dim {SIZE}"),
    ("head_dim absurd", change(head_dim=1 << 24), "has shape|cannot be held"),
    ("positions negative", change(max_position_embeddings=-1), f"max_position_embeddings {SIZE}"),
    ("positions text", change(max_position_embeddings="many"), f"max_position_embeddings {SIZE}"),
    ("one position", change(max_position_embeddings=1), "1 positions"),
    ("eps negative", change(rms_norm_eps=-1e-6), "rms_norm_eps must be a positive number"),
    ("eps NaN", change(rms_norm_eps=float("nan")), "rms_norm_eps must be a positive number"),
    ("eps infinite", change(rms_norm_eps=float("inf")), "rms_norm_eps must be a positive number"),
    ("eps object", change(rms_norm_eps={"value": 1}), "rms_norm_eps must be a positive number"),
    ("theta zero", change(rope_parameters=None, rope_theta=0), "rope_theta must be a positive number"),
    ("theta too large", change(rope_parameters=None, rope_theta=10**400), "rope_theta must be a positive number"),
    ("rope list", change(rope_parameters=[1]), "rotary settings must be an object"),
    ("rope unknown", change(rope_parameters={"rope_type": "yarn", "factor": 4}), "unknown rope type 'yarn'"),
    ("rope type object", change(rope_parameters={"rope_type": {"a": []}}), "unknown rope type"),
    ("rope half", change(rope_parameters={"rope_type": "llama3"}), "must be a positive number"),
    ("rope partial", change(partial_rotary_factor=0.25), "partial_rotary_factor"),
    ("activation", change(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    ("activation endless", change(hidden_act=["gelu"] * 10_000), "hidden_act=.* is not supported"),
    ("mlp bias", change(mlp_bias=True), "mlp_bias=true is not supported"),
    ("dtype unknown", change(dtype="int4"), "unknown dtype 'int4'"),
    ("dtype object", change(dtype={"a": 1}), "unknown dtype"),
    ("layer types too few", change(layer_types=["full_attention"]), "layer_types must name"),
    ("layer types endless", change(layer_types="full_attention" * 10_000), "layer_types must name"),
    ("layer types objects", change(layer_types=[{}, {}]), "layer_types must name"),
    ("window binds", change(use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=None),
     "sliding window of 4"),
    ("window text", change(use_sliding_window=True, sliding_window="4", layer_types=None), f"sliding_window {SIZE}"),
    ("a reward model", change(architectures=["Qwen2ForProcessRewardModel"]), "is a reward model"),
    ("a reward model by name", change(prm_family="math-shepherd"), "is a reward model"),
    ("end is text", change(eos_token_id="0"), "eos_token_id"),
    ("end is an object", change(eos_token_id={"id": 0}), "eos_token_id"),
    ("end is nested", change(eos_token_id=[[0]]), "eos_token_id"),
)  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), CONFIGS)
def test_a_bad_config(refuse, here, damage, words):
    damage(here / "policy" / CONFIG)
    refuse(solved(here), words)


@pytest.mark.parametrize("name", ["missing", "empty", "nested", "not utf-8", "list", "fifo", "directory", "long number",
                                  "vocab_size absurd", "rope list", "architecture endless", "circular link"])  # fmt: skip
def test_a_bad_config_is_bad_for_info_too(refuse, here, name):
    damage, _ = next(case.values for case in CONFIGS if case.id == name)
    damage(here / "policy" / CONFIG)
    refuse(["info", "--policy", here / "policy"], "config.json")


OWN_CODE = "raise SystemExit('remote code was run')"


@pytest.mark.parametrize("file", [CONFIG, TOKENIZER_CONFIG])
def test_remote_code_is_never_run(call, here, file):
    named = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    change(auto_map=named, trust_remote_code=True)(here / "policy" / file)
    (here / "policy" / "own.py").write_text(OWN_CODE)
    code, out, err = call(solved(here))
    assert (code, err) == (0, "") and "remote code" not in out


# --- weights --------------------------------------------------------------------------------------------------------------

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def poisoned(name, value):
    return tensors(lambda held: held[name].fill_(value))


def told(name, **fields):
    return header(lambda names: names[name].update(fields))


CUT = "model.safetensors is damaged or cut short"
TENSORS = table(
    ("missing", gone, "expected model.safetensors or model.safetensors.index.json; neither is there"),
    ("directory", directory, "expected model.safetensors"),
    ("fifo", fifo, "expected model.safetensors"),
    ("dangling link", dangling, "expected model.safetensors"),
    ("zero bytes", empty, CUT),
    ("seven bytes", keep(7), CUT),
    ("header cut", keep(50), CUT),
    ("body cut", keep(-1), CUT),
    ("a byte too many", lambda file: file.write_bytes(file.read_bytes() + b"x"), CUT),
    ("garbage", garbage, CUT),
    ("zeros", write(bytes(1000)), CUT),
    ("a pickle", write(b"\x80\x04\x95\x00."), CUT),
    ("json", write("{}"), CUT),
    ("header of exabytes", write(struct.pack("<Q", 1 << 62) + b"{}"), CUT),
    ("header longer than the file", write(struct.pack("<Q", 1000) + b"{}"), CUT),
    ("header of 200 MB", write(struct.pack("<Q", 200 << 20) + bytes(100)), CUT),
    ("header a list", header(lambda names: b"[]"), CUT),
    ("header not utf-8", header(lambda names: b'{"\xff": 1}'), CUT),
    ("header nested", header(lambda names: b'{"a":' * 50_000), CUT),
    ("no tensors", header(lambda names: names.clear()), CUT),
    ("overlap", told(NORM, data_offsets=[0, 128]), CUT),
    ("offsets reversed", told(NORM, data_offsets=[128, 0]), CUT),
    ("offsets negative", told(NORM, data_offsets=[-128, 0]), CUT),
    ("offsets beyond the end", told(NORM, data_offsets=[1 << 40, (1 << 40) + 128]), CUT),
    ("offsets huge", told(NORM, data_offsets=[0, 1 << 70]), CUT),
    ("no offsets", told(NORM, data_offsets=[]), CUT),
    ("shape does not fill the offsets", told(NORM, shape=[33]), CUT),
    ("shape overflows", told(NORM, shape=[1 << 62, 1 << 62]), CUT),
    ("shape negative", told(NORM, shape=[-32]), CUT),
    ("dtype unknown", told(NORM, dtype="F33"), CUT),
    ("metadata no texts", header(lambda names: names.update(__metadata__={"format": 1})), CUT),
    ("a hole", header(lambda names: names.pop(NORM) and None), CUT),
    ("tensor missing", tensors(lambda held: held.pop(NORM)), f"no tensor '{NORM}'"),
    ("bias missing", tensors(lambda held: held.pop("model.layers.1.self_attn.q_proj.bias")),
     "no tensor 'model.layers.1.self_attn.q"),
    ("head missing", tensors(lambda held: held.pop(HEAD)), f"no tensor '{HEAD}'; expected one of shape"),
    ("shape", tensors(lambda held: held.update({NORM: torch.ones(31)})), r"has shape \[31\], expected \[32\]"),
    ("transposed", tensors(lambda held: held.update({EMBEDDING: held[EMBEDDING].T.contiguous()})), "has shape"),
    ("one dimension more", tensors(lambda held: held.update({NORM: held[NORM][None].clone()})), "has shape"),
    ("scalar", tensors(lambda held: held.update({NORM: torch.tensor(1.0)})), r"has shape \[\]"),
    ("no entries", tensors(lambda held: held.update({NORM: torch.empty(0)})), r"has shape \[0\]"),
    ("integers", tensors(lambda held: held.update({NORM: torch.ones(32).int()})), "stored as I32, expected one of F32"),
    ("bytes", tensors(lambda held: held.update({NORM: torch.ones(32).byte()})), "stored as U8"),
    ("doubles", tensors(lambda held: held.update({NORM: torch.ones(32).double()})), "stored as F64"),
    ("booleans", tensors(lambda held: held.update({NORM: torch.ones(32).bool()})), "stored as BOOL"),
    ("float8", tensors(lambda held: held.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})), "stored as F8_E4M3"),
    ("a reward model's", tensors(lambda held: held.update({"v_head.summary.weight": torch.ones(1, 32)})), "is a reward model"),
    ("NaN head", poisoned(HEAD, torch.nan), "logits are not finite"),
    ("NaN norm", poisoned(NORM, torch.nan), "logits are not finite"),
    ("NaN embedding", poisoned(EMBEDDING, torch.nan), "logits are not finite"),
    ("infinite head", poisoned(HEAD, torch.inf), "logits are not finite"),
    ("pickle only", lambda file: file.rename(file.with_name("pytorch_model.bin")), "only pytorch_model.bin, a pickle file"),
)  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), TENSORS)
def test_bad_weights(refuse, here, damage, words):
    damage(here / "policy" / WEIGHTS)
    refuse(solved(here), words)


def test_tensors_that_nobody_asks_for_change_nothing(call, here):
    before = call(solved(here, "--json"))
    rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), torch.nan) for i in range(2)}
    tensors(lambda held: held.update(rotary | {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}))(here / "policy" / WEIGHTS)
    after = call(solved(here, "--json"))
    assert before[0] == after[0] == 0
    assert json.loads(before[1].splitlines()[-1])["nodes"] == json.loads(after[1].splitlines()[-1])["nodes"]


def listing(edit):
    """An index over two shards of the policy, then `edit`ed: it takes the index and the directory."""

    def damage(policy):
        held = load_file(policy / WEIGHTS)
        (policy / WEIGHTS).unlink()
        shards = {"model-1.safetensors": sorted(held)[::2], "model-2.safetensors": sorted(held)[1::2]}
        for shard, names in shards.items():
            save_file({name: held[name] for name in names}, policy / shard)
        index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
        index = edit(index, policy) or index
        (policy / INDEX).write_text(json.dumps(index))

    return damage


def relisted(**shards):
    return listing(lambda index, policy: index["weight_map"].update({NORM: shards["norm"]}))


def both(index, policy):
    """The norm lies in the shard that the index does not name too, with other values."""
    other = next(s for s in ("model-1.safetensors", "model-2.safetensors") if s != index["weight_map"][NORM])
    tensors(lambda held: held.update({NORM: torch.full((32,), 7.0)}))(policy / other)


OBJECT = 'expected an object "weight_map"'
SHARDS = table(
    ("a list", listing(lambda index, policy: [1]), "JSON object"),
    ("no map", listing(lambda index, policy: {"metadata": {}}), OBJECT),
    ("an empty map", listing(lambda index, policy: {"weight_map": {}}), OBJECT),
    ("a map that is a list", listing(lambda index, policy: {"weight_map": ["a"]}), OBJECT),
    ("a shard that is a number", relisted(norm=1), OBJECT),
    ("a shard that is null", relisted(norm=None), OBJECT),
    ("a path outside", relisted(norm="../prm/model.safetensors"), "expected a plain name"),
    ("an absolute path", relisted(norm="/etc/passwd"), "expected a plain name"),
    ("the directory itself", relisted(norm="."), "expected a plain name|which is not in"),
    ("the directory above", relisted(norm=".."), "expected a plain name|which is not in"),
    ("no name", relisted(norm=""), "expected a plain name|which is not in"),
    ("a NUL", relisted(norm="a\0b"), "expected a plain name|which is not in"),
    ("half a surrogate pair", relisted(norm="\ud800"), "expected a plain name|which is not in"),
    ("an endless name", relisted(norm="a" * 5000), "File name too long"),
    ("a shard that is not there", relisted(norm="model-3.safetensors"), "which is not in"),
    ("no safetensors", relisted(norm=CONFIG), "config.json is damaged or cut short"),
    ("the other shard", listing(lambda index, policy: index["weight_map"].update(
        {NORM: {"model-1.safetensors": "model-2.safetensors"}.get(index["weight_map"][NORM], "model-1.safetensors")})),
     f"has no tensor '{NORM}', which model.safetensors.index.json places there"),
    ("a tensor unlisted", listing(lambda index, policy: index["weight_map"].pop(NORM) and None), f"no tensor '{NORM}'"),
    ("a fifo for a shard", listing(lambda index, policy: fifo(policy / "model-2.safetensors")), "which is not in"),
    ("a cut shard", listing(lambda index, policy: keep(-3)(policy / "model-2.safetensors") and None), "damaged or cut short"),
)  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), SHARDS)
def test_a_bad_shard_index(refuse, here, damage, words):
    damage(here / "policy")
    refuse(solved(here), words)


@pytest.mark.parametrize("content", ["", "{", "\xff", "[" * 100_000, "null"])
def test_a_shard_index_that_is_not_json(refuse, here, content):
    (here / "policy" / INDEX).write_bytes(content.encode("latin-1"))
    refuse(solved(here), "model.safetensors.index.json")


def test_a_tensor_in_two_shards_is_read_where_the_index_says(call, here):
    before = call(solved(here, "--json"))
    listing(both)(here / "policy")
    after = call(solved(here, "--json"))
    assert before[0] == after[0] == 0
    assert json.loads(before[1].splitlines()[-1])["nodes"] == json.loads(after[1].splitlines()[-1])["nodes"]


# --- reward models --------------------------------------------------------------------------------------------------------

PRMS = table(
    ("no family", "prm", CONFIG, change(prm_family=...), "cannot be recognised as a PRM"),
    ("unknown family", "prm", CONFIG, change(prm_family="odd"), "no PRM family 'odd'"),
    ("family a list", "prm", CONFIG, change(prm_family=["math-shepherd"]), "no PRM family"),
    ("family endless", "prm", CONFIG, change(prm_family="x" * 50_000), "no PRM family"),
    ("another's architecture", "prm", CONFIG, change(architectures=["Qwen2ForProcessRewardModel"]), "not of PRM family|no tensor"),
    ("a head it should not have", "prm", WEIGHTS, tensors(lambda held: held.update({"score.weight": torch.ones(1, 32)})),
     "it has score"),
    ("no head", "qwen-prm", WEIGHTS, tensors(lambda held: held.pop("score.2.bias")), "not of PRM family"),
    ("a head of another shape", "qwen-prm", WEIGHTS, tensors(lambda held: held.update({"score.2.bias": torch.ones(3)})),
     "has shape"),
    ("a head of integers", "qwen-prm", WEIGHTS, tensors(lambda held: held.update({"score.2.bias": torch.ones(2).int()})),
     "stored as I32"),
    ("a NaN head", "qwen-prm", WEIGHTS, poisoned("score.0.weight", torch.nan), "gave nan for a step, which is no probability"),
    ("a NaN norm", "prm", WEIGHTS, poisoned(NORM, torch.nan), "gave nan for a step, which is no probability"),
    ("no tokenizer", "prm", TOKENIZER, gone, "holds no tokenizer"),
    ("a tokenizer without the tag", "prm", TOKENIZER,
     lambda file: file.write_text(file.read_text().replace("ки", "кк").replace(r"\u043a\u0438", r"\u043a\u043a")), "is one token"),
    ("no template for a chat", "qwen-prm", TOKENIZER_CONFIG, change(chat_template=...), "has no chat template"),
    ("a template without the solution", "qwen-prm", TOKENIZER_CONFIG, template("{{ messages[0]['content'] }}"),
     "does not show the problem"),
    ("a template that raises", "qwen-prm", TOKENIZER_CONFIG, template("{{ raise_exception('a\nb') }}"), "cannot be rendered.*a b"),
    ("a template that loops", "qwen-prm", TOKENIZER_CONFIG,
     template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), "cannot be rendered"),
    ("a smaller embedding", "prm", CONFIG, change(vocab_size=10), "has shape"),
    ("few positions", "prm", CONFIG, change(max_position_embeddings=20), "the PRM.* 20 positions"),
)  # fmt: skip


@pytest.mark.parametrize(("prm", "file", "damage", "words"), PRMS)
def test_a_bad_reward_model(refuse, here, prm, file, damage, words):
    damage(here / prm / file)
    refuse(scored(here, prm=prm), words)


# --- tokenizers, templates, generation settings -----------------------------------------------------------------------------


def vocabulary(edit):
    """Change the entries of a tokenizer.json by a function on their dictionary."""

    def damage(file):
        value = json.loads(file.read_text())
        edit(value["model"]["vocab"])
        file.write_text(json.dumps(value))

    return damage


NONE = "holds no tokenizer"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILES = table(
    ("tokenizer missing", TOKENIZER, gone, NONE),
    ("tokenizer empty", TOKENIZER, empty, NONE),
    ("tokenizer garbage", TOKENIZER, garbage, NONE),
    ("tokenizer cut", TOKENIZER, keep(300), NONE),
    ("tokenizer an object", TOKENIZER, write("{}"), NONE),
    ("tokenizer a list", TOKENIZER, write("[]"), NONE),
    ("tokenizer nested", TOKENIZER, deep(), NONE),
    ("tokenizer directory", TOKENIZER, directory, NONE),
    ("tokenizer fifo", TOKENIZER, fifo, NONE),
    ("tokenizer without a model", TOKENIZER, change(model=...), NONE),
    ("tokenizer of an unknown model", TOKENIZER, change(model={"type": "Odd", "vocab": {}}), NONE),
    ("tokenizer of an unknown decoder", TOKENIZER, change(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
     "decoder"),
    ("vocabulary empty", TOKENIZER, lambda file: (change(added_tokens=[])(file), vocabulary(dict.clear)(file)),
     "tokenizer|vocabulary"),
    ("vocabulary larger than the embedding", TOKENIZER, vocabulary(lambda vocab: vocab.update({"a": 5000})), "5000.*vocab_size"),
    ("vocabulary id of billions", TOKENIZER, vocabulary(lambda vocab: vocab.update({"a": (1 << 32) - 1})), "vocab_size|tokenizer"),
    ("vocabulary id negative", TOKENIZER, vocabulary(lambda vocab: vocab.update({"a": -1})), NONE),
    ("vocabulary id text", TOKENIZER, vocabulary(lambda vocab: vocab.update({"a": "b"})), NONE),
    ("settings garbage", TOKENIZER_CONFIG, garbage, NONE),
    ("settings empty", TOKENIZER_CONFIG, empty, NONE),
    ("settings a list", TOKENIZER_CONFIG, write("[]"), NONE),
    ("settings nested", TOKENIZER_CONFIG, deep(), NONE),
    ("settings fifo", TOKENIZER_CONFIG, fifo, "not a file|" + NONE),
    ("special token a list", TOKENIZER_CONFIG, change(eos_token=["a"]), NONE),
    ("special token a number", TOKENIZER_CONFIG, change(eos_token=7), NONE),
    ("template not a text", TOKENIZER_CONFIG, template(7), "chat template"),
    ("template a list", TOKENIZER_CONFIG, template([1, 2]), "template|" + NONE),
    ("templates without a default", TOKENIZER_CONFIG, template({"a": "b"}), "chat template cannot be told"),
    ("template empty of messages", TOKENIZER_CONFIG, template("hello"), "leaves the user's message out"),
    ("template of 10 MB", TOKENIZER_CONFIG, template("{{ messages }}" + "x" * 10_000_000), "chat template"),
    ("template of many tags", TOKENIZER_CONFIG, template("{% if a %}{% endif %}" * 100_000), "chat template"),
    ("template nested", TOKENIZER_CONFIG, template("{% if a %}" * 2000 + "{% endif %}" * 2000), "chat template"),
    ("template nested brackets", TOKENIZER_CONFIG, template("{{" + "(" * 20_000 + ")" * 20_000 + "}}"), "chat template"),
    ("template syntax", TOKENIZER_CONFIG, template("{% for %}"), "cannot be rendered"),
    ("template unclosed", TOKENIZER_CONFIG, template("{% if true %}"), "cannot be rendered"),
    ("template raises", TOKENIZER_CONFIG, template("{{ raise_exception('Only\n\nassistants') }}"),
     "cannot be rendered: Only assistants"),
    ("template raises endlessly", TOKENIZER_CONFIG, template("{{ raise_exception('no ' * 100000) }}"), "cannot be rendered: no no"),
    ("template undefined", TOKENIZER_CONFIG, template("{{ nothing.at.all }}"), "cannot be rendered: .*undefined"),
    ("template divides", TOKENIZER_CONFIG, template("{{ 1 / 0 }}"), "cannot be rendered: division by zero"),
    ("template class", TOKENIZER_CONFIG, template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
     "cannot be rendered: .*unsafe"),
    ("template globals", TOKENIZER_CONFIG, template("{{ raise_exception.__globals__['os'].listdir('/') }}"),
     "cannot be rendered: .*unsafe"),
    ("template attr", TOKENIZER_CONFIG, template("{{ ''|attr('__class__') }}"), "cannot be rendered|leaves"),
    ("template format", TOKENIZER_CONFIG, template("{{ '{0.__class__}'.format(1) }}"), "leaves the user's message out"),
    ("template opens a file", TOKENIZER_CONFIG, template("{{ open('/etc/passwd').read() }}"),
     "cannot be rendered: 'open' is undefined"),
    ("template includes", TOKENIZER_CONFIG, template("{% include '/etc/passwd' %}"), "cannot be rendered"),
    ("template imports", TOKENIZER_CONFIG, template("{% import 'os' as os %}"), "cannot be rendered"),
    ("template changes a message", TOKENIZER_CONFIG, template("{{ messages.append(1) }}"), "cannot be rendered"),
    ("template recursive", TOKENIZER_CONFIG, template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), "cannot be rendered"),
    ("template loops", TOKENIZER_CONFIG, template(LOOP), "cannot be rendered: .*seconds"),
    ("template range too long", TOKENIZER_CONFIG, template("{% for a in range(10 ** 9) %}{% endfor %}"), "cannot be rendered"),
    ("template grows", TOKENIZER_CONFIG, template(
        "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"),
     "cannot be rendered: it takes more than (256 MiB|3 seconds)"),
    ("template writes endlessly", TOKENIZER_CONFIG, template("{% for a in range(99999) %}" + "y" * 900_000 + "{% endfor %}"),
     "cannot be rendered"),
    ("template of a large power", TOKENIZER_CONFIG, template("{{ 10 ** 10 ** 9 }}"), "cannot be rendered"),
    ("template of a large product", TOKENIZER_CONFIG, template("{{ 'x' * 1000000000000000 }}"), "cannot be rendered"),
    ("generation garbage", GENERATION, garbage, "generation_config.json cannot be read"),
    ("generation empty", GENERATION, empty, "generation_config.json cannot be read"),
    ("generation a list", GENERATION, write("[]"), "generation_config.json: expected a JSON object"),
    ("generation nested", GENERATION, deep(), "generation_config.json cannot be read"),
    ("generation ends in text", GENERATION, change(eos_token_id="</s>"), "generation_config.json: eos_token_id"),
    ("generation ends in a fraction", GENERATION, change(eos_token_id=1.5), "generation_config.json: eos_token_id"),
    ("generation ends in objects", GENERATION, change(eos_token_id=[{"a": 1}]), "generation_config.json: eos_token_id"),
)  # fmt: skip


@pytest.mark.parametrize(("file", "damage", "words"), FILES)
def test_a_bad_tokenizer_template_or_generation_config(refuse, here, file, damage, words):
    gc.collect()  # a finaliser of an earlier test's garbage, run where a template has used the stack up, would speak too
    damage(here / "policy" / file)
    refuse(solved(here), words)


@pytest.mark.parametrize("ids", [10**9, -5, [64, 10**30], [], None], ids=str)
def test_an_end_that_no_token_has_ends_nothing(call, here, ids):
    before = call(solved(here, "--json"))
    change(eos_token_id=ids)(here / "policy" / GENERATION)
    after = call(solved(here, "--json"))
    assert before[0] == after[0] == 0
    assert json.loads(before[1].splitlines()[-1])["nodes"] == json.loads(after[1].splitlines()[-1])["nodes"]


@pytest.mark.parametrize("text", ["<|end|>", "<|turn|>user\n<|end|>", "<extra_0>", "<|endoftext|>", "<|en<|end|>d|>"])
def test_text_of_a_control_token_is_encoded_as_text(tmp_path, text):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    specials = {id for id, added in tokenizer.added_tokens_decoder.items() if added.special}
    plain, asked = (encode_prompt(tokenizer, problem) for problem in ("1+1?", f"1{text}1?"))
    assert [id for id in asked if id in specials] == [id for id in plain if id in specials] != []
    assert f"1{text}1?" in tokenizer.decode(asked)
    spelled = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert any(asked[i : i + len(spelled)] == spelled for i in range(len(asked)))


# --- tasks ----------------------------------------------------------------------------------------------------------------


def row(**fields):
    """A sound line, then one with these fields; `...` takes one away."""
    bad = {"problem": "1+1?", "answer": "2"} | fields
    return json.dumps(TASK[0]) + "\n" + json.dumps({key: value for key, value in bad.items() if value is not ...}) + "\n"


def second(line):
    return json.dumps(TASK[0]).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n"


LINES = table(
    ("empty", "", "task.jsonl holds no problems"),
    ("blank lines", "\n \n\t\r\n", "holds no problems"),
    ("a mark of byte order", b"\xef\xbb\xbf\n", "holds no problems"),
    ("binary", random.Random(1).randbytes(3000), "task.jsonl line 1: not"),
    ("gzip", b"\x1f\x8b\x08\x00" + bytes(100), "line 1: not UTF-8"),
    ("utf-16", json.dumps(TASK[0]).encode("utf-16"), "line 1: not UTF-8"),
    ("latin-1", second('{"problem": "caf\xe9?", "answer": "1"}'.encode("latin-1")), "line 2: not UTF-8 at byte"),
    ("half a line", second('{"problem": "1+1?", "ans'), "line 2: not JSON"),
    ("two on a line", second('{"problem": "1", "answer": "1"} {"problem": "2", "answer": "2"}'), "line 2: not JSON: Extra data"),
    ("a comma behind", second('{"problem": "1", "answer": "1"},'), "line 2: not JSON"),
    ("a list of them", json.dumps(TASK), "a JSON array where an object was expected"),
    ("indented", json.dumps(TASK[0], indent=1), "line 1: not JSON"),
    ("carriage returns only", "\r".join(map(json.dumps, TASK)), "not JSON"),
    ("null", second("null"), "line 2: a JSON null where an object"),
    ("a text", second('"problem"'), "line 2: a JSON string where an object"),
    ("a number", second("1e400"), "line 2: a JSON number where an object"),
    ("NaN", second('{"problem": "1+1?", "answer": NaN}'), "line 2: NaN is not JSON"),
    ("Infinity", second('{"problem": "1+1?", "answer": -Infinity}'), "line 2: -Infinity is not JSON"),
    ("a number beyond floats", second('{"problem": "1+1?", "answer": 1e400}'), "line 2: field 'answer' is a JSON number"),
    ("an endless number", second('{"problem": "1+1?", "answer": ' + "9" * 10_000 + "}"), "line 2"),
    ("nested", second("[" * 100_000), "line 2: nested too deeply"),
    ("nested in a field", second('{"problem": "1+1?", "answer": "2", "more": ' + '{"a":' * 50_000 + "1" + "}" * 50_001),
     "line 2: nested"),
    ("10 MB", second(json.dumps({"problem": "1" * 10_000_000, "answer": "2"})), "line 2: longer than 4 MiB"),
    ("10 MB of nothing", second(" " * 10_000_000), "line 2: longer than 4 MiB"),
    ("10 MB of keys", second("{" + ",".join(f'"k{i}":0' for i in range(700_000)) + "}"), "line 2: longer than 4 MiB"),
    ("4 MB of keys", second("{" + ",".join(f'"k{i}":0' for i in range(250_000)) + "}"), "line 2: no field 'problem'"),
    ("no problem", row(problem=...), "line 2: no field 'problem' or 'question'"),
    ("no answer", row(answer=...), "line 2: no field 'answer'"),
    ("problem null", row(problem=None), "line 2: field 'problem' is a JSON null"),
    ("problem a number", row(problem=7), "line 2: field 'problem' is a JSON number"),
    ("problem a list", row(problem=["1+1?"]), "line 2: field 'problem' is a JSON array"),
    ("problem blank", row(problem=" \n\t"), "line 2: field 'problem' is blank"),
    ("answer null", row(answer=None), "line 2: field 'answer' is a JSON null"),
    ("answer true", row(answer=True), "line 2: field 'answer' is a JSON boolean"),
    ("answer an object", row(answer={"value": 2}), "line 2: field 'answer' is a JSON object"),
    ("answer blank", row(answer=""), "line 2: field 'answer' is blank"),
    ("id twice", row(id="p0"), "line 2: id 'p0' is that of line 1"),
    ("id by number twice", row(id=1) + row(id="1")[len(json.dumps(TASK[0])) + 1 :], "line 3: id '1' is that of line 2"),
    ("id that a nameless line has", row(id="task-3") + '{"problem": "2", "answer": "2"}\n',
     "line 3: id 'task-3' is that of line 2"),
    ("id a list", row(id=[1]), "line 2: field 'id' is a JSON array"),
    ("id true", row(id=True), "line 2: field 'id' is a JSON boolean"),
    ("id blank", row(id=" "), "line 2: field 'id' is blank"),
    ("level an object", row(level={}), "line 2: field 'level' is a JSON object"),
    ("level a fraction", row(level=1.5), "line 2: field 'level' is a JSON number"),
    ("half a pair in the problem", second(r'{"problem": "1\ud800?", "answer": "2"}'),
     "line 2: field 'problem' has half a surrogate"),
    ("half a pair in the answer", second(r'{"problem": "1?", "answer": "\udfff"}'), "line 2: field 'answer' has half a surrogate"),
    ("half a pair in the id", second(r'{"problem": "1?", "answer": "2", "id": "\ud83d"}'),
     "line 2: field 'id' has half a surrogate"),
    ("half a pair in the level", second(r'{"problem": "1?", "answer": "2", "level": "\ud83d"}'),
     "line 2: field 'level' has half a"),
    ("half a pair for a field", second(r'{"\ud800": 1}'), "line 2: no field 'problem'"),
)  # fmt: skip


@pytest.mark.parametrize(("content", "words"), LINES)
def test_a_bad_task(refuse, here, content, words):
    write(content)(here / "task.jsonl")
    refuse(evaluated(here, here / "new"), words)
    assert not (here / "new").exists()


@pytest.mark.parametrize(("damage", "words"), table(
    ("missing", gone, "is no task and no file"),
    ("directory", directory, "is a directory"),
    ("fifo", fifo, "is no task and no file"),
    ("dangling link", dangling, "is no task and no file"),
))  # fmt: skip
def test_a_task_that_is_no_file(refuse, here, damage, words):
    damage(here / "task.jsonl")
    refuse(evaluated(here, here / "new"), words)


PAIR = "\ud83d\ude80"  # of surrogates that belong together


@pytest.mark.parametrize("content", table(
    ("byte order, carriage returns and blank lines", b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in TASK)),
    ("other fields, numbers for texts, pairs", "".join(
        json.dumps(row | {"answer": 5, "id": i, "more": [None, {"a": PAIR}], "level": PAIR}) + "\n" for i, row in enumerate(TASK))),
))  # fmt: skip
def test_a_task_that_is_only_unusual(call, here, content):
    write(content)(here / "task.jsonl")
    code, out, err = call(evaluated(here, here / "new", "--json"))
    assert (code, err) == (0, "") and json.loads(out.splitlines()[-1])["problems"] == 4


# --- problems that do not fit ---------------------------------------------------------------------------------------------


def records(directory):
    return [json.loads(line) for line in (directory / PROBLEMS).read_bytes().splitlines()]


@pytest.mark.parametrize(("long", "more", "words"), table(
    ("than the policy's positions", {"problem": "1+" * 400 + "1?"}, [], "policy 512 positions"),
    ("than the budget", {"problem": "1+" * 200 + "1?"}, ["--kv-bytes", "100K"], "KV blocks of 8 tokens"),
    ("than the PRM's positions", {"problem": "1+" * 100 + "1?"}, "prm", "the PRM.* 150 positions"),
))  # fmt: skip
def test_a_problem_too_long_fails_with_its_reason_and_the_run_goes_on(call, here, long, more, words):
    rows = [*TASK[:2], {"id": "long", "answer": "2"} | long, *TASK[2:]]
    (here / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if more == "prm":
        change(max_position_embeddings=150)(here / "prm" / CONFIG)
        more = []
    code, out, err = call(evaluated(here, here / "new", "--json", *more))
    assert code == 1 and "1 problems could not be searched" in err and "long" in err and "Traceback" not in err
    by_id = {record["id"]: record for record in records(here / "new")}
    assert by_id.keys() == {row["id"] for row in rows} and re.search(words, by_id.pop("long")["error"])
    assert all(record["error"] is None and record["nodes"] for record in by_id.values())
    whole = {record["id"]: record["nodes"] for record in records(here / "run")}
    if not more:  # what failed beside them changed nothing
        assert {id: [node["tokens"] for node in record["nodes"]] for id, record in by_id.items()} == {
            id: [node["tokens"] for node in nodes] for id, nodes in whole.items()}  # fmt: skip
    assert call(evaluated(here, here / "new", *more))[0] == 1 and len(records(here / "new")) == 5  # nothing is done twice


def test_a_solution_too_long_for_the_prm_fails_alone(call, here):
    """Where the PRM's tokens are more than the policy's, nobody knows before: its tag is two tokens to it inside a step."""
    random_policy_directory(here / "policy", leans={SHEPHERD_TAG: 30.0})
    change(max_position_embeddings=70)(here / "prm" / CONFIG)
    long = {"id": "long", "problem": "a=1+5;b=a-1;c=b*2;d=c-1;d?", "answer": "5"}
    (here / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*TASK[:2], long, *TASK[2:])))
    code, _, err = call(evaluated(here, here / "new", "--max-step-tokens", "24"))
    assert code == 1 and "1 problems could not be searched" in err and "Traceback" not in err
    (here / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASK))
    assert call(evaluated(here, here / "without", "--max-step-tokens", "24"))[0] == 0
    by_id, without = ({record["id"]: record for record in records(here / name)} for name in ("new", "without"))
    assert re.search("a solution to .* has come to 78 tokens as the PRM reads it, and the PRM has 70", by_id.pop("long")["error"])
    assert {id: record["nodes"] for id, record in by_id.items()} == {id: record["nodes"] for id, record in without.items()}


def test_problems_that_are_all_too_long_are_an_error_of_the_settings(refuse, here):
    refuse(evaluated(here, here / "new", "--kv-bytes", "6K"), "KV blocks of 8 tokens|holds no block")


# --- run directories ------------------------------------------------------------------------------------------------------


def middle(line):
    """Another second line of four."""

    def damage(run):
        lines = (run / PROBLEMS).read_bytes().splitlines(keepends=True)
        told = line(json.loads(lines[1])) if callable(line) else line
        lines[1] = told if isinstance(told, bytes) else json.dumps(told).encode() + b"\n"
        (run / PROBLEMS).write_bytes(b"".join(lines))

    return damage


def at(name, damage):
    return lambda run: damage(run / name)


def without(field):
    return middle(lambda record: {key: value for key, value in record.items() if key != field})


def with_node(**fields):
    return middle(lambda record: record | {"nodes": [record["nodes"][0] | fields, *record["nodes"][1:]]})


DAMAGED = "problems.jsonl line 2 is damaged: only the last line of a run may be torn"
BOTH, SCORE, EVAL = ("score", "eval"), ("score",), ("eval",)
RUNS = table(
    ("settings missing", at(RUN, gone), BOTH, "run.json cannot be read|without run.json"),
    ("settings empty", at(RUN, empty), BOTH, "run.json cannot be read"),
    ("settings garbage", at(RUN, garbage), BOTH, "run.json cannot be read"),
    ("settings cut", at(RUN, keep(200)), BOTH, "run.json cannot be read"),
    ("settings a list", at(RUN, write("[]")), BOTH, "no description of a run"),
    ("settings nested", at(RUN, deep()), BOTH, "run.json cannot be read"),
    ("settings nested objects", at(RUN, write('{"a":' * 900 + "1" + "}" * 900)), BOTH, "run.json|was made with|schema_version"),
    ("settings NaN", at(RUN, write('{"schema_version": NaN}')), BOTH, "run.json cannot be read"),
    ("settings a fifo", at(RUN, fifo), BOTH, "run.json cannot be read|not a file"),
    ("settings a directory", at(RUN, directory), BOTH, "run.json cannot be read"),
    ("settings of another schema", at(RUN, change(schema_version=99)), BOTH, "schema_version"),
    ("settings of an endless schema", at(RUN, change(schema_version="9" * 50_000)), BOTH, "schema_version"),
    ("settings with an endless key", at(RUN, change(**{"x" * 50_000: 1})), EVAL, "was made with"),
    ("other seed", at(RUN, change(seed=7)), EVAL, "was made with seed=7, not seed=0"),
    ("other method", at(RUN, change(method="beam")), EVAL, "was made with"),
    ("records missing", at(PROBLEMS, gone), SCORE, "problems.jsonl cannot be read"),
    ("records empty", at(PROBLEMS, empty), SCORE, "holds no finished problem"),
    ("records a directory", at(PROBLEMS, directory), BOTH, "cannot be used|cannot be read"),
    ("records a fifo", at(PROBLEMS, fifo), BOTH, "not a file|cannot be"),
    ("records binary", at(PROBLEMS, write(random.Random(2).randbytes(3000).replace(b"\n", b"") + b"\n\n")), BOTH,
     "line 1 is damaged"),
    ("line torn in the middle", middle(b'{"id": "p1", "pro\n'), BOTH, DAMAGED),
    ("line of zeros in the middle", middle(bytes(300) + b"\n"), BOTH, DAMAGED),
    ("line not utf-8", middle(b'{"id": "\xff"}\n'), BOTH, DAMAGED),
    ("line blank", middle(b"\n"), BOTH, DAMAGED),
    ("line a list", middle([]), BOTH, DAMAGED),
    ("line nested", middle(b"[" * 100_000 + b"\n"), BOTH, DAMAGED),
    ("line without an id", without("id"), BOTH, DAMAGED),
    ("line with a number for an id", middle(lambda record: record | {"id": 7}), BOTH, DAMAGED),
    ("line with an id alone", middle({"id": "p1"}), BOTH, "line 2 is no record of a search: no field"),
    ("line of another schema", middle(lambda record: record | {"schema_version": 2}), BOTH, "line 2 is no record.*schema_version"),
    ("line twice", middle(lambda record: record | {"id": "p0"}), BOTH, "line 2 is no record of a search: its id 'p0' is that of"),
    *[(f"line without {field}", without(field), BOTH, f"line 2 is no record of a search: no field '{field}'")
      for field in ("nodes", "branches", "method", "error", "aggregates", "correct", "ledger", "level")],
    ("nodes null", middle(lambda record: record | {"nodes": None}), SCORE, "line 2 is no record"),
    ("nodes of numbers", middle(lambda record: record | {"nodes": [1]}), SCORE, "line 2 is no record"),
    ("node under itself", with_node(parent=0), SCORE, "line 2 is no record of a search: node 0 has the parent 0"),
    ("node under a text", with_node(parent="-1"), SCORE, "line 2 is no record"),
    ("score above one", with_node(score=1.5), SCORE, "line 2 is no record of a search: node 0 has the score 1.5"),
    ("score a text", with_node(score="0.5"), SCORE, "line 2 is no record"),
    ("score NaN", with_node(score=float("nan")), SCORE, "line 2 is no record"),
    ("text a number", with_node(text=7), SCORE, "line 2 is no record of a search: text is 7"),
    ("text half a pair", with_node(text="\ud800"), SCORE, "line 2 is no record"),
    ("identity no number", with_node(identity="x"), SCORE, "line 2 is no record"),
    ("identity null", with_node(identity=None), SCORE, "line 2 is no record"),
    ("finish unknown", with_node(finish="tired"), SCORE, "line 2 is no record"),
    ("tokens a number", with_node(tokens=3), SCORE, "line 2 is no record"),
    ("branch nowhere", middle(lambda record: record | {"branches": [{"node": 99}]}), SCORE, "line 2 is no record"),
    ("branch negative", middle(lambda record: record | {"branches": [{"node": -1}]}), SCORE, "line 2 is no record"),
    ("gold a number", middle(lambda record: record | {"gold": 5}), SCORE, "line 2 is no record of a search: gold is 5"),
    ("method unknown", middle(lambda record: record | {"method": {"name": "mcts"}}), SCORE, "line 2 is no record|no method"),
    ("method with odd settings", middle(lambda record: record | {"method": record["method"] | {"odd": 1}}), SCORE,
     "line 2|no setting"),
    ("method with n a text", middle(lambda record: record | {"method": record["method"] | {"n": "2"}}), SCORE, "line 2|n must be"),
    ("rules odd", middle(lambda record: record | {"method": record["method"] | {"rules": {"odd": 1}}}), SCORE, "line 2"),
)  # fmt: skip


@pytest.mark.parametrize(("damage", "verbs", "words"), RUNS)
def test_a_bad_run_directory(refuse, here, damage, verbs, words):
    damage(here / "run")
    before = {path.name: path.read_bytes() for path in (here / "run").iterdir() if path.is_file()}
    for verb in verbs:
        refuse(["score", here / "run"] if verb == "score" else evaluated(here, here / "run"), words)
    after = {path.name: path.read_bytes() for path in (here / "run").iterdir() if path.is_file()}
    assert {name: after[name] for name in before} == before  # a refusal costs nothing


def test_a_torn_last_line_is_done_again_and_nothing_else(call, here):
    whole = (here / "run" / PROBLEMS).read_bytes()
    (here / "run" / PROBLEMS).write_bytes(whole[:-40])
    code, _, err = call(evaluated(here, here / "run"))
    again = (here / "run" / PROBLEMS).read_bytes()
    last = len(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert (code, err) == (0, "") and again[:last] == whole[:last]
    one, other = (json.loads(text[last:]) for text in (whole, again))
    assert [one[part] for part in ("id", "nodes", "aggregates")] == [other[part] for part in ("id", "nodes", "aggregates")]


def test_a_run_that_another_process_writes(refuse, here):
    import fcntl

    with (here / "run" / PROBLEMS).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuse(evaluated(here, here / "run"), "another process is writing .*run: wait for it, or choose another --out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read anything")
@pytest.mark.parametrize(("place", "mode"), [("run/problems.jsonl", 0o000), ("run", 0o500), ("policy/config.json", 0o000),
                                             ("policy/model.safetensors", 0o000), ("task.jsonl", 0o000)])  # fmt: skip
def test_what_may_not_be_read_or_written(refuse, here, place, mode):
    (here / place).chmod(mode)
    refuse(evaluated(here, here / "run" / "new" if place == "run" else here / "run"), "cannot be|damaged")
    (here / place).chmod(0o700)


# --- options ----------------------------------------------------------------------------------------------------------------

OPTIONS = table(
    ("n zero", ["--n", "0"], "n must be a whole number of at least 1, not 0"),
    ("n negative", ["--n", "-4"], "n must be a whole number of at least 1, not -4"),
    ("n a fraction", ["--n", "2.5"], "'2.5' is not a whole number"),
    ("n endless", ["--n", "9" * 5000], "is not a whole number"),
    ("n huge", ["--n", str(10**30)], "n"),
    ("n infinite", ["--n", "inf"], "is not a whole number"),
    ("width does not divide", ["--method", "beam", "--n", "6", "--width", "4"], "n=6 must be a multiple of width=4"),
    ("width zero", ["--method", "dvts", "--n", "4", "--width", "0"], "width"),
    ("width above n", ["--method", "beam", "--n", "2", "--width", "4"], "width=4"),
    ("width where there is none", ["--method", "majority", "--width", "2"], "majority has no setting 'width'"),
    ("method", ["--method", "mcts"], "invalid choice: 'mcts'"),
    ("method blank", ["--method", ""], "invalid choice: ''"),
    ("rules", ["--rules", "own"], "invalid choice: 'own'"),
    ("temperature NaN", ["--temperature", "nan"], "'nan' is not a number"),
    ("temperature infinite", ["--temperature", "inf"], "temperature"),
    ("temperature negative", ["--temperature", "-0.5"], "temperature"),
    ("temperature text", ["--temperature", "hot"], "'hot' is not a number"),
    ("steps zero", ["--max-steps", "0"], "max_steps"),
    ("seed text", ["--seed", "x"], "'x' is not a whole number"),
    ("top-p zero", ["--top-p", "0"], "'0' is not a number above 0 and at most 1"),
    ("top-p NaN", ["--top-p", "nan"], "'nan' is not a number above 0"),
    ("top-k negative", ["--top-k", "-1"], "is not a whole number of at least 0"),
    ("dtype", ["--dtype", "int3"], "no dtype 'int3'"),
    ("dtype not there", ["--dtype", "int8", "--device", "cuda"], "finds 0 GPUs here|dtype int8 runs on a CPU only"),
    ("device", ["--device", "tpu"], "no device 'tpu'"),
    ("device no number", ["--device", "cuda:x"], "no device 'cuda:x'"),
    ("device blank", ["--device", ""], "no device ''"),
    ("device not there", ["--device", "cuda:77"], "finds"),
    ("device endless", ["--device", "cuda:" + "9" * 5000], "device"),
    ("backend", ["--backend", "quick"], "no attention backend 'quick'"),
    ("load", ["--load", "hope"], "load='hope' is unknown"),
    ("steps", ["--steps", "odd"], "steps='odd' is unknown"),
    ("family", ["--prm-family", "odd"], "no PRM family 'odd'"),
    ("kv bytes zero", ["--kv-bytes", "0"], "is not a number of bytes"),
    ("kv bytes negative", ["--kv-bytes=-1G"], "is not a number of bytes"),
    ("kv bytes unit", ["--kv-bytes", "4Q"], "'4Q' is not a number of bytes"),
    ("kv bytes few", ["--kv-bytes", "10"], "holds no block"),
    ("kv bytes of terabytes", ["--kv-bytes", "900000G"], "kv_bytes"),
    ("kv bytes endless", ["--kv-bytes", "9" * 4000], "kv"),
    ("block huge", ["--block-size", str(10**12)], "holds no block"),
    ("block zero", ["--block-size", "0"], "is not a whole number of at least 1"),
    ("rows huge", ["--max-rows", str(10**15)], "max_rows"),
    ("tokens zero", ["--max-tokens", "0"], "is not a whole number of at least 1"),
    ("step tokens", ["--max-step-tokens", "none"], "is not a whole number"),
    ("threads zero", ["--threads", "0"], "is not a whole number of at least 1"),
    ("threads huge", ["--threads", str(10**12)], "threads"),
    ("system half a pair", ["--system", "\udcff"], "UTF-8"),
    ("policy not there", ["--policy", "no/such/place"], "neither a directory nor a hub id"),
    ("policy blank", ["--policy", ""], "config.json is missing"),
    ("policy a NUL", ["--policy", "a\0b"], "neither a directory nor a hub id"),
    ("policy endless", ["--policy", "p" * 20_000], "File name too long"),
    ("policy a file", ["--policy", "/dev/null"], "neither a directory nor a hub id"),
    ("policy two", ["--policy"], "expected one argument"),
)  # fmt: skip


@pytest.mark.parametrize(("options", "words"), OPTIONS)
def test_a_bad_option(refuse, here, options, words):
    refuse(scored(here, *options), words)


@pytest.mark.parametrize(("more", "words"), table(
    ("split", ["--split", "train"], "has no splits"),
    ("split of the embedded task", ["--task", "embedded", "--split", "exam"], "no split 'exam'"),
    ("task unknown", ["--task", "gsm8k"], "gsm8k is no task and no file"),
    ("task blank", ["--task", ""], "is no task and no file"),
    ("task a NUL", ["--task", "a\0b"], "is no task and no file"),
    ("task endless", ["--task", "t" * 20_000], "is no task and no file"),
    ("limit zero", ["--limit", "0"], "is not a whole number of at least 1"),
    ("out a file", ["--out", "/dev/null"], "cannot be used"),
    ("out under a file", ["--out", "/dev/null/run"], "cannot be used"),
    ("out a NUL", ["--out", "a\0b"], "out|cannot be used"),
    ("out endless", ["--out", "o" * 20_000], "cannot be used"),
))  # fmt: skip
def test_a_bad_option_of_eval(refuse, here, more, words):
    refuse(evaluated(here, here / "new", *more), words)


@pytest.mark.parametrize(("more", "words"), table(
    ("method", ["--method", "best_of_n,mcts"], "no method 'mcts'"),
    ("method blank", ["--method", "best_of_n,"], "no method ''"),
    ("n text", ["--n", "2,x"], "'x' is not a whole number"),
    ("n blank", ["--n", "2,"], "'' is not a whole number"),
    ("n zero", ["--n", "2,0"], "n must be a whole number of at least 1, not 0"),
    ("n huge", ["--n", f"2,{10**30}"], "n=10*"),
    ("width does not divide", ["--method", "beam", "--n", "4,6"], "n=6 must be a multiple of width=4"),
    ("width where there is none", ["--width", "4"], "best_of_n has no setting 'width'"),
    ("rules", ["--rules", "paper,own"], "no rules 'own'"),
    ("depth", ["--depth", "2,0"], "max_steps must be a whole number of at least 1"),
    ("problems zero", ["--problems", "0"], "'0' is not a whole number of at least 1"),
    ("problems huge", ["--problems", f"1,{10**9}"], "problems=1000000000 must be at least 1 and at most"),
    ("steps too long", ["--step-tokens", "4,400"], "steps of up to 600 may come to .* 512 positions"),
    ("steps endless", ["--step-tokens", str(10**30)], "steps='10*' is unknown"),
    ("prompt too long", ["--prompt-tokens", f"20,{10**12}"], "512 positions"),
    ("prompt too short", ["--prompt-tokens", "3"], "has no room for a problem"),
    ("repeats", ["--repeats", "0"], "'0' is not a whole number of at least 1"),
    ("dtype", ["--dtype", "float32,int3"], "no dtype 'int3'"),
    ("backend", ["--backend", "native,quick"], "no attention backend 'quick'"),
    ("device", ["--device", "cpu,tpu"], "no device 'tpu'"),
    ("kv bytes", ["--kv-bytes", "4M,10"], "kv_bytes=10 holds 0"),
    ("policy", ["--policy", "no/such/place,policy-s"], "neither a directory nor a hub id"),
    ("prm", ["--prm", "no/such/place"], "neither a directory nor a hub id"),
    ("no prm", ["--prm", "none"], "best_of_n needs a PRM, and none is given"),
    ("format", ["-o", "table.txt"], "table.txt is in no known format; known: .md, .csv, .jsonl"),
    ("out nowhere", ["-o", "no/such/table.md"], "table.md cannot be written: No such file"),
    ("out a NUL", ["-o", "a\0b.md"], "cannot be written"),
    ("out endless", ["-o", "o" * 20_000 + ".md"], "cannot be written: File name too long"),
))  # fmt: skip
def test_a_bad_option_of_bench_is_refused_before_anything_is_timed(refuse, here, monkeypatch, more, words):
    monkeypatch.setattr("tts_engine.engine.Engine.from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    sound = ["--problems", 1, "--prompt-tokens", 20, "--depth", 2, "--step-tokens", 4, "--kv-bytes", "4M"]
    models = ["--policy", here / "policy", "--prm", here / "prm"]
    refuse(["bench", *models, "--method", "best_of_n", *sound, *more], words)


@pytest.mark.parametrize(("argv", "words"), table(
    ("memory", ["info", "--policy", "P", "--memory", "80"], None),
    ("memory zero", ["info", "--policy", "P", "--memory", "0"], "is not a size of memory"),
    ("memory unit", ["info", "--policy", "P", "--memory", "80 apples"], "is not a size of memory"),
    ("memory endless", ["info", "--policy", "P", "--memory", "9" * 5000], "is not a size of memory"),
    ("memory for nobody", ["info", "--memory", "80GB"], "--memory is for models that are named"),
    ("info of a NUL", ["info", "--policy", "a\0b"], "a.b"),
    ("info endless", ["info", "--policy", "p" * 20_000], "p"),
    ("info of an empty name", ["info", "--policy", ""], "config.json is missing"),
    ("info of a task", ["info", "--policy", "TASK"], "cannot be read"),
    ("score a NUL", ["score", "a\0b"], "cannot be read"),
    ("score endless", ["score", "r" * 20_000], "cannot be read"),
    ("score a file", ["score", "TASK"], "cannot be read"),
    ("rescore a NUL", ["rescore", "a\0b", "--prm", "PRM"], "cannot be read"),
    ("rescore by a policy", ["rescore", "RUN", "--prm", "P"], "cannot be recognised as a PRM"),
    ("rescore onto itself", ["rescore", "RUN", "--prm", "PRM", "--out", "RUN"], "is the run itself"),
    ("convert what needs none", ["convert", "P", "OUT"], "there is nothing to convert"),
    ("convert onto itself", ["convert", "P", "P"], "there is nothing to convert"),
    ("convert a NUL", ["convert", "a\0b", "OUT"], "not a directory"),
))  # fmt: skip
def test_a_bad_argument_of_another_verb(call, refuse, here, argv, words):
    places = {"P": "policy", "PRM": "prm", "RUN": "run", "TASK": "task.jsonl", "OUT": "new"}
    argv = [here / places[argument] if argument in places else argument for argument in argv]
    if words is None:
        assert call(argv)[0] == 0
    else:
        refuse(argv, words)


# --- the mutator ------------------------------------------------------------------------------------------------------------

MUTATIONS = 25  # of each target in one batch; --soak says how many batches, and 286 make 100,000 mutations
ODD = [None, True, False, -1, 0, 1, 2, 3, 7, 64, 1 << 24, (1 << 24) + 1, 1 << 31, 1 << 63, 10**30, -(10**30), 0.5, -0.0, 1e-300,
       1e308, float("nan"), float("inf"), "", "a", "0", "\ud800", "x" * 10_000, "../a", "a\0b", "{{ a.b }}", "{% for %}", [], {},
       [[]], [0], [None], ["a"], {"a": {}}, {"": None}, {"type": "Sequence"}, [0, 128], [[0]] * 50]  # fmt: skip


def pytest_generate_tests(metafunc):
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", range(metafunc.config.getoption("--soak")))


def mutated_bytes(rng, content):
    """A few bytes other than they were."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([1, 1, 4, 30, 300]))
        old = content[start:end]
        content[start:end] = rng.choice([b"", rng.randbytes(len(old)), bytes(len(old)), old * 2, b"\n", b'"', b"}"])
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def mutated_value(rng, value):
    """A JSON value in which one place holds something odd, or what another place holds, or nothing."""
    places = []

    def walk(held, depth):
        keys = list(held) if isinstance(held, dict) else range(len(held)) if isinstance(held, list) else ()
        for key in keys:
            places.append((depth, held, key))
            walk(held[key], depth + 1)

    walk(value, 0)
    if not places or rng.random() < 0.02:
        return rng.choice(ODD)
    depth = rng.choice(sorted({place[0] for place in places}))  # or else nearly all would fall into the longest list
    _, held, key = rng.choice([place for place in places if place[0] == depth])
    how = rng.randrange(5)
    if how == 0:
        del held[key]
    elif how == 1:
        _, other, name = rng.choice(places)
        held[key] = json.loads(json.dumps(other[name]))
    elif how == 2 and isinstance(held, dict):
        held[rng.choice([*held, "a", ""])] = held.pop(key)
    elif how == 3 and isinstance(held[key], int | float | str):
        held[key] = held[key] * 2 if isinstance(held[key], str) else held[key] + rng.choice([-1, 1, 0.5])
    else:
        held[key] = rng.choice(ODD)
    return value


def mutated_json(rng, content):
    return json.dumps(mutated_value(rng, json.loads(content))).encode()


def mutated_lines(rng, content):
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    how = rng.randrange(6)
    if how == 0:
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    elif how == 1:
        lines[at] = lines[at].rstrip()
    elif how == 2:
        del lines[at]
    else:
        lines[at] = mutated_json(rng, lines[at]) + b"\n"
    return b"".join(lines)


def mutated_tensors(rng, content):
    """Another header of the right length, or other numbers behind it."""
    size = struct.unpack("<Q", content[:8])[0]
    head, body = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.7:
        head = mutated_json(rng, head)
    else:
        start = rng.randrange(len(body) // 4) * 4
        odd = rng.choice([rng.randbytes(400), struct.pack("<f", float("nan")) * 50, b"\xff\xff\x7f\x7f" * 9])  # the largest float
        body = (body[:start] + odd + body[start + len(odd) :])[: len(body)]
    return struct.pack("<Q", len(head)) + head + body


def going_on(here):
    return evaluated(here, here / "run")


def anew(here):
    return evaluated(here, here / "new")


TARGETS = table(
    ("policy's config", f"policy/{CONFIG}", mutated_json, solved),
    ("policy's weights", f"policy/{WEIGHTS}", mutated_tensors, solved),
    ("policy's shards", f"sharded/{INDEX}", mutated_json, lambda here: solved(here, "--policy", here / "sharded")),
    ("policy's tokenizer", f"policy/{TOKENIZER}", mutated_json, solved),
    ("policy's template", f"policy/{TOKENIZER_CONFIG}", mutated_json, solved),
    ("policy's endings", f"policy/{GENERATION}", mutated_json, solved),
    ("prm's config", f"qwen-prm/{CONFIG}", mutated_json, partial(scored, prm="qwen-prm")),
    ("prm's weights", f"qwen-prm/{WEIGHTS}", mutated_tensors, partial(scored, prm="qwen-prm")),
    ("prm's tokenizer", f"prm/{TOKENIZER}", mutated_json, scored),
    ("prm's template", f"qwen-prm/{TOKENIZER_CONFIG}", mutated_json, partial(scored, prm="qwen-prm")),
    ("task", "task.jsonl", mutated_lines, anew),
    ("run's settings", f"run/{RUN}", mutated_json, going_on),
    ("run's records", f"run/{PROBLEMS}", mutated_lines, going_on),
    ("run's trees", f"run/{PROBLEMS}", mutated_lines, lambda here: ["score", here / "run"]),
)  # fmt: skip


@pytest.mark.parametrize(("file", "mutate", "argv"), TARGETS)
def test_whatever_is_mutated_works_or_is_one_sentence(call, here, request, batch, file, mutate, argv):
    (here / "policy" / GENERATION).write_text('{"eos_token_id": [0, 63]}')
    shutil.copytree(here / "policy", here / "sharded")
    listing(lambda index, policy: None)(here / "sharded")
    rng = random.Random(f"{request.node.callspec.id}/{batch}")
    whole, run = (here / file).read_bytes(), {path: path.read_bytes() for path in (here / "run").iterdir()}
    for number in range(MUTATIONS):
        change = rng.choice([mutate, mutate, mutated_bytes])
        (here / file).write_bytes(content := change(rng, whole))
        started = time.monotonic()
        try:
            code, out, err = call(argv(here))
        except Exception as error:
            (here.parent / "mutated").write_bytes(content)
            raise AssertionError(f"batch {batch}, mutation {number}: {file} as in {here.parent / 'mutated'}") from error
        told = f"batch {batch}, mutation {number} of {file}, {change.__name__}: {code} {err[-2000:]}"
        assert time.monotonic() - started < LONGEST_SECONDS, told
        out = re.sub(r"(?m)^Ignored unknown kwarg option .*\n?", "", out)  # what tokenizers says of a misspelt field, by itself
        assert code in (0, 1, 2) and "Traceback" not in err and err.count("\n") == (code != 0), told
        assert (code == 2) <= (err.startswith("error: ") and not out), told
        (here / file).write_bytes(whole)
        for path, content in run.items():
            path.write_bytes(content)
        shutil.rmtree(here / "new", ignore_errors=True)
