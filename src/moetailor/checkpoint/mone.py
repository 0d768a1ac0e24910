"""vLLM's layout for constants in place of experts (MoNE), read as what moetailor's own format would say of it.

config.json names the experts of each layer that are constants; each has a vector in place of its matrices, and the
others keep their numbers. Names follow vLLM 0.33, `expert_substitution.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch

from moetailor.checkpoint.family import QUANT_METHOD
from moetailor.checkpoint.files import Checkpoint, TensorInfo
from moetailor.checkpoint.folder import CONFIG
from moetailor.errors import CheckpointError
from moetailor.schema import Few, read

ENTRY, VALUE = "approximate_experts", "approx_value"
CURE = "the checkpoint is damaged: write it again"
_EXPERT = re.compile(r"^(.*\blayers\.(\d+)\..*\bexperts)\.(\d+)\.(.+)$")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tensors of one shape, read as the rows of one; see `TensorInfo`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(info.nbytes for info in self.stored)

    @property
    def lies(self) -> str:
        """How it lies, in words."""
        return "constants as vLLM's MoNE layout has them"

    def read(self) -> torch.Tensor:
        """Read the rows and return them as one tensor."""
        return torch.stack([info.read() for info in self.stored])


def has_constants(config: Any) -> bool:
    """Say whether the checkpoint of a config.json is of this layout."""
    return bool(config.get(ENTRY))


def as_ours(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint of this layout as moetailor's format has it, and any other as it is.

    Raises:
        CheckpointError: a constant is missing or of another shape, or an expert is there twice or not at all.
    """
    if not has_constants(checkpoint.config):
        return checkpoint
    where = f"{checkpoint.folder / CONFIG}, {ENTRY}"
    told = read(dict[int, list[Few]], checkpoint.config[ENTRY], where, error=CheckpointError, cure=CURE)
    experts: dict[int, dict[int, list[TensorInfo]]] = defaultdict(lambda: defaultdict(list))
    for info in checkpoint.tensors.values():
        if (match := _EXPERT.match(info.name)) and told.get(int(match[2])):
            experts[int(match[2])][int(match[3])].append(info)
    tensors, coded, layers = dict(checkpoint.tensors), {}, {}
    for layer, constants in sorted((layer, sorted(ids)) for layer, ids in told.items() if ids):
        lying = experts[layer]
        if odd := _misfit(lying, constants):
            raise CheckpointError(f"{checkpoint.source}: layer {layer}: {odd}; {CURE}")
        kept = [expert for expert in sorted(lying) if expert not in constants]
        for row, expert in enumerate(kept):
            for info in lying[expert]:
                del tensors[info.name]
            # Rows ascend with experts, so no name that is still to be taken out is put in here.
            for info in lying[expert]:
                name = re.sub(r"\bexperts\.\d+\.", f"experts.{row}.", info.name, count=1)
                tensors[name] = replace(info, name=name)
        rows = tuple(lying[expert][0] for expert in constants)
        path = rows[0].name.removesuffix(f".{constants[0]}.{VALUE}")
        shape = (len(rows), *rows[0].shape)
        coded[f"{path}.constant"] = Rows(name=f"{path}.constant", dtype=rows[0].dtype, shape=shape, stored=rows)
        numbers = [kept.index(slot) if slot in kept else -1 for slot in sorted(lying)]
        layers[str(layer)] = {"experts": len(kept), "rows": numbers, "constant": constants}
    entry = {"quant_method": QUANT_METHOD, "version": 1, "layers": layers}
    config = {name: value for name, value in checkpoint.config.items() if name != ENTRY}
    return replace(checkpoint, config=config | {"quantization_config": entry}, tensors=tensors, coded=coded)


def _misfit(lying: dict[int, list[TensorInfo]], constants: list[int]) -> str | None:
    """Say what of a layer is not as config.json says; None where all is."""
    if lost := sorted({*range(max([*lying, *constants]) + 1)} - {*lying}):
        return f"expert {lost[0]} has no tensors"
    for expert, infos in lying.items():
        values = [info for info in infos if info.name.endswith(f".{VALUE}")]
        if (expert in constants) != bool(values) or (values and len(infos) > 1):
            what = "is named a constant" if expert in constants else "is not named a constant"
            return f"expert {expert} {what} and has {', '.join(info.name for info in infos)}"
    shapes = {(info.dtype, info.shape) for expert in constants for info in lying[expert]}
    return None if len(shapes) == 1 else f"constants have the shapes {sorted(shapes)}"
