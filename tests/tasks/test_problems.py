import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tts_engine.errors import MissingExtra, TaskError
from tts_engine.tasks.grader import Grader
from tts_engine.tasks.problems import LONGEST_LINE, TASKS, Problem, find_task, load_task

GOOD = '{"problem": "1+1?", "answer": "2"}'


@pytest.mark.parametrize(("split", "size"), [("test", 600), ("calibration", 600)])
def test_the_embedded_task_has_its_splits_and_needs_no_grading_worker(split: str, size: int):
    problems = load_task("embedded", split)
    assert len({problem.id for problem in problems}) == len(problems) == size
    assert problems[0].id == f"embedded-{split}-0001"
    assert [problem.level for problem in problems[:6]] == [1, 2, 3, 1, 2, 3]
    for problem in problems:
        assert problem.program is not None
        assert (problem.problem, problem.answer) == (problem.program.text, str(problem.program.answer))

    with Grader() as grader:
        grader.group([problem.answer for problem in problems[:200]])
        assert grader.num_compared == 0


def test_limit_takes_the_first_problems(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join([GOOD] * 9))
    assert load_task(path, limit=5) == load_task(path)[:5]
    assert len(load_task(path, limit=100)) == 9
    with pytest.raises(ValueError, match="limit=0"):
        load_task(path, limit=0)


