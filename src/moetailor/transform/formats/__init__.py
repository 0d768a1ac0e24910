"""The forms in which a result is written: one file for each, registered here."""

from moetailor.transform.formats.compressed_tensors import CompressedTensors
from moetailor.transform.formats.expanded import Expanded
from moetailor.transform.formats.format import FORMATS, Finish, Format, find_format, register_format, resolve_format
from moetailor.transform.formats.gguf import Gguf
from moetailor.transform.formats.moetailor import Moetailor
from moetailor.transform.formats.narrow import Narrower
from moetailor.transform.formats.native import Native
from moetailor.transform.formats.vllm_mone import VllmMone

# In the order in which `auto` tries them.
for form in (Native, Narrower, Moetailor, CompressedTensors, Gguf, Expanded, VllmMone):
    register_format(form())

__all__ = [
    "FORMATS",
    "CompressedTensors",
    "Expanded",
    "Finish",
    "Format",
    "Gguf",
    "Moetailor",
    "Narrower",
    "Native",
    "VllmMone",
    "find_format",
    "resolve_format",
]
