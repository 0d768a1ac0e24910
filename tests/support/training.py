"""What trainings are given: tokens, callbacks, and GPUs that are CPUs."""

import time
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from moetailor.recovery.examples import IGNORED, Blocks


def blocks(count: int = 8, length: int = 10, seed: int = 3) -> Blocks:
    """Return random tokens, of which about a third count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (count, length), generator=generator)
    counts = torch.rand(ids.shape, generator=generator) < 0.3
    counts[:, -1] = True
    return Blocks(ids, ids.masked_fill(~counts, IGNORED))


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0 and state.is_world_process_zero:
            torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, self.file)


def share_on_cpus() -> None:
    """Let accelerate share models out to processes on CPUs, as it does to GPUs: everything else is the real thing."""
    start = AcceleratorState.__init__

    def begin(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin  # type: ignore[method-assign]


class Slow(TrainerCallback):
    """Leaves time to be killed between two steps, after the third."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            time.sleep(60)
