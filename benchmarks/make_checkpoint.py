"""Write a checkpoint with the shapes of OLMoE-1B-7B and random weights, one shard in memory at a time.

The defaults give 16 layers of 64 experts in bfloat16, 13.8 GB in shards of 2 GB. The tokenizer is that of the reference
model, whose ids are a part of the vocabulary, so `moetailor calibrate` runs on real text. Norms are ones and every
other weight is normal with standard deviation 0.02, which keeps the forward pass finite at any depth.
"""

from __future__ import annotations

import argparse
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from moetailor.checkpoint.artifact import save_tensors, write_json
from moetailor.checkpoint.files import INDEX
from moetailor.checkpoint.place import new_folder

REFERENCE = Path(__file__).resolve().parent.parent / "examples" / "reference-moe"


def make_checkpoint(
    out: Path,
    *,
    layers: int = 16,
    experts: int = 64,
    top_k: int = 8,
    hidden: int = 2048,
    expert_width: int = 1024,
    vocab: int = 50304,
    shard_bytes: int = 2 * 10**9,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write the checkpoint and return its folder; the same arguments give the same bytes."""
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "clip_qkv": None,
        "dtype": "bfloat16",
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": expert_width,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": hidden // 128,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": hidden // 128,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab,
    }
    shapes = dict(tensor_shapes(layers, experts, hidden, expert_width, vocab))
    nbytes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    shards, weight_map = into_shards(nbytes, shard_bytes), {}
    with new_folder(out, overwrite=overwrite, nbytes=sum(nbytes.values())) as folder:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_tensors({name: random_weight(name, shapes[name], seed) for name in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
        write_json(folder / "config.json", config)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(REFERENCE / name, folder / name)
    return out


def tensor_shapes(
    layers: int, experts: int, hidden: int, expert_width: int, vocab: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of OLMoE by name, in the order of the layers."""
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            yield f"{prefix}.{name}.weight", (hidden,)
        for name in ("q", "k", "v", "o"):
            yield f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate.weight", (experts, hidden)
        for expert in range(experts):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (expert_width, hidden)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (expert_width, hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, expert_width)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the values of one tensor; they depend on its name and the seed alone."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def into_shards(nbytes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Cut the tensors into shards of at most so many bytes (or one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in nbytes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the checkpoint")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers (default %(default)s)")
    parser.add_argument("--experts", type=int, default=64, help="experts of a layer (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=8, help="experts of a token (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="model width, a multiple of 128 (default %(default)s)")
    parser.add_argument("--expert-width", type=int, default=1024, help="width of an expert (default %(default)s)")
    parser.add_argument("--vocab", type=int, default=50304, help="rows of the embedding (default %(default)s)")
    parser.add_argument("--shard-bytes", type=int, default=2 * 10**9, help="bytes of a shard (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    made = make_checkpoint(**vars(parser.parse_args()))
    print(f"{made}: {sum(file.stat().st_size for file in made.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
