"""Sharding a model over several processes (FSDP): each holds a part of every tensor, a layer is whole while it runs.

The student is sharded by accelerate; the teacher, which no optimizer knows, here.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import fully_shard

from moetailor.errors import MoetailorError
from moetailor.runtime.experts import CompressedExperts


def shard(model: Any) -> None:
    """Shard a frozen model over the processes, one decoder layer after the other, in place.

    Args:
        model: the model, the same in every process; nothing happens when it is None.
    """
    if model is None:
        return
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module)
    fully_shard(model)


def check_shardable(model: Any) -> None:
    """Refuse a model whose layers reach into others: these are not whole while it runs.

    Raises:
        MoetailorError: see the message.
    """
    if any(isinstance(module, CompressedExperts) and module.lenders for module in model.modules()):
        raise MoetailorError(
            "--fsdp: layers of this model use experts of other layers, which are not whole while these run; "
            "train it without --fsdp"
        )
