import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tts_engine.errors import EngineError, MissingExtra
from tts_engine.tasks.answers import canonical
from tts_engine.tasks.grader import Grader

needs_algebra = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify, the [grade] extra")

EQUAL = [
    # decided without a worker
    ("217", "217"),
    ("217", "0217."),
    ("0.5", r"\frac12"),
    (r"\dfrac{3}{4}", "0.75"),
    ("58,500", "58500"),
    (r"10,\!080", "10080"),
    (r"\$18.90", "18.9"),
    (r"90^\circ", "90"),
    (r"1\frac{4}{5}", "9/5"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}2)"),
    (r"(-\infty, 0]", r"\left(-\infty,0\right]"),
    (r"11\sqrt2", r"11 \sqrt{2}"),
    # settled by algebra
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x^2-1", "(x-1)(x+1)"),
    ("x=5", "5"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"15\mbox{ cm}^2", "15"),
    (r"5.4 \text{ cents}", "5.4"),
    ("1,-2", "-2, 1"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}"),
    ("6 - 5i", "-5i + 6"),
    ("y = 2x + 3", "y = 3 + 2x"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("10^3", "1000"),
    (r"(-\infty,2)", "x<2"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}"),
    (r"(2,12) \cup (12,102)", r"(12,102)\cup(2,12)"),
    (r"\frac{20000}{\pi}", r"20000/\pi"),
    # lenient by design
    ("10", r"10\%"),
    ("0.1", r"10\%"),
    ("52_8", "52"),
]
UNEQUAL = [
    # decided without a worker
    ("217", "218"),
    ("217", "-217"),
    ("0.333333", r"\frac{1}{3}"),
    ("1/2", "2"),
    ("2 1/2", "21/2"),
    ("1000", "100"),
    ("3.21", "3,21,000"),
    (r"\text{east}", r"\text{seat}"),
    ("even", r"\text{ellipse}"),
    ("5", ""),
    ("5", "   "),
    # settled by algebra
    (r"\sqrt{8}", r"3\sqrt{2}"),
    ("x^2-1", "x^2+1"),
    ("1,2", "1,3"),
    ("1,2,3", "123"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2)"),
    (r"\infty", r"-\infty"),
    (r"2\pi", r"\pi"),
    ("y = 2x + 3", "y = 2x - 3"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
    ("6 - 5i", "6 + 5i"),
    (r"\text{(C)}", r"\text{(B)}"),
    ("A", "B"),
    (r"\cot x", r"\tan x"),
    ("3R^2", "3R^3"),
    (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}"),
    (r"\frac{", "7"),
]

FAKE_LIBRARY = """
    import os, time
    def parse(text, parsing_timeout):
        print("r1 not a reply", flush=True)
        return [text]
    def verify(gold, answer, timeout_seconds):
        both = gold[0] + answer[0]
        if "hang" in both:
            while True: pass
        if "crash" in both: os._exit(0)
        if "leak" in both and "kept" not in globals(): globals()["kept"] = bytearray(150 << 20)
        if "huge" in both: bytearray(1 << 40)
        return "same" in gold[0] and "other" in answer[0]
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for math-verify that hangs, crashes and leaks on command, and holds `same*` = `other*`, one way round only."""
    (tmp_path / "math_verify.py").write_text(textwrap.dedent(FAKE_LIBRARY))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_s=60) as grader:  # roomy: the machine may be busy, and nothing in these tables hangs
        yield grader


@needs_algebra
@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal_either_way_round(grader: Grader, left: str, right: str):
    assert grader.equal(left, right)
    assert grader.equal(right, left)


@needs_algebra
@pytest.mark.parametrize(("left", "right"), UNEQUAL)
def test_unequal_either_way_round(grader: Grader, left: str, right: str):
    assert not grader.equal(left, right)
    assert not grader.equal(right, left)


def test_a_missing_answer_equals_nothing(grader: Grader):
    assert not grader.equal("5", None)
    assert not grader.equal("", "")


def test_text_and_arithmetic_start_no_process():
    with Grader() as grader:
        assert grader.equal("217", r"\boxed{217}"[7:-1])
        assert not grader.equal("217", "218")
        assert grader.equal(r"\text{East}", "east")
        assert grader.group([str(k % 7) for k in range(64)] + [None]) == [str(k % 7) for k in range(64)] + [None]
        assert (grader.running, grader.num_compared) == (False, 0)


def test_every_benchmark_gold_equals_itself_without_a_process(shared: Path):
    golds = [json.loads(line)["answer"] for line in (shared / "benchmarks" / "math500.jsonl").open()]
    with Grader() as grader:
        assert len(golds) == 500
        assert all(grader.equal(gold, f" ${gold}$.") for gold in golds)
        assert not grader.running
    assert sum(isinstance(canonical(gold), str) for gold in golds) < 150  # most need no library against any number either


@needs_algebra
def test_a_bomb_is_unequal_in_bounded_time_and_the_next_pair_is_graded():
    with Grader(timeout_s=1) as grader:
        started = time.monotonic()
        assert not grader.equal("9^{9^{9^9}}", "7")
        assert time.monotonic() - started < 30
        assert not grader.running
        grader.timeout_s = 60
        assert grader.equal(r"\sqrt{8}", r"2\sqrt{2}")


