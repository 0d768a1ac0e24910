"""A checkpoint opened once, and handed to every stage: what it is, where its experts lie, and how it is loaded.

All that can be refused is refused in the order of what it costs to see: config.json, before weights are downloaded;
headers; then the model without weights, whose every parameter must be on disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moetailor.checkpoint import config as config_json
from moetailor.checkpoint.anatomy import Anatomy, build_skeleton, discover
from moetailor.checkpoint.coded import Coded, with_codes
from moetailor.checkpoint.facts import ModelFacts, facts_of_checkpoint
from moetailor.checkpoint.family import UNQUANTIZED
from moetailor.checkpoint.files import CODES, DTYPES, LazyTensor, open_checkpoint
from moetailor.checkpoint.folder import CONFIG
from moetailor.checkpoint.layout import DiskStack, find_stacks
from moetailor.checkpoint.loader import StreamedModel
from moetailor.checkpoint.lock import scratch
from moetailor.checkpoint.models import load_model, load_numbers, load_tokenizer
from moetailor.checkpoint.mone import ENTRY, Rows, as_ours, has_constants
from moetailor.checkpoint.width import one_width
from moetailor.errors import CheckpointError

Takes = Literal["originals", "results", "anything"]


# Bytes that rows of matrices must be multiples of in grouped products.
ROW = 16


class Original:
    """A checkpoint opened once.

    Args:
        source: folder or hub name.
        takes: what it may be: an original alone; a result of moetailor too, whose plain config, skeleton and anatomy
            are those of the original that it was made from; or anything, if it is only loaded.
        trust_remote_code: run code that comes with the checkpoint.
        headers: a folder of which the weights' headers are enough, see `find_folder`.

    Attributes:
        checkpoint: its files.
        headers_only: whether weights are holes in files, since only the headers were downloaded.
        trust_remote_code: as given; whatever builds the model or the tokenizer gets it from here.

    Raises:
        CheckpointError: it cannot be read, or is none that is handled.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        takes: Takes = "originals",
        trust_remote_code: bool = False,
        headers: Path | None = None,
    ) -> None:
        self.trust_remote_code = trust_remote_code
        self._takes, self._remote = takes, not Path(source).is_dir()
        self.checkpoint = as_ours(with_codes(open_checkpoint(source, check=self._check, headers=headers)))
        self.headers_only = headers is not None and self.folder == headers
        config_json.check_counts(self.folder, self.checkpoint.config, self.checkpoint.tensors.values())

    def _check(self, folder: Path, config: dict) -> None:
        """Refuse what the config tells; while the weights are still on the hub, all that it tells."""
        if has_constants(config) and self._takes == "originals":
            raise CheckpointError(
                f"{folder / CONFIG}: {ENTRY}: experts are replaced already; give the original instead"
            )
        if self._takes == "anything" or (self._takes == "results" and config_json.written_here(config)):
            return
        config_json.check_config(folder, config)
        if self._remote:
            config_json.check_counts(folder, config)
            described = config_json.load_config(folder, config, trust_remote_code=self.trust_remote_code)
            described = config_json.original_config(described)
            discover(described, self._built(folder, config, described))

    @property
    def source(self) -> str:
        """The checkpoint as the user named it."""
        return self.checkpoint.source

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.checkpoint.folder

    @property
    def written_here(self) -> bool:
        """Whether moetailor wrote it."""
        return config_json.written_here(self.checkpoint.config)

    @property
    def substituted(self) -> bool:
        """Whether constants lie as vLLM's MoNE layout has them; what is read is what moetailor's format would say."""
        return any(isinstance(coded, Rows) for coded in self.checkpoint.coded.values())

    @cached_property
    def config(self) -> Any:
        """Its transformers config."""
        trusted = self.trust_remote_code
        return config_json.load_config(self.folder, self.checkpoint.config, trust_remote_code=trusted)

    @cached_property
    def plain_config(self) -> Any:
        """Its config without how it was compressed or quantized."""
        return config_json.original_config(self.config)

    @cached_property
    def _empty(self) -> Any:
        """The model on the meta device, in float32."""
        return self._built(self.folder, self.checkpoint.config, self.plain_config)

    def _built(self, folder: Path, config: dict, described: Any) -> Any:
        return config_json.empty_model(folder, config, described, trust_remote_code=self.trust_remote_code)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The MoE layers in memory."""
        return discover(self.plain_config, self._empty)

    @cached_property
    def _unchecked(self) -> StreamedModel:
        return StreamedModel(self.checkpoint, self._empty, dtype=torch.float32)

    @cached_property
    def stacks(self) -> dict[str, DiskStack]:
        """The MoE layers on disk, by prefix."""
        return find_stacks(self.checkpoint, self.anatomy, self._unchecked.names)

    @cached_property
    def skeleton(self) -> StreamedModel:
        """The model without weights, in float32 on the CPU, of which parts can be loaded."""
        if not self.written_here:
            self._check_numbers()
            _ = self.stacks  # says more of experts that are not there
            self._unchecked.check()
        return self._unchecked

    def _check_numbers(self) -> None:
        """Refuse tensors that do not hold the numbers of a parameter: transformers would load codes as weights."""
        names, parameters = self._unchecked.names, self._unchecked.model.state_dict()
        for info in self.checkpoint.numbers.values():
            if isinstance(info, Coded):
                continue
            if info.dtype in CODES:
                told = f"{info.name!r} is {info.dtype}, {CODES[info.dtype]}"
                raise CheckpointError(f"{self.source}: weights are quantized ({told}): {UNQUANTIZED}")
            parameter = parameters.get(names.get(info.name, ""))
            if parameter is not None and parameter.is_floating_point() != DTYPES[info.dtype].is_floating_point:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name!r} is {info.dtype}, which {names[info.name]} of the model is not; "
                    f"quantized weights are {UNQUANTIZED}; if it is the original, download it again"
                )

    @cached_property
    def facts(self) -> ModelFacts:
        """What planning must know of it."""
        _ = self.skeleton  # whose every parameter must be there
        why = one_width(self.plain_config, self._empty, self.anatomy)
        return facts_of_checkpoint(self.checkpoint, self.anatomy, self.stacks, one_width=why)

    def streamed(
        self,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        prepare: Callable[[nn.Module], None] | None = None,
        complete: Callable[[nn.Module], None] | None = None,
    ) -> StreamedModel:
        """Return the model with a part in memory at a time.

        Args:
            dtype: dtype to load floating-point weights in.
            device: where to load them.
            prepare: called once with the empty model, to change its shapes.
            complete: called with each part that was loaded.
        """
        with self._wide_corrections():
            model = build_skeleton(self.plain_config, dtype, of=type(self._empty))
        self._avoid_grouped_products(model)
        return StreamedModel(self.checkpoint, model, dtype=dtype, device=device, prepare=prepare, complete=complete)

    def load(self, *, dtype: torch.dtype, device: str, device_map: str | None = None) -> nn.Module:
        """Return the model in memory, for inference.

        Args:
            dtype: dtype to run in.
            device: where to put it when there is no device map.
            device_map: as transformers takes it, such as ``auto``.

        Raises:
            CheckpointError: transformers cannot load it, or tensors are missing from it.
        """
        with self._wide_corrections():
            model = self._loaded(dtype, device, device_map)
        self._avoid_grouped_products(model)
        return model

    def _loaded(self, dtype: torch.dtype, device: str, device_map: str | None) -> nn.Module:
        if self.checkpoint.coded and (self.substituted or not self.written_here):
            sources = {name: LazyTensor(info) for name, info in self.checkpoint.numbers.items()}
            kind, place, config = type(self._empty), device_map or device, self.plain_config
            if self.substituted:
                config = copy.copy(config)
                config.quantization_config = self.checkpoint.config["quantization_config"]
            return load_numbers(self.source, kind, config, sources, dtype=dtype, device_map=place)
        trusted = self.trust_remote_code
        return load_model(self.folder, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trusted)

    @cached_property
    def _without_experts(self) -> bool:
        """Whether no experts are found in it: then it is loaded as it is."""
        try:
            return self._empty is None or not self.anatomy.layers
        except CheckpointError:
            return True

    def _avoid_grouped_products(self, model: nn.Module) -> None:
        """Have transformers run experts one after the other where a row of their matrices is no whole 16 bytes: its
        grouped products stop there. Our own runtime sees to that itself.
        """
        if self.written_here or self.substituted or self._without_experts:
            return
        names = {f"{layer.experts}.{name}" for layer in self.anatomy.layers.values() for name in layer.expert_rows}
        rows = [row for name, row in model.named_parameters() if name in names and row.dim() > 2]
        if any(size * row.element_size() % ROW for row in rows for size in row.shape[1:]):
            model.set_experts_implementation("eager")  # type: ignore[operator]

    def tokenizer(self) -> Any:
        """Return the tokenizer that lies beside the weights.

        Raises:
            CheckpointError: there is none that transformers can load.
        """
        return load_tokenizer(self.folder, trust_remote_code=self.trust_remote_code)

    @contextmanager
    def _wide_corrections(self) -> Iterator[None]:
        """Have transformers keep correction biases in float32 whatever the dtype, as it does in most families.

        They are few, they decide which experts run, and engines read them as they lie on disk.
        """
        if self._without_experts:
            yield
            return
        kind, layers = type(self._empty), self.anatomy.layers.values()
        names = {layer.correction.rpartition(".")[2] for layer in layers if layer.correction}
        before = kind._keep_in_fp32_modules_strict
        kind._keep_in_fp32_modules_strict = {*(before or ()), *names}
        try:
            yield
        finally:
            kind._keep_in_fp32_modules_strict = before


@contextmanager
def looked_at(source: str | Path, *, takes: Takes = "originals", trust_remote_code: bool = False) -> Iterator[Original]:
    """Give a checkpoint of which config.json and headers are enough: of one on the hub no more is asked for.

    Args:
        source: folder or hub name.
        takes: what it may be, see `Original`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        CheckpointError: see `Original`.
    """
    with nullcontext() if Path(source).is_dir() else scratch() as headers:
        yield Original(source, takes=takes, trust_remote_code=trust_remote_code, headers=headers)


def open_original(source: str | Path | Original, *, trust_remote_code: bool = False) -> Original:
    """Return an original that is open already as it is, and open any other."""
    return source if isinstance(source, Original) else Original(source, trust_remote_code=trust_remote_code)
