import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tts_engine.errors import EngineError, MissingExtra
from tts_engine.search.voting import all_aggregates
from tts_engine.tasks.answers import canonical, decide, extract_answer
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
    (r"864 \mbox{ inches}^2", "864"),
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
    ("52_8", "52_4"),
    ("2516_8", "2516_{16}"),
    (r"(2,\infty)", r"(2,\infty]"),
    (r"\left(-\infty,0\right]", "[-\\infty, 0]"),
    ("5", ""),
    ("5", "   "),
    ("x" * 2000, "y" + "x" * 1999),
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
    kept = []
    def parse(text, parsing_timeout):
        print("r1 not a reply", flush=True)
        return [text]
    def verify(gold, answer, timeout_seconds):
        both = gold[0] + answer[0]
        if "hang" in both:
            while True: pass
        if "crash" in both: os._exit(0)
        if "leak" in both: kept.append(bytearray(150 << 20))
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


@pytest.fixture(scope="module")
def golds(shared: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (shared / "benchmarks" / "math500.jsonl").open()]


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
    records = [json.loads(line) for line in (shared / "benchmarks" / "math500.jsonl").open()]
    with Grader() as grader:
        assert len(records) == 500
        for gold, solution in ((record["answer"], record["solution"]) for record in records):
            assert all(grader.equal(gold, answer) for answer in (gold, f" ${gold}$.", extract_answer(solution)))
        assert not grader.running
    assert sum(isinstance(canonical(record["answer"]), str) for record in records) < 150  # most need no library against any number


@needs_algebra
def test_golds_equal_themselves_by_algebra_alone_too(grader: Grader, golds: list[str], soak: int):
    formulas = [gold for gold in golds if isinstance(canonical(gold), str)][:: 1 if soak > 1 else 5]
    assert len(formulas) > 20
    assert [gold for gold in formulas if not grader._compare(gold, gold)] == []


def test_what_is_decided_is_decided_the_same_either_way_round(golds: list[str]):
    forms = sorted({canonical(gold) for gold in golds if isinstance(canonical(gold), str)})
    forms += [canonical(text) for pair in EQUAL + UNEQUAL for text in pair]
    assert all(decide(left, right) is decide(right, left) for left in forms for right in forms)


@needs_algebra
def test_a_bomb_is_unequal_in_bounded_time_and_the_same_worker_grades_the_next_pair():
    with Grader(timeout_s=1) as grader:
        assert grader.equal(r"\sqrt{8}", r"2\sqrt{2}")
        worker, spent = grader._worker.pid, seconds_of(grader._worker.pid)
        assert not grader.equal("9^{9^{9^9}}", r"x^2+\sqrt{3}")
        assert grader.equal(r"\sqrt{18}", r"3\sqrt{2}")
        assert grader._worker.pid == worker
        assert seconds_of(worker) - spent < 5