def test_a_task_is_called_by_its_name_or_its_files(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text(GOOD)
    assert find_task(path).name == find_task(str(path)).name == "mine"
    assert [find_task(name).name for name in TASKS] == ["embedded", "math500", "aime24", "amc23"]


def test_a_jsonl_file_gives_problems_in_order(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    lines = [
        '\ufeff{"id": "first", "problem": " 1+1? ", "answer": "2", "level": 3, "subject": null}',
        "",
        '{"question": "2+2?", "answer": 4, "id": 7, "level": "easy"}',
        '{"question": "3+3?", "answer": 6.5, "id": null, "level": null}',
    ]
    path.write_bytes("\r\n".join(lines).encode())
    assert load_task(path) == [
        Problem("first", " 1+1? ", "2", 3),
        Problem("7", "2+2?", "4", "easy"),
        Problem("mine-4", "3+3?", "6.5"),
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON: .* at column [0-9]"),
        ('{"problem": "p", "answer": "a"} x', "not JSON"),
        ('["p", "a"]', "a JSON array where an object was expected"),
        ("null", "a JSON null where an object was expected"),
        ('{"answer": "a"}', "no field 'problem' or 'question'; it has 'answer'"),
        ('{"problem": "p"}', "no field 'answer'"),
        ("{}", "it has none"),
        ('{"problem": 5, "answer": "a"}', "field 'problem' is a JSON number, not a string"),
        ('{"problem": "p", "answer": ["a"]}', "field 'answer' is a JSON array, not a string or finite number"),
        ('{"problem": "p", "answer": true}', "field 'answer' is a JSON boolean"),
        ('{"problem": "p", "answer": null}', "field 'answer' is a JSON null"),
        ('{"problem": "p", "answer": " "}', "field 'answer' is blank"),
        ('{"problem": "p", "answer": "a", "id": ""}', "field 'id' is blank"),
        ('{"problem": "p", "answer": "a", "id": {}}', "field 'id' is a JSON object"),
        ('{"problem": "p", "answer": "a", "level": 2.5}', "field 'level' is a JSON number, not an integer or a string"),
        ('{"problem": "p", "answer": "a", "level": false}', "field 'level' is a JSON boolean"),
        ('{"problem": "p", "answer": NaN}', "NaN is not JSON"),
        ('{"problem": "p", "answer": "a", "score": -Infinity}', "-Infinity is not JSON"),
        ('{"problem": "p", "answer": 1e999}', "not a string or finite number"),
        (r'{"problem": "p \ud800", "answer": "a"}', "field 'problem' has half a surrogate pair at character 3"),
        (r'{"problem": "p", "answer": "\udc00"}', "field 'answer' has half a surrogate pair"),
        ('{"problem": "p", "answer": "a", "id": "good-1"}', "id 'good-1' is that of line 1"),
        ('{"problem": "' + "p" * LONGEST_LINE + '", "answer": "a"}', "longer than 4 MiB"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"problem": "\xff", "answer": "a"}', "not UTF-8 at byte 14"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str | bytes, what: str):
    path = tmp_path / "good.jsonl"
    path.write_bytes(f"{GOOD}\n\n".encode() + (line if isinstance(line, bytes) else line.encode()) + f"\n{GOOD}\n".encode())
    with pytest.raises(TaskError, match=f"good.jsonl line 3: .*{what}"):
        load_task(path, limit=1)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_problems_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(TaskError, match="holds no problems"):
        load_task(path)


def test_what_is_neither_task_nor_file_is_answered_with_what_is_known(tmp_path: Path):
    for name in ("embeded", tmp_path / "absent.jsonl", "x" * 5000, "\0"):
        with pytest.raises(TaskError, match="is no task and no file; known: embedded, .*, or the path of a JSONL file"):
            load_task(name)
    with pytest.raises(TaskError, match="is a directory"):
        load_task(tmp_path)


def test_an_unknown_split_is_refused(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text(GOOD)
    with pytest.raises(TaskError, match="known: test, calibration, prm_dev"):
        load_task("embedded", "train")
    for name in (path, "math500"):
        with pytest.raises(TaskError, match=f"{name} has no splits: split='calibration' cannot be taken from it"):
            load_task(name, "calibration")


# A row with the columns that the hub has, and the problem it is.
HUB = {
    "math500": (
        ("HuggingFaceH4/MATH-500", "test"),
        {"problem": "1+1?", "solution": "", "answer": "2", "subject": "Algebra", "level": 3, "unique_id": "test/algebra/1.json"},
        Problem("test/algebra/1.json", "1+1?", "2", 3),
    ),
    "aime24": (
        ("HuggingFaceH4/aime_2024", "train"),
        {"id": 60, "problem": "1+1?", "solution": "", "answer": "002", "url": "https://", "year": "2024"},
        Problem("60", "1+1?", "002"),
    ),
    "amc23": (
        ("math-ai/amc23", "test"),
        {"id": 0, "answer": "2.0", "url": "https://", "question": "1+1?"},
        Problem("0", "1+1?", "2.0"),
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_a_task_of_the_hub_is_read_from_its_own_columns(monkeypatch: pytest.MonkeyPatch, name: str):
    (hub_id, split), row, problem = HUB[name]
    asked = []

    def load_dataset(*names: str, **how: str):
        asked.append((names, how))
        return iter([row])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_task(name) == [problem]
    assert asked == [((hub_id,), {"split": split})]
    with Grader() as grader:
        assert grader.equal(problem.answer, "2") and not grader.running


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (ConnectionError("no network\nfor you"), "no network"),
        (KeyError(), "KeyError"),
        ([{"problem": "1+1?", "answer": "2"}], "no field 'unique_id'; it has 'problem', 'answer'"),
        ([{"problem": None, "answer": "2", "unique_id": "a"}], "field 'problem' is a JSON null, not a string"),
    ],
)
def test_a_task_that_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch, rows, what: str):
    def load_dataset(name: str, split: str):
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    sentence = rf"^task math500 cannot be had from the hub \(HuggingFaceH4/MATH-500\): {what}; give the path of a JSONL file with"
    with pytest.raises(TaskError, match=sentence) as caught:
        load_task("math500")
    assert "\n" not in str(caught.value)


def test_a_task_of_the_hub_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tts-engine\[hub\]', or give the path of a JSONL file"):
        load_task("aime24")


@pytest.mark.parametrize(("name", "size"), [("math500", 500), ("aime24", 30), ("amc23", 40)])
def test_the_benchmarks_load(shared: Path, name: str, size: int):
    path = shared / "benchmarks" / f"{name}.jsonl"
    problems = load_task(path)
    records = [json.loads(line) for line in path.open()]
    assert len(problems) == size
    assert [(p.id, p.problem, p.answer, p.level) for p in problems] == [
        (r["id"], r["problem"], r["answer"], r["level"]) for r in records
    ]


@pytest.mark.parametrize("name", ["aime24", "amc23"])
def test_competition_answers_are_compared_as_numbers_whatever_their_spelling(shared: Path, name: str):
    golds = [problem.answer for problem in load_task(shared / "benchmarks" / f"{name}.jsonl") if problem.answer.isdecimal()]
    assert len(golds) >= 30
    with Grader() as grader:
        for gold in golds:
            same = (f"{int(gold):03d}", f"{gold}.0", f"0{gold}", f"${gold}$.", f"+{gold}")
            other = (f"{gold}0", f"1{gold}", f"{gold}.5", f"{int(gold) + 1:03d}", f"1/{gold}1")
            assert [grader.equal(gold, text) for text in same + other] == [True] * 5 + [False] * 5
        assert grader.num_compared == 0
