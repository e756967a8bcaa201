"""How a report's plots look: colours that colour-blind readers tell apart, one font, quiet axes.

matplotlib is the `eval` extra and is imported when something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from antiphon.traces.results import ResultError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 9.6
DOTS_PER_INCH = 120
LABEL_CHARACTERS = 30
INK, QUIET, GRID = "#222222", "#666666", "#dddddd"

SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d1f")
"""Okabe and Ito's, but for its yellow, which white paper hides."""
SERIES_MARKERS = "osD^vPX*"
SERIES_LINES = ("-", "--", "-.", ":")

ARM_LOOKS: Mapping[str, tuple[str, str]] = {
    "local": ("#4477aa", ""),
    "remote_pull": ("#ee8866", "//"),
    "remote_recompute": ("#bbcc33", ".."),
    "move": ("#aa3377", "xx"),
}
"""Arm -> colour, hatch: told apart in grey too."""
OTHER_ARM = ("#bbbbbb", "")

STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.parse_math": False,  # a `$` in a name is a dollar sign
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "savefig.dpi": DOTS_PER_INCH,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture with what a stranger needs to read it."""

    name: str
    """Of its file, without the ending."""
    question: str
    """What it answers; its heading."""
    caption: str
    """How to read it."""
    png: bytes


def require_matplotlib() -> None:
    """Raises `ResultError` that says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ResultError("plots need matplotlib: pip install 'antiphon[eval]'") from error


@contextmanager
def drawing(height_inches: float) -> Iterator[Figure]:
    """A figure of the report's width; whatever is drawn on it must happen inside."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = dict(STYLE)
    with rc_context(settings):
        yield Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def png_of(figure: Figure) -> bytes:
    """Equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def panels(figure: Figure, columns: int, **options: Any) -> list[Axes]:
    """A row of axes."""
    made = figure.subplots(1, columns, squeeze=False, **options)
    return list(made[0])


def series_look(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> colour, marker and line; names beyond the colours differ by their line."""
    return {
        name: {
            "color": SERIES_COLOURS[index % len(SERIES_COLOURS)],
            "marker": SERIES_MARKERS[index % len(SERIES_MARKERS)],
            "linestyle": SERIES_LINES[index // len(SERIES_COLOURS) % len(SERIES_LINES)],
        }
        for index, name in enumerate(names)
    }


def arm_look(arm: str) -> dict[str, Any]:
    colour, hatch = ARM_LOOKS.get(arm, OTHER_ARM)
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}


def arm_order(arms: Sequence[str]) -> list[str]:
    """Known arms first, in one order everywhere."""
    known = list(ARM_LOOKS)
    return sorted(set(arms), key=lambda arm: (known.index(arm) if arm in known else len(known), arm))


def short(text: str, characters: int = LABEL_CHARACTERS) -> str:
    """Fits a label; the end stays, since that is where names differ."""
    if len(text) <= characters:
        return text
    end = characters // 3
    return f"{text[: characters - end - 1]}…{text[-end:]}"


def legend_outside(figure: Figure, handles: Sequence[Any], labels: Sequence[str], title: str = "") -> None:
    """To the right of everything, so that it hides nothing."""
    figure.legend(
        list(handles), [short(label) for label in labels], loc="outside right upper", title=title or None,
        alignment="left", title_fontsize=8.5,
    )  # fmt: skip


def seconds(value: float) -> str:
    """A time with three digits in the unit that fits."""
    if value >= 100:
        return f"{value:,.0f} s"
    if value >= 1:
        return f"{value:.3g} s"
    if value >= 1e-3:
        return f"{value * 1e3:.3g} ms"
    return f"{value * 1e6:.3g} µs"


def seconds_axis(axis: Any) -> None:
    """Ticks of a logarithmic time axis in words: 10 ms, 1 s. Call it when the limits stand."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(LogLocator(base=10.0, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value) if value > 0 else "0"))
    axis.set_minor_formatter(NullFormatter())