def stat_of(pid: int) -> list[str]:
    """From its state on, see proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def forks_of(worker: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{worker}/task/{worker}/children").read_text().split()]


def seconds_of(worker: int) -> float:
    """Processor seconds of a worker and of all its forks so far."""
    ticks = [int(ticks) for pid in [worker, *forks_of(worker)] for ticks in stat_of(pid)[11:15]]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def test_a_hanging_pair_is_unequal_and_asked_once(library: None):
    with Grader(timeout_s=0.3) as grader:
        started = time.monotonic()
        assert not grader.equal("hang", "x+1")
        assert not grader.equal("x+1", "hang")
        assert not grader.equal("$x + 1$", "hang")
        assert 0.3 <= time.monotonic() - started < 60
        assert grader.num_compared == 1
        assert grader.equal("same1", "other1")


def test_an_answer_that_hangs_with_everything_is_tried_twice_and_the_others_are_still_compared(library: None):
    answers = [f"{word}{k}" for k in range(5) for word in ("a", "hang", "same", "other")]
    with Grader(timeout_s=0.1) as grader:
        died = Counter()
        compare = grader._compare

        def counting(left: str, right: str) -> bool | None:
            verdict = compare(left, right)
            died.update((left, right) if verdict is None else ())
            return verdict

        grader._compare = counting
        keys = grader.group(answers)
        assert keys == [answer if answer[:4] != "othe" else "same0" for answer in answers]
        assert max(count for answer, count in died.items() if "hang" in answer) == 2


def test_a_crashing_pair_is_unequal_and_the_next_is_graded(library: None):
    with Grader() as grader:
        assert not grader.equal("crash", "x+1")
        assert grader.equal("same1", "other1")


def test_memory_is_bounded_and_what_a_pair_leaves_behind_fails_no_other(library: None):
    with Grader(timeout_s=60, memory_bytes=256 << 20) as grader:
        assert not grader.equal("huge", "x+1")
        assert grader.equal("same1", "other1")
        limits = Path(f"/proc/{grader._worker.pid}/limits").read_text()
        assert f"Max address space {256 << 20}" in " ".join(limits.split())
        assert all(grader.equal(f"same{k} leak", "other1") for k in range(3))  # each fits alone


def test_who_is_killed_from_outside_is_replaced_before_the_next_pair(library: None):
    with Grader() as grader:
        assert grader.equal("same1", "other1")
        (fork,) = forks_of(grader._worker.pid)
        os.kill(fork, signal.SIGKILL)
        while stat_of(fork)[0] != "Z":
            time.sleep(0.01)
        assert grader.equal("same2", "other2")
        grader._worker.kill()
        grader._worker.wait()
        assert grader.equal("same3", "other3")


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


def test_votes_and_verdicts_ask_once_a_pair_whatever_its_spellings(library: None):
    rng, asked = random.Random(64), Counter()
    spellings = ["{}", "${}$.", " {} ", r"\text{{{}}}", r"\mathrm{{ {} }}"]
    words = rng.choices(["same1", "other1", "x+1", "x-1", "y^2", "7", "east"], k=64)
    answers = [rng.choice(spellings).format(word) for word in words]
    with Grader() as grader:
        compare = grader._compare

        def counting(left: str, right: str) -> bool | None:
            asked[frozenset((canonical(left), canonical(right)))] += 1
            return compare(left, right)

        grader._compare = counting
        for _ in range(4):
            rng.shuffle(answers)
            keys = grader.group(answers)
            chosen = all_aggregates(keys, [(rng.random(),) for _ in keys])
            assert all(grader.equal("same1", answer) == (canonical(answer) in ("same1", "other1")) for answer in chosen.values())
    assert set(asked.values()) == {1}
    assert len(asked) <= 5 * 6 / 2 + 5 * 2  # pairs of formulas, and formulas beside 7 and a word


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


def test_close_ends_the_worker_and_its_fork(library: None):
    with Grader() as grader:
        assert grader.equal("same1", "other1")
        pids = [grader._worker.pid, *forks_of(grader._worker.pid)]
        assert len(pids) == 2
    assert not grader.running
    assert not Path(f"/proc/{pids[0]}").exists()
    assert has_ended(pids[1])


def has_ended(pid: int, within_s: float = 60) -> bool:
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        try:
            if stat_of(pid)[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_worker_whose_parent_dies_in_a_hang_ends_itself(library: None, tmp_path: Path):
    script = textwrap.dedent("""
        import os, sys, threading, time
        from tts_engine.tasks.grader import Grader
        grader = Grader(timeout_s=0.2)
        threading.Thread(target=grader.equal, args=("hang", "x+1"), daemon=True).start()
        while not grader.running:
            time.sleep(0.01)
        print(grader._worker.pid, flush=True)
        os._exit(0)
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-"], input=script, env=environment, capture_output=True, text=True, timeout=60)
    assert has_ended(int(done.stdout))


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


# --- corpora: golds respelt, golds damaged, answers meant to hang ----------------------------------------------------------


