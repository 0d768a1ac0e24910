"""How a tensor may lie in a checkpoint and in a module: one file for each way, registered by being imported here."""

from moetailor.checkpoint.storage import awq as awq
from moetailor.checkpoint.storage import compressed as compressed
from moetailor.checkpoint.storage import fp8 as fp8
from moetailor.checkpoint.storage import gptq as gptq
from moetailor.checkpoint.storage import mxfp4 as mxfp4
from moetailor.checkpoint.storage import plain as plain
from moetailor.checkpoint.storage.codebooks import WEIGHTS, Codebook
from moetailor.checkpoint.storage.few_bits import Codes, FewBits
from moetailor.checkpoint.storage.float4_mx import MxFloat4
from moetailor.checkpoint.storage.float4_nv import NvFloat4
from moetailor.checkpoint.storage.float8 import Float8
from moetailor.checkpoint.storage.float8_blocks import BlockFloat8
from moetailor.checkpoint.storage.integers import BITS, Integers
from moetailor.checkpoint.storage.quantized import READERS, Quantized, ways_of
from moetailor.checkpoint.storage.storage import STORAGES, Storage, TensorSpec, find_storage

__all__ = [
    "BITS",
    "READERS",
    "STORAGES",
    "WEIGHTS",
    "BlockFloat8",
    "Codebook",
    "Codes",
    "FewBits",
    "Float8",
    "Integers",
    "MxFloat4",
    "NvFloat4",
    "Quantized",
    "Storage",
    "TensorSpec",
    "find_storage",
    "ways_of",
]
