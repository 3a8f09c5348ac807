"""The bench for users: what it asks for, what it counts, what it writes. Models are tiny; no time is asserted that was measured."""

import csv
import io
import itertools
import json
import math
from dataclasses import asdict, fields, replace

import pytest
import torch
from rich.console import Console

from tts_engine import bench, cli, options
from tts_engine.bench import Case, Measured, cross, make_problems, measure, run_case
from tts_engine.branch import child_identity
from tts_engine.config import DTYPES, EngineConfig
from tts_engine.engine import Engine
from tts_engine.errors import EngineError
from tts_engine.ledger import Ledger, PolicyLedger, PRMLedger
from tts_engine.models.tokenizer import chat_template, encode_prompt, load_tokenizer
from tts_engine.report import bench_table
from tts_engine.sampling import philox_key
from tts_engine.search import METHODS, make_method
from tts_engine.steps import CLOSED, DrawnLengths
from tts_engine.tasks.prompts import messages
from tts_engine.testing import random_policy_directory, random_prm_directory

CONFIG = EngineConfig(system="", block_size=4, kv_bytes=4 << 20)
PROMPT = 20
KV_BYTES = 2 * 2 * 2 * 8 * 4  # of a token of either model: K and V, 2 layers, 2 heads of 8, float32
PRM_PROMPT, PRM_STEP = PROMPT, 2  # tokens of a problem and of a one-token step as the PRM reads them: a line end, a marker


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    random_policy_directory(top / "policy", vocab_size=2000)  # few siblings are equal then
    random_prm_directory(top / "prm", "qwen2.5-math-prm")
    return top


@pytest.fixture
def case(models):
    """case(method, ...) with everything small."""

    def make(name, *, problems=2, step_tokens=1, config=CONFIG, **settings):
        method = make_method(name, **settings)
        prm = models / "prm" if method.uses_prm else None
        return Case(policy=models / "policy", prm=prm, method=method, config=config, problems=problems, prompt_tokens=PROMPT,
                    step_tokens=step_tokens)  # fmt: skip

    return make


@pytest.fixture(scope="module")
def engine(models):
    with Engine.from_pretrained(models / "policy", models / "prm", system="", block_size=4, kv_bytes=4 << 20) as made:
        yield made


def ticking(*seconds):
    """A clock that shows such times between its odd and its even calls, and an hour between the others."""
    shown = list(itertools.accumulate(x for second in seconds for x in (3600.0, second)))
    return iter(shown).__next__


# --- figures, counted by hand ---------------------------------------------------------------------------------------------


def test_rates_shares_and_medians_of_a_case(case):
    ledger = Ledger(policy=PolicyLedger(tokens_generated=600, linear_flops=3_000, attention_flops=7_000, head_flops=1_000,
                                        duplicate_flops=500, ideal_flops=10_500, kv_distinct_bytes=3, kv_logical_bytes=9),
                    prm=PRMLedger(tokens_computed=900, linear_flops=5_000, attention_flops=3_000, head_flops=1_000,
                                  rereading_flops=1_500, kv_distinct_bytes=1, kv_logical_bytes=2))  # fmt: skip
    out = Measured(case=case("beam", n=4), ledger=ledger, seconds=(5.0, 1.0, 2.0), ceiling=10_000.0, copy_ceiling=5_000.0,
                   bytes_read=4_000, joules=None, peak_rss=1)  # fmt: skip
    assert (out.median, out.problems_per_s, out.policy_tokens_per_s, out.prm_tokens_per_s) == (2.0, 1.0, 300.0, 450.0)
    assert out.mfu == pytest.approx((3_000 + 1_000 + 5_000 + 1_000) / (2.0 * 10_000))  # attention is left out
    assert out.mbu == pytest.approx(4_000 / (2.0 * 5_000))
    assert out.tokens_per_pflop == pytest.approx(600 / (20_000 / 1e15))
    told = out.as_dict()
    assert (told["seconds"], told["seconds_min"], told["seconds_max"], told["repeats"]) == (2.0, 1.0, 5.0, 3)
    assert (told["policy_flops"], told["prm_flops"]) == (11_000, 9_000)
    assert told["useful"] == pytest.approx(18_000 / 20_000)
    assert (told["wasted_duplicates"], told["wasted_rereading"], told["wasted_padding"]) == pytest.approx((0.025, 0.075, 0))
    assert (told["kv_distinct_bytes"], told["kv_logical_bytes"]) == (4, 11)


