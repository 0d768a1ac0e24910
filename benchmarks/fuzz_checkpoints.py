"""Damaged checkpoints: each is refused with one clear message, or gives a right result; nothing else may come of it.

Tiny checkpoints are damaged at random, in headers, shards, indexes, configs, tokenizers and the folder, and taken
through inspect, calibrate (in memory, streamed, or both), plan and apply. A child of one loaded process runs each case,
with a limit of memory and of time. What may come of a stage is success, or exit code 1 with a line that begins with
"error: "; of the case besides: no half-written output is left, both ways of calibrating agree, and a result loads in
transformers with nothing missing.

    .venv/bin/python benchmarks/fuzz_checkpoints.py --cases 1000 --seed 0

The same seed gives the same cases; `--only N` runs one of them again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import moetailor
from measure import ROOT
from moetailor.checkpoint.folder import INDEX, SINGLE
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor_cli import app

sys.path.append(str(ROOT / "tests"))
from support.families import tiny_model

SECONDS, MEMORY = 60, 3 * 2**30
# Experts one by one in one file and in shards, groups and a correction bias, fused experts with biases.
BASES = ("olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss")
SHARDED = {"qwen3_moe", "gpt_oss"}
# What a value of a JSON file may turn into.
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    7,
    2**31,
    10**9,
    10**20,
    -(10**9),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
]
VALUES += ["", "x", "8", "../x", "é\u0000", [], [1], [[]], {}, {"a": 1}]
ENTRIES: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8"},
    "compression_config": {"format": "int4"},
    "text_config": {"model_type": "olmoe"},
    "transformers_weights": "model.safetensors",
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    "attn_implementation": "flash_attention_2",
    "tie_word_embeddings": True,
    "num_local_experts": 8,
    "num_experts": 16,
    "layer_types": ["full_attention"],
    "rope_scaling": {"rope_type": "yarn", "factor": 0},
    "torch_dtype": "float8_e4m3fn",
}


def make_bases(folder: Path) -> dict[str, Path]:
    """Write the checkpoints that are damaged, and the text beside them."""
    alphabet = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    found = {}
    for family in BASES:
        found[family] = folder / family
        with quiet_transformers():
            model = tiny_model(family, vocab_size=len(alphabet))
            model.save_pretrained(found[family], max_shard_size="60KB" if family in SHARDED else "1GB")
            words.save_pretrained(found[family])
    rows = (json.dumps({"text": f"{n} experts are routed, {n * n} tokens are not. " * 8}) for n in range(8))
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n")
    return found


# Damages: each changes a folder and says what it did.


def changed_json(content: Any, draw: Random) -> tuple[Any, str]:
    """Change one value, key or length somewhere in JSON."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    walk(content)
    if not places:
        return draw.choice(VALUES), "is another value"
    part, key = draw.choice(places)
    what = draw.choice(["value", "value", "value", "lost", "renamed", "doubled", "added"])
    if what == "lost":
        del part[key]
    elif what == "renamed" and isinstance(part, dict):
        part[f"{key}x"] = part.pop(key)
    elif what == "doubled" and isinstance(part[key], int | str | list):
        part[key] = part[key] * 2
    elif what == "added" and isinstance(part, list):
        part.append(draw.choice(VALUES))
    else:
        part[key] = draw.choice(VALUES)
        what = f"value {part[key]!r}"
    return content, f"{key}: {what}"


def flip(file: Path, draw: Random, first: int = 0, last: int | None = None) -> str:
    """Change a few bytes."""
    data = bytearray(file.read_bytes())
    places = [draw.randrange(first, last or len(data)) for _ in range(draw.choice([1, 1, 4]))] if data else []
    for place in places:
        data[place] = draw.randrange(256)
    file.write_bytes(data)
    return f"{file.name}: bytes {places} changed"


def pick(folder: Path, pattern: str, draw: Random) -> Path:
    return draw.choice(sorted(folder.glob(pattern)))