def test_a_hanging_pair_is_unequal_and_asked_once(library: None):
    with Grader(timeout_s=0.3) as grader:
        started = time.monotonic()
        assert not grader.equal("hang", "x+1")
        assert not grader.equal("x+1", "hang")
        assert 0.3 <= time.monotonic() - started < 30
        assert (grader.running, grader.num_compared) == (False, 1)
        grader.timeout_s = 60
        assert grader.equal("same1", "other1")


def test_a_crashing_pair_is_unequal_and_the_worker_is_replaced(library: None):
    with Grader() as grader:
        assert not grader.equal("crash", "x+1")
        assert grader.equal("same1", "other1")


def test_memory_is_bounded_and_a_worker_that_kept_too_much_is_replaced(library: None):
    with Grader(timeout_s=60, memory_bytes=256 << 20) as grader:
        assert not grader.equal("huge", "x+1")
        assert grader.equal("same1", "other1")
        limits = Path(f"/proc/{grader._worker.pid}/limits").read_text()
        assert f"Max address space {256 << 20}" in " ".join(limits.split())
        assert grader.equal("same1 leak", "other1")  # fits, but leaves more than half of the limit behind
        assert not grader.running
        assert grader.equal("same2", "other2")


def test_a_worker_killed_from_outside_is_replaced_before_the_next_pair(library: None):
    with Grader() as grader:
        assert grader.equal("same1", "other1")
        grader._worker.kill()
        grader._worker.wait()
        assert grader.equal("same2", "other2")


def test_an_interrupted_wait_leaves_no_reply_for_the_next_pair(library: None, monkeypatch: pytest.MonkeyPatch):
    def interrupted(fd: int, count: int) -> bytes:
        raise KeyboardInterrupt

    with Grader() as grader:
        assert grader.equal("same1", "other1")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "read", interrupted)
            grader.equal("same2", "other2")
        assert not grader.equal("x+1", "x+2")


def test_equality_is_symmetric_where_the_library_is_not(library: None):
    with Grader() as grader:
        assert grader.equal("same1", "other1")
        assert grader.equal("other2", "same2")


def test_group_keys_are_first_answers_and_no_pair_is_asked_twice(library: None):
    answers = ["x+1", "same1", None, "other1", "x + 1", "7", "7.0", " ", "other1", "x+2", "$x+1$"]
    keys = ["x+1", "same1", None, "same1", "x+1", "7", "7", None, "same1", "x+2", "x+1"]
    with Grader() as grader:
        assert grader.group(answers) == keys
        # x+1 against same1, other1, 7, x+2; same1 against other1, 7, x+2; 7 against x+2
        assert grader.num_compared == 8
        assert grader.group(answers) == keys
        assert grader.group(answers[::-1])[0] == "$x+1$"
        assert grader.num_compared < 20


def test_threads_share_one_worker(library: None):
    verdicts: dict[int, list[bool]] = {}

    def ask(thread: int, grader: Grader) -> None:
        verdicts[thread] = [grader.equal(f"same{thread}-{k}", f"other{k}" if k % 2 else f"x{k}") for k in range(40)]

    with Grader() as grader:
        threads = [threading.Thread(target=ask, args=(thread, grader)) for thread in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert verdicts == {thread: [bool(k % 2) for k in range(40)] for thread in range(6)}
        assert grader.num_compared == 240


def test_close_ends_the_worker(library: None):
    with Grader() as grader:
        assert grader.equal("same1", "other1")
        pid = grader._worker.pid
    assert not grader.running
    assert not Path(f"/proc/{pid}").exists()


def test_a_worker_whose_parent_dies_in_a_hang_ends_itself(library: None, tmp_path: Path):
    script = textwrap.dedent("""
        import os, sys, threading, time
        from tts_engine.tasks.grader import Grader
        grader = Grader(timeout_s=1)
        threading.Thread(target=grader.equal, args=("hang", "x+1"), daemon=True).start()
        while not grader.running:
            time.sleep(0.01)
        print(grader._worker.pid, flush=True)
        os._exit(0)
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-"], input=script, env=environment, capture_output=True, text=True, timeout=60)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    ends = time.monotonic() + 60
    while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_missing_library_is_named_only_when_algebra_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('math_verify')")
    monkeypatch.syspath_prepend(tmp_path)
    with Grader() as grader:
        assert grader.equal("1/2", "0.5")
        with pytest.raises(MissingExtra, match=r"pip install 'tts-engine\[grade\]'"):
            grader.equal("x+1", "1+x")
        assert not grader.running


@needs_algebra
def test_too_little_memory_for_the_worker_is_said():
    with Grader(memory_bytes=1 << 20) as grader, pytest.raises(EngineError, match="raise memory_bytes"):
        grader.equal("x+1", "1+x")


@pytest.mark.parametrize(
    "settings", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"timeout_s": float("inf")}, {"memory_bytes": 0}]
)
def test_impossible_settings_are_refused(settings: dict[str, float]):
    with pytest.raises(ValueError, match="must be"):
        Grader(**settings)


def test_the_worker_imports_no_torch():
    code = "import sys, tts_engine.tasks.grader; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
