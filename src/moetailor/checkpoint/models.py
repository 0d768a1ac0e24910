"""Models in memory: from a checkpoint as transformers loads it, on the device and in the dtype the user means."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetailor.checkpoint.files import DTYPES, Checkpoint, LazyTensor
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import CheckpointError, MoetailorError, did_you_mean, out_of_memory, reason_of

DTYPE_CHOICES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str | None, device: str, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype to run in: the one named, else the checkpoint's on an accelerator and float32 on the CPU.

    Raises:
        MoetailorError: the name is not a dtype that models run in.
    """
    if name is not None:
        if name not in DTYPE_CHOICES:
            raise MoetailorError(f"unknown dtype {name!r}" + did_you_mean(name, DTYPE_CHOICES))
        return DTYPE_CHOICES[name]
    return torch.float32 if torch.device(device).type == "cpu" else stored_dtype(checkpoint)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype, of those to run in, that most of a checkpoint's tensors have; bfloat16 where none has one."""
    # Codes count as the numbers that they stand for, and those that are not known are no dtype to run in.
    stored = [DTYPES.get(info.dtype) for info in checkpoint.numbers.values()]
    return (
        max(DTYPE_CHOICES.values(), key=stored.count) if set(stored) & set(DTYPE_CHOICES.values()) else torch.bfloat16
    )


def load_model(
    folder: Path, *, dtype: torch.dtype, device: str, device_map: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Load a causal language model for inference.

    Args:
        folder: checkpoint folder, original or compressed.
        dtype: dtype to run in.
        device: where to put it when there is no device map.
        device_map: as transformers takes it, such as ``auto``.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        CheckpointError: transformers cannot load it, or tensors are missing from it.
    """
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "device_map": device_map or device, "trust_remote_code": trust_remote_code}
    return _loaded(str(folder), AutoModelForCausalLM, folder, **options)


def load_numbers(
    source: str,
    kind: Any,
    config: Any,
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: torch.dtype,
    device_map: str,
) -> nn.Module:
    """Load a model whose weights lie as codes from their numbers, on any device: transformers' own way would need GPUs
    or packages, or give other numbers on other devices.

    Args:
        source: what messages call the checkpoint.
        kind: class of the model.
        config: its transformers config, without quantization.
        tensors: its tensors, by their names on disk; they are read when they are needed.
        dtype: dtype to run in.
        device_map: where to put it.

    Raises:
        CheckpointError: transformers cannot load it, or tensors are missing from it.
    """
    return _loaded(source, kind, None, config=config, state_dict=dict(tensors), dtype=dtype, device_map=device_map)


def _loaded(source: str, kind: Any, folder: Path | None, **options: Any) -> nn.Module:
    with quiet_transformers():
        try:
            model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
        except Exception as error:
            if isinstance(error, MoetailorError) or out_of_memory(error):
                raise
            # Whatever else is raised, it is about what somebody wrote there.
            raise CheckpointError(f"{source}: transformers cannot load it: {reason_of(error)}") from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(f"{source}: {len(names)} tensors are missing, first {names[0]}")
    return model.eval()


def copy_sharing_tensors(model: nn.Module) -> Any:
    """Return a copy of a model's structure that holds the very same tensors.

    What puts new tensors in place of those that it changes, and writes into none, leaves the original as it is.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies beside the weights.

    Raises:
        CheckpointError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever is raised, it is about what somebody wrote there
        raise CheckpointError(f"{folder}: transformers cannot load its tokenizer: {reason_of(error)}") from error
    try:
        tokenizer("text", verbose=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot read text: {reason_of(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # What transformers makes when there is no file.
        raise CheckpointError(f"{folder}: holds no tokenizer; put the files of the original's beside the weights")
    return tokenizer


def longest_sequence(config: Any) -> int | None:
    """Return the most positions a model takes, when its config says."""
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None