def test_time_is_that_of_the_repeats_and_not_of_the_warm_up(engine, case):
    out = run_case(engine, case("majority", n=1, max_steps=1), 1.0, 1.0, repeats=3, clock=ticking(100.0, 4.0, 2.0, 3.0))
    assert out.seconds == pytest.approx((4.0, 2.0, 3.0)) and out.median == pytest.approx(3.0)


def test_every_repeat_pays_its_own_way(engine, case):
    """Had it found the prompts of the one before, it would have read them no more."""
    out = run_case(engine, case("best_of_n", n=2, max_steps=3), 1.0, 1.0, repeats=2)
    # Of a step of one token nothing is computed while it is drawn, and the last one of a solution never.
    assert out.ledger.policy.tokens_computed == 2 * (PROMPT + 2 * 2)
    assert out.ledger.prm.tokens_reread > out.ledger.prm.tokens_computed > 0
    assert out.ledger.policy.tokens_recomputed == out.ledger.prm.tokens_recomputed == 0


@pytest.mark.parametrize("step_tokens", [1, 2, 7])
def test_the_tokens_drawn_are_the_lengths_that_were_drawn(engine, case, step_tokens):
    given = replace(case("majority", n=3, max_steps=4, step_tokens=step_tokens), seed=5)
    rule, expected = DrawnLengths(step_tokens, 3), 0
    for number in range(given.problems):
        for draw in range(3):
            identity, numbers = 0, [draw, 0, 0, 0]
            for number_of_draw in numbers:
                identity = child_identity(identity, (), number_of_draw)
                expected += rule.start(identity, philox_key(5, f"bench-{number}")) - CLOSED
    out = run_case(engine, given, 1.0, 1.0, repeats=1)
    assert out.ledger.policy.tokens_generated == expected
    assert (step_tokens != 1) or expected == 2 * 3 * 4


@pytest.mark.parametrize(
    ("name", "settings", "distinct", "logical"),
    [  # tokens of one problem behind its prompt, and paths; steps are single tokens
        ("cot", {"max_steps": 5}, 5, [5]),
        ("majority", {"n": 3, "max_steps": 4}, 12, [4, 4, 4]),
        ("best_of_n", {"n": 3, "max_steps": 4}, 12, [4, 4, 4]),
        ("beam", {"n": 2, "width": 2, "max_steps": 3}, 2 + 2, [3, 3]),  # one survivor: a chain, then a fork
        ("dvts", {"n": 4, "width": 2, "max_steps": 3}, 2 * (2 + 2), [3, 3, 3, 3]),
        ("beam", {"n": 4, "width": 4, "max_steps": 1}, 4, [1, 1, 1, 1]),
    ],
)
def test_keys_and_values_held_once_and_by_every_branch_for_itself(engine, case, name, settings, distinct, logical):
    given = case(name, **settings)
    out = run_case(engine, given, 1.0, 1.0, repeats=1)
    tokens = {"distinct": PROMPT + distinct, "logical": sum(PROMPT + path for path in logical)}
    if given.method.uses_prm:
        tokens["distinct"] += PRM_PROMPT + PRM_STEP * distinct
        tokens["logical"] += sum(PRM_PROMPT + PRM_STEP * path for path in logical)
    assert out.kv_distinct == given.problems * KV_BYTES * tokens["distinct"]
    assert out.kv_logical == given.problems * KV_BYTES * tokens["logical"]