def damage_header(folder: Path, draw: Random) -> str:
    file = pick(folder, "*.safetensors", draw)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    what = draw.choice(["json", "json", "json", "swap", "same", "dtype", "order", "twice", "length", "behind", "flip"])
    if what == "flip":
        return flip(file, draw, 8, 8 + length)
    if what == "json":
        header, what = changed_json(header, draw)
    elif what == "swap":
        header[one], header[other] = header[other], header[one]
    elif what == "same":
        header[one] = header[other]
    elif what == "dtype":
        header[one]["dtype"] = draw.choice(["BF16", "F16", "I32", "F8_E8M0", "F4", "F64", "C64", "U32", "BOOL"])
    elif what == "order":
        header = dict(draw.sample(sorted(header.items(), key=lambda item: item[0]), len(header)))
    elif what == "behind":
        data += bytes(draw.randrange(1, 9))
    text = json.dumps(header).encode()
    if what == "twice":
        text = text[:-1] + b"," + json.dumps({one: header[other]}).encode()[1:]
    told = len(text) + (draw.choice([-1, 1, 8, 10**6, 2**62]) if what == "length" else 0)
    file.write_bytes(max(told, 0).to_bytes(8, "little") + text + data)
    return f"{file.name}, header of {one}: {what}"


def damage_tensors(folder: Path, draw: Random) -> str:
    file = pick(folder, "*.safetensors", draw)
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    what = draw.choice(
        ["lost", "renamed", "cut", "transposed", "flat", "half", "scale", "twin", "not finite", "zero", "f8"]
    )
    tensor = tensors[name]
    if what in ("lost", "renamed"):
        del tensors[name]
    if what in ("renamed", "scale", "twin"):
        other = {"renamed": name + "x", "scale": name + "_scale_inv", "twin": name.removeprefix("model.")}[what]
        tensors[other] = tensor.clone() if what != "scale" else torch.ones(2)
    elif what != "lost":
        tensors[name] = {
            "cut": tensor[:-1],
            "transposed": tensor.transpose(0, -1),
            "flat": tensor.flatten(),
            "half": tensor.bfloat16(),
            "not finite": torch.full_like(tensor, draw.choice([float("nan"), float("inf")])),
            "zero": torch.zeros_like(tensor),
            "f8": tensor.to(torch.float8_e4m3fn),
        }[what].contiguous()
    save_file(tensors, file, {"format": "pt"})
    if (folder / INDEX).is_file() and draw.random() < 0.7:  # the index may know of it, or not
        index = json.loads((folder / INDEX).read_text())
        kept = {key: shard for key, shard in index["weight_map"].items() if shard != file.name}
        index["weight_map"] = kept | dict.fromkeys(tensors, file.name)
        (folder / INDEX).write_text(json.dumps(index))
    return f"{file.name}, {name}: {what}"


def damage_data(folder: Path, draw: Random) -> str:
    file = pick(folder, "*.safetensors", draw)
    if draw.random() < 0.5:
        size = draw.randrange(file.stat().st_size)
        os.truncate(file, size)
        return f"{file.name}: cut to {size} bytes"
    return flip(file, draw)


def damage_index(folder: Path, draw: Random) -> str:
    file = folder / INDEX
    if not file.is_file():
        entries = dict.fromkeys(load_file(folder / SINGLE), draw.choice([SINGLE, "other.safetensors", "../" + SINGLE]))
        file.write_text(json.dumps({"metadata": {}, "weight_map": entries}))
        return f"{file.name}: made"
    if draw.random() < 0.3:
        return flip(file, draw)
    content, told = changed_json(json.loads(file.read_text()), draw)
    file.write_text(json.dumps(content))
    return f"{file.name}, {told}"


