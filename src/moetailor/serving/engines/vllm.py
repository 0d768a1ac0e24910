"""vLLM: one width for all experts of a layer as compressed-tensors, and fewer experts; with our plug-in any result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

from moetailor.checkpoint.devices import HAS_TILES, has_gpu
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.family import QUANT_METHOD
from moetailor.checkpoint.hub import name_and_revision
from moetailor.checkpoint.storage.compressed import METHOD
from moetailor.serving.choices import Choice
from moetailor.serving.engine import Engine, Served, group_of, register_engine


class Vllm(Engine):
    """It takes nine tenths of a GPU's memory (`gpu_memory_utilization`), and graphs and activations are in these."""

    name = "vllm"
    overhead = Fraction(15, 100)
    program = "vllm"
    harness = "vllm"

    def choices(self, facts: ModelFacts) -> Sequence[Choice]:
        """Return 8 and 4 bits by layer, 4 bits, and fewer experts in 4 bits, in groups that kernels take; with the
        plug-in bits and stand-ins, too.
        """
        loads, group = "vLLM", group_of(facts)
        ours = Choice(name="bits and stand-ins", method="auto", format="moetailor", loads="vLLM with moetailor-vllm")
        # The plug-in takes nothing that came of a quantized original.
        plain = all(stack.lies == "plain" for stack in facts.stacks)
        every = (ours,) if plain and has_plugin() else ()
        if group is None:
            given = {"method": "refit", "parameters": {"neurons": "chosen"}, "rule": "narrower experts"}
            few = Choice(name="fewer experts", format="native", loads=loads, **given)
            return (*every, few)
        packed: dict[str, Any] = {"format": "compressed-tensors", "loads": loads}
        bits: dict[str, Any] = {"codes": "int", "group": group}
        by_layer = {"uniform_layers": True, "widths": "8,4", **bits}
        return (
            *every,
            Choice(name="8 and 4 bits by layer", method="auto", parameters=by_layer, rule="by layer", **packed),
            Choice(
                name="4 bits for all", method="quantize", parameters={"bits": 4, **bits}, rule="one width", **packed
            ),
            Choice(name="fewer, in 4 bits", method="refit", bits=f"int4g{group}", rule="fewer in 4 bits", **packed),
        )

    def refusal(self, written: str) -> str | None:
        """Refuse what vLLM alone does not know."""
        if written == QUANT_METHOD and not has_plugin():
            told = "vLLM needs a plug-in for the moetailor format, which is not installed here (plugins/vllm)"
            return f"{told}; install it, or use --engine transformers"
        return None

    def stops(self, entry: Mapping[str, Any]) -> str | None:
        """Name the few bits for which vLLM has kernels on CPUs, where a checkpoint has others and no GPU is here."""
        groups = entry.get("config_groups")
        if has_gpu() or entry.get("quant_method") != METHOD or not isinstance(groups, dict):
            return None
        schemes = [group["weights"] for group in groups.values() if isinstance(group, dict) and group.get("weights")]
        if HAS_TILES and all(map(_runs_on_cpus, schemes)):
            return None
        kernels = "4 bits without zero points in groups of 64 or 128, and fp8b128, where the CPU has AMX"
        return f"no GPU is found here, and on a CPU vLLM 0.32 stops at experts in few bits but {kernels}"

    def command(self, served: Served) -> list[str]:
        """Return the command of its server."""
        limit = [] if served.context is None else ["--max-model-len", str(served.context)]
        name, revision = name_and_revision(served.folder)
        limit += [] if revision is None else ["--revision", revision]
        command = [served.program(self.program), "serve", name]
        return [*command, "--host", served.host, "--port", str(served.port), *limit]


def _runs_on_cpus(weights: Mapping[str, Any]) -> bool:
    """Say whether vLLM 0.32 has a kernel with which CPUs run a scheme of compressed-tensors."""
    if weights.get("type") == "float":
        return weights.get("strategy") == "block"
    return weights.get("num_bits") == 4 and bool(weights.get("symmetric")) and weights.get("group_size") in (64, 128)


def has_plugin() -> bool:
    """Say whether the plug-in for our format is installed here."""
    return find_spec("moetailor_vllm") is not None


register_engine(Vllm())
