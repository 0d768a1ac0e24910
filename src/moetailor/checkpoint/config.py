"""config.json: what of it is refused before anything is built of it, and the model without weights that it describes.

Somebody wrote the file by hand, or a tool that nobody knows: whatever transformers raises over it is said in one line,
with the entry to blame.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moetailor.checkpoint import family
from moetailor.checkpoint.anatomy import build_skeleton
from moetailor.checkpoint.artifact import write_json
from moetailor.checkpoint.coded import ways_in
from moetailor.checkpoint.files import TensorInfo
from moetailor.checkpoint.folder import CONFIG
from moetailor.checkpoint.lock import scratch
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.checkpoint.storage import READERS
from moetailor.errors import CheckpointError, reason_of

# What names the implementation of experts: transformers stops at one that it does not know, where it would but warn of
# an unknown quantization and of missing tensors, and go on with experts of random numbers.
IMPLEMENTATION = "experts_implementation"
# Files beside the weights that say that they are quantized, where config.json does not.
QUANTIZED_FILES = "*quant*config*.json"
COUNT = re.compile(r"(?:^|_)(?:num|n)_(?:\w+_)?(layer|expert)s?$")
# As many layers or experts are built in no time, and told from what is there by name.
FEW = 256
# More layers and experts no model has.
MANY = {"layer": 1_000, "expert": 10_000}


def written_here(config: dict) -> bool:
    """Say whether moetailor wrote the checkpoint of a config.json."""
    entry = config.get("quantization_config")
    return isinstance(entry, dict) and entry.get("quant_method") == family.QUANT_METHOD


def unmarked(config: Any) -> Any:
    """Return a transformers config whose experts transformers may build, though config.json says that only moetailor
    runs them; saved, it says so again.
    """
    if getattr(config, f"_{IMPLEMENTATION}", None) == family.QUANT_METHOD:
        setattr(config, f"_{IMPLEMENTATION}", None)
        setattr(config, IMPLEMENTATION, family.QUANT_METHOD)
    return config


def original_config(config: Any) -> Any:
    """Return a transformers config without how moetailor compressed the experts, or how weights lie that are read as
    numbers; any other is returned as it is.
    """
    entry = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    if method not in (family.QUANT_METHOD, *READERS):
        return config
    config = copy.copy(config)
    config.quantization_config = None
    vars(config).pop(IMPLEMENTATION, None)
    return config


def check_config(folder: Path, config: dict) -> None:
    """Refuse what config.json and the files beside it tell without being understood.

    Args:
        folder: folder of the checkpoint.
        config: its config.json.

    Raises:
        CheckpointError: see the message.
    """
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{folder / CONFIG}: model_type = {config['model_type']!r}: not a name")
    try:
        family.check_family(config)
        ways = ways_in(config)
        handled = {"quantization_config"} if ways and not written_here(config) else set()
        family.check_unquantized({name: value for name, value in config.items() if name not in handled})
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    if not ways and (beside := sorted(file.name for file in folder.glob(QUANTIZED_FILES))):
        raise CheckpointError(f"{folder}: weights are quantized, says {beside[0]}: {family.UNQUANTIZED}")
    counts = {name: config[name] for name in family.expert_count_spellings(config)}
    if len(set(map(repr, counts.values()))) > 1:
        told = ", ".join(f"{name} = {value!r}" for name, value in counts.items())
        raise CheckpointError(f"{folder / CONFIG}: {told}; which of them is the number of experts?")


def check_counts(folder: Path, config: dict, tensors: Iterable[TensorInfo] | None = None) -> None:
    """Refuse counts beyond what there is room for, before anything is built that large.

    Args:
        folder: folder of the checkpoint.
        config: its config.json.
        tensors: its tensors, whose names and shapes say how much room there is; None before they are there.

    Raises:
        CheckpointError: see the message.
    """
    room, told = MANY, "no model has so many"
    if tensors is not None:
        tensors = list(tensors)
        numbered = 1 + max((int(n) for info in tensors for n in info.name.split(".") if n.isdecimal()), default=0)
        largest = max((size for info in tensors for size in info.shape), default=0)
        room = {"layer": max(FEW, numbered), "expert": max(FEW, numbered, largest)}
        told = f"its weights are numbered up to {numbered - 1:,} and have up to {largest:,} rows"
    for name, value in config.items():
        if (match := COUNT.search(name)) and isinstance(value, int) and value > room[match[1]]:
            raise CheckpointError(f"{folder / CONFIG}: {name} = {value:,}; {told}")


def load_config(folder: Path, config: dict, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a checkpoint.

    Args:
        folder: its folder.
        config: its config.json.
        trust_remote_code: run code that comes with it.

    Raises:
        CheckpointError: transformers does not know the model type, its code would have to be run, or a value is none
            that transformers takes.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return unmarked(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except Exception as error:  # whatever is raised, it is about what somebody wrote there
        reason = "transformers cannot read it: " + reason_of(error)
        if "trust_remote_code" in str(error):
            reason = "code beside it would have to be run; pass --trust-remote-code if you trust it"
        elif not any(repr(name) in reason for name in config):
            reason = _blamed(config) + reason
        raise CheckpointError(f"{folder / CONFIG}: {reason}") from error


def empty_model(folder: Path, config: dict, described: Any, *, trust_remote_code: bool = False) -> Any:
    """Build the model of a checkpoint without weights, in float32.

    Args:
        folder: its folder.
        config: its config.json.
        described: its transformers config.
        trust_remote_code: run code that comes with it.

    Raises:
        CheckpointError: there is no such model, or a value makes it impossible.
    """
    try:
        with quiet_transformers():
            return build_skeleton(described, torch.float32, trust_remote_code=trust_remote_code)
    except CheckpointError:
        raise
    except Exception as error:  # whatever is raised, it is about what somebody wrote there
        reason = f"{_blamed(config)}transformers cannot build the model: {reason_of(error)}"
        raise CheckpointError(f"{folder / CONFIG}: {reason}") from error


def _blamed(config: dict) -> str:
    """Return the entry without which transformers could build a model of a config.json, as the start of a message."""
    from transformers import AutoConfig

    with scratch() as place, quiet_transformers():
        # Without any entry first: some errors do not come a second time, and then none is to blame.
        for name in (None, *config):
            others = {key: value for key, value in config.items() if key != name}
            write_json(place / CONFIG, others)
            try:
                build_skeleton(AutoConfig.from_pretrained(place))
            except Exception:  # not this one, or not alone
                continue
            return "" if name is None else f"{name} = {textwrap.shorten(repr(config[name]), 80)}: "
    return ""