def damage_config(folder: Path, draw: Random) -> str:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    chance = draw.random()
    if chance < 0.1:
        return flip(file, draw)
    if chance < 0.35:
        name = draw.choice(sorted(ENTRIES))
        content[name], told = ENTRIES[name], f"{name} added"
    else:
        content, told = changed_json(content, draw)
    file.write_text(json.dumps(content))
    return f"config.json, {told}"


def damage_tokenizer(folder: Path, draw: Random) -> str:
    file = pick(folder, "tokenizer*.json", draw)
    chance = draw.random()
    if chance < 0.2:
        file.unlink()
        return f"{file.name}: lost"
    if chance < 0.4:
        return flip(file, draw)
    content, told = changed_json(json.loads(file.read_text()), draw)
    file.write_text(json.dumps(content))
    return f"{file.name}, {told}"


def damage_folder(folder: Path, draw: Random) -> str:
    file = pick(folder, "*", draw)
    what = draw.choice(["link", "loop", "folder", "empty", "lost", "pipe", "beside"])
    if what == "beside":
        name = draw.choice(
            ["adapter_config.json", "hf_quant_config.json", "pytorch_model.bin", "x.safetensors", SINGLE]
        )
        if not (folder / name).exists():
            (folder / name).write_text("{}")
        return f"{name} beside"
    file.unlink()
    if what == "link":
        file.symlink_to(folder.parent / "text.jsonl")
    elif what == "loop":
        file.symlink_to(file.name)
    elif what == "folder":
        file.mkdir()
    elif what == "empty":
        file.write_text("")
    elif what == "pipe":
        os.mkfifo(file)
    return f"{file.name}: {what}"


Damage = Callable[[Path, Random], str]
DAMAGES: list[Damage] = [damage_header] * 2 + [damage_tensors] * 2 + [damage_config] * 3
DAMAGES += [damage_data, damage_index, damage_tokenizer, damage_folder]


# Cases


def commands(model: Path, text: Path, out: Path, draw: Random) -> Iterator[tuple[str, list[object]]]:
    """Yield the stages of a case; each needs the one before, but inspect."""
    ways = draw.choice([[[]], [["--stream"]], [[], ["--stream"]]])
    method = draw.choice(["reap", "reap", "mone", "mergemoe", "refit", "linear"])
    yield "inspect", ["inspect", model]
    sized = ["--data", text, "--sequences", 2, "--length", 24]
    for place, way in zip(("calibration", "again"), ways, strict=False):
        yield "calibrate", ["calibrate", model, "-o", out / place, *sized, *way]
    plan = out / "plan.json"
    yield "plan", ["plan", out / "calibration", "-o", plan, "--method", method, "--remove", "25%"]
    yield "apply", ["apply", model, plan, "-o", out / "result", "--calibration", out / "calibration"]


