"""Recovery on five tasks: what each compressed form of the reference model gets back in the same few tokens.

For each task the original is compressed to the same bytes by every row, trained on the same blocks with the same
settings, and measured on held-out examples: the loss of their completions, and for intents how often the completion is
right word for word. `--set auxiliary` halves the active experts instead. The corpora are JSON lines under --data, named
as in `TASKS`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import random
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moetailor
from measure import REFERENCE, provenance
from moetailor.recovery.examples import Blocks, read_blocks

LENGTH, BATCH = 256, 4
Rows = Iterator[dict[str, str]]


def read(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a compressed file of JSON lines."""
    with lzma.open(folder / f"{name}.jsonl.xz", "rt") as lines:
        yield from map(json.loads, lines)


def maths(folder: Path, held: bool) -> Rows:
    for row in read(folder / "corpora", "gsm8k.test" if held else "gsm8k.train"):
        question, _, answer = row["text"].partition("\nAnswer:")
        yield {"prompt": f"{question}\nAnswer:", "completion": answer}


def code(folder: Path, held: bool) -> Rows:
    """Yield the files of TheAlgorithms/Python, without the standard library; a tenth by hash is held out."""
    for row in read(folder / "corpora", "code_python.train"):
        digest = hashlib.sha256(row["text"].encode()).digest()
        if not row["file"].startswith("Lib/") and (digest[0] < 26) == held:
            yield {"text": row["text"]}


def commonsense(folder: Path, held: bool) -> Rows:
    for name in ("hellaswag", "arc_easy", "arc_challenge", "piqa", "openbookqa"):
        rows = list(read(folder / "benchmarks", f"{name}.{'validation' if held else 'train'}"))
        for row in rows[: 300 if held else None]:
            choice = row["choices"][row["label"]]
            joined = choice if choice[:1] in " ,.;:'" else " " + choice
            yield {"prompt": row["ctx"], "completion": joined}


def intent(folder: Path, held: bool) -> Rows:
    for row in read(folder / "corpora", "clinc150_intent.test" if held else "clinc150_intent.train"):
        yield {"prompt": f"Query: {row['query']}\nIntent:", "completion": f" {row['intent']}"}


def summary(folder: Path, held: bool) -> Rows:
    for row in read(folder / "corpora", "scitldr.test" if held else "scitldr.train"):
        yield {"prompt": f"{row['source'][:600]}\nSummary:", "completion": f" {row['target']}"}


