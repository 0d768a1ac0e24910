"""What lies beside the weights of a checkpoint and goes with them into a result."""

from __future__ import annotations

import shutil
import warnings
from collections import defaultdict
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from moetailor.checkpoint.folder import lies_inside
from moetailor.errors import MoetailorWarning

# What is copied, in lower case: what tokenizers and generation need, and terms of use. A list, since a folder may hold
# anything: other weights, logs, keys.
TOKENIZER = ("*.json", "*.txt", "*.model", "*.model.v*", "*.bpe", "*.codes", "*.spm", "*.tiktoken", "*.tokenizer")
TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
TERMS = ("licen[cs]e*", "copying*", "copyright*", "notice*", "*policy*.md", "*terms*.md")
COPIED = (*TOKENIZER, *TEMPLATES, *TERMS)
# Of these not: hidden files, indexes of other weights, adapters, whose weights stay behind, and what is no small file.
NOT_COPIED, LARGEST = (".*", "*.index.json", "*.index.*.json", "adapter_config.json"), 2**28
CODE = "code is copied with --trust-remote-code only; what loads with trust_remote_code needs it"


def copy_others(source: Path, folder: Path, *, left_out: Collection[str], trust_remote_code: bool = False) -> None:
    """Copy the files of a checkpoint that hold no weights; warns of those that one may miss.

    Args:
        source: folder of the checkpoint.
        folder: folder of the result.
        left_out: names of files that the result writes anew.
        trust_remote_code: copy code too.
    """
    left: dict[str, list[str]] = defaultdict(list)
    for file in sorted(path for pattern in ("*", "*/*") for path in source.glob(pattern)):
        name = file.relative_to(source).as_posix()
        is_code = fnmatch(name, "*.py")
        if name in left_out or not (is_code or _is_beside(name)) or file.is_dir():
            continue
        if not lies_inside(file, source):
            left["links that lead out of the folder are not followed"].append(name)
        elif not file.is_file():
            left["they are no ordinary files"].append(name)
        elif file.stat().st_size > LARGEST:
            left[f"files above {LARGEST >> 20} MiB are not copied"].append(name)
        elif is_code and not trust_remote_code:
            left[CODE].append(name)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
    for reason, names in left.items():
        warnings.warn(f"{source}: left out {', '.join(names)}: {reason}", MoetailorWarning, stacklevel=3)


def _is_beside(name: str) -> bool:
    """Say whether a file, by its path in a checkpoint, belongs to what is copied."""
    folder, _, own = name.lower().rpartition("/")
    patterns = [pattern.rpartition("/") for pattern in COPIED]
    wanted = any(folder == place and fnmatch(own, pattern) for place, _, pattern in patterns)
    return wanted and not any(fnmatch(own, pattern) for pattern in NOT_COPIED)
