"""The pictures with points: quality against bytes, expected against measured, damage by domain."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from moetailor.answers import Keep
from moetailor.report.drawing import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PAPER,
    PINK,
    RED,
    SKY,
    Label,
    bottom,
    canvas,
    log_axis,
    place,
    svg,
)
from moetailor.report.words import Cell
from moetailor.words import nbytes, unit

MARKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PINK, "D"), (SKY, "v"))
# Below this an expected error says no more than that it is nothing.
NOTHING = 1e-6
DEPTH = LinearSegmentedColormap.from_list("depth", [SKY, RED])


def quality(cells: Sequence[Cell], original: int) -> Markup:
    """Draw KL against bytes, a point for each cell, with the cells that no smaller one beats joined.

    Args:
        cells: those that were measured, at least one.
        original: bytes of the original.
    """
    scale, name = unit(original)
    kls = [cell["fidelity"][""]["kl"] for cell in cells]
    zero = bottom(value for kl in kls for value in kl.values())
    means, lows, highs = ([max(kl[key], zero) for kl in kls] for key in ("mean", "low", "high"))
    sizes = [cell["nbytes"] / scale for cell in cells]
    best = front(sizes, means)
    # Labels are given in this order: the front, then from the best to the worst.
    order = sorted(range(len(cells)), key=lambda n: (n not in best, means[n]))
    figure, axes = canvas(min(3.6 + 0.05 * len(cells), 5.5))
    axes.grid(axis="y")
    log_axis(axes, "y", [*lows, *highs])
    span = max(sizes) - min(sizes) or max(sizes)
    axes.set_xlim(min(sizes) - 0.25 * span, max(sizes) + 0.35 * span)
    line = [(sizes[n], means[n]) for n in best]
    axes.plot(*zip(*line, strict=True), color=BLUE, lw=1.2, alpha=0.6, zorder=2)
    for n in order:
        color = BLUE if n in best else MUTED
        axes.plot([sizes[n]] * 2, [lows[n], highs[n]], color=color, lw=1, zorder=2)
        face = color if cells[n]["native"] else PAPER
        axes.plot(sizes[n], means[n], "o", ms=6, color=color, mfc=face, mew=1.4, zorder=3)
    axes.set_xlabel(f"size, {name}; the original has {nbytes(original)}")
    axes.set_title("KL from the original, nats a token")
    named = [Label(sizes[n], means[n], cells[n]["name"], weight="bold" if n in best else "normal") for n in order]
    place(axes, named, [line] if len(line) > 1 else [])
    return svg(figure, "KL against size, a point for each method and ratio")


def front(sizes: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the points that no other beats in both, from the smallest size up."""
    found: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda n: (sizes[n], values[n])):
        if not found or values[number] < values[found[-1]]:
            found.append(number)
    return found


def layer_errors(cells: Sequence[Cell]) -> Markup | None:
    """Draw the measured error of each layer that changed against what was expected; None when nothing was expected.

    Args:
        cells: those that were measured.
    """
    layers = sorted({int(layer) for cell in cells for layer in cell["layers"]})
    points = [
        (max(found["expected"], NOTHING), max(found["measured"], NOTHING), layers.index(int(layer)))
        for cell in cells
        for layer, found in cell["layers"].items()
        if set(found["slots"]) != {Keep.letter}
    ]
    if not points:
        return None
    expected, measured, depth = zip(*points, strict=True)
    figure, axes = canvas(4.2)
    _square(axes, expected, measured)
    drawn = axes.scatter(expected, measured, c=depth, cmap=DEPTH, s=20, alpha=0.9, linewidths=0)
    if len(layers) > 1:
        # The key stands in the line of the title, on the right.
        bar = axes.inset_axes((0.76, 1.025, 0.18, 0.03))
        figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=[]).outline.set_visible(False)  # type: ignore[operator]
        for x, side, text in ((0.74, "right", f"layer {layers[0]}"), (0.96, "left", f"{layers[-1]}")):
            axes.text(x, 1.04, text, ha=side, va="center", size=9, transform=axes.transAxes)
    axes.set_title("Layer's error, measured", y=1)
    axes.set_xlabel("expected, as a share of the output's square")
    return svg(figure, "Measured against expected error of each layer")


def expected_kl(cells: Sequence[Cell]) -> Markup | None:
    """Draw the measured KL against what was expected; None when nothing was expected.

    Args:
        cells: those that were measured.
    """
    known = [cell for cell in cells if cell["expected_kl"] is not None]
    if not known:
        return None
    pairs = [(cell["expected_kl"], cell["fidelity"][""]["kl"]["mean"]) for cell in known]
    zero = bottom(value for pair in pairs for value in pair)
    expected, measured = ([max(value, zero) for value in values] for values in zip(*pairs, strict=True))
    ratios = list(dict.fromkeys(cell["ratio"] for cell in known))
    figure, axes = canvas(4.2)
    _square(axes, expected, measured)
    for number, ratio in enumerate(ratios):
        color, mark = MARKS[number % len(MARKS)]
        at = [n for n, cell in enumerate(known) if cell["ratio"] == ratio]
        drawn = [[values[n] for n in at] for values in (expected, measured)]
        axes.plot(*drawn, mark, color=color, ms=6, label=f"{ratio} removed")
    axes.legend(loc="best", frameon=False, handletextpad=0.2)
    axes.set_title("KL, nats a token, measured")
    axes.set_xlabel("expected")
    return svg(figure, "Measured against expected KL of each method and ratio")


def domains(cells: Sequence[Cell], names: Sequence[str], title: str) -> Markup:
    """Draw the KL of a few cells on each domain.

    Args:
        cells: at most five.
        names: the domains.
        title: of the picture.
    """
    rows = ["", *names]
    found = [[cell["fidelity"].get(row) for row in rows] for cell in cells]
    values = [value for row in found for fidelity in row if fidelity for value in fidelity["kl"].values()]
    zero = bottom(values)
    figure, axes = canvas(1.2 + 0.34 * len(rows))
    log_axis(axes, "x", (max(value, zero) for value in values))
    axes.grid(axis="x")
    for number, (cell, measured) in enumerate(zip(cells, found, strict=True)):
        color, mark = MARKS[number]
        shift = 0.16 * (number - (len(cells) - 1) / 2)
        for row, fidelity in enumerate(measured):
            if fidelity is None:
                continue
            mean, low, high = (max(fidelity["kl"][key], zero) for key in ("mean", "low", "high"))
            axes.plot([low, high], [row + shift] * 2, color=color, lw=1)
            axes.plot(mean, row + shift, mark, color=color, ms=6, label=cell["name"] if row == 0 else None)
    axes.set_yticks(range(len(rows)), ["all text", *names])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("KL, nats a token")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.1, columnspacing=1.2)
    return svg(figure, title)


def _square(axes: Axes, expected: Sequence[float], measured: Sequence[float]) -> None:
    """Give both axes one logarithmic scale, and draw where expected is measured."""
    both = [*expected, *measured]
    log_axis(axes, "x", both)
    log_axis(axes, "y", both)
    axes.set_box_aspect(1)
    axes.grid()
    axes.axline((1, 1), (10, 10), color=MUTED, lw=1, zorder=1)
