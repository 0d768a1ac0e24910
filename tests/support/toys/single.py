"""A format: a native result in a single file, and a word of its own in the config."""

from __future__ import annotations

from typing import Any

from moetailor.checkpoint.writer import Piece
from moetailor.planning.plan import Plan
from moetailor.transform.formats import FORMATS, Format
from moetailor.transform.pieces import Parts


class Single(Format):
    """One file."""

    name = "single"
    loading = "One file, for engines that know no shards."

    def refusal(self, plan: Plan) -> str | None:
        return FORMATS["native"].refusal(plan)

    def config(self, original: dict, config: Any, plan: Plan) -> dict:
        return FORMATS["native"].config(original, config, plan) | {"written_as": "single"}

    def shards(self, parts: Parts) -> list[list[Piece]]:
        return [[piece for shard in super().shards(parts) for piece in shard]]
