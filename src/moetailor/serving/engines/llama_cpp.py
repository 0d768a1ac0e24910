"""llama.cpp: GGUF files, with one type for the experts of a layer, which its own tools write and round."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.original import Original
from moetailor.errors import MoetailorError
from moetailor.serving.choices import Choice
from moetailor.serving.engine import Engine, Room, Served, group_of, register_engine
from moetailor.transform.formats.gguf import MODEL_FILE, check_converter, check_tool
from moetailor.transform.gguf_recipe import BLOCK, MATRIX_FILE, SUPERBLOCK, find_library

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
# Bits of a weight in Q8_0, and of what the converter leaves in float32: vectors, and the router.
ROUNDED, WHOLE = Fraction(17, 2), 32
GETTING = """\
git clone --depth 1 https://github.com/ggml-org/llama.cpp
cmake -S llama.cpp -B llama.cpp/build -DCMAKE_BUILD_TYPE=Release
cmake --build llama.cpp/build --target llama-quantize llama-server
then this command again, with \
--converter llama.cpp/convert_hf_to_gguf.py --quantizer llama.cpp/build/bin/llama-quantize"""


class LlamaCpp(Engine):
    """Its compute buffers take a tenth; the cache is in 16 bits, as it is by default."""

    name = "llama.cpp"
    overhead = Fraction(1, 10)
    program = "llama-server"
    obtained = "get llama.cpp (its releases hold it, packages of many systems do, or build the target llama-server)"
    loads_originals = False

    def choices(self, facts: ModelFacts) -> Sequence[Choice]:
        """Return bits by layer, 4 bits, and fewer experts in 4 bits; fewer experts where rows are no whole blocks.

        In groups of 32 our codes take as many bytes as any type of as many bits, so what is written is no larger than
        what was planned.
        """
        gguf: dict[str, Any] = {"format": "gguf", "loads": "llama.cpp"}
        few: dict[str, Any] = {"method": "refit", **gguf}
        if group_of(facts) is None:
            return (Choice(name="fewer experts", rule="fewer experts", **few),)
        bits: dict[str, Any] = {"codes": "uint", "group": BLOCK}
        by_layer = {"uniform_layers": True, "widths": "8,6,5,4,3,2" if _superblocks(facts) else "8,6,5,4", **bits}
        return (
            Choice(name="bits by layer", method="auto", parameters=by_layer, rule="GGUF", **gguf),
            Choice(name="4 bits for all", method="quantize", parameters={"bits": 4, **bits}, rule="GGUF", **gguf),
            Choice(name="fewer, in 4 bits", bits=f"uint4g{BLOCK}", rule="fewer in GGUF", **few),
        )

    def refusal(self, written: str) -> str | None:
        """Refuse whatever is no GGUF file."""
        return (
            "llama.cpp loads GGUF files, and there is none; moetailor fit --engine llama.cpp writes one, and so does "
            "moetailor apply --format gguf with --converter and --quantizer"
        )

    def check(self, folder: Path) -> None:
        """Refuse what holds no GGUF file."""
        self._file(folder)

    def tools(self, original: Original, converter: Path | None, quantizer: Path | None) -> dict[str, Path]:
        """Return llama.cpp's own: those that were named, else those that are found, once the former was tried."""
        find_library()
        named = {"converter": (converter, CONVERTER), "quantizer": (quantizer, QUANTIZER)}
        found = {option: path or shutil.which(name) for option, (path, name) in named.items()}
        if missing := [name for option, (_, name) in named.items() if found[option] is None]:
            raise MoetailorError(
                f"GGUF is written with llama.cpp's own tools, and {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not found here; name them with --converter and --quantizer, "
                f"or get them:\n{GETTING}"
            )
        tools = {option: Path(path) for option, path in found.items() if path}
        for option, path in tools.items():
            check_tool(f"--{option}", path)
        if not original.headers_only:
            check_converter(tools["converter"], original)
        return tools

    def command(self, served: Served) -> list[str]:
        """Return the command of its server, on the GGUF file that a folder holds, or that is named."""
        limit = [] if served.context is None else ["--ctx-size", str(served.context)]
        command = [served.program(self.program), "--model", str(self._file(served.folder))]
        return [*command, "--host", served.host, "--port", str(served.port), *limit]

    def room(self, original: Original, memory: int, context: int) -> Room:
        """Return where the memory goes; what is no expert is rounded to 8 bits, whatever the plan is."""
        stacks, saved = original.stacks.values(), Fraction(0)
        experts = {name for stack in stacks for name in (*stack.experts, *stack.fused)}
        routers = {name for stack in stacks for name in stack.slots}
        for name, info in original.checkpoint.numbers.items():
            if name not in experts:
                rounds = len(info.shape) == 2 and info.shape[1] % BLOCK == 0 and name not in routers
                lies = sum(part.nbytes for part in info.stored)
                saved += lies - prod(info.shape) * (ROUNDED if rounds else WHOLE) / 8
        return replace(super().room(original, memory, context), saved=int(saved))

    def _file(self, folder: Path) -> Path:
        """Return the GGUF file that is meant, the first of its parts where there are several.

        Raises:
            MoetailorError: there is none, or there are several.
        """
        if folder.suffix == ".gguf" and folder.is_file():
            return folder
        if (folder / MODEL_FILE).is_file():
            return folder / MODEL_FILE
        found = sorted(file for file in folder.glob("*.gguf") if file.name != MATRIX_FILE)
        first = [file for file in found if not re.search(r"-(?!0*1-of)\d+-of-\d+\.gguf$", file.name)]
        if not first:
            raise MoetailorError(f"{folder}: {self.refusal('')}")
        if len(first) > 1:
            raise MoetailorError(
                f"{folder}: holds {', '.join(file.name for file in first)}; name the one that is meant"
            )
        return first[0]


def _superblocks(facts: ModelFacts) -> bool:
    """Say whether all rows of experts are whole superblocks, for which there are types of 3 and 2 bits."""
    shapes = [stack.shape for stack in facts.stacks if stack.shape is not None]
    return not any(inputs % SUPERBLOCK for shape in shapes for _, inputs in shape.matrices.values())


register_engine(LlamaCpp())
