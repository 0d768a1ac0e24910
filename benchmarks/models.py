"""What well-known models take and become in some memory, by the tool's own code: the table of the README.

No weights are there. A model is built without numbers from its published sizes (models.json), under the names that its
files have; the headers of such files are written, with holes in place of the numbers; and `fit` is asked what it would
say of a model on the hub. Parameters are counted and held against what was published. vLLM's plug-in counts where it is
installed. Layers for multi-token prediction are left out, as transformers leaves them out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from moetailor.checkpoint.anatomy import build_skeleton
from moetailor.checkpoint.files import DTYPE_NAMES, tensor_nbytes
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.estimates.estimate import Estimate, Host, duration
from moetailor.fit import Job, Outlook, foretold, look
from moetailor.planning.budget import parse_bytes
from moetailor.serving import find_engine
from moetailor.words import nbytes

MODELS = Path(__file__).with_name("models.json")
# Published counts are rounded, and leave out or count in what others do not.
CLOSE = 0.01
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
ENTRIES: dict[str, dict[str, Any]] = {"fp8": FP8, "mxfp4": {"quant_method": "mxfp4"}}
# Matrices that DeepSeek-V3 has in FP8.
ROUNDED = re.compile(r"layers\.\d+\.(?!.*\bgate\.weight).*_(proj|proj_with_mqa)\.weight$")
Lies = tuple[str, tuple[int, ...]]


def write_headers(model: Mapping[str, Any], folder: Path) -> Path:
    """Write config.json and a weight file of which only the header is there, and return their folder.

    Args:
        model: an entry of models.json.
        folder: where.
    """
    config = AutoConfig.for_model(**model["config"])
    with quiet_transformers():
        skeleton = build_skeleton(config, torch.bfloat16)
        tensors = revert_weight_conversion(skeleton, skeleton.state_dict())
    header, end = {}, 0
    for name, tensor in tensors.items():
        for stored, (dtype, shape) in lying(name, tensor, model.get("codes")):
            begin, end = end, end + tensor_nbytes(dtype, shape)
            header[stored] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)
    entry = ENTRIES.get(model.get("codes", ""))
    written = config.to_dict() | {"dtype": "bfloat16", "architectures": [type(skeleton).__name__]}
    (folder / "config.json").write_text(json.dumps(written | ({"quantization_config": entry} if entry else {})))
    return folder


def lying(name: str, tensor: torch.Tensor, codes: str | None) -> Iterator[tuple[str, Lies]]:
    """Yield what lies on disk of a weight: name, dtype and shape of each part.

    Args:
        name: under which its numbers would lie.
        tensor: the weight, without numbers.
        codes: ``fp8`` or ``mxfp4``, where the published file has these.
    """
    shape = tuple(tensor.shape)
    if codes == "fp8" and ROUNDED.search(name):
        yield name, ("F8_E4M3", shape)
        yield f"{name}_scale_inv", ("F32", tuple(math.ceil(size / 128) for size in shape))
    elif codes == "mxfp4" and name.endswith("_proj") and len(shape) == 3:
        experts, inputs, outputs = shape
        yield f"{name}_blocks", ("U8", (experts, outputs, inputs // 32, 16))
        yield f"{name}_scales", ("U8", (experts, outputs, inputs // 32))
    else:
        yield name, ("F32" if name.endswith("correction_bias") else DTYPE_NAMES[tensor.dtype], shape)


def told(found: Outlook) -> str:
    """Return what a model becomes in some memory, in a cell of a table."""
    if found.fits_as_it_is:
        return "as it is"
    best = found.offers[0]
    if not best.fits:
        others = [offer.why for offer in found.offers if not offer.nbytes]
        return f"no: {others[0] if others else f'{nbytes(min(offer.nbytes for offer in found.offers))} at least'}"
    return f"{best.choice.name}: {nbytes(best.nbytes)}, {best.grade}"


def takes(original: Original, found: Outlook) -> Estimate | None:
    """Return what `fit` takes to make the best choice; None where there is nothing to make."""
    if found.fits_as_it_is or not found.offers[0].fits:
        return None
    job = Job(choice=found.chosen(), room=found.room, device="cpu")
    # As of a process that has just started: what this one did for other models is no part of it.
    host = replace(Host.measured(time.perf_counter(), original, device="cpu"), startup=10.0)
    return foretold(host, original, job)


def main() -> None:
    """Ask, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="12GB,24GB,80GB", help="what the engine may take (default %(default)s)")
    parser.add_argument("--engine", default="vllm", help="which engine (default %(default)s)")
    parser.add_argument("--context", type=int, help="tokens of one sequence (default: as `fit` has it)")
    parser.add_argument("--only", default="", help="names of models that have this in them")
    given = parser.parse_args()
    budgets = given.memory.split(",")
    print(f"| model | family | parameters | as it is | {' | '.join(budgets)} | makes | memory | disk | time |")
    print("|---" * (8 + len(budgets)) + "|")
    far = []
    for model in json.loads(MODELS.read_text()):
        if given.only not in model["name"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            original = Original(write_headers(model, Path(folder)))
            count = original.checkpoint.parameters
            off = count / model["parameters"] - 1
            far += [f"{model['name']}: {count:,} are counted, {model['parameters']:,.0f} published"] * (
                abs(off) > CLOSE
            )
            cells, made = [], None
            for memory in budgets:
                size = parse_bytes(memory, "--memory")
                found = look(original, memory=size, engine=find_engine(given.engine), context=given.context)
                estimate = takes(original, found)
                cells.append(told(found))
                made = made or (estimate and (memory, estimate))
            counted = f"{count / 1e9:.2f} billion ({off:+.1%})"
            row = [model["name"], original.anatomy.model_type, counted, nbytes(original.checkpoint.nbytes), *cells]
            print("| " + " | ".join([*row, *cost(made)]) + " |", flush=True)
    print("\n" + ("\n".join(far) if far else f"Every count is within {CLOSE:.0%} of what was published."))


def cost(made: tuple[str, Estimate] | None) -> list[str]:
    """Return the cells of what making it takes: for which budget, memory, disk, time."""
    if made is None:
        return ["-"] * 4
    memory, estimate = made
    disk = nbytes(estimate.reads) + " read, " + nbytes(estimate.writes + estimate.meanwhile) + " written"
    return [
        memory,
        nbytes(estimate.memory),
        disk,
        "not foretold" if estimate.seconds is None else duration(estimate.seconds),
    ]


if __name__ == "__main__":
    main()
