"""What of a quantized original stays as codes in a result, turned into numbers while transformers loads it.

transformers gathers the parts of a weight by the names that its quantizer declares, and stacks experts after this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps

from moetailor.checkpoint.files import DTYPE_NAMES
from moetailor.checkpoint.storage import Quantized
from moetailor.errors import CheckpointError

Gathered = dict[str, Any]


class Decode(ConversionOps):
    """Turn the parts of weights into their numbers; what lies plain passes.

    Args:
        hf_quantizer: the quantizer of the model, which knows in which ways weights may lie.
    """

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict: Gathered, full_layer_name: str = "", model: Any = None, **kwargs: Any) -> Gathered:
        """Return numbers, each weight's by the pattern of its first part: later operations know the patterns of parts.

        Args:
            input_dict: the parts that were gathered for one parameter, by their patterns, one each or one an expert.
            full_layer_name: the parameter.
            model: the model.
            **kwargs: what other operations need.
        """
        ways, dtype = self.hf_quantizer.ways, model.get_parameter_or_buffer(full_layer_name).dtype
        weights: dict[tuple[str, str], dict[str, list[torch.Tensor]]] = defaultdict(dict)
        for pattern, gathered in input_dict.items():
            for parameter, parts in self.hf_quantizer.serialized_names.items():
                for part in (part for part in parts if f".{pattern}".endswith(f".{part}")):
                    listed = gathered if isinstance(gathered, list) else [gathered]
                    weights[pattern.removesuffix(part), parameter][part] = listed
        made = {}
        for (stem, parameter), parts in weights.items():
            every = [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
            # The quantizer's own rules have patterns without a path.
            name = stem + next(iter(parts)) if stem else full_layer_name
            made[name] = [numbers_of(ways, parameter, each).to(dtype) for each in every]
        return made

    @property
    def reverse_op(self) -> ConversionOps:
        """Numbers are saved as they are."""
        return _Same()


class _Same(ConversionOps):
    def convert(self, input_dict: Gathered, **kwargs: Any) -> Gathered:
        """Return what is given."""
        return input_dict


@dataclass(frozen=True)
class _Held:
    """A part in memory, as one on disk is seen."""

    name: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return DTYPE_NAMES[self.tensor.dtype]

    def read(self) -> torch.Tensor:
        """Return the tensor."""
        return self.tensor


def numbers_of(ways: Sequence[Quantized], parameter: str, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the numbers of one weight.

    Args:
        ways: in which it may lie.
        parameter: what it is called in its module.
        given: the parts that it has.

    Raises:
        CheckpointError: it lies in none of them.
    """
    for way in ways:
        names = {part: way.named(parameter, part) for part in way.names}
        parts: Any = {part: _Held(name, given[name]) for part, name in names.items() if name in given}
        if way.missing(parts) or len(parts[way.code].shape) != way.code_axes:
            continue
        if way.misfit(shape := way.shape(parts), parts) is None:
            read = {part: held.tensor for part, held in parts.items()}
            return way.decode(read, shape, way.numbers_dtype(parts))
    if list(given) == [parameter] and given[parameter].dtype.itemsize > 1:
        return given[parameter]
    raise CheckpointError(f"weights lie as {', '.join(given)}, in none of the ways that config.json tells of")
