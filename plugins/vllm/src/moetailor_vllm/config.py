"""The `quantization_config` of the format as vLLM reads it: which layers are compressed, and what must arrive."""

from __future__ import annotations

from typing import Any
from weakref import ref

import regex as re
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from moetailor_vllm.slots import KINDS, Slots
from moetailor_vllm.stored import Plain

METHOD = "moetailor"
VERSION = 1


class AfterArrival:
    """Has a model's weights looked at before any of them is put into another order.

    Args:
        config: of the model.
    """

    def __init__(self, config: MoetailorConfig) -> None:
        super().__init__()
        self.config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """See `MoetailorConfig.check`."""
        self.config.check()
        super().process_weights_after_loading(layer)  # type: ignore[misc]


class ArrivingLinear(AfterArrival, UnquantizedLinearMethod):
    """A linear layer as vLLM runs it."""


class ArrivingEmbedding(AfterArrival, UnquantizedEmbeddingMethod):
    """An embedding or a head as vLLM runs it."""


class AllArrived(QuantizeMethodBase):
    """No method of a layer's `Arrivals`, but what vLLM asks once all weights were read."""

    requires_device_loading = False

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refuse: nothing calls it."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
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
        self._expected: list[tuple[ref[nn.Module], str]] = []

    def expect(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Have a parameter of the model begin as NaN, which is seen where no file fills it. Experts and what stands in
        for them are counted.

        vLLM checks that every weight was loaded for models without a quantization method only.

        Args:
            module: whose it is.
            name: its name there.
            parameter: the parameter.
        """
        counted = isinstance(module, RoutedExperts | Plain)
        if counted or parameter is None or not parameter.is_floating_point():
            return
        parameter.data.fill_(torch.nan)
        self._expected.append((ref(module), name))

    def check(self) -> None:
        """Look once at all that is expected.

        Raises:
            ValueError: some is not there.
        """
        expected, self._expected, missing = self._expected, [], []
        for module, name in ((module(), name) for module, name in expected):
            parameter = module._parameters.get(name) if module is not None else None
            if parameter is not None and parameter.isnan().any():
                missing.append(f"{getattr(module, 'prefix', '') or type(module).__name__}.{name}")
        if missing:
            raise ValueError(
                f"moetailor-vllm: no file has all of {', '.join(missing[:8])} ({len(missing)} missing), or vLLM's "
                "model does not tie it to what has it"
            )

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
            return ArrivingLinear(self)
        return ArrivingEmbedding(self) if isinstance(layer, VocabParallelEmbedding) else None


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
    """Return that of the model that is being built; None where none is."""
    current = get_current_vllm_config_or_none()
    return None if current is None else current.quant_config


def _registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if isinstance(config := current_config(), MoetailorConfig):
        config.expect(module, name, parameter)


register_module_parameter_registration_hook(_registered)