def pick(pattern: str, text: str, rng: random.Random) -> re.Match[str] | None:
    """A place in the text where the pattern stands."""
    places = list(re.finditer(pattern, text))
    return rng.choice(places) if places else None


def put(text: str, place: re.Match[str] | None, new: str) -> str:
    return text if place is None else text[: place.start()] + new + text[place.end() :]


RESPELT = [  # pattern -> replacement: another way to write the same
    (r"\\frac", r"\\dfrac"),
    (r"(?<![0-9 ])\\frac\{([^{}]*)\}\{([^{}]*)\}", r"{(\1)}/{(\2)}"),
    (r"(?<!\\left)(?<!\\left )([(\[])(.*)(?<!\\right)(?<!\\right )([)\]])", r"\\left\1 \2 \\right\3"),
    (r"\\(?:left|right)\b", ""),
    (r"([-+=])", r" \1 "),
    (r"(?<![A-Za-z0-9}]) | (?![A-Za-z0-9\\])", ""),
    (r"^(.*)$", r"$\1$."),
    (r"^(.*)$", r"\\displaystyle \1"),
    (r"\\text\{([^{}]*)\}", r"\\mathrm{\1}"),
    (r"\^\\circ", r"^{\\circ}"),
    (r"\^\\circ", r" \\text{ degrees}"),
    (r"^(-?[0-9]+)$", r"\1.0"),
    (r"^(-?[0-9]+)$", r"x = \1"),
    (r"(?<=[0-9])(?=\\sqrt|\\pi)", r"\\cdot "),
    (r"pmatrix", "bmatrix"),
    (r"\\%", ""),
    (r"\\\$", ""),
    (r"^([0-9]+)([0-9]{3})$", r"\1{,}\2"),
]


def damaged(gold: str, rng: random.Random) -> set[str]:
    """The gold with one thing about it changed, so that it says something else; what stands in units is left alone."""
    unit = re.search(r"\\(?:text|mbox)\{ .*", gold)
    text, unit = (gold[: unit.start()], unit[0]) if unit else (gold, "")
    digit, sign, bracket = (pick(pattern, text, rng) for pattern in (r"[0-9]", r"[-+]", r"[][()]"))
    letter = pick(r"(?<![A-Za-z\\])[a-z](?![A-Za-z])", text, rng)
    made = {
        put(text, digit, str((int(digit[0]) + rng.randint(1, 9)) % 10)) if digit else text,
        put(text, digit, f"{digit[0]}{rng.randint(1, 9)}") if digit else text,
        put(text, digit, ""),
        put(text, sign, "+" if sign and sign[0] == "-" else "-"),
        put(text, bracket, "()[]"["[]()".index(bracket[0])]) if bracket else text,
        put(text, letter, rng.choice([c for c in "abknxyz" if letter and c != letter[0]] or [""])),
        re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\\frac{\2}{\1}", text, count=1) if "frac{1}{1}" not in text else text,
        re.sub(r"\\sqrt|\\pi|\^(?:\{[^{}]*\}|[0-9a-z])", "", text, count=1),
        re.sub(r"\\text\{([a-z]{4,})\}", lambda word: word[1][::-1], text),
        re.sub(r"^(\\left)?([(\[])(.*),(.*?)(\\right)?([)\]])$", r"\2\4,\3\6", text),
        re.sub(r",[^,]*?(?=(?:\\right)?[)\]]|\\\}|$)", "", text, count=1),
        text if text.strip("0.") == "" else text[1:] if text[0] == "-" else f"-{text}",
        f"2{text}",
    }
    return {answer + unit for answer in made if answer and canonical(answer) != canonical(text)}


@needs_algebra
def test_golds_are_accepted_however_they_are_spelt(grader: Grader, golds: list[str], soak: int):
    count, asked = 0, golds[:: 1 if soak > 1 else 10]
    for gold in asked:
        for pattern, replacement in RESPELT:
            answer = re.sub(pattern, replacement, gold)
            if answer != gold:
                count += 1
                assert grader.equal(gold, answer), (gold, answer)
    assert count > 3 * len(asked)


