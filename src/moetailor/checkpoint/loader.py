"""One part of a model in memory at a time, loaded by transformers' own conversion rules.

The only file that leans on internal modules of transformers; the rules say which tensors on disk become which
parameter (experts that lie one by one are stacked, names change), so no family needs a rule of ours.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from moetailor.checkpoint.anatomy import build_skeleton, tensors_of
from moetailor.checkpoint.files import DTYPES, Checkpoint, LazyTensor
from moetailor.errors import CheckpointError

# Older releases ask for a tensor-parallel plan; there is none.
_NO_PLAN = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}


def load_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a checkpoint.

    Raises:
        CheckpointError: transformers does not know the model type, or its code would have to be run.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "its code would have to be run; pass --trust-remote-code if you trust it"
        raise CheckpointError(f"{checkpoint.source}: transformers cannot read the config: {reason}") from None


def memory_names(checkpoint: Checkpoint, skeleton: Any) -> dict[str, str]:
    """Map each tensor on disk to the parameter or buffer it becomes, leaving out what the model does not load."""
    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = skeleton.state_dict()
    names = {}
    for key in checkpoint.tensors:
        name = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, state)[0]
        if name in state or key in state:
            names[key] = name if name in state else key
    return names


def disk_tensors(skeleton: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors in memory as they lie on disk: experts may lie one by one there, under other names.

    Args:
        skeleton: the model, which knows the rules of its family.
        tensors: name in memory -> tensor.
    """
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(skeleton, tensors).items()}


class StreamedModel:
    """A model on the meta device whose parts are loaded when they are needed and dropped after.

    Args:
        checkpoint: where the weights are.
        config: its transformers config.
        dtype: dtype to load floating-point weights in.
        device: where to load them.
        prepare: called once with the empty model, to change its shapes.
        complete: called with each part that was loaded.

    Attributes:
        model: the whole model; only the parts inside `loaded` have weights.
        names: disk name of each tensor the model loads -> its name in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        prepare: Callable[[nn.Module], None] | None = None,
        complete: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.model: Any = build_skeleton(config, dtype).eval()
        _keep_wide(self.model, dtype)
        self._complete = complete
        if prepare is not None:
            prepare(self.model)
        self.names = memory_names(checkpoint, self.model)

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[nn.Module]:
        """Give the model with the modules at `paths` loaded; they go back to the meta device at the end.

        Raises:
            CheckpointError: a tensor of these modules is not in the checkpoint, or has another shape.
        """
        try:
            for path in paths:
                self._load(path)
            yield self.model
        finally:
            for path in paths:
                self.model.get_submodule(path).to("meta")

    def _load(self, path: str) -> None:
        by_target: dict[str, list[str]] = defaultdict(list)
        for key, name in self.names.items():
            if name == path or name.startswith(path + "."):
                by_target[name].append(key)
        # Stacking experts holds three copies of a parameter for a moment: one such parameter at a time, largest first.
        stacked = [keys for keys in by_target.values() if len(keys) > 1]
        for keys in sorted(stacked, key=lambda keys: -sum(self.checkpoint.tensors[key].nbytes for key in keys)):
            self._load_tensors(keys)
        self._load_tensors([keys[0] for keys in by_target.values() if len(keys) == 1])
        self._initialise_buffers(self.model.get_submodule(path))
        left = [name for name, tensor in self.model.get_submodule(path).state_dict().items() if tensor.is_meta]
        if left:
            raise CheckpointError(f"{self.checkpoint.source}: the checkpoint has no tensor for {path}.{left[0]}")

    def _load_tensors(self, keys: list[str]) -> None:
        sources = {key: LazyTensor(self.checkpoint.tensors[key]) for key in keys}
        # The rules keep state: a fresh list for each call.
        rules: Any = get_model_conversion_mapping(self.model)
        # The rules only move numbers: they do so in the narrower dtype, and what came of it is widened.
        wanted = {name: tensors_of(self.model)[name].dtype for name in {self.names[key] for key in keys}}
        narrow = {
            re.escape(self.names[key]): min(
                wanted[self.names[key]],
                DTYPES[self.checkpoint.tensors[key].dtype],
                key=lambda dtype: dtype.itemsize,
            )
            for key in keys
        }
        settings = LoadStateDictConfig(
            dtype=self.dtype, dtype_plan=narrow, weight_mapping=rules, device_map={"": self.device}
        )
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, sources, settings, **_NO_PLAN)
        # Set by the call for this part alone; `disk_tensors` needs the rules of the whole model.
        self.model._weight_conversions = None
        for name, dtype in wanted.items():
            tensor = tensors_of(self.model)[name]
            tensor.data = tensor.data.to(dtype)
        for name, stored, expected in info.mismatched_keys:
            raise CheckpointError(
                f"{self.checkpoint.source}: {name} has shape {list(stored)}, the config says {list(expected)}"
            )
        for name, text in info.conversion_errors.items():
            raise CheckpointError(f"{self.checkpoint.source}: cannot build {name}: {text.strip().splitlines()[-1]}")

    def _initialise_buffers(self, module: nn.Module) -> None:
        """Compute the buffers that are in no checkpoint (rotary frequencies), as from_pretrained does."""
        for part in module.modules():
            buffers = {name: part._buffers.get(name) for name in part._non_persistent_buffers_set}
            unsaved = {name: buffer for name, buffer in buffers.items() if buffer is not None}
            for name, buffer in unsaved.items():
                setattr(part, name, torch.empty_like(buffer, device=self.device))
            if unsaved:
                self.model._init_weights(part)
        if self._complete is not None:
            self._complete(module)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing progress bars and load reports of its own."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Widen what transformers loads in float32 whatever the dtype, such as correction biases of some families."""
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype.itemsize < 4 else set()
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    patterns = [re.compile(glob.replace("*", ".*")) for glob in kept]
    for name, tensor in tensors_of(model).items():
        if any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.float()
