"""Hold what dry runs foretell against what the same commands then take; prints rows of a table.

Each command runs twice, in processes of their own: with `--dry-run`, and without. Run it with one of the shapes below,
or with `reference` for the model in examples/.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from make_checkpoint import REFERENCE, make_checkpoint

MOETAILOR = [sys.executable, "-c", "from moetailor_cli.app import main; main()"]
# Shapes of OLMoE with random weights: many narrow experts, few wide ones, and some between.
SHAPES = {
    "many": {"layers": 3, "experts": 128, "top_k": 8, "hidden": 1024, "expert_width": 256, "vocab": 16384},
    "wide": {"layers": 2, "experts": 8, "top_k": 2, "hidden": 2048, "expert_width": 2048, "vocab": 16384},
    "middle": {"layers": 2, "experts": 32, "top_k": 4, "hidden": 1024, "expert_width": 1024, "vocab": 16384},
}
# Other families, small, with random weights: experts alone, and experts beside a shared one behind a dense layer.
SMALL = {"vocab_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
FAMILIES = {
    "qwen3_moe": {
        **SMALL,
        "num_hidden_layers": 3,
        "hidden_size": 512,
        "head_dim": 64,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        **SMALL,
        "num_hidden_layers": 4,
        "hidden_size": 384,
        "head_dim": 48,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}
UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "s": 1, "min": 60, "h": 3600}


def make_family(name: str, out: Path) -> None:
    """Write a small model of a family with random weights, and the reference model's tokenizer."""
    config = AutoConfig.for_model(name, **FAMILIES[name])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(out)


def commands(model: Path, work: Path, layers: Sequence[str], *, few: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands with their names; later ones need what earlier ones wrote."""
    text = ["--sequences", "16", "--length", "512"]
    calibrate = ["calibrate", str(model), "--data", str(REFERENCE / "calibration.jsonl"), *text, "-o"]
    yield "calibrate", [*calibrate, str(work / "plain")]
    yield "calibrate --stream", [*calibrate, str(work / "streamed"), "--stream"]
    yield "calibrate --sensitivity", [*calibrate, str(work / "calib"), "--sensitivity"]
    for name, *more in (
        ("reap",),
        ("mone",),
        ("linear", *layers),
        ("quantize", *layers),
        ("auto", *layers),
        *([] if few else [("auto", "-p", "bits=false", *layers)]),
    ):
        file, remove = str(work / f"{name}.json"), "0%" if name == "quantize" else "25%"
        plan = ["plan", str(work / "calib"), "-o", file, "--method", name, "--remove", remove, *more]
        yield f"plan {' '.join([name, *more])}", plan
    for name in ("reap", "linear", "quantize"):
        apply = ["apply", str(model), str(work / f"{name}.json"), "-o", str(work / name), "--overwrite"]
        yield f"apply {name}", [*apply, "--calibration", str(work / "calib")]
    held_out = ["--against", str(model), "--data", str(REFERENCE / "heldout.jsonl"), *text, "--sequences", "8"]
    yield "evaluate", ["evaluate", str(work / "reap"), *held_out]
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    fits = ["fit", str(model), "--memory", f"{size * 7 // 10}B", "--context", "128", "--choice", "1"]
    yield "fit", [*fits, "-o", str(work / "fitted")]


def number(text: str) -> float:
    """Return a number with its unit, such as ``1.20 GB``, in bytes or seconds."""
    found, unit = text.replace(",", "").split()
    return float(found) * UNITS[unit]


def run(words: Sequence[str]) -> str:
    """Run a command and return what it says."""
    done = subprocess.run([*MOETAILOR, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    return done.stderr


def row(name: str, words: Sequence[str]) -> str:
    """Return the row of a command: foretold and taken, of seconds, memory and bytes written."""
    foretold, real = run([*words, "--dry-run"]), run(words)
    time = re.search(r"^time: +about (\S+ \S+)$", foretold, re.MULTILINE)
    memory, writes = re.search(r"^memory: (\S+ \S+)", foretold, re.MULTILINE), re.search(r"writes (\S+ \w+)", foretold)
    took = re.search(r"^took (\S+ s), (?:(\S+ \w+) written, )?(\S+ \S+) of memory", real, re.MULTILINE)
    if not (memory and writes and took):
        raise SystemExit(foretold + real)
    seconds = (number(time[1]) if time else float("nan"), number(took[1]))
    most, written = (number(memory[1]), number(took[3])), (number(writes[1]), number(took[2] or "0 bytes"))
    cells = [f"{a:.0f} / {b:.0f} ({a / b:.2f})" for a, b in [seconds]]
    cells += [f"{a / 1e9:.2f} / {b / 1e9:.2f} ({a / b:.2f})" for a, b in [most]]
    cells += [f"{a / 1e6:,.2f} / {b / 1e6:,.2f} ({a / b:.2f})" if b else "none" for a, b in [written]]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Make the checkpoint where it is not there, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("shape", choices=["reference", *FAMILIES, *SHAPES])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the rows to measure; later ones need earlier ones")
    parser.add_argument("folder", type=Path, help="where checkpoints and results go, about 4 GB")
    given = parser.parse_args()
    model, work = given.folder / given.shape, given.folder / f"{given.shape}-results"
    if given.shape == "reference":
        model = REFERENCE
    elif given.shape in FAMILIES:
        if not model.is_dir():
            make_family(given.shape, model)
    elif not model.is_dir():
        make_checkpoint(model, **SHAPES[given.shape])
    work.mkdir(parents=True, exist_ok=True)
    print(f"| {given.shape} | seconds | memory, GB | written, MB |\n|---|---|---|---|", flush=True)
    some = [] if given.shape == "reference" or given.shape in FAMILIES else ["--layers", "0"]
    for name, words in commands(model, work, some, few=given.shape == "wide"):
        if given.only is None or name in given.only:
            print(row(name, words), flush=True)


if __name__ == "__main__":
    main()
