"""The pictures with points: quality against bytes, expected against measured, damage by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from moetailor.answers import Keep
from moetailor.report.colors import PLAIN, Look
from moetailor.report.drawing import (
    INK,
    MUTED,
    PAPER,
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
from moetailor.words import nbytes

# Below this an expected error says no more than that it is nothing.
NOTHING = 1e-6
DEPTH = LinearSegmentedColormap.from_list("depth", [SKY, RED])


def quality(cells: Sequence[Cell], original: int, looks: Mapping[str, Look]) -> Markup:
    """Draw KL against bytes: a point for each cell, those of one name joined; one line along the cells that no smaller
    one beats, another along those of bits alone.

    Args:
        cells: those that were measured, at least one; ``best`` says which no other beats in both.
        original: bytes of the original.
        looks: color and mark of each name.
    """
    kls = [cell["fidelity"][""]["kl"] for cell in cells]
    zero = bottom(value for kl in kls for value in kl.values())
    means, lows, highs = ([max(kl[key], zero) for kl in kls] for key in ("mean", "low", "high"))
    sizes = [100 * cell["nbytes"] / original for cell in cells]
    by_size = sorted(range(len(cells)), key=lambda n: sizes[n])
    best = [n for n in by_size if cells[n]["best"]]
    plain = [n for n in by_size if not cells[n]["removes"]]
    series: dict[str, list[int]] = {}
    for n in by_size:
        series.setdefault(cells[n]["name"], []).append(n)
    figure, axes = canvas(min(3.8 + 0.04 * len(cells), 5.5))
    axes.grid(axis="y")
    log_axis(axes, "y", [*lows, *highs])
    span = max(sizes) - min(sizes) or max(sizes)
    axes.set_xlim(min(sizes) - 0.25 * span, max(sizes) + 0.35 * span)
    for name, numbers in series.items():
        color = looks[name][0]
        axes.plot([sizes[n] for n in numbers], [means[n] for n in numbers], color=color, lw=0.7, alpha=0.6, zorder=1)
    for numbers, color, width in ((_lowest(plain, means), PLAIN, 1.4), (best, INK, 1.2)):
        axes.plot([sizes[n] for n in numbers], [means[n] for n in numbers], color=color, lw=width, alpha=0.7, zorder=2)
    for n, cell in enumerate(cells):
        color, mark = looks[cell["name"]]
        axes.plot([sizes[n]] * 2, [lows[n], highs[n]], color=color, lw=1, zorder=2)
        face = color if cell["native"] else PAPER
        axes.plot(sizes[n], means[n], mark, ms=5.5, color=color, mfc=face, mew=1.3, zorder=3 + cell["best"])
    axes.set_xlabel(f"size, % of the original's {nbytes(original)}")
    axes.set_title("KL from the original, nats a token")
    # A name is written once: at the largest on the front if one is there, else at the smallest, which is where there is
    # room. Those of the front come first, then bits alone, then from the best to the worst.
    named = [
        max([n for n in numbers if cells[n]["best"]] or numbers[:1], key=sizes.__getitem__)
        for numbers in series.values()
    ]
    named.sort(key=lambda n: (not cells[n]["best"], cells[n]["removes"], means[n]))
    rest = [n for n in range(len(cells)) if n not in named]
    labels = [Label(sizes[n], means[n], cells[n]["name"], "bold" if cells[n]["best"] else "normal") for n in named]
    labels += [Label(sizes[n], means[n], "") for n in rest]
    lines = [[(sizes[n], means[n]) for n in numbers] for numbers in (best, _lowest(plain, means))]
    place(axes, labels, [line for line in lines if len(line) > 1])
    return svg(figure, "KL against size, a point for each method and ratio or size")


def _lowest(numbers: Sequence[int], values: Sequence[float]) -> list[int]:
    """Return those numbers, from the smallest size up, whose value no one before has reached."""
    found: list[int] = []
    for number in numbers:
        if not found or values[number] < values[found[-1]]:
            found.append(number)
    return found


def layer_errors(cells: Sequence[Cell]) -> Markup | None:
    """Draw the measured error of each layer that changed against what was expected; None when there are none.

    Args:
        cells: those that were measured.
    """
    layers = sorted({int(layer) for cell in cells for layer in cell["layers"]})
    points = [
        (max(found["expected"], NOTHING), max(found["measured"], NOTHING), layers.index(int(layer)))
        for cell in cells
        for layer, found in cell["layers"].items()
        if set(found["slots"]) != {Keep.letter} and None not in (found["expected"], found["measured"])
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


def expected_kl(cells: Sequence[Cell], looks: Mapping[str, Look]) -> Markup | None:
    """Draw the measured KL against what was expected; None when nothing was expected.

    Args:
        cells: those that were measured.
        looks: color and mark of each name.
    """
    known = [cell for cell in cells if cell["expected_kl"] is not None]
    if not known:
        return None
    pairs = [(cell["expected_kl"], cell["fidelity"][""]["kl"]["mean"]) for cell in known]
    zero = bottom(value for pair in pairs for value in pair)
    expected, measured = ([max(value, zero) for value in values] for values in zip(*pairs, strict=True))
    figure, axes = canvas(4.2)
    _square(axes, expected, measured)
    for cell, x, y in zip(known, expected, measured, strict=True):
        color, mark = looks[cell["name"]]
        axes.plot(x, y, mark, color=color, ms=6)
    axes.set_title("KL, nats a token, measured")
    axes.set_xlabel("expected")
    return svg(figure, "Measured against expected KL of each method and ratio or size")


def domains(cells: Sequence[Cell], names: Sequence[str], title: str, looks: Mapping[str, Look]) -> Markup:
    """Draw the KL of a few cells on each domain.

    Args:
        cells: at most five.
        names: the domains.
        title: of the picture.
        looks: color and mark of each name.
    """
    rows = ["", *names]
    found = [[cell["fidelity"].get(row) for row in rows] for cell in cells]
    values = [value for row in found for fidelity in row if fidelity for value in fidelity["kl"].values()]
    zero = bottom(values)
    # The names stand beside each other where the width has room for them, about 48 characters.
    columns = max(n for n in (1, 2, 3) if n == 1 or n * (3 + max(len(cell["name"]) for cell in cells)) <= 48)
    figure, axes = canvas(1.0 + 0.34 * len(rows) + 0.2 * -(-len(cells) // columns))
    log_axis(axes, "x", (max(value, zero) for value in values))
    axes.grid(axis="x")
    for number, (cell, measured) in enumerate(zip(cells, found, strict=True)):
        color, mark = looks[cell["name"]]
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
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, handletextpad=0.1, columnspacing=1.2)
    return svg(figure, title)


def _square(axes: Axes, expected: Sequence[float], measured: Sequence[float]) -> None:
    """Give both axes one logarithmic scale, and draw where expected is measured."""
    both = [*expected, *measured]
    log_axis(axes, "x", both)
    log_axis(axes, "y", both)
    axes.set_box_aspect(1)
    axes.grid()
    axes.axline((1, 1), (10, 10), color=MUTED, lw=1, zorder=1)