def test_a_ceiling_is_the_fastest_product_but_the_first(monkeypatch):
    monkeypatch.setattr(bench, "SIDE", {"cpu": 8})
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(bench, "COPIED", {"cpu": 100})
    assert bench.gemm_ceiling("float32", clock=ticking(1.0, 5.0, 2.0, 3.0)) == pytest.approx(2 * 8**3 / 2.0)
    assert bench.copy_ceiling(clock=ticking(1.0, 5.0, 2.0, 3.0)) == pytest.approx(2 * 100 / 2.0)


def test_every_dtype_of_an_engine_has_its_product():
    assert set(bench.GEMMS) == set(DTYPES)
    rows, weight = torch.randn(32, 64), torch.randn(16, 64)
    for dtype, product in bench.GEMMS.items():
        scale = 400 if dtype == "int8" else 1
        torch.testing.assert_close(product(rows, weight)().float() / scale, rows @ weight.T, rtol=0.05, atol=1.5)


# --- the work ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt_tokens", "seed"), [(bench.SHORTEST_TEXT + 1, 0), (PROMPT, 0), (PROMPT, 1), (301, 0)])
def test_prompts_have_their_length_and_differ(case, models, prompt_tokens, seed):
    given = replace(case("cot", problems=20), prompt_tokens=prompt_tokens, seed=seed)
    tokenizer = load_tokenizer(models / "policy")
    problems = make_problems(given, tokenizer)
    assert len({problem.problem for problem in problems}) == len({problem.id for problem in problems}) == 20
    assert {len(encode_prompt(tokenizer, problem.problem)) for problem in problems} == {prompt_tokens}
    assert problems == make_problems(given, tokenizer) != make_problems(replace(given, seed=7), tokenizer)
    assert problems[:5] == make_problems(replace(given, problems=5), tokenizer)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama-3.1", "mistral-7b-v0.1", "deepseek-r1-distill-qwen"])
def test_prompts_have_their_length_in_real_vocabularies(case, shared, name):
    if not (shared / "tokenizers" / name).is_dir():
        pytest.skip(f"needs the tokenizer of {name}")
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    for problem in make_problems(replace(case("cot"), prompt_tokens=150), tokenizer):
        system, user = messages(problem.problem, chat_template(tokenizer), "")
        assert len(encode_prompt(tokenizer, user, system)) == 150


def test_every_combination_in_the_order_in_which_it_was_asked():
    made = cross(
        [("a", "q"), ("b", "q")], of_engine={"dtype": ["float32", "bfloat16"]}, methods=["majority", "beam", "cot"],
        of_case={"problems": [1, 2]}, of_method={"width": [1, 2], "n": [2, 4]},
    )  # fmt: skip
    told = [
        (c.policy, c.prm, c.config.dtype, c.method.name, c.problems, getattr(c.method, "width", None), c.method.n) for c in made
    ]
    majority = [("majority", p, None, n) for p in (1, 2) for n in (2, 4)]
    beam = [("beam", p, width, n) for p in (1, 2) for width in (1, 2) for n in (2, 4)]
    cot = [("cot", p, None, 1) for p in (1, 2)]
    assert told == [
        (policy, "q" if METHODS[name].uses_prm else None, dtype, name, *rest)
        for policy in "ab" for dtype in ("float32", "bfloat16") for name, *rest in majority + beam + cot
    ]  # fmt: skip


