"""The tables of docs and README from the results of `recovery.py`: means, spreads over seeds, intervals over blocks."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from recovery import ABLATION, AUXILIARY, ROWS, TASKS, TWO

RESAMPLES = 2000
Found = dict[tuple[str, str, str, int], dict[str, Any]]


def tasks_at_half(found: Found) -> list[str]:
    """Return the loss of every row on every task at 50%, seed 0."""
    lines = [
        f"| 50% of all parameters | {' | '.join(TASKS)} | mean | intent, accuracy |",
        "|---" * (len(TASKS) + 3) + "|",
    ]
    for row in ROWS:
        cells = [found.get((task, row, "50%", 0)) for task in TASKS]
        if all(cells):
            losses = [cell["loss"] for cell in cells if cell]
            right = next(cell["accuracy"] for cell in cells if cell and "accuracy" in cell)
            shown = [f"{loss:.3f}" for loss in (*losses, statistics.mean(losses))]
            lines.append(f"| {row} | {' | '.join(shown)} | {right:.1%} |")
    return lines


def seeds_and_ratios(found: Found) -> list[str]:
    """Return mean and range over seeds at 50%, and the loss at 30%, on two tasks."""
    tasks = TWO["recovery"]
    head = " | ".join(f"{task}, 50%, three seeds | {task}, 30%" for task in tasks)
    lines = [f"| | {head} |", "|---" * (2 * len(tasks) + 1) + "|"]
    for row in ROWS:
        parts = []
        for task in tasks:
            losses = [found[key]["loss"] for seed in range(3) if (key := (task, row, "50%", seed)) in found]
            spread = f"{statistics.mean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]" if len(losses) == 3 else ""
            less = found.get((task, row, "30%", 0))
            parts += [spread, f"{less['loss']:.3f}" if less else ""]
        if any(parts):
            lines.append(f"| {row} | {' | '.join(parts)} |")
    return lines


def ablation(found: Found) -> list[str]:
    """Return what each choice gives on two tasks, beside the paper's and the best."""
    tasks = TWO["ablation"]
    lines = [f"| | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for row in ("direct replacement", "LightMoE (paper)", *ABLATION, "LightMoE (best)"):
        cells = [found.get((task, row, "50%", 0)) for task in tasks]
        if all(cells):
            shown = [f"{cell['loss']:.3f}" for cell in cells if cell]
            lines.append(f"| {row} | {' | '.join(shown)} |")
    return lines


def curves(found: Found) -> list[str]:
    """Return the training loss of annealing and of direct replacement, the mean of each tenth step and over seeds."""
    lines = []
    for task in TWO["recovery"]:
        for row in ("direct replacement", "LightMoE (paper)"):
            cells = [found.get((task, row, "50%", seed)) for seed in range(3)]
            if not all(cells):
                continue
            means = np.mean([cell["curve"] for cell in cells if cell], axis=0)
            if not lines:
                steps = [f"{10 * at + 1} to {10 * at + 10}" for at in range(len(means))]
                lines = [f"| training loss, steps | {' | '.join(steps)} |", "|---" * (len(steps) + 1) + "|"]
            lines.append(f"| {task}, {row} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return lines


def auxiliary(found: Found) -> list[str]:
    """Return the loss of half the active experts, and the share of the gap to all of them that is closed."""
    tasks = TWO["auxiliary"]
    head = " | ".join(f"{task}: loss over seeds | against the half | gap closed" for task in tasks)
    lines = [f"| | {head} |", "|---" * (3 * len(tasks) + 1) + "|"]
    for row in AUXILIARY:
        parts = []
        for task in tasks:
            cells = {
                name: [found.get((task, name, "50%", seed)) for seed in range(3)] for name in ("full", "half", row)
            }
            if not all(cell for group in cells.values() for cell in group):
                continue
            loss = {name: [cell["loss"] for cell in group if cell] for name, group in cells.items()}
            mean = {name: statistics.mean(values) for name, values in loss.items()}
            low, high = interval(cells[row], cells["half"])
            gap = mean["half"] - mean["full"]
            closed = f"{(mean['half'] - mean[row]) / gap:.0%}" if gap > 0 else "no gap"
            parts += [
                f"{mean[row]:.4f} [{min(loss[row]):.4f}, {max(loss[row]):.4f}]",
                f"{mean[row] - mean['half']:+.4f} [{low:+.4f}, {high:+.4f}]",
                closed,
            ]
        if parts:
            lines.append(f"| {row} | {' | '.join(parts)} |")
    return lines


def interval(one: list[Any], two: list[Any]) -> tuple[float, float]:
    """Return the 95% interval of the mean difference in loss, by resampling held-out blocks; paired."""
    sums = [np.mean([cell["blocks"] for cell in group], axis=0) for group in (one, two)]
    counted = sum(one[0]["blocks"]) / one[0]["loss"] / len(sums[0])
    apart = (sums[0] - sums[1]) / counted
    draws = np.random.default_rng(0).choice(apart, (RESAMPLES, len(apart))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `recovery.py --json` wrote")
    options = parser.parse_args()
    found: Found = {}
    for line in options.results.read_text().splitlines():
        row = json.loads(line)
        found[row["task"], row["row"], row["ratio"], row["seed"]] = row
    about = defaultdict(set)
    for row in found.values():
        for name in ("commit", "lr", "tokens"):
            about[name].add(row[name])
    print(", ".join(f"{name} {' '.join(map(str, sorted(values)))}" for name, values in about.items()))
    for table in (tasks_at_half, seeds_and_ratios, curves, ablation, auxiliary):
        print("\n" + "\n".join(table(found)))


if __name__ == "__main__":
    main()
