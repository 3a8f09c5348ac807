"""Are two final answers equal, and which answers of a vote are one answer?

What text and exact arithmetic decide is decided here; the rest is math-verify's, in a worker process that is started when
first needed and leaves each comparison to a fork of itself. The kernel ends that fork when a comparison takes too long or too
much memory: such a pair is unequal.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

from tts_engine.errors import EngineError, MissingExtra
from tts_engine.tasks.answers import canonical, decide

START_LIMIT_S = 60.0
HARMLESS = r"x^2+\sqrt{2}"

Form = Fraction | str  # of an answer, see answers.canonical

# The worker's replies, one byte each: a greeting, then for every pair the verdict.
_READY, _NO_LIBRARY = b"r", b"m"
_UNEQUAL, _EQUAL, _DIED = b"u", b"e", b"d"

# A plain child, not multiprocessing: a spawned child would import the caller's main module again, with all it imports
# (torch among it), and fails outright for a script without a main guard or read from standard input.
_COMMAND = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from {__name__} import _serve
_serve(float(sys.argv[2]), int(sys.argv[3]))
"""


class Grader:
    """Equality of answers, for any number of threads; owns at most one worker (and that one fork), ended by `close` or `with`.

    timeout_s: processor seconds that one comparison may take, so that a busy machine changes no verdict; memory_bytes: the
    worker's whole address space. Verdicts of the worker are remembered. `num_compared` counts the pairs it was asked about.
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
        self._verdicts: dict[frozenset[Form], bool] = {}
        self._bearable: dict[Form, bool | None] = {}  # of those over which a fork died: None until it is tried by itself
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def equal(self, gold: str, answer: str | None) -> bool:
        """Whether both say the same; symmetric. A missing or blank answer equals nothing.

        math-verify's own verdict depends on which side is the reference (an interval against an inequality, say), so two
        answers are equal when it accepts them either way round. It is lenient by design: `10` equals `10\\%`, `52_8`
        equals `52`. A pair that hangs, crashes or outgrows the worker is unequal, and stays so; an answer that does so even
        beside a harmless one is compared as text from then on.
        Raises MissingExtra where algebra is needed and math-verify is not installed.
        """
        if answer is None or not answer.strip() or not gold.strip():
            return False
        return self._same({canonical(gold): gold, canonical(answer): answer})

    def group(self, answers: Sequence[str | None]) -> list[str | None]:
        """For each answer the first one it equals, itself if none: the key it votes under. A missing answer's key is None.

        math-verify's equality is not transitive (`10`, `10\\%` and `0.1`), so an answer joins the earliest group whose
        first answer it equals. Votes by exact string need no grader: there the answers are the keys.
        """
        groups: dict[Form, str] = {}  # the form of each group's first answer -> that answer
        key_of: dict[Form, str] = {}  # every form seen -> its group's first answer
        keys: list[str | None] = []
        for answer in answers:
            if answer is None or not answer.strip():
                keys.append(None)
                continue
            form = canonical(answer)
            if form not in key_of:
                for other, first in groups.items():
                    if self._same({other: first, form: answer}):
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

    def _same(self, answers: dict[Form, str]) -> bool:
        """Whether the answers, by their forms, say the same; the worker is asked once a pair of forms."""
        verdict = decide(next(iter(answers)), next(reversed(answers)))
        if verdict is not None:
            return verdict
        with self._lock:
            pair = frozenset(answers)
            if pair not in self._verdicts:
                self._verdicts[pair] = self._settle(answers)
            return self._verdicts[pair]

    def _settle(self, answers: dict[Form, str]) -> bool:
        """The worker's verdict. An answer over which a fork died is tried beside a harmless one before it is asked about again:
        else a vote with a few such answers in it would wait for as many forks as it has pairs."""
        for form, answer in answers.items():
            if self._bearable.get(form, True) is None:
                self._bearable[form] = self._compare(answer, HARMLESS) is not None
            if self._bearable.get(form) is False:
                return False
        verdict = self._compare(*answers.values())
        if verdict is None:
            self._bearable = dict.fromkeys(answers) | self._bearable
        return bool(verdict)

    def _compare(self, left: str, right: str) -> bool | None:
        """The worker's verdict; None where its fork died over the pair."""
        self.num_compared += 1
        if not self.running:
            self._start()
        try:
            reply = self._ask(left, right)
        except BrokenPipeError:
            reply = b""
        except BaseException:
            self._stop()  # a reply that nobody read would answer the next question
            raise
        if not reply:
            self._stop()
        return {_EQUAL: True, _UNEQUAL: False}.get(reply)

    def _ask(self, left: str, right: str) -> bytes:
        """One byte, or none where somebody killed the worker. Its forks end themselves in time, so this wait is bounded."""
        assert self._worker and self._worker.stdin and self._worker.stdout
        self._worker.stdin.write(json.dumps([left, right]).encode() + b"\n")
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
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.communicate()