TASKS: dict[str, Callable[[Path, bool], Rows]] = {
    "maths": maths,
    "code": code,
    "commonsense": commonsense,
    "intent": intent,
    "summary": summary,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
        method: what compresses; None for the original.
        parameters: of the method.
        train: what trains, nothing when empty.
        options: how, beside the common options.
        loss: what is minimised; ``kd`` and ``both`` are towards the original after LoRA on the same task.
    """

    method: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    train: tuple[str, ...] = ("standins", "experts", "rest")
    options: dict[str, Any] = field(default_factory=dict)
    loss: str = "task"


LORA = ("experts", "rest")
PAPER = {"start": "zero"}
BEST = {"start": "svd", "ranks": "chosen", "bases": 1, "rank": 20}
ROWS: dict[str, Row] = {
    "original": Row(train=()),
    "LoRA": Row(train=LORA),
    "reap + LoRA": Row(method="reap", train=LORA),
    "mone + recover": Row(method="mone", parameters={"score": "exact", "novice": "optimal"}),
    "linear + recover": Row(method="linear", parameters={"rank": 8, "ranks": "chosen"}),
    "direct replacement": Row(method="lightmoe", parameters=PAPER),
    "LightMoE (paper)": Row(method="lightmoe", parameters=PAPER, options={"anneal": 0.2}),
    "LightMoE (best)": Row(method="lightmoe", parameters=BEST),
}
# What each of moetailor's own choices gives, beside the paper's.
ABLATION: dict[str, Row] = {
    "paper, annealed over half": Row(method="lightmoe", parameters=PAPER, options={"anneal": 0.5}),
    "paper, annealed exponentially": Row(
        method="lightmoe", parameters=PAPER, options={"anneal": 0.2, "anneal_gamma": 3.0}
    ),
    "svd start": Row(method="lightmoe", parameters={"start": "svd"}),
    "svd start, least-squares base": Row(method="lightmoe", parameters={"start": "svd", "base": "least_squares"}),
    "best, annealed": Row(method="lightmoe", parameters=BEST, options={"anneal": 0.2}),
    "best, distilled": Row(method="lightmoe", parameters=BEST, loss="both"),
    "best, distilled by layers too": Row(
        method="lightmoe", parameters=BEST, loss="both", options={"layer_weight": 1.0}
    ),
}
# Half of the active experts; vectors that never train are the plain half.
ALL = ("router", "experts", "rest")
AUXILIARY: dict[str, Row] = {
    "full": Row(train=ALL),
    "half": Row(method="compressed_experts", parameters={"vectors": "none"}, train=ALL),
    "half + vectors": Row(method="compressed_experts", train=("all",)),
    "half + one set a layer": Row(method="compressed_experts", parameters={"vectors": "layer"}, train=("all",)),
    "half + vectors + constants": Row(method="compressed_experts", parameters={"constants": True}, train=("all",)),
    "half + maps": Row(method="compressed_experts", parameters={"vectors": "none", "rank": 16}, train=("all",)),
    "half + vectors + maps": Row(method="compressed_experts", parameters={"rank": 16}, train=("all",)),
}
SETS = {"recovery": ROWS, "ablation": ABLATION, "auxiliary": AUXILIARY}
TWO = {"recovery": ("maths", "intent"), "ablation": ("maths", "intent"), "auxiliary": ("maths", "code")}
EVERY = ROWS | ABLATION | AUXILIARY


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a row on a task at a ratio with a seed."""

    task: str
    row: str
    ratio: str
    seed: int


def prepare(folder: Path, work: Path, task: str, calibration_tokens: int) -> None:
    """Write a task's examples and calibrate the original on its training text."""
    for held in (False, True):
        rows = list(TASKS[task](folder, held))
        random.Random(0).shuffle(rows)
        (work / f"{task}.{held}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = work / f"{task}.text.jsonl"
    rows = map(json.loads, (work / f"{task}.False.jsonl").read_text().splitlines())
    joined = (row.get("text") or row["prompt"] + row["completion"] for row in rows)
    text.write_text("".join(json.dumps({"text": words}) + "\n" for words in joined))
    options = moetailor.TextOptions(
        data=(str(text),), sequences=calibration_tokens // LENGTH, length=LENGTH, batch_size=16
    )
    sample = moetailor.SampleOptions(tokens=calibration_tokens)
    moetailor.calibrate(REFERENCE, work / f"{task}.calibration", text=options, sample=sample)


def blocks_of(work: Path, task: str, held: bool, count: int) -> Blocks:
    """Return the first blocks of a task."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    options = moetailor.ExampleOptions(data=(str(work / f"{task}.{held}.jsonl"),), length=LENGTH)
    found = read_blocks(options, tokenizer)
    return Blocks(found.input_ids[:count], found.labels[:count])


@torch.no_grad()
def accuracy(model: Any, work: Path, task: str, count: int = 500) -> float:
    """Return the share of held-out examples whose completion is the likeliest word for word, which greedy decoding
    gives then too.
    """
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    right = 0
    rows = [json.loads(line) for line in (work / f"{task}.True.jsonl").read_text().splitlines()[:count]]
    for row in rows:
        prompt, completion = (tokenizer(row[part], add_special_tokens=False).input_ids for part in row)
        ids = torch.tensor([[tokenizer.eos_token_id, *prompt, *completion, tokenizer.eos_token_id]])
        given = model(ids, use_cache=False).logits[0, len(prompt) : -1].argmax(1)
        right += bool((given == ids[0, len(prompt) + 1 :]).all())
    return right / len(rows)


@torch.no_grad()
def block_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the summed loss of one block."""
    logits = model(ids[None], use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))


def folder_of(cell: Cell) -> str:
    """Return the name of a run's folder; what is not compressed has no ratio."""
    ratio = cell.ratio if EVERY[cell.row].method else "whole"
    return f"{cell.task}-{cell.row}-{ratio}-{cell.seed}".replace(" ", "_").replace("%", "")


def run(cell: Cell, work: Path, tokens: int, lr: float) -> dict[str, Any]:
    """Compress, train and measure one cell."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", moetailor.MoetailorWarning)
    row, began = EVERY[cell.row], time.perf_counter()
    place = work / folder_of(cell)
    source, steps, losses = REFERENCE, tokens // (BATCH * LENGTH), ()
    if row.method is not None:
        calibration = moetailor.Calibration.open(work / f"{cell.task}.calibration")
        whole = moetailor.METHODS[row.method].useful_whole
        budget = moetailor.Budget.parse(remove="0%" if whole else cell.ratio).of_total(calibration.model.nbytes)
        plan = moetailor.make_plan(calibration, row.method, budget, parameters=row.parameters)
        source = moetailor.apply(plan, REFERENCE, place.with_name(place.name + ".start"), calibration=calibration)
    if row.train:
        annealed = "anneal" in row.options
        teacher = work / folder_of(replace(cell, row="LoRA")) if row.loss != "task" else None
        result = moetailor.recover(
            source,
            place,
            examples=blocks_of(work, cell.task, False, steps * BATCH),
            teacher=REFERENCE if annealed else teacher,
            train=row.train,
            loss=row.loss,
            options=moetailor.RecoveryOptions(
                steps=steps, batch_size=BATCH, lr=lr, seed=cell.seed, lora_rank=16, lora_alpha=16, **row.options
            ),
        )
        source, losses = result.out, result.losses
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    held = blocks_of(work, cell.task, True, 128)
    sums = torch.tensor([block_loss(model, *block) for block in zip(held.input_ids, held.labels, strict=True)])
    nbytes = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    found = {"loss": float(sums.sum()) / held.counted, "blocks": [round(float(value), 3) for value in sums]}
    found |= {"bytes": nbytes, "tokens": steps * BATCH * LENGTH if row.train else 0}
    if cell.task == "intent":
        found["accuracy"] = accuracy(model, work, cell.task)
    curve = [sum(losses[at : at + 10]) / 10 for at in range(0, len(losses) - 9, 10)]
    return vars(cell) | found | {"curve": curve, "seconds": time.perf_counter() - began}


def cells(names: list[str], chosen: str) -> list[Cell]:
    """Return all runs: five tasks at 50%, two of them at 30% and with three seeds; of the ablation only those two."""
    tasks = TASKS if chosen == "recovery" else TWO[chosen]
    found = [Cell(task=task, row=row, ratio="50%", seed=0) for task in tasks for row in names]
    if chosen == "ablation":
        return found
    smaller = [row for row in names if EVERY[row].method and chosen == "recovery"]
    found += [Cell(task=task, row=row, ratio="30%", seed=0) for task in TWO[chosen] for row in smaller]
    more = [(task, seed) for task in TWO[chosen] for seed in (1, 2)]
    return found + [Cell(task=task, row=row, ratio="50%", seed=seed) for task, seed in more for row in names]


def main() -> None:
    """Run the cells that a file does not have yet, teachers first, and add them to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with corpora/ and benchmarks/")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, kept for a second call")
    parser.add_argument("--json", type=Path, required=True, help="results, one JSON object a line; what is there stays")
    parser.add_argument("--tokens", type=int, default=81_920, help="training tokens of a run (default %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of every run (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default %(default)s)")
    parser.add_argument("--set", choices=SETS, default="recovery", help="which rows (default %(default)s)")
    parser.add_argument("--rows", help="only these rows, by comma")
    parser.add_argument("--tasks", help="only these tasks, by comma")
    parser.add_argument("--first", action="store_true", help="only seed 0 at 50%%")
    options = parser.parse_args()
    names = options.rows.split(",") if options.rows else list(SETS[options.set])
    wanted = [cell for cell in cells(names, options.set) if not options.tasks or cell.task in options.tasks.split(",")]
    wanted = [cell for cell in wanted if not options.first or (cell.ratio, cell.seed) == ("50%", 0)]
    done = [json.loads(line) for line in options.json.read_text().splitlines()] if options.json.exists() else []
    have = {(row["task"], row["row"], row["ratio"], row["seed"]) for row in done}
    wanted = [cell for cell in wanted if (cell.task, cell.row, cell.ratio, cell.seed) not in have]
    about = provenance()
    work = options.work
    work.mkdir(exist_ok=True)
    with options.json.open("a") as out:
        for task in {cell.task for cell in wanted}:
            if not (work / f"{task}.calibration").exists():
                prepare(options.data, work, task, 128 * LENGTH)
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            for taught in (False, True):
                turn = [cell for cell in wanted if (EVERY[cell.row].loss != "task") == taught]
                given = ([value] * len(turn) for value in (work, options.tokens, options.lr))
                for found in pool.map(run, turn, *given):
                    out.write(json.dumps(found | {"lr": options.lr, "commit": about["commit"]}) + "\n")
                    out.flush()
                    shown = f"{found['accuracy']:7.1%}" if "accuracy" in found else ""
                    print(
                        f"{found['task']:12} {found['row']:30} {found['ratio']} seed {found['seed']}  "
                        f"loss {found['loss']:.4f} {shown}  {found['bytes'] / 1e6:.2f} MB  {found['seconds']:.0f} s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
