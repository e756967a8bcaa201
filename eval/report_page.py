"""The report as one HTML page that stands alone: sections of texts, tables and pictures, all escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import jinja2

from antiphon.eval.report_style import Plot


class Strong(str):
    """A table cell to be seen first."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are texts. Without column names it has no head."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: int = 1
    """So many columns hold words, not numbers."""
    folded: bool = False
    """Shown when it is opened: for what is only looked up."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot as the page shows it."""

    plot: Plot

    @property
    def base64(self) -> str:
        return base64.b64encode(self.plot.png).decode()


@dataclass(slots=True)
class Section:
    """A heading and what stands under it, in order."""

    title: str
    anchor: str
    texts: list[str] = field(default_factory=list)
    items: list[Table | Picture] = field(default_factory=list)


def render(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    """The page. Every text is escaped: names in result files are not ours."""
    data = resources.files("antiphon.eval") / "data"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["strong"] = lambda value: isinstance(value, Strong)
    environment.tests["picture"] = lambda value: isinstance(value, Picture)
    template = environment.from_string((data / "report.html.j2").read_text(encoding="utf-8"))
    style = (data / "report.css").read_text(encoding="utf-8")
    return template.render(title=title, intro=intro, sections=sections, style=style)