@needs_algebra
@pytest.mark.timeout(3600)
def test_damaged_golds_are_refused(grader: Grader, golds: list[str], soak: int):
    accepted, count, asked = [], 0, golds[:: 1 if soak > 1 else 10]
    for gold in asked:
        for answer in sorted(damaged(gold, random.Random(gold))):
            count += 1
            if grader.equal(gold, answer):
                accepted.append((gold, answer))
    assert count > 4 * len(asked)
    assert accepted == []


def nested(opening: str, closing: str, depth: int, core: str) -> str:
    return opening * depth + core + closing * depth


def joined(separator: str, count: int, item: str) -> str:
    """`item` with # replaced by 0, 1, 2, ..."""
    return separator.join(item.replace("#", str(i)) for i in range(count))


def grid(kind: str, size: int, item: str) -> str:
    rows = r"\\".join("&".join(f"{item}_{{{i}{j}}}" for j in range(size)) for i in range(size))
    return rf"\begin{{{kind}}}{rows}\end{{{kind}}}"


ODD = "\u200b\u202e\uff11\u0660\U0001d7d9\u221a\u00bd\u2460\u0301\U0001f680\ue000\ud800\x00\x1b"
TOKENS = [r"\frac{", r"\sqrt{", "}", "{", "x", "1", "^", "_", "(", ")", r"\pi", "+", r"\text{", r"\begin{pmatrix}", "&", r"\\"]