def _serve(timeout_s: float, memory_bytes: int) -> None:
    """The worker's life: one line with a pair in, one byte out, until standard input ends.

    It has the library ready and compares nothing: a fork that dies over a pair is replaced in milliseconds, an interpreter in
    a second.
    """
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM, signal.SIGPROF])
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT_S)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    os.dup2(2, 1)  # nothing a library prints may pass for a reply
    try:
        same = _library()
    except ModuleNotFoundError:
        os.write(replies, _NO_LIBRARY)
        return
    same(r"\frac{1}{2}", r"\frac{2}{4}")  # builds the parser's tables, once for all forks
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(replies, _READY)
    fork, line_to = 0, None
    for line in sys.stdin.buffer:
        if line_to is None or os.waitpid(fork, os.WNOHANG)[0]:
            fork, line_to = _fork(same, timeout_s, limit // 2)
        try:
            line_to.sendall(line)
            reply = line_to.recv(2)
        except OSError:
            reply = b""
        if len(reply) != 1:  # dead, or leaving
            line_to.close()
            os.waitpid(fork, 0)
            line_to = None
        os.write(replies, reply[:1] or _DIED)


def _fork(same: Callable[[str, str], bool], timeout_s: float, spent_bytes: int) -> tuple[int, socket.socket]:
    """A process that answers for the worker: its id, and the socket for lines and replies. It ends when the other end closes."""
    ours, theirs = socket.socketpair()
    fork = os.fork()
    if fork == 0:
        try:
            ours.close()
            _compare_lines(theirs, same, timeout_s, spent_bytes)
        finally:
            os._exit(0)
    theirs.close()
    return fork, ours


def _compare_lines(worker: socket.socket, same: Callable[[str, str], bool], timeout_s: float, spent_bytes: int) -> None:
    """A fork's life: one byte for a pair, and one more when it leaves, so that what this pair left behind cannot fail the next.

    The alarms' default action ends it from within the kernel, whatever Python is busy with and whether or not anybody still
    lives who could; the second alarm is for what takes time without computing.
    """
    for line in worker.makefile("rb"):
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        signal.setitimer(signal.ITIMER_REAL, START_LIMIT_S + timeout_s)
        left, right = json.loads(line)
        try:
            equal = same(left, right)
        except Exception:  # the libraries raise what they like
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        spent = _address_space() > spent_bytes
        worker.sendall((_EQUAL if equal else _UNEQUAL) + _DIED * spent)
        if spent:
            return


def _library() -> Callable[[str, str], bool]:
    """Whether two answers say the same, by math-verify; raises ModuleNotFoundError where it is not installed."""
    from math_verify import parse, verify

    @lru_cache(maxsize=1024)
    def read(answer: str) -> list[object]:
        return list(parse(rf"\boxed{{{answer}}}", parsing_timeout=None))

    @lru_cache(maxsize=1024)
    def value(answer: str) -> complex | None:
        expression = next(iter(read(answer)), None)
        return _value(expression) if getattr(expression, "is_number", False) else None

    def same(left: str, right: str) -> bool:
        if _apart(value(left), value(right)):
            return False
        one, other = read(left), read(right)
        return bool(verify(one, other, timeout_seconds=None) or verify(other, one, timeout_seconds=None))

    return same


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
