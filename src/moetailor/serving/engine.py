"""What an engine declares: the memory that it leaves to weights, what it loads, and how it is started."""

from __future__ import annotations

import os
import shlex
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.original import Original
from moetailor.errors import MoetailorError, MoetailorWarning, did_you_mean
from moetailor.serving.choices import Choice
from moetailor.serving.needs import cache_nbytes
from moetailor.transform.formats.gguf import MODEL_FILE, named

ENGINES: dict[str, Engine] = {}
HOST, PORT = "127.0.0.1", 8000


@dataclass(frozen=True, kw_only=True)
class Room:
    """Where the memory of a served model goes.

    Attributes:
        memory: bytes in all.
        cache: bytes of the keys and values of one sequence.
        overhead: bytes that the engine takes for itself.
        context: tokens of the sequence.
        saved: bytes by which what is no expert is smaller where it is served than a plan counts it, see `planned`.
    """

    memory: int
    cache: int
    overhead: int
    context: int
    saved: int = 0

    @property
    def weights(self) -> int:
        """Bytes that are left for weights."""
        return self.memory - self.cache - self.overhead

    @property
    def planned(self) -> int:
        """Bytes that a plan may take to leave no more weights than that."""
        return self.weights + self.saved


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, and where.

    Attributes:
        folder: of the checkpoint.
        context: tokens of a sequence; what the engine takes when None.
        host: address to listen on.
        port: port to listen on.
        binary: the engine's program; the one that is found when None.
    """

    folder: Path
    context: int | None = None
    host: str = HOST
    port: int = PORT
    binary: Path | None = None

    def program(self, found: str) -> str:
        """Return what is run: the program that was named, where it lies, else the one that is found.

        Args:
            found: its name.
        """
        return found if self.binary is None else named(self.binary)


class Engine(ABC):
    """One engine that serves models.

    Attributes:
        name: as ``--engine`` names it.
        overhead: share of the memory that is kept free of weights and cache: buffers, activations, the engine itself.
        program: what is run; empty where it runs in the process of moetailor.
        obtained: where the program comes from.
        harness: what lm-evaluation-harness calls it; empty where it runs nothing with it.
        loads_originals: whether it loads a model as it was published.
    """

    name: str
    overhead: Fraction
    program: str = ""
    obtained: str = "install it"
    harness: str = ""
    loads_originals: bool = True

    @abstractmethod
    def choices(self, facts: ModelFacts) -> Sequence[Choice]:
        """Return what a model can become that the engine loads."""

    @abstractmethod
    def refusal(self, written: str) -> str | None:
        """Say why a checkpoint cannot be loaded and what can be done; None where it can.

        Args:
            written: the `quant_method` of its config.json, empty where it has none.
        """

    def stops(self, entry: Mapping[str, Any]) -> str | None:
        """Say why a checkpoint that it loads elsewhere stops it on this machine; None where that is not known.

        Args:
            entry: the `quantization_config` of its config.json, empty where it has none.
        """
        return None

    def check(self, folder: Path) -> None:
        """Refuse a checkpoint that cannot be loaded; warn of one that stops the engine on this machine.

        Args:
            folder: of the checkpoint.

        Raises:
            MoetailorError: it cannot, or is none.
        """
        if (folder / MODEL_FILE).is_file() and not (folder / "config.json").exists():
            raise MoetailorError(f"{folder}: {MODEL_FILE} is for --engine llama.cpp")
        entry = open_checkpoint(folder).config.get("quantization_config") or {}
        if not isinstance(entry, dict):
            raise MoetailorError(f"{folder}: config.json: quantization_config is {entry!r:.80}, and no object")
        if (why := self.refusal(entry.get("quant_method", ""))) is not None:
            raise MoetailorError(f"{folder}: {why}")
        if (why := self.stops(entry)) is not None:
            warnings.warn(f"{folder}: {why}", MoetailorWarning, stacklevel=2)

    def tools(self, original: Original, converter: Path | None, quantizer: Path | None) -> dict[str, Path]:
        """Return the programs with which results are written in its form, by the options of `apply`.

        Args:
            original: what results are made of.
            converter: that which was named.
            quantizer: the same.

        Raises:
            MoetailorError: one is missing, cannot do it, or nothing is done with it.
        """
        if converter or quantizer:
            raise MoetailorError(
                f"--converter and --quantizer write GGUF, for --engine llama.cpp; {self.name} loads none"
            )
        return {}

    @abstractmethod
    def command(self, served: Served) -> list[str]:
        """Return the command that serves a checkpoint, as OpenAI's API has it.

        Args:
            served: the checkpoint, and where.

        Raises:
            MoetailorError: it has none.
        """

    def absent(self, served: Served) -> str | None:
        """Say what serving needs that is not installed here, and how it is had; None where all is there."""
        program = self.command(served)[0]
        return None if shutil.which(program) else f"{program}: not found here; {self.obtained}"

    def serve(self, served: Served) -> None:
        """Serve a checkpoint; returns when it is stopped, or never.

        Raises:
            MoetailorError: the engine is not installed here.
        """
        command = self.command(served)
        if (told := self.absent(served)) is not None:
            raise MoetailorError(f"{told}, name it with --binary, or run where it is: {shlex.join(command)}")
        os.execvp(command[0], command)

    def room(self, original: Original, memory: int, context: int) -> Room:
        """Return where the memory goes.

        Args:
            original: the model.
            memory: bytes in all.
            context: tokens of the one sequence that must fit.

        Raises:
            MoetailorError: nothing is left for weights.
        """
        cache = cache_nbytes(original, context)
        room = Room(memory=memory, cache=cache, overhead=int(memory * self.overhead), context=context)
        if room.weights <= 0:
            raise MoetailorError(
                f"{memory:,} bytes: the keys and values of {context:,} tokens take {cache:,}, and {self.name} "
                f"{room.overhead:,}; give more --memory, or less --context"
            )
        return room


def register_engine(engine: Engine) -> None:
    """Make an engine known by its name."""
    assert engine.name not in ENGINES, f"engine {engine.name} is registered twice"
    ENGINES[engine.name] = engine


def find_engine(name: str) -> Engine:
    """Return an engine by name.

    Raises:
        MoetailorError: there is none of that name.
    """
    if name.lower() not in ENGINES:
        raise MoetailorError(f"no engine {name!r}" + did_you_mean(name, ENGINES))
    return ENGINES[name.lower()]


def group_of(facts: ModelFacts) -> int | None:
    """Return the inputs that share a scale in what engines load: the most for which they have kernels and that divide
    every width; None where there is none.
    """
    shapes = [stack.shape for stack in facts.stacks if stack.shape is not None]
    inputs = {inputs for shape in shapes for _, inputs in shape.matrices.values()}
    return next((group for group in (128, 64, 32) if not any(size % group for size in inputs)), None)
