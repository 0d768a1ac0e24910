"""What every test stands on: one thread, no network, seeds, tiny checkpoints made once, the command line."""

import os
import random
import sys
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start, too: the other core has tests of its own
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as Triton is loaded: kernels run where there is no GPU, too

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

import moetailor
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor_cli.app import main
from support.families import tiny_model
from support.source import lengths
from support.tiny import token_batches

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Ignore what users of scarce calibration text are told, of which the tests have little."""
    # In pyproject.toml it would load all that is tested before the settings above are there.
    config.addinivalue_line("filterwarnings", "ignore::moetailor.errors.MoetailorWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what draws without a generator of its own, so that no number depends on which tests ran before."""
    seed = zlib.crc32(item.nodeid.encode())
    for start in (random.seed, numpy.random.seed, torch.manual_seed):
        start(seed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how long the source is: it grows one harmless line at a time."""
    terminalreporter.write_line(lengths())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's tiny checkpoint, float32, made on first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "original"
            with quiet_transformers():
                tiny_model(name).save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def calibration(checkpoint: Callable[[str], Path]) -> Callable[[str], moetailor.Calibration]:
    """Return a family's calibration on `token_batches`, with every token sampled and every statistic recorded."""
    made: dict[str, moetailor.Calibration] = {}

    def get(name: str) -> moetailor.Calibration:
        if name not in made:
            folder = checkpoint(name)
            made[name] = moetailor.calibrate(
                folder, folder.with_name("calibration"), text=token_batches(), residual=True, sensitivity=True
            )
        return made[name]

    return get


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs a command and gives exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moetailor", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call
