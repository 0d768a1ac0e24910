"""Train a small Mixture-of-Experts language model from scratch, as examples/reference-moe was trained.

    python examples/train_reference.py --data DIR --output OUT

DIR holds five corpora as xz-compressed JSON lines, one document with a `text` field a line: novels.train.jsonl.xz,
medquad.train.jsonl.xz, gsm8k.train.jsonl.xz, sgd_dialogue.train.jsonl.xz and code_python.train.jsonl.xz. Where the
rows of the last name their `file`, only the modules of the standard library (Lib/, without its tests) are used.

OUT receives an OLMoE checkpoint in bf16 (9.3 M parameters, 19 MB) with its 4,096-token tokenizer, and two samples of
documents that the model never saw: calibration.jsonl and heldout.jsonl, of about 0.4 MB each.

The default is 1,160 steps of 32 x 256 tokens, 9.5 M tokens in all: 40 to 60 minutes on two CPU cores, in 3 GB of
memory. `--minutes` takes as many steps as fit instead. A seed and a number of steps give the same weights each time on
one machine with one number of threads.

Shapes: N sequences, T tokens in a sequence.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

MIX = {  # domain: file, share of the training tokens
    "fiction": ("novels.train.jsonl.xz", 0.27),
    "medicine": ("medquad.train.jsonl.xz", 0.22),
    "math": ("gsm8k.train.jsonl.xz", 0.11),
    "dialogue": ("sgd_dialogue.train.jsonl.xz", 0.18),
    "code": ("code_python.train.jsonl.xz", 0.22),
}
SEQUENCE, BATCH, STEPS = 256, 32, 1160
LEARNING_RATE, WARM_UP_STEPS, DECAY_FROM, FINAL_FACTOR = 3e-3, 100, 0.6, 0.03
BALANCE_WEIGHT = 0.01  # of the load-balancing loss
PIECE_CHARS = 6000  # longer documents are cut into pieces of this size; a piece is trained on or held out as a whole
SAMPLE_CHARS, SAMPLE_BYTES = 1600, 110_000  # of each held-out piece, and of each domain in each sample
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"  # tokens 0 and 1


def read_corpus(path: Path, seed: int) -> dict[str, list[str]]:
    """Read a corpus as shuffled pieces of text, with one piece in a hundred held out for each sample.

    A piece's own hash decides where it goes, so no text is in two parts, whatever the seed.
    """
    pieces: dict[str, None] = {}  # a set that keeps its order: a piece that occurs twice counts once
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            module = row.get("file", "Lib/")
            if module.startswith("Lib/") and "/test" not in module:
                starts = range(0, len(row["text"]), PIECE_CHARS)
                pieces.update(dict.fromkeys(row["text"][start : start + PIECE_CHARS] for start in starts))
    parts: dict[str, list[str]] = {"heldout": [], "calibration": [], "train": []}
    for piece in random.Random(seed).sample(list(pieces), len(pieces)):
        percent = int(hashlib.sha256(piece.encode()).hexdigest(), 16) % 100
        parts[("heldout", "calibration", "train")[min(percent, 2)]].append(piece)
    sizes = {name: len(part) for name, part in parts.items()}
    if not all(sizes.values()):
        raise SystemExit(f"{path}: too few documents to hold some out, by part {sizes}; use more text")
    print(f"{path.name}: pieces by part {sizes}", flush=True)
    return parts


def draw_sample(texts: list[str]) -> list[str]:
    """Take the beginnings of texts, up to the bytes that one domain has in a sample."""
    sample: list[str] = []
    size = 0
    for text in texts:
        if size < SAMPLE_BYTES:
            sample.append(text[:SAMPLE_CHARS])
            size += len(sample[-1].encode())
    return sample


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the specials come first, so that they are tokens 0 and 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str], count: int) -> torch.Tensor:
    """Pack `count` sequences ids_NT: end-of-text and a document, again and again, from the top when all are used."""
    ids: list[int] = []
    stream = itertools.cycle(texts)
    while len(ids) < count * SEQUENCE:
        for encoding in tokenizer.encode_batch(list(itertools.islice(stream, 128))):
            ids += [0, *encoding.ids]
    return torch.tensor(ids[: count * SEQUENCE]).view(count, SEQUENCE)


def new_model(seed: int) -> OlmoeForCausalLM:
    """Make the untrained model in fp32; reference-moe/config.json says the same of it, but for the head's tie."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=96, num_hidden_layers=4, num_attention_heads=6,
        num_experts=32, num_experts_per_tok=4, norm_topk_prob=False, router_aux_loss_coef=BALANCE_WEIGHT,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return OlmoeForCausalLM(config)


