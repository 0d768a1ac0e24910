"""The experts of one layer as plain matrices, whatever their family's layout.

Shapes: T tokens, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from moetailor.checkpoint.devices import working_nbytes
from moetailor.schema import Count


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """What an expert is made of, whatever its family's layout; names as in `Experts`.

    Attributes:
        width: numbers of its input and output, D.
        intermediate: its intermediate size, F.
        gated: whether it has three matrices (gate, up, down) or two.
        biased: whether each of them has a bias.
    """

    width: Count
    intermediate: Count
    gated: bool = True
    biased: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The matrices that are applied to an expert's input."""
        return ("gate", "up") if self.gated else ("up",)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shape of each matrix."""
        return dict.fromkeys(self.inputs, (self.intermediate, self.width)) | {"down": (self.width, self.intermediate)}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of each matrix and bias."""
        biases = {f"{name}_bias": (rows,) for name, (rows, _) in self.matrices.items()}
        return self.matrices | (biases if self.biased else {})


class Experts:
    """The experts of one layer, whatever their family's layout.

    Matrices are named ``gate`` and ``up`` [F, D] and ``down`` [D, F], with ``gate_bias`` and ``up_bias`` [F] and
    ``down_bias`` [D] where the family has biases; families without gates have no ``gate``. Stacks of them have a
    leading axis of experts.

    Args:
        module: the experts module, with weights.
        working_nbytes: bytes that work on several of them together may take; what the device is good for when None.
    """

    def __init__(self, module: Any, working_nbytes: int | None = None) -> None:
        self.module = module
        self._working = working_nbytes
        self.gated = hasattr(module, "gate_up_proj")
        self.transposed = bool(getattr(module, "is_transposed", False))
        self.concatenated = bool(getattr(module, "is_concatenated", True))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.module.down_proj.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.module.down_proj.device

    @property
    def working_nbytes(self) -> int:
        """Bytes that work on several of them together may take."""
        return self._working or working_nbytes(self.device)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The matrices that are applied to an expert's input."""
        return ("gate", "up") if self.gated else ("up",)

    @property
    def first(self) -> str:
        """The family's parameter with these."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def shape(self) -> ExpertShape:
        """What each of them is made of."""
        width, intermediate = (self.module.down_proj.shape[axis] for axis in ((2, 1) if self.transposed else (1, 2)))
        biased = getattr(self.module, "down_proj_bias", None) is not None
        return ExpertShape(width=width, intermediate=intermediate, gated=self.gated, biased=biased)

    def rows(self, experts: Sequence[int] | slice) -> dict[str, torch.Tensor]:
        """Return the rows of the family's parameters that belong to some experts, by name."""
        matrices = (self.first, "down_proj")
        names = [name for matrix in matrices for name in (matrix, f"{matrix}_bias")]
        return {name: rows[experts] for name in names if (rows := getattr(self.module, name, None)) is not None}

    def matrices(self, experts: Sequence[int] | slice = slice(None), *, detach: bool = True) -> dict[str, torch.Tensor]:
        """Return the stacked matrices of some experts, views where the layout allows.

        Args:
            experts: which.
            detach: leave gradients out.
        """
        found = {}
        for name, rows in self.rows(experts).items():
            turned = self.transposed and not name.endswith("_bias")
            found[name] = rows.transpose(1, 2) if turned else rows
        split = self._split(found)
        return {name: stack.detach() for name, stack in split.items()} if detach else split

    def expert(self, expert: int) -> dict[str, torch.Tensor]:
        """Return the matrices of one expert."""
        return {name: stack[0] for name, stack in self.matrices(slice(expert, expert + 1)).items()}

    def packed(self, matrices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return stacked matrices as the family's parameters: the inverse of `matrices`."""
        found = {}
        for name, part in ((self.first, "up"), ("down_proj", "down")):
            for suffix in ("", "_bias"):
                if part + suffix not in matrices:
                    continue
                both = [matrices[f"gate{suffix}"], matrices[f"up{suffix}"]] if self.gated and part == "up" else None
                weight = matrices[part + suffix] if both is None else self._join(both, axis=1)
                turned = self.transposed and not suffix
                found[name + suffix] = weight.transpose(1, 2).contiguous() if turned else weight.contiguous()
        return found

    @torch.no_grad()
    def hidden(self, matrices: Mapping[str, torch.Tensor], x_TD: torch.Tensor) -> torch.Tensor:
        """Return what an expert's down projection is applied to, [T, F].

        Args:
            matrices: the expert's.
            x_TD: tokens.
        """
        x_TD = x_TD.to(matrices["up"])
        return self.activated([F.linear(x_TD, matrices[part], matrices.get(f"{part}_bias")) for part in self.inputs])

    def activated(self, projected: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the down projection is applied to, [T, F], from what `inputs` gave, each [T, F]."""
        if not self.gated:
            return self.activated_together(projected[0])
        if projected[0].stride(0) == 1:  # in columns, which are not to be turned
            return self.activated_together(self._join([part.T for part in projected], axis=0).T)
        return self.activated_together(self._join(projected, axis=1))

    def activated_together(self, projected: torch.Tensor) -> torch.Tensor:
        """Return the same from what the family's first parameter gave, gates and all."""
        return self.module._apply_gate(projected) if self.gated else self.module.act_fn(projected)

    @torch.no_grad()
    def outputs(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the raw output of one expert for each token, [T, D] in the weights' dtype."""
        matrices = self.expert(expert)
        return F.linear(self.hidden(matrices, x_TD), matrices["down"], matrices.get("down_bias"))

    def _split(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        split = {}
        for name, weight in found.items():
            part, suffix = ("down" if name.startswith("down") else "up"), ("_bias" if name.endswith("_bias") else "")
            if part == "up" and self.gated:
                halves = weight.chunk(2, dim=1) if self.concatenated else (weight[:, ::2], weight[:, 1::2])
                split[f"gate{suffix}"], split[f"up{suffix}"] = halves
            else:
                split[part + suffix] = weight
        return split

    def _join(self, both: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return (
            torch.cat(list(both), axis)
            if self.concatenated
            else torch.stack(list(both), axis + 1).flatten(axis, axis + 1)
        )
