"""One HTML file that holds all of a report and asks nobody for anything: styles and pictures inside, no script. What models and
task files say is text and never markup. jinja2 is imported when a page is asked for.
"""

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..errors import MissingExtra
from .arms import Study
from .curves import Figure, figures
from .diagnostics import Diagnostics
from .diagnostics_figure import diagnostics_figure
from .diagnostics_table import diagnostics_table
from .sheets import Sheet, sheets
from .text import harmless
from .versions import package_version

TEMPLATE = Path(__file__).with_name("page.html")
PAGE = "report.html"
WIDTH = 120  # columns of what is shown as on a terminal
LONGEST = 1200  # characters that are quoted of a text, the last ones among them


@dataclass(frozen=True, slots=True)
class Section:
    """What stands under one entry of the contents."""

    name: str
    title: str
    note: str
    figures: tuple[Figure, ...]
    sheet: Sheet | None


@dataclass(frozen=True, slots=True)
class Report:
    study: Study
    sheets: tuple[Sheet, ...]
    figures: tuple[Figure, ...]
    diagnostics: tuple[Diagnostics, ...]


def make_report(study: Study, diagnostics: Sequence[Diagnostics] = ()) -> Report:
    """Raises MissingExtra where matplotlib is not installed."""
    told = [diagnostics_figure(one, f"diagnostics-{number}") for number, one in enumerate(diagnostics, start=1)]
    return Report(study, tuple(sheets(study)), (*figures(study), *told), tuple(diagnostics))


def write_report(report: Report, directory: Path) -> Path:
    """report.html and every figure as a PNG beside it; what is there of an earlier report is written over. Raises MissingExtra."""
    text = page(report)
    directory.mkdir(parents=True, exist_ok=True)
    write_figures(report.figures, directory)
    file = directory / PAGE
    file.write_text(text, encoding="utf-8")
    return file


def write_figures(drawn: Sequence[Figure], directory: Path) -> list[Path]:
    """Each as NAME.png, for other pages."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"{figure.name}.png" for figure in drawn]
    for figure, file in zip(drawn, files, strict=True):
        file.write_bytes(figure.png)
    return files


def page(report: Report) -> str:
    """The HTML. Raises MissingExtra where jinja2 is not installed."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise MissingExtra("a report needs jinja2 and it is not installed: pip install 'tts-engine[report]'") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"said": said, "base64": lambda data: base64.b64encode(data).decode("ascii")}
    judged = [figure for figure in report.figures if figure.name.startswith("diagnostics-")]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        study=report.study,
        sections=sections(report),
        diagnostics=[(figure, plain(one)) for figure, one in zip(judged, report.diagnostics, strict=True)],
        version=package_version("tts-engine") or "",
        now=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def sections(report: Report) -> list[Section]:
    """Each table with the figures that show it."""
    made = []
    for sheet in report.sheets:
        start = sheet.name.removeprefix("by-")
        own = tuple(figure for figure in report.figures if figure.name == start or figure.name.startswith(f"{start}-"))
        made.append(Section(sheet.name, sheet.title, sheet.note, own, sheet))
    return made


def plain(found: Diagnostics) -> str:
    """As a terminal shows it."""
    screen = Console(file=io.StringIO(), width=WIDTH, no_color=True)
    screen.print(diagnostics_table(found))
    return screen.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def said(text: str | None, longest: int = LONGEST) -> str:
    """Somebody else's text as it is quoted: without what could steer, and not endless."""
    if text is None:
        return "none"
    if len(text) > longest:
        text = f"{text[: longest - longest // 5]} ... {text[-(longest // 5) :]} ({len(text)} characters)"
    return harmless(text)