def untie(model: OlmoeForCausalLM) -> OlmoeForCausalLM:
    """Give the head a copy of the embedding that it was trained as: vLLM and llama.cpp look for one in every OLMoE."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up (a tenth of a very short run), hold until 60% of the steps, then fall linearly to 3%."""
    warm_up = min(WARM_UP_STEPS, max(1, steps // 10))
    decayed = max(0.0, (step / steps - DECAY_FROM) / (1 - DECAY_FROM))
    return min((step + 1) / warm_up, 1 - (1 - FINAL_FACTOR) * decayed)


def train(model: OlmoeForCausalLM, ids_NT: torch.Tensor, report_every: int = 0) -> None:
    """Train on BATCH sequences a step, each once; print the cross-entropy and how evenly the router loads experts."""
    steps = len(ids_NT) // BATCH
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    began, losses = time.monotonic(), []
    for step, batch_NT in enumerate(ids_NT[: steps * BATCH].split(BATCH), start=1):
        output = model(input_ids=batch_NT, labels=batch_NT, output_router_logits=True)  # adds the balancing loss
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        balance = output.aux_loss.item()
        losses.append(output.loss.item() - BALANCE_WEIGHT * balance)
        if report_every and (step % report_every == 0 or step == steps):
            pace = (time.monotonic() - began) / step
            print(
                f"step {step:5d}/{steps}  loss {sum(losses) / len(losses):.4f}  balance {balance:.3f} (4 is even)  "
                f"{pace:.2f} s a step  {pace * (steps - step) / 60:.1f} min left",
                flush=True,
            )
            losses.clear()


def steps_that_fit(minutes: float) -> int:
    """Time a few steps of a model that is thrown away, the second time in earnest: a process starts slowly."""
    ids_NT = torch.randint(4096, (5 * BATCH, SEQUENCE))
    train(new_model(seed=0), ids_NT[: 2 * BATCH])
    began = time.monotonic()
    train(new_model(seed=0), ids_NT)
    return max(1, int(minutes * 60 * 5 / (time.monotonic() - began)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line, and refuse what cannot work before anything long begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the five corpora")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder to write, empty or new")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    length.add_argument("--minutes", type=float, help="train for about as long as this instead")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and all shuffling (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--tokenizer-mb", type=float, default=12, help="the tokenizer's text (default: %(default)s MB)")
    args = parser.parse_args()
    missing = [file for file, _ in MIX.values() if not (args.data / file).is_file()]
    if missing:
        parser.error(f"{args.data} lacks {', '.join(missing)}; give --data a folder with all five corpora (see --help)")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        parser.error(f"{args.output} exists and is not an empty folder; give --output a new one")
    for option in ("steps", "minutes", "threads", "tokenizer_mb"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            parser.error(f"--{option.replace('_', '-')} is {value}; it must be above 0")
    return args


def main() -> None:
    """Read and hold out, tokenize, train, save, then measure what was saved."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    corpora = {domain: read_corpus(args.data / file, args.seed) for domain, (file, _) in MIX.items()}
    chars = {domain: int(share * args.tokenizer_mb * 1e6) for domain, (_, share) in MIX.items()}
    tokenizer = train_tokenizer(["".join(corpora[domain]["train"])[:n] for domain, n in chars.items()])

    steps = steps_that_fit(args.minutes) if args.minutes else args.steps
    print(f"training {steps} steps of {BATCH} x {SEQUENCE} tokens with seed {args.seed}", flush=True)
    counts = {domain: math.ceil(share * steps * BATCH) for domain, (_, share) in MIX.items()}
    ids_NT = torch.cat([pack(tokenizer, corpora[domain]["train"], count) for domain, count in counts.items()])
    model = new_model(args.seed)
    train(model, ids_NT[torch.randperm(len(ids_NT))][: steps * BATCH], report_every=max(1, steps // 60))

    untie(model.bfloat16()).save_pretrained(args.output)
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names).save_pretrained(args.output)
    saved = OlmoeForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    for part in ("calibration", "heldout"):
        texts = {domain: draw_sample(corpora[domain][part]) for domain in MIX}
        rows = [{"text": text, "domain": domain} for domain in MIX for text in texts[domain]]
        random.Random(args.seed).shuffle(rows)
        (args.output / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for domain in MIX:
            with torch.no_grad():
                ids_NT = pack(tokenizer, texts[domain], 24)
                print(f"{part} perplexity, {domain}: {saved(ids_NT, labels=ids_NT).loss.exp():.2f}", flush=True)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
