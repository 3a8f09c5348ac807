"""The argmax over calibration runs, what may not be fitted on, and the strictness of the file."""

import json
from dataclasses import asdict, replace

import pytest

from tts_engine.ledger import Ledger
from tts_engine.search import make_method
from tts_engine.strategy import StrategyError
from tts_engine.strategy.choose import Evidence, Strategy, fit, load_strategy, method_of, outcome_of
from tts_engine.strategy.difficulty import Draws
from tts_engine.strategy.typed import parse

IDS = [f"p{i:02}" for i in range(20)]  # the even ones are easy
TASK = {"name": "sums", "split": "calibration", "limit": None, "problems_sha256": "f" * 64}
POLICY = {"name": "small", "parameters": 1_000, "sha256": {"w": "1"}}
PRM = {"name": "judge", "parameters": 2_000, "sha256": {"w": "2"}}


def run(name, n, solves, flops, *, prm=PRM, seed=0, **changed):
    """A run that solves the problems `solves` names, at `flops` a problem."""
    method = make_method(name) if name == "cot" else make_method(name, n=n)
    description = {"policy": POLICY, "prm": prm if method.uses_prm else None, "seed": seed, "task": TASK,
                   "method": {"name": name} | asdict(method)} | changed  # fmt: skip
    return Evidence(f"runs/{name}{n}", description, {id: (solves(i), flops) for i, id in enumerate(IDS)})


def pilot(prm=PRM, seed=1, draws=8, **changed):
    """Draws that agree and please the PRM where a problem is easy, and scatter where it is hard."""
    found = run("best_of_n", draws, bool, 1, prm=prm, seed=seed, **changed)
    easy = Draws((True,) * draws, ("7",) * draws, ((0.9,),) * draws)
    hard = Draws((False,) * draws, tuple(str(i) for i in range(draws)), ((0.1,), (0.3,)) * (draws // 2))
    return replace(found, name="runs/pilot", outcomes={}, draws={id: (hard if i % 2 else easy) for i, id in enumerate(IDS)})


def even(i):
    return i % 2 == 0


RUNS = [
    run("cot", 1, even, 1),
    run("majority", 4, even, 4),
    run("best_of_n", 4, lambda i: True, 8),
    run("beam", 4, lambda i: i % 2 == 1, 6),
    run("beam", 8, lambda i: True, 20),
]


def fitted(runs=RUNS, pilots=None, **settings):
    return fit(runs, [pilot()] if pilots is None else pilots, name="mine", versions={"python": "3"}, **settings)


def picks(strategy):
    return {(pick.n, pick.bin): (pick.method["name"], pick.method.get("n", 1)) for pick in strategy.tables[0].picks}


@pytest.mark.parametrize("draws", [0, 4])
def test_the_best_is_picked_and_of_equals_the_cheaper(draws):
    strategy = fitted(draws=draws, budgets=[1, 4, 8])
    # easy: all but beam at n = 4 solve every problem, cot for least; hard: beam at n = 4 as well as best of n, for less
    assert {key: method for key, method in picks(strategy).items() if key[1] != "medium"} == {
        (1, "easy"): ("cot", 1), (1, "hard"): ("cot", 1), (4, "easy"): ("cot", 1), (4, "hard"): ("beam", 4),
        (8, "easy"): ("cot", 1), (8, "hard"): ("beam", 4)}  # fmt: skip
    [table] = strategy.tables
    found = table.pick("hard", 4)
    assert (found.accuracy, found.problems, found.compared) == (1.0, 10, 4) and found.gflop == pytest.approx(6e-9)
    assert table.pick("medium", 4).method["name"] == "best_of_n" and table.pick("medium", 4).problems == 0  # the best for all
    assert (table.predictor is None) == (draws == 0)


def test_a_strategy_says_what_it_was_fitted_on():
    [table] = fitted().tables
    assert (table.policy.name, table.policy.sha256, table.prm.name) == ("small", {"w": "1"}, "judge")
    told = table.fitted_on
    assert (told.task, told.split, told.problems, told.seeds, told.pilot_seed) == ("sums", "calibration", 20, (0,), 1)
    assert told.runs[0] == "runs/cot1" and told.pilot == "runs/pilot" and told.pilot_draws == 4 and told.problems_sha256 == "f" * 64
    assert table.pilot["name"] == "best_of_n" and table.pilot["n"] == 4 and table.predictor.uses_prm
    assert table.predictor.confusion["easy"] == {"easy": 10, "medium": 0, "hard": 0}


def test_each_prm_has_a_table_and_shares_the_runs_that_read_none():
    other = PRM | {"name": "poor", "sha256": {"w": "3"}}
    runs = [*RUNS, run("beam", 4, lambda i: False, 6, prm=other)]
    first, second = fitted(runs, draws=4).tables
    assert (first.prm.name, second.prm.name) == ("judge", "poor")
    assert second.pick("easy", 4).compared == 3  # cot, majority and its own beam
    # the pilot was read by the other PRM: what that thinks is not to be had in a search with this one
    assert not second.predictor.uses_prm and second.pilot["name"] == "majority"


def test_without_a_prm_agreement_is_all_there_is():
    [table] = fitted([RUNS[0], RUNS[1]]).tables
    assert table.prm is None and table.predictor.features == ("agreement",)


@pytest.mark.parametrize(
    ("runs", "pilots", "settings", "words"),
    [
        ([replace(RUNS[1], description=RUNS[1].description | {"task": TASK | {"name": "embedded", "split": "test"}})], None, {},
         "runs/majority4 is a run on the test split of embedded: a strategy is chosen on calibration problems"),
        (RUNS, [pilot(seed=0)], {}, "runs/pilot and runs/majority4 share their draws, both of seed 0"),
        (RUNS, [replace(RUNS[3], draws=pilot().draws)], {}, "runs/beam4 is a run of beam: only independent draws"),
        (RUNS, [pilot(policy=POLICY | {"sha256": {"w": "9"}})], {}, "no pilot run is of the policy and problems of runs/cot1"),
        (RUNS, [pilot(task=TASK | {"problems_sha256": "0" * 64})], {}, "no pilot run is of the policy and problems"),
        (RUNS, None, {"draws": 8}, "runs/pilot has 8 draws a problem: with 8 for the predictor none are left"),
        (RUNS, None, {"edges": (0.1, 0.5)}, "falling"),
        ([RUNS[1]], None, {"budgets": [1, 4]}, "no run has n=1 or less: the smallest is n=4"),
        ([RUNS[0], replace(RUNS[1], outcomes={"p00": (True, 1)})], None, {}, "runs/majority4 hold different problems"),
    ],
)  # fmt: skip
def test_what_would_make_a_strategy_look_better_than_it_is_is_refused(runs, pilots, settings, words):
    with pytest.raises(StrategyError) as refusal:
        fitted(runs, pilots, **settings)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"policy": None}, "the run.json of runs/beam4 is not as a run of this version has it"),
        ({"policy": {"name": "small", "parameters": 1}}, "is not as a run"),
        ({"prm": {"name": "judge", "parameters": "many", "sha256": {}}}, "is not as a run"),
        ({"task": None}, "is not as a run"),
        ({"task": {"name": "sums", "split": "calibration"}}, "is not as a run"),
        ({"seed": "0"}, "is not as a run"),
        ({"method": {"name": "beam", "n": 4}}, "is not as a run"),
        ({"method": {"name": "majority", "n": 4, "max_steps": 40, "rules": {}}}, "is not as a run"),
        ({"method": {"name": "beam", "n": 5}}, "n=5 must be a multiple of width=4"),
        ({"method": {"name": "auto", "n": 4}}, "runs/beam4 is a run of 'auto', and a strategy chooses among cot, majority"),
    ],
)
def test_a_run_that_was_written_otherwise_is_one_sentence(changed, words):
    sound = RUNS[3]
    sound.check()
    with pytest.raises(StrategyError) as refusal:
        replace(sound, description=sound.description | changed).check()
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(StrategyError, match="holds no finished problem yet"):
        replace(sound, outcomes={}).check()


