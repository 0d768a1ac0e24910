"""The `quantization_config` of the format as vLLM reads it: which layers are compressed, and what must arrive."""

from __future__ import annotations

from typing import Any

import regex as re
import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from moetailor_vllm.slots import KINDS, Slots

METHOD = "moetailor"
VERSION = 1


class MustArrive:
    """Has a layer's weights begin as NaN, and refuses to go on with what no file filled.

    vLLM checks that every weight was loaded for models without a quantization method only.
    """

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Make room for the weights."""
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        for weight in layer.parameters(recurse=False):
            weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Look at the weights before anything else is done with them.

        Raises:
            ValueError: some are not there.
        """
        missing = [name for name, weight in layer.named_parameters(recurse=False) if weight.isnan().any()]
        if missing:
            raise ValueError(
                f"moetailor-vllm: {getattr(layer, 'prefix', '') or type(layer).__name__}: no file has all of "
                f"{', '.join(missing)}, or vLLM's model does not tie it to what has it"
            )
        super().process_weights_after_loading(layer)  # type: ignore[misc]


class ArrivingLinear(MustArrive, UnquantizedLinearMethod):
    """A linear layer as vLLM runs it."""


class ArrivingEmbedding(MustArrive, UnquantizedEmbeddingMethod):
    """An embedding or a head as vLLM runs it."""


class AllArrived(QuantizeMethodBase):
    """No method of a layer's `Answers`, but what vLLM asks once all weights were read."""

    requires_device_loading = False

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refuse: nothing calls it."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Refuse to go on when a tensor is missing.

        Raises:
            ValueError: some are.
        """
        layer.check()  # type: ignore[operator]


@register_quantization_config(METHOD)
class MoetailorConfig(QuantizationConfig):
    """Which layers are compressed, one object for each model. What is not routed experts runs as vLLM runs it.

    Args:
        layers: decoder layer -> slot map.
    """

    def __init__(self, layers: dict[int, Slots]) -> None:
        super().__init__()
        self.layers = layers

    def get_name(self) -> str:  # type: ignore[override]
        """Return the name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return all that vLLM has."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ask for nothing."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return nothing: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoetailorConfig:
        """Read the entry of config.json.

        Raises:
            NotImplementedError: it asks for what is not served.
            ValueError: it is damaged.
        """
        if config.get("source"):
            raise NotImplementedError(
                "moetailor-vllm does not serve what stays as codes of a quantized original; use transformers"
            )
        if config.get("version", 1) > VERSION:
            raise ValueError(f"moetailor format {config['version']}: this moetailor-vllm reads {VERSION}; update it")
        return cls({int(layer): Slots.read(entry, f"layer {layer}") for layer, entry in config["layers"].items()})

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """Return how names on disk become vLLM's: stand-ins lie in the module that has the routed experts.

        The name of this hook is about scales of caches, but it is asked for all tensors, whatever the family does.
        """
        names = re.compile(rf"\.experts\.((?:{'|'.join(KINDS)})(?:_\w+)?)$")
        mine = WeightsMapper(orig_to_new_regex={names: r".experts.routed_experts.\1"})
        return mine | QuantizationConfig.get_cache_scale_mapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return vLLM's own unquantized methods, the experts' with whatever kernel it chooses for them.

        Raises:
            NotImplementedError: vLLM has experts of its own for the family, which no slot map can be put before.
        """
        if isinstance(layer, RoutedExperts) and slots_of(self, prefix) and not hasattr(layer, "slotted"):
            raise NotImplementedError(
                f"moetailor-vllm: {prefix}: vLLM runs this family with {type(layer).__name__}, which is not served"
            )
        if isinstance(layer, LinearBase):
            return ArrivingLinear()
        return ArrivingEmbedding() if isinstance(layer, VocabParallelEmbedding) else None


def slots_of(config: QuantizationConfig | None, prefix: str) -> Slots | None:
    """Return the slot map of a layer; None where it stays as in the original.

    Args:
        config: of the model.
        prefix: path of a module, of which a decoder layer's number is a part.
    """
    if not isinstance(config, MoetailorConfig) or not any(part.isdecimal() for part in prefix.split(".")):
        return None
    return config.layers.get(extract_layer_index(prefix))


def current_config() -> QuantizationConfig | None:
    """Return that of the model that is being built."""
    return get_current_vllm_config().quant_config
