"""Runs in the environment that has vLLM: greedy tokens and log-probabilities of some folders, or why one is refused.

usage: serve.py PROMPTS.npy TOKENS [--together | --ranks | --bfloat16] FOLDER...

Beside each folder it leaves FOLDER.vllm.npz (`greedy` [S, TOKENS] and `logp` [S, T, V] of the prompts' positions) or
FOLDER.refused.txt. With --together all models are loaded first, and run in the other order;
with --ranks each runs on two ranks (tensor parallelism), in a process each; float32 is computed in, or bfloat16.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def load(folder: str, ranks: int = 1, dtype: str = "float32") -> Any:
    """Return a model; None when it is refused, which is written down."""
    from vllm import LLM

    try:
        return LLM(
            folder,
            dtype=dtype,
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=512,
            max_logprobs=-1,
            tensor_parallel_size=ranks,
        )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        Path(f"{folder}.refused.txt").write_text(f"{type(cause).__name__}: {cause}")
        return None


def run(model: Any, folder: str, prompts: np.ndarray, tokens: int) -> None:
    """Write down what a model gives."""
    from vllm import SamplingParams

    def ask(**wanted: Any) -> list:
        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **wanted)
        return model.generate([{"prompt_token_ids": row} for row in prompts.tolist()], params, use_tqdm=False)

    greedy = [found.outputs[0].token_ids for found in ask(max_tokens=tokens)]
    vocabulary = model.llm_engine.model_config.get_vocab_size()
    logp = np.full((len(prompts), prompts.shape[1] - 1, vocabulary), -np.inf)
    for row, found in enumerate(ask(max_tokens=1, prompt_logprobs=-1)):
        for position, given in enumerate(found.prompt_logprobs[1:]):
            for token, one in given.items():
                logp[row, position, token] = one.logprob
    np.savez(f"{folder}.vllm.npz", greedy=np.array(greedy), logp=logp)


def main() -> None:
    """Run what the command line names."""
    prompts, tokens, folders = np.load(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if folders[0] == "--together":
        models = {folder: load(folder) for folder in folders[1:]}
        for folder, model in reversed(models.items()):
            run(model, folder, prompts, tokens)
        return
    how: dict[str, Any] = {"--ranks": {"ranks": 2}, "--bfloat16": {"dtype": "bfloat16"}}.get(folders[0], {})
    for folder in folders[1:] if how else folders:
        if (model := load(folder, **how)) is not None:
            run(model, folder, prompts, tokens)
            del model


if __name__ == "__main__":
    main()
