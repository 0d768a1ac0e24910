"""A color and a mark for each method, alike in every picture and table of a page; bits alone have one color.

They are none of the colors of the kinds of answers, so that a color means one thing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from moetailor.report.words import Cell

# Seen on white and on black, and told apart with any color vision; beyond these the marks tell.
COLORS = ("#4477aa", "#aa3377", "#228833", "#66ccee", "#ee6677", "#ccbb44")
MARKS = ("o", "^", "D", "v", "P", "X", "*")
PLAIN, PLAIN_MARKS = "#ee7733", ("s", "p", "h", "d")

Look = tuple[str, str]


def looks(cells: Iterable[Cell]) -> dict[str, Look]:
    """Return the color and the mark of each name.

    Args:
        cells: of the comparison, whether they were measured or not, in the order of the page.
    """
    found: dict[str, Look] = {}
    methods = zip(itertools.cycle(COLORS), itertools.cycle(MARKS), strict=False)
    widths = zip(itertools.repeat(PLAIN), itertools.cycle(PLAIN_MARKS), strict=False)
    for cell in cells:
        if cell["name"] not in found:
            found[cell["name"]] = next(methods if cell["removes"] else widths)
    return found