def test_outcomes_count_both_models_and_need_a_gold_answer():
    ledger = Ledger.empty()
    ledger.policy.linear_flops, ledger.policy.attention_flops, ledger.prm.head_flops, ledger.seconds = 1, 2, 4, 9.0
    assert outcome_of({"correct": True, "ledger": ledger.as_dict()}) == (True, 7)
    assert outcome_of({"correct": False, "ledger": None}) == (False, 0)
    with pytest.raises(StrategyError, match="p has no known answer"):
        outcome_of({"id": "p", "correct": None, "ledger": None})


# --- the file -------------------------------------------------------------------------------------------------------------


def test_a_saved_strategy_is_read_back_whole(tmp_path):
    for kind in ("absolute", "quantile"):
        strategy = fitted(kind=kind)
        strategy.save(tmp_path / "mine.json")
        again = load_strategy(tmp_path / "mine.json")
        assert again == strategy and again.sha256 == strategy.sha256


def changed(place, value):
    """The file of a strategy with one thing changed; a value of None takes it out."""
    data = json.loads(json.dumps(asdict(fitted())))
    *path, last = place
    at = data
    for key in path:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return data


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["colour"], "red", "mine has the key 'colour', which is unknown; known: schema_version, name"),
        (["tables", 0, "bins", "width"], 3, "mine.tables[0].bins has the key 'width'"),
        (["source"], None, "mine lacks source"),
        (["tables"], "none", 'mine.tables is "none", not a list'),
        (["tables", 0, "parameters"], [1], "mine.tables[0].parameters is [1], not a list of 2"),
        (["tables", 0, "predictor", "draws"], 4.5, "mine.tables[0].predictor.draws is 4.5, not a whole number"),
        (["tables", 0, "predictor", "draws"], True, "is true, not a whole number"),
        (["tables", 0, "predictor", "draws"], 5, "a pilot is a majority or best_of_n of the predictor's 5 draws"),
        (["tables", 0, "predictor", "thresholds"], [0.0], "3 bins take 2 thresholds"),
        (["tables", 0, "predictor"], None, "of no use without each other"),
        (["tables", 0, "picks"], [], "a table without picks"),
        (["tables", 0, "picks", 0, "bin"], "dreadful", "a pick is for the bin 'dreadful', and the bins are easy, medium, hard"),
        (["tables", 0, "picks", 0, "method", "name"], "mcts", "no method 'mcts'"),
        (["tables", 0, "picks", 3, "method", "depth"], 3, "has no setting 'depth'"),
        (["tables", 0, "bins", "edges"], [0.1, 0.5], "falling"),
        (["schema_version"], 2, "schema_version is 2; this version reads 1"),
    ],
)
def test_a_file_that_is_not_of_its_form_is_refused_by_place(place, value, words):
    with pytest.raises(StrategyError) as refusal:
        parse(json.dumps(changed(place, value)), Strategy, "mine")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is not JSON"), ("[]", "is [], not an object"), ('{"schema_version": NaN}', "NaN is not JSON")]
)
def test_what_is_no_strategy_is_one_sentence(tmp_path, text, words):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(StrategyError) as refusal:
        load_strategy(tmp_path / "s.json")
    assert words in str(refusal.value)
    with pytest.raises(StrategyError, match="nowhere is no strategy and no file; known: paper_table"):
        load_strategy("nowhere")


