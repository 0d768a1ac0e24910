"""Fitted: a slot's own expert, its weights fitted anew to make up for what others no longer give."""

from __future__ import annotations

from dataclasses import dataclass

from moetailor.answers.keep import Keep


@dataclass(frozen=True)
class Fitted(Keep):
    """The slot's own expert, its weights fitted anew."""

    kind = "fitted"
    letter = "f"
    label = "kept, weights fitted"
    color = "#b9a3d9"
    rebuilds = True
