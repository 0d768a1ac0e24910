"""How every picture looks: narrow, for a phone; words stay text; ink takes the colour of the page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

# Inches. On a phone a picture is about as wide as the screen; on a desktop two stand beside each other.
WIDTH = 4.2
# Stands for the colour of the page's own text, which replaces it in the SVG.
INK = "#010203"
# Stands for the colour behind it.
PAPER = "#fdfeff"
# Seen on white and on black.
MUTED = "#858b93"
# The two ends of a scale, of Okabe and Ito's palette: told apart with any color vision.
SKY, RED = "#56b4e9", "#d55e00"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": MUTED,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
}
# Pixels from a point to a label beside it, and to one that is some lines higher or lower, with a stroke to it.
NEAR, FAR, LINE, STEPS = 6, 14, 11, 4
# Half of what a point takes.
POINT = 4


@dataclass(frozen=True)
class Label:
    """A name for a point, which lies at (x, y) of the axes' scales."""

    x: float
    y: float
    text: str
    weight: str = "normal"


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the page, whatever the reader's own settings are."""
    with rc_context():
        rcdefaults()
        rcParams.update(STYLE)
        yield


def canvas(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of the common width, a pixel to each point, and its axes as `Figure.subplots` gives them.

    Args:
        height: inches.
        rows: of axes.
        columns: of axes.
        options: of `Figure.subplots`.
    """
    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def svg(figure: Figure, alt: str) -> Markup:
    """Return a figure as an element of a page: no metadata, no fixed size, the same bytes every time.

    Args:
        figure: the picture.
        alt: what a screen reader says.
    """
    out = io.StringIO()
    with rc_context({"svg.hashsalt": alt}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    _, _, drawn = out.getvalue().partition("<svg")
    view = re.search(r'viewBox="[^"]*"', drawn)
    assert view is not None
    drawn = re.sub(r' id="[A-Za-z._]+_\d+"', "", drawn[drawn.index(">") :])
    drawn = drawn.replace(INK, "currentColor").replace(PAPER, "var(--page)")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return Markup(f'<svg {names} {view[0]} role="img" aria-label="{escape(alt)}"{drawn}')


def log_axis(axes: Axes, name: Literal["x", "y"], values: Iterable[float]) -> None:
    """Make an axis logarithmic, with a little room around values, and plain numbers at its ticks.

    Args:
        axes: whose axis.
        name: which of the two.
        values: what it shows, all positive.
    """
    found = list(values)
    low, high = min(found), max(found)
    margin = 1.1 * (high / low) ** 0.04
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low / margin, high * margin)})
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value > 9e-4 else f"{value:.0e}".replace("e-0", "e-"))
    axis.set_minor_formatter(NullFormatter())


def bottom(values: Iterable[float]) -> float:
    """Return where a logarithmic axis draws zeros, and what rounding put below: under the smallest positive value."""
    return min((value for value in values if value > 0), default=1e-6) / 2


def place(axes: Axes, labels: Sequence[Label], lines: Iterable[Sequence[tuple[float, float]]] = ()) -> None:
    """Write labels beside their points, so that none covers a point, a line or another label.

    A label that finds no room is left out: the important ones come first. One without text is only a point that none
    may cover.

    Args:
        axes: where the points are drawn.
        labels: what to write.
        lines: corners of drawn lines, in the axes' scales.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    frame = axes.get_window_extent()
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken = [Bbox.from_extents(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in points]
    strokes = [Path(axes.transData.transform(line)) for line in lines]
    rows = sorted(range(-STEPS, STEPS + 1), key=abs)
    for number, (label, point) in enumerate(zip(labels, points, strict=True)):
        if not label.text:
            continue
        others = taken[:number] + taken[number + 1 :]
        for row, side in itertools.product(rows, (1, -1)):
            shift = np.array([side * (FAR if row else NEAR), row * LINE])
            note = axes.annotate(
                label.text,
                (label.x, label.y),
                tuple(shift),
                textcoords="offset pixels",
                ha="left" if side > 0 else "right",
                va="center_baseline",
                weight=label.weight,
                size=9,
            )
            note.set_in_layout(False)
            box = note.get_window_extent()
            way = shift / np.hypot(*shift)
            stroke = Path([point + 1.4 * POINT * way, point + shift - POINT / 2 * way]) if row else None
            if (
                frame.x0 <= box.x0
                and box.x1 <= frame.x1
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1
                and not any(box.overlaps(other) for other in taken)
                and not any(other.intersects_bbox(box) for other in strokes)
                and not (stroke and any(stroke.intersects_bbox(other) for other in others))
            ):
                taken.append(box)
                if stroke:
                    strokes.append(stroke)
                    axes.add_patch(PathPatch(stroke, transform=None, color=MUTED, lw=0.6))
                break
            note.remove()