def run(arguments: list[object]) -> tuple[str, str]:
    """Run the command line here; return what came of it, and its last words."""
    said = io.StringIO()
    before, sys.argv = sys.argv, ["moetailor", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            app.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        return "traceback", traceback.format_exc()[-1500:]
    else:
        code = 0
    finally:
        sys.argv = before
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    if code == 0:
        return "ok", ""
    refused = code == 1 and lines and any(line.startswith("error: ") and len(line) > 15 for line in lines)
    return ("refused", lines[-1]) if refused else (f"exit {code} without a reason", "\n".join(lines[-5:]))


def left_over(out: Path) -> list[str]:
    """Return what a refused stage left behind that could pass for a result."""
    known = ("calibration", "again", "plan.json")
    return sorted(str(file.relative_to(out)) for file in out.glob("*") if file.name not in known)


def check_agreement(out: Path) -> str:
    """Compare what was measured in memory and streamed; return what differs."""
    one, other = (moetailor.Calibration.open(out / place) for place in ("calibration", "again"))
    for layer in one.layers:
        pair = one.sums(layer).norm_sq, other.sums(layer).norm_sq
        if not torch.allclose(*pair, rtol=1e-3, equal_nan=True):
            return f"layer {layer}: streamed and in memory differ"
    return ""


def check_result(result: Path) -> str:
    """Load a result in transformers; return what is wrong with it."""
    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        return f"misses {sorted(info['missing_keys'])[:2]}"
    model.eval()(torch.arange(8)[None])
    return ""


def case(model: Path, text: Path, out: Path, draw: Random) -> Iterator[tuple[str, str, str]]:
    """Run the stages of a case as far as they go; yield stage, what came of it, last words."""
    for stage, arguments in commands(model, text, out, draw):
        came, said = run(arguments)
        yield stage, came, said
        wrong = ""
        if came == "ok" and stage == "apply":
            wrong = check_result(out / "result")
        elif came == "ok" and (out / "again").exists() and stage == "calibrate":
            wrong = check_agreement(out)
        if wrong:
            yield stage, "wrong result", wrong
        elif came != "ok" and stage != "inspect":
            if left := left_over(out):
                yield stage, "half-written output", str(left)
            return


def forked(work: Callable[[], Iterator[tuple[str, str, str]]]) -> list[tuple[str, str, str]]:
    """Do work in a child with limits of memory and time; return what it yielded, and how it ended if that was badly."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(nothing, stream)
            room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            for found in work():
                os.write(write, (json.dumps(found) + "\n").encode())
        except BaseException:
            os.write(write, (json.dumps(("", "traceback", traceback.format_exc()[-1500:])) + "\n").encode())
        finally:
            os._exit(0)
    os.close(write)
    came, end = b"", time.monotonic() + SECONDS
    while (left := end - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
        if not (part := os.read(read, 65536)):
            break
        came += part
    else:
        os.kill(child, signal.SIGKILL)
        came += json.dumps(("", "hang", f"no end after {SECONDS} s")).encode()
    os.close(read)
    _, status = os.waitpid(child, 0)
    found = [tuple(json.loads(line)) for line in came.splitlines()]
    if os.WIFSIGNALED(status) and not any(kind == "hang" for _, kind, _ in found):
        found.append(("", "crash", f"signal {os.WTERMSIG(status)}"))
    return found


def fuzz(seed: int, numbers: range, bases: dict[str, Path]) -> Iterator[tuple[int, str, list[tuple[str, str, str]]]]:
    """Yield number, damages and outcome of each case."""
    for number in numbers:
        draw = Random(f"{seed} {number}")
        base = bases[draw.choice(sorted(bases))]
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            model, out, text = Path(place) / "model", Path(place) / "out", Path(place) / "text.jsonl"
            shutil.copytree(base, model)
            shutil.copy(base.parent / "text.jsonl", text)
            out.mkdir()
            told = [base.name]
            for _ in range(draw.choice([1, 1, 1, 2])):
                # What a first damage took away, a second one cannot change.
                with contextlib.suppress(Exception):
                    told.append(draw.choice(DAMAGES)(model, draw))
            yield number, "; ".join(told), forked(lambda: case(model, text, out, draw))  # noqa: B023 (run at once)


def bad(found: list[tuple[str, str, str]]) -> bool:
    """Say whether anything came of a case that may not."""
    return not found or any(came not in ("ok", "refused") for _, came, _ in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, told in full")
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(given.first, given.first + given.cases) if given.only is None else range(given.only, given.only + 1)
    ends: Counter[str] = Counter()
    began, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="bases-") as place:
        for number, told, found in fuzz(given.seed, numbers, make_bases(Path(place))):
            stage, came = found[-1][:2] if found else ("", "nothing")
            ends[f"{stage} {came}".strip()] += 1
            if bad(found) or given.only is not None:
                failed += bad(found)
                print(f"case {number}: {told}", *(f"  {a} {b}: {c}" for a, b, c in found), sep="\n", flush=True)
    print(f"{len(numbers)} cases in {time.monotonic() - began:.0f} s, {failed} bad:", dict(ends.most_common()))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
