"""The plug-in that lets ``AutoModelForCausalLM.from_pretrained`` load the moetailor format, for any family.

transformers selects it by ``quantization_config.quant_method`` in config.json. It reshapes the empty model before the
weights come, so weight conversion, device maps, PEFT and saving stay transformers' own.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moetailor.answers import SlotMap
from moetailor.answers.slot_map import CURE
from moetailor.checkpoint.anatomy import Anatomy, discover
from moetailor.checkpoint.coded import described_ways, ways_in
from moetailor.checkpoint.config import IMPLEMENTATION, original_config, unmarked
from moetailor.checkpoint.family import QUANT_METHOD
from moetailor.checkpoint.storage import Quantized
from moetailor.errors import CheckpointError
from moetailor.runtime.decode import Decode
from moetailor.runtime.experts import CompressedExperts
from moetailor.runtime.reshape import LayerChange, reshape_model
from moetailor.schema import read

# The second version holds what stays of a quantized original as codes; all else is of the first.
FORMAT_VERSION = 2


class MoetailorConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry: the slot map of each changed layer.

    Args:
        layers: decoder layer -> slot map, see `SlotMap.to_json`.
        version: version of the format.
        source: the `quantization_config` of a quantized original, whose codes stay.
    """

    source: dict | None = None

    def __init__(
        self, layers: dict[str, dict] | None = None, version: int = 1, source: dict | None = None, **kwargs: Any
    ) -> None:
        if type(version) is not int or version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint is of moetailor format {version}, this moetailor reads up to {FORMAT_VERSION}; "
                "update it"
            )
        self.quant_method: Any = QUANT_METHOD
        self.version = version
        self.layers = layers or {}
        if source:
            self.source = source

    @classmethod
    def of(cls, maps: dict[int, SlotMap], source: dict | None = None) -> MoetailorConfig:
        """Return the entry for some slot maps."""
        layers = {str(layer): slot_map.to_json() for layer, slot_map in maps.items()}
        return cls(layers=layers, version=2 if source else 1, source=source)

    def slot_maps(self) -> dict[int, SlotMap]:
        """Return the slot maps by decoder layer."""
        where = "config.json, quantization_config, layers"
        layers = read(dict[int, Any], self.layers, where, error=CheckpointError, cure=CURE)
        return {layer: SlotMap.from_json(entry, f"{where}, {layer}") for layer, entry in layers.items()}


class MoetailorQuantizer(HfQuantizer):
    """Loads and saves models whose experts moetailor compressed."""

    requires_calibration = True
    quantization_config: MoetailorConfig  # type: ignore[assignment]

    def update_attn_implementation(self, config: Any) -> Any:
        """Let the model be built: this is called with its config before that."""
        return super().update_attn_implementation(unmarked(config))

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        reshape_loaded(model, self.quantization_config.slot_maps())
        # However it is told to run here: saved again, it must not be run without moetailor.
        setattr(model.config, IMPLEMENTATION, QUANT_METHOD)
        if self.quantization_config.source:
            # Each parameter that may lie as codes, with the parts that transformers must gather for it.
            self.serialized_names = described_ways(self.ways)
        return model

    @cached_property
    def ways(self) -> list[Quantized]:
        """The ways in which weights of a quantized original may lie; none of any other."""
        return ways_in({"quantization_config": vars(self.quantization_config)})

    def get_load_operations(self) -> dict:
        """Return what turns the codes of a quantized original into numbers."""
        return {"deserialize": Decode, "dequantize": Decode} if self.quantization_config.source else {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        fill_maps(model)
        if self.quantization_config.source:
            # What was loaded are numbers, and so is what is saved of it, by the family's own rules.
            del self.quantization_config.source
            self.quantization_config.version = 1
            model._weight_conversions = None
        return model

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Leave experts whole in each process: what stands beside the pool would be summed once for each of them."""
        named = (path for path, module in model.named_modules() if isinstance(module, CompressedExperts))
        experts = {re.sub(r"\.\d+(?=\.)", ".*", path) for path in named}  # plans name all layers at once
        for key in [key for key in plan if any(f"{key}.".startswith(f"{path}.") for path in experts)]:
            del plan[key]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Say that `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that PEFT and Trainer may train it."""
        return True


register_quantization_config(QUANT_METHOD)(MoetailorConfig)
register_quantizer(QUANT_METHOD)(MoetailorQuantizer)


def reshape_loaded(model: Any, maps: dict[int, SlotMap]) -> None:
    """Give an empty model of the original's shapes those of a compressed checkpoint."""
    if not maps:
        return
    anatomy = discover(original_config(model.config), model)
    _check_maps(maps, anatomy)
    changes = {
        layer: LayerChange(experts=range(len(slot_map.plain_pool)), slots=range(len(slot_map.rows)), slot_map=slot_map)
        for layer, slot_map in maps.items()
    }
    reshape_model(model, anatomy, changes)


def _check_maps(maps: dict[int, SlotMap], anatomy: Anatomy) -> None:
    """Refuse slot maps that are not of this model."""
    where = "config.json, quantization_config"
    if unknown := sorted(set(maps) - set(anatomy.layers)):
        raise CheckpointError(f"{where}: names layers {unknown}, which are no MoE layers of this model; {CURE}")
    for index, slots in maps.items():
        most, mine = anatomy.layers[index].num_experts, anatomy.layers[index].expert_shape
        if max(slots.experts, len(slots.rows)) > most:
            raise CheckpointError(
                f"{where}, layer {index}: {len(slots.rows)} slots and {slots.experts} experts, the original has "
                f"{most}; {CURE}"
            )
        for lender in slots.lenders:
            if lender not in anatomy.layers or anatomy.layers[lender].expert_shape != mine:
                raise CheckpointError(f"{where}, layer {index}: layer {lender} cannot lend it experts; {CURE}")


def fill_maps(module: nn.Module) -> None:
    """Fill the slot maps of a model or a part of it, which transformers left empty because no file holds them."""
    for part in module.modules():
        if isinstance(part, CompressedExperts):
            part.fill_map()
