"""lm-evaluation-harness on a result: its own command line, in a process that knows the moetailor format."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from moetailor.checkpoint.hub import name_and_revision
from moetailor.errors import MoetailorError
from moetailor.serving.engine import ENGINES, Engine

# What importing moetailor registers is there once the harness loads the model; vLLM finds its plug-in by itself.
CODE = "import moetailor; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"


def harness_command(folder: Path, engine: Engine, words: Sequence[str] = ()) -> list[str]:
    """Return the command that runs lm-evaluation-harness on a checkpoint.

    Args:
        folder: of the checkpoint.
        engine: with which the harness runs it.
        words: what its own command line gets beside the model.

    Raises:
        MoetailorError: the engine does not load the checkpoint, or the harness does not know the engine.
    """
    if not engine.harness:
        known = ", ".join(name for name, other in ENGINES.items() if other.harness)
        raise MoetailorError(f"lm-evaluation-harness runs nothing with {engine.name} here; give --engine {known}")
    engine.check(folder)
    name, revision = name_and_revision(folder)
    model = {"pretrained": os.path.abspath(name) if folder.exists() else name}
    # As JSON: as words, values would end at commas, and be read as Python where they can be.
    given = json.dumps(model | ({"revision": revision} if revision else {}))
    return [sys.executable, "-c", CODE, "run", "--model", engine.harness, "--model_args", given, *words]


def run_harness(command: Sequence[str]) -> None:
    """Become the process of a command.

    Args:
        command: what `harness_command` gave.

    Raises:
        MoetailorError: the harness is not installed here.
    """
    if find_spec("lm_eval") is None:
        raise MoetailorError("lm-evaluation-harness is not installed here: pip install 'moetailor[tasks]'")
    os.execv(command[0], list(command))
