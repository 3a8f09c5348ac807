"""Are two final answers equal, and which answers of a vote are one answer?

What text and exact arithmetic decide is decided here; the rest is math-verify's, in a worker process that is started when
first needed and that the kernel ends when one comparison takes too long or too much memory: such a pair is unequal.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

from tts_engine.errors import EngineError, MissingExtra
from tts_engine.tasks.answers import canonical, decide

START_LIMIT_S = 60.0

# The worker's replies, one byte each: a greeting, then for every pair a sum of the two flags.
_READY, _NO_LIBRARY = b"r", b"m"
_EQUAL, _SPENT = 1, 2

# A plain child, not multiprocessing: a spawned child would import the caller's main module again, with all it imports
# (torch among it), and fails outright for a script without a main guard or read from standard input.
_COMMAND = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from {__name__} import _serve
_serve(float(sys.argv[2]), int(sys.argv[3]))
"""


class Grader:
    """Equality of answers, for any number of threads; owns at most one worker process, ended by `close` or the `with` block.

    timeout_s: wall seconds one comparison may take; memory_bytes: the worker's whole address space. Verdicts of the worker
    are remembered. `num_compared` counts the pairs it was asked about.
    """

    def __init__(self, timeout_s: float = 5.0, memory_bytes: int = 2 << 30):
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s={timeout_s} must be a positive number of seconds")
        if memory_bytes <= 0:
            raise ValueError(f"memory_bytes={memory_bytes} must be positive; the worker alone takes about 100 MiB")
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self.num_compared = 0
        self._lock = threading.Lock()
        self._verdicts: dict[tuple[str, str], bool] = {}
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def equal(self, gold: str, answer: str | None) -> bool:
        """Whether both say the same; symmetric. A missing or blank answer equals nothing.

        math-verify's own verdict depends on which side is the reference (an interval against an inequality, say), so two
        answers are equal when it accepts them either way round. It is lenient by design: `10` equals `10\\%`, `52_8`
        equals `52`. A pair that hangs, crashes or outgrows the worker is unequal, and stays so.
        Raises MissingExtra where algebra is needed and math-verify is not installed.
        """
        if answer is None or not answer.strip() or not gold.strip():
            return False
        verdict = decide(canonical(gold), canonical(answer))
        return self._settle(gold, answer) if verdict is None else verdict

    def group(self, answers: Sequence[str | None]) -> list[str | None]:
        """For each answer the first one it equals, itself if none: the key it votes under. A missing answer's key is None.

        math-verify's equality is not transitive (`10`, `10\\%` and `0.1`), so an answer joins the earliest group whose
        first answer it equals. Votes by exact string need no grader: there the answers are the keys.
        """
        groups: dict[Fraction | str, str] = {}  # the form of each group's first answer -> that answer
        key_of: dict[Fraction | str, str] = {}  # every form seen -> its group's first answer
        keys: list[str | None] = []
        for answer in answers:
            if answer is None or not answer.strip():
                keys.append(None)
                continue
            form = canonical(answer)
            if form not in key_of:
                for first_form, first in groups.items():
                    verdict = decide(first_form, form)
                    if self._settle(first, answer) if verdict is None else verdict:
                        key_of[form] = first
                        break
                else:
                    key_of[form] = groups[form] = answer
            keys.append(key_of[form])
        return keys

    @property
    def running(self) -> bool:
        """Whether a worker process lives now."""
        return self._worker is not None and self._worker.poll() is None

    def close(self) -> None:
        """End the worker, if there is one. A later comparison that needs one starts another."""
        with self._lock:
            self._stop()

    def _settle(self, left: str, right: str) -> bool:
        """The worker's verdict on a pair, asked for once."""
        pair = (left, right) if left < right else (right, left)
        with self._lock:
            if pair not in self._verdicts:
                self._verdicts[pair] = self._compare(pair)
            return self._verdicts[pair]

    def _compare(self, pair: tuple[str, str]) -> bool:
        self.num_compared += 1
        if not self.running:
            self._start()
        try:
            reply = self._ask(pair)
        except BrokenPipeError:
            reply = b""
        except BaseException:
            self._stop()  # a reply that nobody read would answer the next question
            raise
        if not reply or reply[0] & _SPENT:
            self._stop()
        return bool(reply) and bool(reply[0] & _EQUAL)

    def _ask(self, pair: tuple[str, str]) -> bytes:
        """One byte, or none where the worker died over the pair: it ends itself in time, so this wait is bounded."""
        assert self._worker and self._worker.stdin and self._worker.stdout
        self._worker.stdin.write(json.dumps(pair).encode() + b"\n")
        self._worker.stdin.flush()
        return os.read(self._worker.stdout.fileno(), 1)

    def _start(self) -> None:
        self._stop()
        arguments = [json.dumps(sys.path), str(self.timeout_s), str(self.memory_bytes)]
        # Its own session: Ctrl-C is for the caller, who may still want to grade what is finished.
        self._worker = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._worker.stdout
        greeting = b""
        try:
            greeting = os.read(self._worker.stdout.fileno(), 1)
        finally:
            if greeting != _READY:
                self._stop()
        if greeting == _NO_LIBRARY:
            raise MissingExtra(
                "comparing these answers takes algebra and math-verify is not installed: pip install 'tts-engine[grade]'"
            )
        if greeting != _READY:
            raise EngineError(
                f"the grading worker did not start within {START_LIMIT_S:.0f} s and {self.memory_bytes >> 20} MiB; "
                "it needs about 100 MiB: raise memory_bytes"
            )

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()


def _serve(timeout_s: float, memory_bytes: int) -> None:
    """The worker's life: one line with a pair in, one byte out, until standard input ends.

    The alarm's default action ends the process from within the kernel, whatever Python is busy with and whether or not
    the parent still lives.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT_S)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    os.dup2(2, 1)  # nothing a library prints may pass for a reply
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError:
        os.write(replies, _NO_LIBRARY)
        return

    @lru_cache(maxsize=1024)
    def read(answer: str) -> list[object]:
        return list(parse(rf"\boxed{{{answer}}}", parsing_timeout=None))

    @lru_cache(maxsize=1024)
    def value(answer: str) -> complex | None:
        expression = next(iter(read(answer)), None)
        return _value(expression) if getattr(expression, "is_number", False) else None

    def same(gold: str, answer: str) -> bool:
        return bool(verify(read(gold), read(answer), timeout_seconds=None))

    same(r"\frac{1}{2}", "0.5")  # builds the parser's tables before the clock of a comparison runs
    os.write(replies, _READY)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        left, right = json.loads(line)
        apart = _apart(value(left), value(right))
        equal = not apart and (same(left, right) or same(right, left))
        signal.setitimer(signal.ITIMER_REAL, 0)
        spent = _address_space() > limit // 2  # what this pair left behind must not fail the next
        os.write(replies, bytes([_EQUAL * equal + _SPENT * spent]))


def _value(expression: Any) -> complex | None:
    """A sympy number in machine precision; None where it has none, or is a percentage (math-verify may ignore the sign)."""
    from sympy import UnevaluatedExpr

    if expression.has(UnevaluatedExpr):
        return None
    try:
        return complex(expression.evalf())
    except Exception:  # sympy raises what it likes; then math-verify decides
        return None


def _apart(left: complex | None, right: complex | None) -> bool:
    """Whether two values differ by far more than math-verify's rounding: then it need not simplify their difference."""
    return left is not None and right is not None and abs(left - right) > 1e-4 * (1 + abs(left))


def _address_space() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()
