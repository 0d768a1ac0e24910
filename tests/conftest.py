"""What every test stands on: one thread, no network, tiny checkpoints made once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moetailor
from families import tiny_model
from moetailor.checkpoint.loader import quiet_transformers

torch.set_num_threads(1)

# What a method needs to save anything on tiny experts.
TINY_PARAMETERS = {"lightmoe": {"rank": 1, "bases": 1}, "compressed_experts": {"main": 1, "vectors": "layer"}}


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


def token_batches(count: int = 2, length: int = 12, vocabulary: int = 128) -> list[moetailor.Batch]:
    """Return batches of random token ids: one of two sequences, the others of one, so that shapes differ."""
    generator = torch.Generator().manual_seed(1)
    sizes = [2] + [1] * (count - 1)
    return [moetailor.Batch.of(torch.randint(3, vocabulary, (size, length), generator=generator)) for size in sizes]


@pytest.fixture(scope="session")
def calibration(checkpoint: Callable[[str], Path]) -> Callable[[str], moetailor.Calibration]:
    """Return a family's calibration on `token_batches`, with every token sampled and every statistic recorded."""
    made: dict[str, moetailor.Calibration] = {}

    def get(name: str) -> moetailor.Calibration:
        if name not in made:
            folder = checkpoint(name)
            made[name] = moetailor.calibrate(
                folder, folder.with_name("calibration"), text=token_batches(), residual=True, effect=True
            )
        return made[name]

    return get
