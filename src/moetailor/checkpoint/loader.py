"""One part of a model in memory at a time, loaded by transformers' own conversion rules, see names.py."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moetailor.checkpoint.anatomy import tensors_of
from moetailor.checkpoint.coded import Coded
from moetailor.checkpoint.files import DTYPES, Checkpoint, LazyTensor, TensorInfo
from moetailor.checkpoint.names import placed
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import CheckpointError

_LAYER = re.compile(r"\blayers\.(\d+)\.")
# Older releases ask for a tensor-parallel plan; there is none.
_NO_PLAN = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}


class StreamedModel:
    """A model on the meta device whose parts are loaded when they are needed and dropped after.

    Args:
        checkpoint: where the weights are.
        model: the model without weights, from `build_skeleton`.
        dtype: dtype to load floating-point weights in.
        device: where to load them.
        prepare: called once with the empty model, to change its shapes.
        complete: called with each part that was loaded.

    Attributes:
        model: the whole model; only the parts inside `loaded` have weights.
        names: disk name of each tensor the model loads -> its name in memory.
        tied: name in memory of each tensor that is not on disk -> name of the one whose numbers it shares.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Any,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        prepare: Callable[[nn.Module], None] | None = None,
        complete: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.model: Any = model.eval()
        _keep_wide(self.model, dtype)
        self._complete = complete
        if prepare is not None:
            prepare(self.model)
        self.names, self._rules = placed(checkpoint, self.model)
        self.model._weight_conversions = self._rules
        self.tied = _untie(self.model, set(self.names.values()))
        self._optional = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]

    def check(self) -> None:
        """Refuse a checkpoint that lacks a parameter of the model, or has one of another shape: read off the headers.

        transformers' own loading is tried, on tensors without numbers. Layers that have the same tensors load alike, so
        one of each make is tried.

        Raises:
            CheckpointError: see above.
        """
        tensors = {key: self.checkpoint.numbers[key] for key in self.names}
        makes: dict[int | None, set[tuple]] = defaultdict(set)
        for place in (tensors, self.model.state_dict()):
            for name, tensor in place.items():
                makes[_layer_of(name)].add((place is tensors, _LAYER.sub("layers.*.", name), tuple(tensor.shape)))
        numbers = sorted((layer for layer in makes if layer is not None), reverse=True)
        tried = {None, *{frozenset(makes[layer]): layer for layer in numbers}.values()}
        sources = {key: _Numberless(info) for key, info in tensors.items() if _layer_of(key) in tried}
        missing = self._convert(sources, device="meta").missing_keys - self.tied.keys()
        lost = sorted(name for name in missing if _layer_of(name) in tried and not self._may_lack(name))
        if lost:
            unknown = sorted(self.checkpoint.numbers.keys() - self.names.keys())
            told = f"; it has {unknown[0]}, which the model does not load" if unknown else ""
            more = ", among others" if lost[1:] else ""
            raise CheckpointError(f"{self.checkpoint.source}: the checkpoint has no tensor for {lost[0]}{more}{told}")

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[nn.Module]:
        """Give the model with the modules at `paths` loaded; they go back to the meta device at the end.

        Raises:
            CheckpointError: a tensor of these modules is not in the checkpoint, or has another shape.
        """
        try:
            for path in paths:
                self.load(path)
            yield self.model
        finally:
            for path in paths:
                self.model.get_submodule(path).to("meta")

    def read_ahead(self, path: str) -> None:
        """Let the system read the module at a path from the disk, which is to be loaded next."""
        for keys in self._keys_of(path).values():
            for key in keys:
                for info in self.checkpoint.numbers[key].stored:
                    info.read_ahead()

    def load(self, path: str) -> None:
        """Load the module at a path, which stays in memory.

        Raises:
            CheckpointError: see `loaded`.
        """
        by_target = self._keys_of(path)
        # Stacking experts holds three copies of a parameter for a moment: one such parameter at a time, largest first.
        stacked = [keys for keys in by_target.values() if len(keys) > 1]
        for keys in sorted(stacked, key=lambda keys: -sum(self.checkpoint.numbers[key].nbytes for key in keys)):
            self._load_tensors(keys)
        self._load_tensors([keys[0] for keys in by_target.values() if len(keys) == 1])
        self._initialise_rest(path)
        for name, other in self.tied.items():
            if name.startswith(path + "."):
                self._load_tied(name, other)
        if self._complete is not None:
            self._complete(self.model.get_submodule(path))
        left = [name for name, tensor in self.model.get_submodule(path).state_dict().items() if tensor.is_meta]
        if left:
            raise CheckpointError(f"{self.checkpoint.source}: the checkpoint has no tensor for {path}.{left[0]}")

    def some(self, path: str, sources: Mapping[str, LazyTensor], count: int) -> dict[str, torch.Tensor]:
        """Return the parameters of a module of experts with the rows of some of these alone; nothing stays loaded.

        Args:
            path: the experts module.
            sources: what is read, by its name on disk.
            count: how many experts that is.

        Raises:
            CheckpointError: see `loaded`.
        """
        module, by_target = self.model.get_submodule(path), defaultdict(list)
        whole = dict(module.named_parameters(recurse=False))
        for key in sources:
            by_target[self.names[key]].append(key)
        try:
            for name, parameter in whole.items():
                _set_parameter(module, name, parameter.new_empty(count, *parameter.shape[1:]))
            for keys in by_target.values():
                self._load_tensors(keys, sources)
            return {name: module.get_parameter(name).detach() for name in whole}
        finally:
            for name, parameter in whole.items():
                setattr(module, name, parameter)

    def _keys_of(self, path: str) -> dict[str, list[str]]:
        """Return the names on disk of the tensors of the module at a path, by their names in memory."""
        by_target: dict[str, list[str]] = defaultdict(list)
        for key, name in self.names.items():
            if name == path or name.startswith(path + "."):
                by_target[name].append(key)
        return by_target

    def _load_tied(self, name: str, other: str) -> None:
        """Give a tensor the numbers of another one, which is loaded for it where it is not loaded already."""
        absent = self.model.get_parameter(other).is_meta
        if absent:
            self._load_tensors([key for key, target in self.names.items() if target == other])
        _set_parameter(self.model, name, self.model.get_parameter(other).detach())
        if absent:
            self.model.get_submodule(other.rpartition(".")[0]).to("meta")

    def _load_tensors(self, keys: list[str], sources: Mapping[str, LazyTensor] | None = None) -> None:
        # The rules only move numbers: they do so in the narrower dtype, and what came of it is widened.
        found = self.model.get_parameter_or_buffer
        stored: dict[str, set[torch.dtype]] = defaultdict(set)
        for key in keys:
            stored[self.names[key]].add(DTYPES[self.checkpoint.numbers[key].dtype])
        wanted = {name: found(name).dtype for name in stored}
        size = attrgetter("itemsize")
        narrow = {re.escape(name): min(wanted[name], max(each, key=size), key=size) for name, each in stored.items()}
        given = {key: sources[key] if sources else LazyTensor(self.checkpoint.numbers[key]) for key in keys}
        self._convert(given, narrow, device=self.device)
        for name, dtype in wanted.items():
            found(name).data = found(name).data.to(dtype)

    def _convert(
        self, sources: Mapping[str, object], dtypes: dict[str, torch.dtype] | None = None, *, device: str | torch.device
    ) -> Any:
        """Put tensors in their places by transformers' rules and return what it reports.

        Raises:
            CheckpointError: a tensor has another shape than the model, or others than its fellows.
        """
        # The rules keep state: a fresh list for each call.
        rules: Any = get_model_conversion_mapping(self.model)
        settings = LoadStateDictConfig(
            dtype=self.dtype, dtype_plan=dtypes or {}, weight_mapping=rules, device_map={"": torch.device(device)}
        )
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(sources), settings, **_NO_PLAN)
        # Set by the call for this part alone; `disk_tensors` needs the rules of the whole checkpoint.
        self.model._weight_conversions = self._rules
        for name, stored, expected in sorted(info.mismatched_keys):
            raise CheckpointError(
                f"{self.checkpoint.source}: {name} has shape {list(stored)}, the config says {list(expected)}"
            )
        for name, text in info.conversion_errors.items():
            raise CheckpointError(f"{self.checkpoint.source}: cannot build {name}: {text.strip().splitlines()[-1]}")
        return info

    def _may_lack(self, name: str) -> bool:
        """Say whether from_pretrained computes a tensor that is not on disk, and takes that for granted."""
        return any(pattern.search(name) for pattern in self._optional) and name not in self.names.values()

    def _initialise_rest(self, path: str) -> None:
        """Compute what is in no checkpoint (rotary frequencies) or may be left out of one, as from_pretrained does."""
        for prefix, part in self.model.get_submodule(path).named_modules(prefix=path):
            own = part._parameters | part._buffers
            fresh = {
                name: tensor
                for name, tensor in own.items()
                if tensor is not None
                and (name in part._non_persistent_buffers_set or self._may_lack(f"{prefix}.{name}"))
            }
            for name, tensor in fresh.items():
                empty = torch.empty_like(tensor, device=self.device)
                setattr(part, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
            if fresh:
                self.model._init_weights(part)


class _Numberless:
    """A tensor on disk as its shape alone, for transformers' loader."""

    def __init__(self, info: TensorInfo | Coded) -> None:
        self.info = info

    def __getitem__(self, key: object) -> torch.Tensor:
        return torch.empty(self.info.shape, dtype=DTYPES[self.info.dtype], device="meta")

    def get_shape(self) -> list[int]:
        """Return the stored shape."""
        return list(self.info.shape)

    def get_dtype(self) -> str:
        """Return the safetensors name of the stored dtype."""
        return self.info.dtype


def _layer_of(name: str) -> int | None:
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _untie(model: Any, loaded: set[str]) -> dict[str, str]:
    """Give tied parameters places of their own, and return where those that are not loaded get their numbers.

    As from_pretrained does, a pair is tied in whichever direction its one tensor on disk allows, and not at all where
    both are there.
    """
    found = {}
    for one, other in model.all_tied_weights_keys.items():
        _set_parameter(model, one, torch.empty_like(model.get_parameter(one)))
        for name, source in ((one, other), (other, one)):
            if name not in loaded and source in loaded:
                found[name] = source
    return found


def _set_parameter(model: Any, name: str, value: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(value, requires_grad=value.is_floating_point()))


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Widen what transformers loads in float32 whatever the dtype, such as correction biases of some families."""
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype.itemsize < 4 else set()
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    patterns = [re.compile(glob.replace("*", ".*")) for glob in kept]
    for name, tensor in tensors_of(model).items():
        if any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.float()
