"""One file that loads nothing, in which no text of a model or a task is markup."""

import re
import sys
from html.parser import HTMLParser

import pytest

from tts_engine.errors import MissingExtra
from tts_engine.report import page
from tts_engine.report.arms import study
from tts_engine.report.curves import Figure

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'` {{ 7 * 7 }}{% raw %}</pre></div>"
    "\u202e\u200b\x1b[2J\x00\ud800&amp;&#60;"
)
FIGURE = Figure("accuracy-n", "Accuracy", "", 10, 10, b"\x89PNG")
VOID = ("meta", "img", "br", "hr", "link", "input")


class Read(HTMLParser):
    """What a browser would find: tags, attributes, text; and that every tag is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def made(monkeypatch):
    """Runs -> the page's text, without drawing."""

    def make(runs, texts=None, diagnostics=()):
        monkeypatch.setattr(page, "figures", lambda study: [FIGURE])
        return page.page(page.make_report(study(runs, texts or {}), diagnostics))

    return make


def test_the_page_holds_the_figures_and_the_tables(made, line_up):
    found = Read(made(line_up))
    text = "".join(found.text)
    assert "sums, test: 40 problems" in text and "100.0 (91-100)" in text and "2.00x (" in text
    names = [value for tag, name, value in found.attributes if (tag, name) == ("section", "id")]
    links = [value for tag, name, value in found.attributes if (tag, name) == ("a", "href")]
    assert links == [f"#{name}" for name in names] and len(set(names)) == len(names) == 9
    rows = re.findall(r"<tr[^>]*><td[^>]*>small</td><td[^>]*>judge</td><td[^>]*>beam</td><td[^>]*>16</td>", made(line_up))
    assert len(rows) == 7  # in all tables but that of the winners


def test_the_page_asks_nobody_for_anything(made, line_up):
    text = made(line_up)
    assert "default-src 'none'; img-src data:" in text and not re.search(
        r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", text)
    )
    found = Read(text)
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(found.tags)
    loaded = [value for _, name, value in found.attributes if name in ("src", "srcset", "data", "poster", "background")]
    assert loaded == ["data:image/png;base64,iVBORw=="]
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]


def hostile(run_of):
    runs = [
        run_of("cot", 1, [1, 0, 1], 10, policy=HOSTILE, name=f"runs/{HOSTILE.replace('/', '')}", task=HOSTILE, levels=(HOSTILE, 2)),
        run_of(
            "beam", 4, [1, 1, 0], 90, policy=HOSTILE, prm=HOSTILE, task=HOSTILE, levels=(HOSTILE, 2), settings={"width": HOSTILE}
        ),
        run_of("beam", 4, [0, 1, 0], 90, policy=HOSTILE, prm=HOSTILE, task=HOSTILE, levels=(HOSTILE, 2), settings={"width": 4}),
    ]
    for run in runs:
        for record in run.records:
            record["gold"] = HOSTILE
            record["answer"] = HOSTILE * 300
        run.description["made"]["at"] = run.description["versions"]["tts-engine"] = HOSTILE
    runs[1].records[0] |= {"error": HOSTILE, "correct": False, "ledger": None}
    return runs


def test_text_of_models_and_tasks_is_never_markup(made, run_of):
    plain, attacked = (
        Read(made([run_of("cot", 1, [1, 0], 10)])),
        made(hostile(run_of), {f"p{i:03}": HOSTILE * 1000 for i in range(3)}),
    )
    attacked.encode()  # no half of a surrogate pair
    found = Read(attacked)
    assert set(found.tags) <= set(plain.tags) | {"pre", "bdi", "b", "div"} and "script" not in found.tags
    assert not [value for _, name, value in found.attributes if name.startswith("on") or "alert" in str(value)]
    text = "".join(found.text)
    assert "<script>alert(1)</script>" in text and "{{ 7 * 7 }}{% raw %}" in text and "&amp;&#60;" in text
    assert not set("\u202e\u200b\x1b\x00") & set(attacked)


def test_endless_texts_are_cut(made, run_of):
    text = made(hostile(run_of), {f"p{i:03}": "x" * 10**6 for i in range(3)})
    assert "(1000000 characters)" in text and len(text) < 200_000
    assert max(map(len, re.findall(r"\w+", text))) < 1200


def test_notes_stand_on_the_page(made, run_of):
    assert "begun holds no finished problem yet" in made([run_of("cot", 1, [1, 0], 1), run_of("majority", 4, [], 1, name="begun")])


@pytest.mark.parametrize("runs", [[("cot", 1, [1])], [("beam", 4, [0])], [("cot", 1, [1, 0]), ("majority", 4, [1, 1])]])
def test_few_runs_make_a_page_too(made, run_of, runs):
    assert "problems</h1>" in made([run_of(method, n, solved, 10) for method, n, solved in runs])


def test_a_report_is_a_page_and_pngs(line_up, tmp_path):
    report = page.Report(study(line_up, {}), (), (FIGURE,), ())
    file = page.write_report(report, tmp_path / "new" / "out")
    assert file == tmp_path / "new" / "out" / "report.html" and file.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in sorted(file.parent.iterdir())] == ["accuracy-n.png", "report.html"]
    assert (file.parent / "accuracy-n.png").read_bytes() == b"\x89PNG"


def test_without_jinja_the_sentence_says_what_to_install(line_up, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tts-engine\[report\]'"):
        page.page(page.Report(study(line_up, {}), (), (), ()))
