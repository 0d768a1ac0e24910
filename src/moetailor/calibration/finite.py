"""Weights that are not finite: damaged on disk, or made so by the dtype that they are run in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from moetailor.checkpoint.anatomy import MoELayer, tensors_of
from moetailor.checkpoint.files import Checkpoint
from moetailor.checkpoint.layout import DiskStack
from moetailor.checkpoint.tensors import is_finite
from moetailor.errors import CalibrationError

# Says whether a row of a parameter, by its name in memory, is finite as it lies on disk.
Stored = Callable[[str, int], bool]


def stored_rows(checkpoint: Checkpoint, names: Mapping[str, str], stacks: Mapping[str, DiskStack]) -> Stored:
    """Return what looks rows of experts and of slots up on disk, in their stored dtype.

    Args:
        checkpoint: where they lie.
        names: disk name -> memory name.
        stacks: the MoE layers on disk.
    """

    def finite(parameter: str, row: int) -> bool:
        for stack in stacks.values():
            axes = stack.fused | stack.slots
            for key in (key for key in (*stack.experts, *axes) if names.get(key) == parameter):
                if stack.experts.get(key, row) == row:
                    tensor = checkpoint.numbers[key].read()
                    if not is_finite(tensor.select(axes[key], row) if key in axes else tensor):
                        return False
        return True

    return finite


def check_weights(model: nn.Module, layer: MoELayer, stored: Stored | None) -> None:
    """Refuse a layer that holds NaN or Inf among its experts or in its router's matrix.

    Args:
        model: the model, with this layer's weights in memory.
        layer: which layer.
        stored: tells whether they are so on disk; None for a model that has no other weights than these.

    Raises:
        CalibrationError: a weight is damaged, or overflows in the dtype of the run.
    """
    tensors = tensors_of(model)
    rows = {f"{layer.experts}.{name}": (axis, "expert") for name, axis in layer.expert_rows.items()}
    # Infinite corrections may be meant: they close a slot.
    rows |= {
        f"{layer.block}.{name}": (axis, "slot") for name, axis in layer.slot_rows.items() if name.endswith("weight")
    }
    for name, (axis, what) in rows.items():
        tensor = tensors[name].movedim(axis, 0)
        # What accelerate keeps elsewhere comes when it runs; what it gives is looked at, too.
        bad = [] if tensor.is_meta else [number for number, row in enumerate(tensor) if not is_finite(row)]
        if not bad:
            continue
        inside = layer.experts if what == "expert" else layer.block
        part = "the router's " * (what == "slot") + name.removeprefix(f"{inside}.")
        damaged = bad if stored is None else [row for row in bad if not stored(name, row)]
        if damaged:
            told = "" if stored is None else "; the checkpoint is damaged"
            raise CalibrationError(f"layer {layer.index}, {what} {damaged[0]}: {part} holds NaN or Inf{told}")
        dtype, many = str(tensor.dtype).removeprefix("torch."), f"{len(bad)} {what}s in this layer"
        raise CalibrationError(
            f"layer {layer.index}, {what} {bad[0]}: {part} is finite as it is stored and overflows in {dtype} "
            f"({many}); calibrate in a wider --dtype"
        )


def not_finite(model: Any, but: Collection[str] = ()) -> str | None:
    """Return the name of a parameter in memory that holds NaN or Inf, if there is one.

    Args:
        model: the model; what of it is not loaded is not looked at.
        but: names of parameters that may.
    """
    here = ((name, tensor) for name, tensor in model.named_parameters() if not tensor.is_meta and name not in but)
    return next((name for name, tensor in here if not is_finite(tensor)), None)
