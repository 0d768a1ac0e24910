"""The pictures with a row for each layer and a column for each expert: how much it is used, and what became of it.

Experts stand in the order of their use, the most used on the left, alike in all pictures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.image import AxesImage

from moetailor.answers import all_marks
from moetailor.report.drawing import canvas, svg
from moetailor.report.words import Cell

Usage = Mapping[str, Mapping[str, Sequence[float]]]
# Shares are drawn up to this many doublings around an even split.
DOUBLINGS = 3


def usage(shares: Usage) -> Markup:
    """Draw each expert's share of the routed pairs, a map for all text and one for each domain.

    Args:
        shares: layer -> domain -> a share for each expert.
    """
    names = list(dict.fromkeys(name for layer in shares.values() for name in layer))
    order = by_use(shares)
    columns = min(len(names), 2)
    rows = math.ceil(len(names) / columns)
    figure, grid = canvas(0.8 + rows * (_height(len(shares)) + 0.3), rows, columns, squeeze=False)
    for axes, name in itertools.zip_longest(grid.flat, names):
        if name is None:
            axes.set_axis_off()
            continue
        # log2 of share x experts: 0 is an even split
        table = {
            layer: [_doublings(found[name][expert] * len(order[layer])) for expert in order[layer]]
            for layer, found in shares.items()
            if name in found
        }
        image = _draw(axes, table, cmap="PuOr_r", vmin=-DOUBLINGS, vmax=DOUBLINGS)
        axes.set_title(name or "all text")
    ticks = range(-DOUBLINGS, DOUBLINGS + 1)
    bar = figure.colorbar(image, ax=grid, location="bottom", aspect=40, ticks=list(ticks), pad=0.03)
    bar.ax.set_xticklabels([f"1/{2**-tick}" if tick < 0 else str(2**tick) for tick in ticks])
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("times an even share")
    return svg(figure, "How much each expert is used, by layer and domain")


def slots(cells: Sequence[Cell], shares: Usage, title: str) -> Markup:
    """Draw what became of every slot, a map for each cell.

    Args:
        cells: those that were measured, at least one.
        shares: how much each expert is used.
        title: of the picture, for screen readers.
    """
    order = by_use(shares)
    known = all_marks()
    letters, colors = list(known), ListedColormap([color for _, color in known.values()])
    layers = len(cells[0]["layers"])
    figure, grid = canvas(len(cells) * (_height(layers, cell=0.11) + 0.3), len(cells), squeeze=False)
    for axes, cell in zip(grid.flat, cells, strict=True):
        table = {
            layer: [letters.index(found["slots"][slot]) for slot in order.get(layer, range(len(found["slots"])))]
            for layer, found in cell["layers"].items()
        }
        _draw(axes, table, cmap=colors, vmin=-0.5, vmax=len(letters) - 0.5)
        axes.set_title(cell["name"], weight="bold")
    return svg(figure, title)


def by_use(shares: Usage) -> dict[str, list[int]]:
    """Return the experts of each layer, the most used on all text first."""
    return {layer: sorted(range(len(found[""])), key=lambda e: -found[""][e]) for layer, found in shares.items()}


def _draw(axes: Axes, table: Mapping[str, Sequence[float]], **colors: Any) -> AxesImage:
    """Draw a row for each layer; layers with fewer experts end earlier."""
    values = np.full((len(table), max(map(len, table.values()))), np.nan)
    for row, found in zip(values, table.values(), strict=True):
        row[: len(found)] = found
    layers = list(table)
    axes.set_yticks(sorted({0, len(layers) - 1}), [layers[0], layers[-1]][: len(layers)])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes.imshow(values, aspect="auto", interpolation="none", **colors)


def _doublings(multiple: float) -> float:
    return math.log2(max(multiple, 2.0**-DOUBLINGS))


def _height(layers: int, cell: float = 0.09) -> float:
    """Return inches of a map: cells are nearly square while layers are few, flatter when they are many."""
    return min(max(cell * layers, 0.3), 2.0)
