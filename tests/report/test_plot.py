import struct
import sys

import pytest

from tts_engine.errors import MissingExtra
from tts_engine.ledger import Ledger, PolicyLedger, PRMLedger
from tts_engine.report.plot import plot_accuracy
from tts_engine.report.table import Cell


def cell(policy, method, n, gflop, solved):
    ledger = Ledger(policy=PolicyLedger(linear_flops=int(gflop * 1e10)), prm=PRMLedger())
    return Cell(policy=policy, method=method, n=n, uses_prm=False, ids=tuple("abcdefghij"), ledger=ledger,
                correct=tuple(i < solved for i in range(10)))  # fmt: skip


CELLS = [cell("s", "cot", 1, 0.03, 0), cell("s", "beam", 4, 0.4, 5), cell("s", "beam", 16, 1.1, 10), cell("l", "cot", 1, 0.6, 6)]


def test_a_plot_is_a_png_of_some_size(tmp_path):
    pytest.importorskip("matplotlib")
    plot_accuracy(CELLS, tmp_path / "plot.png", "ten problems")
    image = (tmp_path / "plot.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", image[16:24]) == (1425, 825)


def test_without_matplotlib_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tts-engine\[plot\]'"):
        plot_accuracy(CELLS, tmp_path / "plot.png", "ten problems")
