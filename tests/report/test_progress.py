import io

from tts_engine.report import progress as module
from tts_engine.report.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_plain_line_counts_accuracy_of_what_runs_now_and_time_for_what_is_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = Progress(40, io.StringIO())
    progress.begin("beam", earlier=[{"correct": True}] * 10)
    assert progress.line() == "beam, 10 of 40 problems, 100.0 (72-100) % correct, 0:00 passed, ? left"
    now[0] += 20
    for _ in range(10):
        progress.advance({"correct": False})
    # ten problems in 20 s leave 40 s for the other twenty; those of the earlier session took none of it
    assert progress.line() == "beam, 20 of 40 problems, 50.0 (30-70) % correct, 0:20 passed, 0:40 left"
    progress.begin("dvts")
    assert progress.line() == "dvts, 20 of 40 problems, 0:20 passed, 0:40 left"


def test_plain_lines_come_at_intervals_and_end_with_the_run(monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.01)
    stream = io.StringIO()
    with Progress(2, stream) as progress:
        progress.advance({"correct": True})
        while not stream.getvalue():
            pass
    assert stream.getvalue().startswith("1 of 2 problems")
    assert not progress._reporter.is_alive()


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress(2, stream) as progress:
        progress.begin("beam")
        progress.advance({"correct": True})
        progress._bar.refresh()
    assert "1/2" in stream.getvalue() and "beam" in stream.getvalue()
