"""vLLM as it is: compressed-tensors, one width for all experts of a layer, and fewer experts."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.family import QUANT_METHOD
from moetailor.serving.choices import Choice
from moetailor.serving.engine import HOST, PORT, Engine, group_of, register_engine


class Vllm(Engine):
    """It takes nine tenths of a GPU's memory (`gpu_memory_utilization`), and graphs and activations are in these."""

    name = "vllm"
    overhead = Fraction(15, 100)

    def choices(self, facts: ModelFacts) -> Sequence[Choice]:
        """Return 8 and 4 bits by layer, 4 bits, and fewer experts in 4 bits; groups are those that kernels take."""
        loads, group = "vLLM", group_of(facts)
        if group is None:
            return (Choice(name="fewer experts", method="refit", format="native", rule="fewer experts", loads=loads),)
        packed: dict[str, Any] = {"format": "compressed-tensors", "loads": loads}
        return (
            Choice(
                name="8 and 4 bits by layer",
                method="auto",
                parameters={"uniform_layers": True, "widths": "8,4", "codes": "int", "group": group},
                rule="by layer",
                **packed,
            ),
            Choice(
                name="4 bits for all",
                method="quantize",
                parameters={"bits": 4, "codes": "int", "group": group},
                rule="one width",
                **packed,
            ),
            Choice(name="fewer, in 4 bits", method="refit", bits=f"int4g{group}", rule="fewer in 4 bits", **packed),
        )

    def refusal(self, written: str) -> str | None:
        """Refuse what vLLM alone does not know."""
        if written == QUANT_METHOD:
            return "vLLM does not know the moetailor format; use --engine transformers"
        return None

    def command(self, folder: Path, context: int | None = None, host: str = HOST, port: int = PORT) -> list[str]:
        """Return the command of its server."""
        limit = [] if context is None else ["--max-model-len", str(context)]
        return ["vllm", "serve", str(folder), "--host", host, "--port", str(port), *limit]


register_engine(Vllm())