def test_what_two_prms_would_measure_twice_is_measured_once():
    made = cross([("a", "q"), ("a", "r")], of_engine={}, methods=["majority", "beam"], of_case={}, of_method={"n": [4]})
    assert [(c.method.name, c.prm) for c in made] == [("majority", None), ("beam", "q"), ("beam", "r")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ["mcts"]}, "no method 'mcts'"),
        ({"methods": ["beam", "mcts"]}, "no method 'mcts'"),
        ({"methods": ["cot", "majority"], "of_method": {"n": [2], "width": [2]}}, "has no setting 'width'"),
        ({"of_method": {"n": [4, 6]}}, "n=6 must be a multiple of width=4"),
        ({"of_engine": {"dtype": ["float32", "int3"]}}, "no dtype 'int3'"),
        ({"of_engine": {"backend": ["native", "quick"]}}, "no attention backend 'quick'"),
        ({"of_case": {"problems": [4, 0]}}, "problems=0 must be at least 1"),
        ({"of_case": {"problems": [10**9]}}, "problems=1000000000 must be at least 1 and at most"),
        ({"of_case": {"step_tokens": [0]}}, "steps='0' is unknown"),
        ({"models": [("a", None)]}, "beam needs a PRM, and none is given"),
    ],
)
def test_a_combination_without_sense_is_refused(changes, words):
    given = {"models": [("a", "q")], "of_engine": {}, "methods": ["beam"], "of_case": {}, "of_method": {"n": [4]}} | changes
    with pytest.raises(EngineError, match=words):
        cross(given.pop("models"), **given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_tokens": 600}, "600 tokens of prompt and 5 steps of up to 1 may come to 605 in policy, which has 512 positions"),
        ({"step_tokens": 100}, "20 tokens of prompt and 5 steps of up to 150 may come to 770 in policy"),
        ({"step_tokens": 65, "prompt_tokens": 25}, "steps of up to 97 may come to 515 in prm, which has 512 positions"),
        ({"prompt_tokens": bench.SHORTEST_TEXT}, "has no room for a problem: the policy's chat takes 1 and a problem 8"),
        ({"config": replace(CONFIG, kv_bytes=20_000)}, "may need .* KV blocks of 4 tokens in each model and kv_bytes=20000"),
        ({"policy": "no/such/place"}, "neither a directory nor a hub id"),
        ({"prm": "no/such/place"}, "neither a directory nor a hub id"),
        ({"prm": "policy"}, "cannot be recognised as a PRM"),
        ({"policy": "prm"}, "is a reward model"),
    ],
)
def test_what_could_not_run_is_refused_before_anything_is_loaded(case, models, monkeypatch, changes, words):
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for ceiling in ("gemm_ceiling", "copy_ceiling"):
        monkeypatch.setattr(bench, ceiling, lambda *_: pytest.fail("something was timed"))
    sound = case("beam", n=4, max_steps=5)
    changes = {name: models / value if value in ("policy", "prm") else value for name, value in changes.items()}
    with pytest.raises(EngineError, match=words):
        measure([sound, replace(sound, **changes)])


