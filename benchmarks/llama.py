"""GGUF files as llama.cpp runs them, beside a model as transformers runs it: bytes, KL, greedy tokens.

Needs `pip install llama-cpp-python`; `LLAMA_CPP_LIB_PATH` names the folder of another build's libraries.

    python benchmarks/llama.py MODEL a.gguf b.gguf     # MODEL: the original, or the result that a.gguf was made of
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from llama_cpp import GGML_TYPE_F32, Llama

import moetailor
from measure import REFERENCE
from moetailor.checkpoint.models import load_model, load_tokenizer

PROMPT = 32


def run_gguf(file: Path, blocks_BL: torch.Tensor, new: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Return logits [B, L, V] of all tokens, and the tokens that follow greedily on the first ones of each block."""
    room = max(blocks_BL.shape[1], PROMPT + new)
    sizes: dict[str, Any] = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), room)
    sizes |= {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
    cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(str(file), logits_all=True, verbose=False, **sizes, **cache)
    logits, greedy = [], []
    for block in blocks_BL.tolist():
        model.reset()
        model.eval(block)
        logits.append(torch.tensor(model.scores[: len(block)]))
        model.reset()
        model.eval(block[:PROMPT])
        for _ in range(new):
            model.eval([int(model.scores[model.n_tokens - 1].argmax())])
        greedy.append(model.input_ids[PROMPT : PROMPT + new].tolist())
    return torch.stack(logits), greedy


@torch.no_grad()
def run_original(folder: Path, blocks_BL: torch.Tensor, new: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Return the same of the model by transformers, in float32."""
    model = load_model(folder, dtype=torch.float32, device="cpu")
    logits = torch.cat([model(block[None]).logits for block in blocks_BL])
    greedy = []
    for prompt in blocks_BL[:, :PROMPT]:
        ids = prompt[None]
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        greedy.append(ids[0, PROMPT:].tolist())
    return logits, greedy


def compared(one: tuple, other: tuple) -> str:
    """Return KL and its 95% interval over blocks, agreement of the first word, and equal greedy tokens, in words."""
    kl, agree = [], []
    for a_LV, b_LV in zip(one[0], other[0], strict=True):
        p, q = a_LV.double().log_softmax(-1), b_LV.double().log_softmax(-1)
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        agree.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    same = sum(a == b for left, right in zip(one[1], other[1], strict=True) for a, b in zip(left, right, strict=True))
    spread = 1.96 * stdev(kl) / len(kl) ** 0.5
    return f"KL {mean(kl):.3g} ± {spread:.1g}, top-1 {mean(agree):.1%}, greedy {same}/{sum(map(len, one[1]))}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--data", default=str(REFERENCE / "heldout.jsonl"), help="held-out text")
    parser.add_argument("--blocks", type=int, default=16, help="of 256 tokens, at least 2")
    parser.add_argument("--new", type=int, default=64, help="tokens that follow the first 32 of each block")
    given = parser.parse_args(arguments)
    text = moetailor.TextOptions(data=(given.data,), sequences=given.blocks, length=256)
    batches = moetailor.read_batches(text, load_tokenizer(given.model))
    blocks_BL = torch.cat([batch.input_ids for batch in batches])
    original = run_original(given.model, blocks_BL, given.new)
    for file in given.files:
        found = compared(original, run_gguf(file, blocks_BL, given.new))
        print(f"{file.stat().st_size:12,} bytes  {found}  {file.name}", flush=True)


if __name__ == "__main__":
    main()
