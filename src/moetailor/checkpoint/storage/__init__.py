"""How a tensor may lie in a checkpoint and in a module: one file for each way, registered by being imported here."""

from moetailor.checkpoint.storage import plain as plain
from moetailor.checkpoint.storage.integers import Integers
from moetailor.checkpoint.storage.storage import STORAGES, Storage, TensorSpec, find_storage

__all__ = ["STORAGES", "Integers", "Storage", "TensorSpec", "find_storage"]