def test_a_case_at_the_edge_of_positions_and_pool_is_let_through_and_runs(models):
    longest = (512 - PRM_PROMPT) // 2 - 1  # of a step, with its marker
    step_tokens = next(mean for mean in range(longest, 0, -1) if mean + mean // 2 <= longest)
    tokens = 2 * (step_tokens + step_tokens // 2) + 2  # of both steps to the PRM
    blocks = 5 + 1 + math.ceil((tokens - 1) / 4)  # the prompt, a step of one token, the other
    config = replace(CONFIG, kv_bytes=2 * KV_BYTES * 4 * blocks)
    edge = Case(policy=models / "policy", prm=models / "prm", method=make_method("beam", n=4, max_steps=2), problems=1,
                prompt_tokens=PROMPT, step_tokens=step_tokens, config=config)  # fmt: skip
    bench.check([edge])
    for beyond in ({"step_tokens": step_tokens + 1}, {"config": replace(config, kv_bytes=config.kv_bytes - 1)}):
        with pytest.raises(EngineError):
            bench.check([replace(edge, **beyond)])
    with Engine.from_pretrained(edge.policy, edge.prm, **asdict(edge.engine_config)) as engine:
        out = run_case(engine, edge, 1.0, 1.0, repeats=1)
    assert out.ledger.policy.tokens_generated >= 8 * (step_tokens - step_tokens // 2)


def test_models_are_loaded_once_for_all_that_share_them(models, monkeypatch):
    loaded, load = [], Engine.from_pretrained
    monkeypatch.setattr(bench, "gemm_ceiling", lambda *key: loaded.append(key) or 1.0)
    monkeypatch.setattr(bench, "copy_ceiling", lambda _: 1.0)

    def watched(policy, prm=None, **settings):
        loaded.append((policy.name, prm and prm.name, settings["dtype"]))
        return load(policy, prm, **settings)

    monkeypatch.setattr(Engine, "from_pretrained", watched)
    cases = cross(
        [(models / "policy", models / "prm")], of_engine={"dtype": ["float32", "bfloat16"], "kv_bytes": [4 << 20]},
        methods=["majority", "beam", "cot"], of_case={"prompt_tokens": [PROMPT], "step_tokens": [1, 2]},
        of_method={"n": [4], "max_steps": [1, 2]},
    )  # fmt: skip
    out = list(measure(cases, repeats=1))
    assert loaded == [
        ("float32", "cpu"), ("policy", None, "float32"), ("policy", "prm", "float32"),
        ("bfloat16", "cpu"), ("policy", None, "bfloat16"), ("policy", "prm", "bfloat16"),
    ]  # fmt: skip
    assert {one.case for one in out} == set(cases) and len(out) == len(cases) == 24
    for one in out:  # each was run with its own lengths
        steps = one.case.method.n * one.case.method.max_steps * one.case.problems
        drawn = one.ledger.policy.tokens_generated
        assert drawn == steps if one.case.step_tokens == 1 else steps <= drawn <= 3 * steps


# --- the command line -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, models, monkeypatch):
    """argv -> (exit code, standard output, standard error), with everything small and a ceiling that costs nothing."""
    for ceiling in ("gemm_ceiling", "copy_ceiling"):
        monkeypatch.setattr(bench, ceiling, lambda *_: 1e9)
    small = ["--problems", 1, "--prompt-tokens", PROMPT, "--step-tokens", 2, "--depth", 2, "--kv-bytes", "4M", "--repeats", 2]

    def call(*argv, given=True):
        named = ["--policy", models / "policy", "--prm", models / "prm", *small] if given else []
        try:
            code = cli.main([str(argument) for argument in ("bench", *named, *argv)])
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("suffix", [".md", ".csv", ".jsonl"])
def test_the_table_is_shown_written_and_told_to_programs(run, tmp_path, suffix):
    out = tmp_path / f"table{suffix}"
    out.write_text("what was there")
    code, shown, err = run("--method", "cot,beam", "--n", "4,8", "-o", out, "--json")
    *lines, last = shown.splitlines()
    told = json.loads(last)
    assert code == 0 and err == "1 of 3 measured\n2 of 3 measured\n"
    assert told["interrupted"] is False and told["out"] == str(out)
    rows = told["rows"]
    assert [(row["method"], row["n"], row["prm"]) for row in rows] == [("cot", 1, None), ("beam", 4, "prm"), ("beam", 8, "prm")]
    assert all(row["policy_tokens"] > 0 and row["mfu"] > 0 and row["seconds_min"] <= row["seconds"] for row in rows)
    assert [row["prm_tokens"] > 0 for row in rows] == [False, True, True]
    assert "policy policy, prm prm, rules paper, width 4" in shown and "prompt tokens 20, depth 2, step tokens 2" in shown
    assert "float32 on cpu 1 GFLOP/s" in shown and sum(line.startswith(("cot", "beam")) for line in lines) == 3
    written = out.read_text()
    if suffix == ".jsonl":
        assert [json.loads(line) for line in written.splitlines()] == rows
    elif suffix == ".csv":
        read = list(csv.DictReader(written.splitlines()))
        assert [list(row) for row in read] == [list(row) for row in rows]
        assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == read
    else:
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines() if line.startswith("|")]
        heading, rule, *body = cells
        assert heading[:3] == ["method", "n", "problems /s"] and set(rule) == {"---"} and len({len(line) for line in cells}) == 1
        assert [line[:2] for line in body] == [["cot", "1"], ["beam", "4"], ["beam", "8"]]
        assert [line[heading.index("PRM tok/s")] == "-" for line in body] == [True, False, False]


def test_ctrl_c_shows_and_writes_what_is_measured(run, tmp_path, monkeypatch):
    measured, real = [], bench.run_case

    def interrupted(*args, **how):
        if measured:
            raise KeyboardInterrupt
        measured.append(real(*args, **how))
        return measured[0]

    monkeypatch.setattr(bench, "run_case", interrupted)
    out = tmp_path / "table.jsonl"
    code, shown, err = run("--method", "majority", "--n", "2,4", "-o", out, "--json")
    told = json.loads(shown.splitlines()[-1])
    assert code == cli.EXIT_INTERRUPTED and err.endswith("interrupted: 1 of 2 are measured\n")
    assert told["interrupted"] is True and [row["n"] for row in told["rows"]] == [2]
    assert [json.loads(line) for line in out.read_text().splitlines()] == told["rows"] and "majority" in shown


def test_ctrl_c_before_anything_is_measured_leaves_a_file_as_it_was(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_case", interrupted)
    out = tmp_path / "table.md"
    out.write_text("what was there")
    assert run("--method", "cot", "-o", out) == (cli.EXIT_INTERRUPTED, "", "interrupted: 0 of 1 are measured\n")
    assert out.read_text() == "what was there"


def test_a_case_that_fails_costs_none_that_is_measured(run, tmp_path, monkeypatch):
    real = bench.run_case

    def failing(engine, case, *rest, **how):
        if case.method.n == 4:
            raise EngineError("out of luck")
        return real(engine, case, *rest, **how)

    monkeypatch.setattr(bench, "run_case", failing)
    out = tmp_path / "table.jsonl"
    code, shown, err = run("--method", "majority", "--n", "2,4", "-o", out)
    assert code == 2 and err.endswith("error: out of luck\n") and "majority" in shown
    assert [json.loads(line)["n"] for line in out.read_text().splitlines()] == [2]


def test_the_defaults_that_help_states_are_those_of_a_case():
    defaults = {field.name: field.default for field in fields(Case)}
    stated = {name: text.rpartition("(default ")[2].rstrip(")") for name, _, text in options.BENCH_OPTIONS}
    for name in ("problems", "prompt_tokens", "step_tokens"):
        assert stated[name] == str(defaults[name])
    args = options.make_parser(cli.RUNS).parse_args(["bench"])
    assert args.repeats == bench.REPEATS and args.seed == defaults["seed"]


def test_a_bench_of_what_ships_fits_its_models(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "_measure", lambda group, *_: asked.extend(group) or iter(()))
    assert cli.main(["bench"]) == 0
    [case] = asked
    assert (case.method.name, case.method.n, case.config.block_size, case.problems) == ("beam", 16, 8, 4)


@pytest.mark.parametrize(("width", "num_tables", "joules"), [(132, 1, None), (132, 2, 77.5), (80, 2, None), (34, 7, 77.5)])
def test_every_figure_is_shown_on_a_narrow_page_too(case, width, num_tables, joules):
    ledger = Ledger(
        policy=PolicyLedger(tokens_generated=123_456, linear_flops=10**13, ideal_flops=10**13, kv_distinct_bytes=10**9,
                            kv_logical_bytes=12 * 10**9),
        prm=PRMLedger(linear_flops=10**13, recompute_flops=10**12),
    )  # fmt: skip
    rows = [
        Measured(case=case("beam", n=n), ledger=ledger, seconds=(12.34, 12.3, 12.5), ceiling=1e12, copy_ceiling=1e10,
                 bytes_read=10**9, joules=joules, peak_rss=345 * 10**6).as_dict()
        for n in (64, 256)
    ]  # fmt: skip
    screen = Console(file=io.StringIO(), width=width)
    bench_table.show(rows, screen)
    text = screen.file.getvalue()
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= width
    assert text.count("256") == text.count("method") == num_tables
    assert all(part in text for part in ("10000", "6.17 M", "162", "1000", "12000", "345", "12.3", "95", "0.81"))
    assert ("joules" in text) == ("77.5" in text) == (joules is not None)
    assert rows[0]["threads"] == torch.get_num_threads()
