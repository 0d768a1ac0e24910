"""The Python that has vLLM, and the plug-in as far as its entry point goes.

vLLM may lie in an environment of its own: MOETAILOR_VLLM_PYTHON names its Python, that of the tests when it is not set.
"""

import os
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("MOETAILOR_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
SKIP = pytest.mark.skipif(
    PYTHON is None, reason="vllm is not installed; MOETAILOR_VLLM_PYTHON may name a Python that has it"
)


def site(folder: Path) -> str:
    """Return a PYTHONPATH under which vLLM finds the plug-in, written into a folder."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    info = folder / "site" / "moetailor_vllm-0.dist-info"
    info.mkdir(parents=True)
    lines = [f"{name} = {target}" for name, target in entry.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines]))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moetailor-vllm\nVersion: 0\n")
    return f"{ROOT / 'src'}{os.pathsep}{info.parent}"