# kind -> (random numbers, size from 1 on) -> an answer that no model should write, and some will
HOSTILE = {
    "tower": lambda r, k: nested(f"{r.randint(2, 99)}^{{", "}", k + 1, "9"),
    "power of a power": lambda r, k: f"10^{{10^{{{k + 2}}}}}",
    "tower of e": lambda r, k: nested("e^{", "}", k, "e"),
    "factorials": lambda r, k: nested("(", "!)", k, str(r.randint(5, 50))),
    "large factorial": lambda r, k: f"{10 ** (k + 1)}!",
    "binomial": lambda r, k: rf"\binom{{10^{{{k}}}}}{{{10**k // 2}}}",
    "digits": lambda r, k: str(r.randint(1, 9)) * 10 ** (k + 1),
    "decimals": lambda r, k: "0." + "3" * 10 ** (k + 1),
    "digits under a root": lambda r, k: rf"\sqrt{{{'7' * 10**k}}}",
    "braces": lambda r, k: nested("{", "}", 10**k, "1"),
    "brackets": lambda r, k: nested("([", "])", 10**k, "1"),
    "open braces": lambda r, k: "{" * 10**k,
    "closing braces": lambda r, k: "1" + "})]" * 10**k,
    "roots": lambda r, k: nested(r"\sqrt{", "}", 4**k, "2"),
    "continued fraction": lambda r, k: nested(r"\frac{1}{1+", "}", 4**k, "x"),
    "numerators": lambda r, k: nested(r"\frac{", "+1}{2}", 4**k, "x"),
    "signs": lambda r, k: "-" * 10**k + "1",
    "sum of terms": lambda r, k: joined("+", 5**k, "x_{#}"),
    "product of sums": lambda r, k: joined("", 4**k, "(x+#)"),
    "power of a sum": lambda r, k: f"(x+y+z)^{{{10**k}}}",
    "plus or minus": lambda r, k: joined(r"\pm", 4 * k, " #"),
    "matrix": lambda r, k: grid("pmatrix", 6 * k, "a"),
    "matrix to a power": lambda r, k: rf"{grid('pmatrix', 2, 'a')}^{{{10 ** (2 * k)}}}",
    "determinant": lambda r, k: grid("vmatrix", 4 * k, "x"),
    "set": lambda r, k: rf"\{{{joined(',', 6**k, '#')}\}}",
    "union": lambda r, k: joined(r"\cup", 4**k, "(#,#.5)"),
    "list": lambda r, k: joined(", ", 4**k, r"\sqrt{#}"),
    "sum": lambda r, k: rf"\sum_{{i=1}}^{{10^{{{2 * k}}}}} \frac{{1}}{{i^2+x}}",
    "product": lambda r, k: rf"\prod_{{i=1}}^{{10^{{{2 * k}}}}} (i+x)",
    "integral": lambda r, k: nested(r"\int_0^1 ", "dx", k, r"e^{\sin(x^{\sin x})}"),
    "limit": lambda r, k: r"\lim_{x\to 0} " * k + r"\frac{\sin(\tan x)-\tan(\sin x)}{x^7}",
    "sines": lambda r, k: nested(r"\sin(", ")", 4**k, "x"),
    "sines of a number": lambda r, k: nested(r"\sin(", ")", 4**k, "1"),
    "logarithms": lambda r, k: nested(r"\log_{", "}{7}", 4**k, "2"),
    "high degree": lambda r, k: f"x^{{{10**k + 1}}}-x-1=0",
    "chain of equations": lambda r, k: joined("=", 4**k, "x+#"),
    "chain of inequalities": lambda r, k: joined("<", 4**k, "x_{#}"),
    "modulus": lambda r, k: rf"7^{{10^{{{4 * k}}}}} \bmod 10",
    "absolute values": lambda r, k: nested("|", "|", 4**k, "x"),
    "texts": lambda r, k: nested(r"\text{", "}", 4**k, "east"),
    "boxes": lambda r, k: nested(r"\boxed{", "}", 4**k, "1"),
    "backslashes": lambda r, k: "\\" * 10**k,
    "unknown commands": lambda r, k: joined("", 4**k, r"\nonsense{#}"),
    "open environments": lambda r, k: r"\begin{pmatrix}" * 4**k + "1",
    "cases": lambda r, k: rf"\begin{{cases}}{joined(chr(92) * 2, 4**k, 'x^{#}&x>#')}\end{{cases}}",
    "odd characters": lambda r, k: "".join(r.choices(ODD, k=10**k)),
    "control characters": lambda r, k: "".join(r.choices([chr(c) for c in range(32)], k=10**k)) + "1",
    "code": lambda r, k: "__import__('os')._exit(0)" + "+1" * k,
    "files": lambda r, k: r"\input{/etc/passwd}" * 10**k,
    "noise": lambda r, k: "".join(r.choices([chr(c) for c in range(32, 127)], k=10**k)),
    "noise of commands": lambda r, k: "".join(r.choices(TOKENS, k=8**k)),
}
HOSTILE_LIMIT_S = 0.3


@needs_algebra
@pytest.mark.timeout(3600)
def test_hostile_answers_are_unequal_within_their_limit_and_the_worker_survives_them(soak: int):
    """All kinds in four sizes with --soak, 208 answers; else 30 of them."""
    rng, partners = random.Random(208), [r"x^2+1", r"\frac{\sqrt{3}}{2}", "(1,2]", r"\{1,2\}", "x=5", r"\pi", "7"]
    answers = [(f"{kind} {size}", hostile(rng, size)) for size in range(1, 5) for kind, hostile in HOSTILE.items()]
    assert len(answers) >= 200
    with Grader(timeout_s=HOSTILE_LIMIT_S) as grader:
        assert grader.equal(r"\sqrt{8}", r"2\sqrt{2}")
        worker = grader._worker.pid
        for place, (name, answer) in enumerate(answers if soak > 1 else answers[::7]):
            compared, spent = grader.num_compared, seconds_of(worker)
            assert not grader.equal(partners[place % len(partners)], answer), name
            assert grader.equal(answer, answer) or not answer.strip(), name
            assert seconds_of(worker) - spent < (grader.num_compared - compared) * (HOSTILE_LIMIT_S + 0.2) + 0.2, name
            assert grader.equal(rf"\sqrt{{{4 * place + 8}}}", rf"2\sqrt{{{place + 2}}}"), name
        assert grader._worker.pid == worker
