"""Make the tables of `checkpoint/storage/codebooks.py`: k-means on normal numbers, one table for each number of bits.

Prints the mean squared error of each beside that of the best scalar numbers of as many bits (Max, 1960), and what no
code of any length can beat, 4^-bits. Takes some ten minutes on a core; ``--write`` replaces the file in the package and
in the plug-in.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import safetensors.torch
import torch

from moetailor.checkpoint.storage import codebooks

SAMPLES, ROUNDS = 2**21, 100
# The plug-in for vLLM has a copy, as it runs without moetailor.
PLUGIN = Path(__file__).resolve().parent.parent / "plugins" / "vllm" / "src" / "moetailor_vllm"
PACKAGES = (Path(codebooks.__file__).parent, PLUGIN)
SCALAR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def distances(table: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest row of the table and its squared distance, of each row."""
    index = codebooks.nearest(rows[None], table[None])[0]
    return index, (rows - table[index]).square().sum(1)


def k_means(bits: int) -> torch.Tensor:
    """Return a table, bfloat16 [codes, weights], by Lloyd's rounds; codes that nothing is near to start anew."""
    width, generator = codebooks.WEIGHTS[bits], torch.Generator().manual_seed(bits)
    rows = torch.randn(SAMPLES, width, generator=generator)
    table = rows[: 2 ** (bits * width)].clone()
    for _ in range(ROUNDS):
        index, apart = distances(table, rows)
        count = torch.bincount(index, minlength=len(table))
        table = torch.zeros_like(table).index_add(0, index, rows) / count[:, None].clamp_min(1)
        empty = (count == 0).nonzero()[:, 0]
        table[empty] = rows[apart.topk(len(empty)).indices]
    return table.bfloat16()


def main() -> None:
    """Make all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the files in the packages")
    options = parser.parse_args()
    fresh, tables = torch.Generator().manual_seed(100), {}
    print(f"{'bits':>4} {'weights':>8} {'error':>8} {'scalar':>8} {'bound':>8}")
    for bits, width in codebooks.WEIGHTS.items():
        tables[f"vq{bits}"] = k_means(bits)
        _, apart = distances(tables[f"vq{bits}"].float(), torch.randn(SAMPLES // 4, width, generator=fresh))
        error = float(apart.mean()) / width
        print(f"{bits:4} {width:8} {error:8.5f} {SCALAR[bits]:8.5f} {4.0**-bits:8.5f}", flush=True)
    if options.write:
        for package in PACKAGES:
            safetensors.torch.save_file(tables, package / "codebooks.safetensors")


if __name__ == "__main__":
    main()