def test_a_bin_without_a_pick_is_found_when_the_file_is_read():
    data = changed(["colour"], 1)
    del data["colour"], data["tables"][0]["picks"][1]
    with pytest.raises(StrategyError, match="no method for medium problems at n=1; its budgets: 4, 8"):
        parse(json.dumps(data), Strategy, "mine")


def test_a_budget_that_was_not_fitted_is_refused():
    [table] = fitted().tables
    with pytest.raises(StrategyError, match="no method for easy problems at n=16; its budgets: 1, 4, 8"):
        table.method("easy", 16)


# --- the paper's table, as its authors gave it ---------------------------------------------------------------------------

PAPER = [  # task, parameters, name; easy, medium, hard
    ("math500", 1.5e9, "Qwen2.5-1.5B-Instruct", ("beam", "beam", "beam")),
    ("math500", 7.6e9, "Qwen2.5-7B-Instruct", ("dvts", "dvts", "beam")),
    ("math500", 32.8e9, "Qwen2.5-32B-Instruct", ("dvts", "dvts", "beam")),
    ("math500", 72.7e9, "Qwen2.5-72B-Instruct", ("best_of_n",) * 3),
    ("aime24", 1.5e9, "Qwen2.5-1.5B-Instruct", ("dvts",) * 3),
    ("aime24", 7.6e9, "Qwen2.5-7B-Instruct", ("dvts",) * 3),
    ("aime24", 14.8e9, "Qwen2.5-14B-Instruct", ("best_of_n",) * 3),
    ("aime24", 7.6e9, "DeepSeek-R1-Distill-Qwen-7B", ("majority",) * 3),
    (None, 1.5e5, "policy-s", ("beam",) * 3),
]


@pytest.mark.parametrize(("task", "parameters", "name", "methods"), PAPER)
def test_the_papers_table_is_the_papers(task, parameters, name, methods):
    def serves(table):
        low, high = table.parameters
        fits = (low or 0) <= parameters and (high is None or parameters < high)
        return fits and (not table.tasks or task in table.tasks) and (not table.policies or name.startswith(table.policies))

    strategy = load_strategy("paper_table")
    table = next(table for table in strategy.tables if serves(table))
    assert tuple(table.method(bin, 64).name for bin in ("easy", "medium", "hard")) == methods
    assert table.bins.edges == (0.5, 0.1) and {table.method(bin, 64).n for bin in table.bins.names} == {64}
    assert "2502.06703" in strategy.source and "issue 4" in strategy.source


def test_methods_are_described_as_runs_describe_them():
    method = make_method("dvts", n=8, width=2, rules="sal", temperature=0.5)
    assert method_of(json.loads(json.dumps({"name": "dvts", **asdict(method)}))) == method
    assert method_of({"name": "beam", "width": 2}, 6).n == 6 and method_of({"name": "cot"}, 6).n == 1
    with pytest.raises(StrategyError, match="n=6 must be a multiple of width=4"):
        method_of({"name": "beam"}, 6)
