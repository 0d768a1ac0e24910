"""GGUF: a native result as llama.cpp's own tools convert and round it; without them, all that they need."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.artifact import write_bytes
from moetailor.checkpoint.folder import INDEX
from moetailor.checkpoint.lock import scratch
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.place import new_folder
from moetailor.errors import MoetailorError, MoetailorWarning, PlanError
from moetailor.planning.plan import Plan
from moetailor.transform.formats.format import Finish
from moetailor.transform.formats.native import Native, other_than_drops
from moetailor.transform.gguf_recipe import MATRIX_FILE, TYPES_FILE, find_library, several_widths, write_gguf_recipe

MODEL_FILE, WHOLE_FILE = "model.gguf", "whole.gguf"
# What everything but the experts becomes: it is few bytes of a model, and rounding it further costs more than it saves.
REST = "Q8_0"
# Lines of a tool that failed.
SHOWN = 12


class Gguf(Native):
    """What llama.cpp loads: native experts, in the types that come nearest to the plan's bits."""

    name = "gguf"
    automatic = False
    library = "gguf"
    loading = "Loads in llama.cpp and what is built on it, once it is converted."

    def refusal(self, plan: Plan) -> str | None:
        """Refuse what native cannot hold but for bits, and several widths in a layer."""
        if told := other_than_drops(plan):
            return told
        if told := several_widths(plan):
            return f"has one type for all experts of a layer, {told}; plan one width for each layer"
        return None

    def check(self, plan: Plan, original: Original) -> None:
        """Say what llama.cpp may not load."""
        if getattr(original.config, "tie_word_embeddings", False):
            warnings.warn(
                "format gguf: the head is tied to the embedding; llama.cpp loads that in some families, and in others "
                "wants lm_head.weight stored",
                MoetailorWarning,
                stacklevel=3,
            )

    def carried(self, plan: Plan) -> Plan:
        """Return the plan with experts as they lie, for llama.cpp to round."""
        return replace(plan, layers={name: replace(layer, widths={}) for name, layer in plan.layers.items()})

    def check_tools(self, finish: Finish) -> None:
        """Ask for the library that writes importance matrices, and refuse tools that are not there or alone."""
        find_library()
        if finish.quantizer and not finish.converter:
            raise PlanError("--quantizer: rounds what --converter has converted; give that too")
        for option, tool in (("--converter", finish.converter), ("--quantizer", finish.quantizer)):
            if tool is not None:
                check_tool(option, tool)

    def room(self, plan: Plan, finish: Finish) -> int:
        """Return the bytes of the checkpoint, and of it converted and rounded."""
        passes = 1 + bool(finish.converter) + bool(finish.quantizer)
        return max(super().room(plan, finish), plan.nbytes * passes)

    def finish(self, folder: Path, finish: Finish) -> int | None:
        """Add the importance matrix and the types; put the GGUF file in the checkpoint's place where there are tools.

        Raises:
            MoetailorError: a tool failed.
        """
        before = {file for file in folder.iterdir() if file.is_file()}
        write_gguf_recipe(finish.plan, finish.original, folder, finish.calibration)
        if finish.converter is None:
            return None
        rounds = finish.quantizer is not None
        convert = _convert(finish.converter, folder, folder / (WHOLE_FILE if rounds else MODEL_FILE))
        _run("--converter", [*convert, "--model-name", Path(finish.original.source).name])
        if finish.quantizer is not None:
            _run("--quantizer", _quantize(finish.quantizer, folder, folder / WHOLE_FILE, folder / MODEL_FILE))
            (folder / WHOLE_FILE).unlink()
        for file in before:
            if file.suffix == ".safetensors" or file.name in ("config.json", INDEX):
                file.unlink()
        return (folder / MODEL_FILE).stat().st_size


def recipe_format(format: str, calibration: Calibration | None) -> str:
    """Return the form of a result that goes with a recipe in a folder of its own.

    Raises:
        PlanError: another one is asked for, or there is no calibration.
    """
    if format not in ("auto", "native", Gguf.name):
        raise PlanError(f"--gguf-recipe: llama.cpp loads native results; leave --format {format} out")
    if calibration is None:
        raise PlanError("--gguf-recipe: what the experts get is measured on the calibration's sample; --calibration")
    return Gguf.name


def put_recipe(folder: Path, recipe: Path, *, overwrite: bool) -> None:
    """Put importance matrix and types of a result into a folder of their own, too.

    Raises:
        MoetailorError: the folder exists.
    """
    with new_folder(recipe, overwrite=overwrite, nbytes=0) as place:
        for name in (MATRIX_FILE, TYPES_FILE):
            write_bytes(place / name, (folder / name).read_bytes())


def commands(out: Path) -> list[str]:
    """Return what turns a result of this format into GGUF files of the plan's bits: nothing where that was done."""
    steps = []
    if not (out / MODEL_FILE).exists():
        steps = [
            _convert(Path("convert_hf_to_gguf.py"), out, Path(WHOLE_FILE)),
            _quantize(Path("llama-quantize"), out, Path(WHOLE_FILE), Path(MODEL_FILE)),
        ]
        steps[0][0] = "python"
    return [shlex.join(step) for step in steps]


def check_tool(option: str, tool: Path) -> None:
    """Refuse a tool of llama.cpp that cannot be run: a script is run by Python, whatever its rights.

    Raises:
        PlanError: it is not there, or no program.
    """
    if not tool.is_file():
        raise PlanError(f"{option} {tool}: there is no such file")
    if option == "--quantizer" and not os.access(tool, os.X_OK):
        raise PlanError(f"{option} {tool}: is no program that may be run; chmod +x {tool}")


def named(program: Path) -> str:
    """Return what runs a program that a user named: what is named as ./llama-quantize would else be looked for among
    the programs of the machine.
    """
    return str(program.absolute() if program.is_file() else program)


def check_converter(converter: Path, original: Original) -> None:
    """Let a converter write the vocabulary of an original: it knows neither every family nor every tokenizer.

    Raises:
        MoetailorError: it cannot.
    """
    with scratch() as place:
        _run("--converter", [*_convert(converter, original.folder, place / MODEL_FILE), "--vocab-only"])


def _convert(converter: Path, folder: Path, file: Path) -> list[str]:
    return [sys.executable, str(converter), str(folder), "--outfile", str(file), "--outtype", "auto"]


def _quantize(quantizer: Path, folder: Path, whole: Path, file: Path) -> list[str]:
    matrix = ["--imatrix", str(folder / MATRIX_FILE)] if (folder / MATRIX_FILE).exists() else []
    types = ["--tensor-type-file", str(folder / TYPES_FILE)]
    return [named(quantizer), *matrix, *types, str(whole), str(file), REST]


def _run(option: str, command: Sequence[str]) -> None:
    """Run a tool of llama.cpp.

    Raises:
        MoetailorError: it cannot be run, or failed; with its last lines.
    """
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise MoetailorError(f"{option}: {command[0]} cannot be run: {error.strerror}") from None
    if ran.returncode:
        last = "\n".join(ran.stdout.decode(errors="replace").splitlines()[-SHOWN:])
        raise MoetailorError(f"{option}: ended with status {ran.returncode}, nothing was kept; its last lines:\n{last}")
