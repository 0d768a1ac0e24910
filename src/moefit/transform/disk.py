"""The plan carried out on a checkpoint: streamed shard to shard, written beside, renamed at the end."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moefit._version import __version__
from moefit.calibration.facts import facts_of_checkpoint
from moefit.calibration.folder import Calibration
from moefit.checkpoint.anatomy import Anatomy, discover
from moefit.checkpoint.files import INDEX, Checkpoint, open_checkpoint
from moefit.checkpoint.layout import DiskStack, find_stacks
from moefit.checkpoint.loader import StreamedModel, load_config
from moefit.checkpoint.weights import ExpertWeights
from moefit.checkpoint.writer import Piece, check_place, new_folder, rows, whole, write_shards
from moefit.planning.checks import check_plan
from moefit.planning.plan import Plan
from moefit.planning.slots import LayerPlan
from moefit.transform.card import model_card
from moefit.transform.formats import Format, patched_config, resolve_format
from moefit.transform.standins import build_stand_ins, check_calibration
from moefit.transform.verify import verify_result

PLAN_FILE, PROVENANCE_FILE = "moefit_plan.json", "moefit_provenance.json"
# Tokenizer, generation config, chat template, licence and code.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "LICENCE*", "NOTICE*")
WRITTEN_ANEW = {"config.json", "README.md", INDEX, PLAN_FILE, PROVENANCE_FILE}


def apply_to_checkpoint(
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    format: Format = "auto",
    overwrite: bool = False,
    allow_other_weights: bool = False,
    trust_remote_code: bool = False,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the compressed checkpoint that a plan describes.

    Args:
        plan: what becomes of the slots.
        model: folder or hub name of the original.
        out: folder of the result; it appears when it is complete.
        calibration: the calibration of the plan; needed when the plan has stand-ins.
        format: ``native``, ``moefit``, or ``auto`` for native where the plan allows it.
        overwrite: replace an existing folder, at the end.
        allow_other_weights: apply the plan to another model of the same shapes.
        trust_remote_code: run code that comes with the checkpoint.
        verify: open the result and run it once before it takes its place.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: the original cannot be used.
        PlanError: the plan does not fit it.
        MoefitError: the output folder exists, or the disk is full.
    """
    out, checkpoint = Path(out), open_checkpoint(model)
    inputs = {"the original": checkpoint.folder, "the calibration": calibration.folder if calibration else None}
    check_place(out, overwrite=overwrite, inputs=inputs)
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    skeleton = StreamedModel(checkpoint, config, dtype=torch.float32)
    anatomy = discover(config, skeleton.model, trust_remote_code=trust_remote_code)
    check_plan(plan, facts_of_checkpoint(checkpoint, anatomy, skeleton.names), allow_other_weights=allow_other_weights)
    check_calibration(plan, calibration)
    written = resolve_format(plan, format)
    stacks = find_stacks(checkpoint, anatomy, skeleton.names)
    compute = _stand_in_reader(plan, calibration, ExpertWeights(checkpoint, trust_remote_code=trust_remote_code))
    shards = plan_shards(plan, checkpoint, anatomy, stacks, compute)
    with new_folder(out, overwrite=overwrite, nbytes=plan.nbytes) as folder:
        nbytes = write_shards(folder, shards, progress)
        assert nbytes == plan.nbytes, f"{nbytes} bytes written, {plan.nbytes} planned"
        _copy_others(checkpoint.folder, folder)
        _write_json(folder / "config.json", patched_config(checkpoint.config, config, plan, written))
        plan.save(folder / PLAN_FILE)
        _write_json(folder / PROVENANCE_FILE, provenance(plan, checkpoint, calibration, written))
        (folder / "README.md").write_text(model_card(plan, checkpoint.folder, written))
        if verify:
            verify_result(folder, plan, trust_remote_code=trust_remote_code)
    return out


def plan_shards(
    plan: Plan,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    stacks: dict[str, DiskStack],
    compute: Callable[[int, str], torch.Tensor],
) -> list[list[Piece]]:
    """Return what each shard of the result holds, in the order of the original's shards.

    Args:
        plan: the plan.
        checkpoint: the original.
        anatomy: its MoE layers in memory.
        stacks: its MoE layers on disk.
        compute: (decoder layer, tensor name) -> values of a stand-in tensor.
    """
    owner = {name: stack for stack in stacks.values() for name in [*stack.experts, *stack.fused, *stack.slots]}
    shards: dict[Path, list[Piece]] = defaultdict(list)
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.offset)):
        stack = owner.get(info.name)
        layer = plan.layers.get(stack.prefix) if stack else None
        if stack is None or layer is None:
            shards[info.file].append(whole(info))
        elif info.name in stack.experts:
            expert = stack.experts[info.name]
            if expert in layer.pool:
                shards[info.file].append(whole(info, stack.renamed(info.name, layer.pool.index(expert))))
        elif info.name in stack.fused:
            shards[info.file].append(rows(info, stack.fused[info.name], layer.pool))
        else:
            shards[info.file].append(rows(info, stack.slots[info.name], layer.kept_slots))
    for prefix, layer in plan.layers.items():
        if layer.constants:
            stack = stacks[prefix]
            # Stand-ins lie with the router of their layer.
            home = checkpoint.tensors[next(iter(stack.slots))].file
            shards[home].append(_constants(stack, layer, anatomy, compute))
    return [shards[file] for file in sorted(shards)]


def provenance(plan: Plan, checkpoint: Checkpoint, calibration: Calibration | None, written: str) -> dict:
    """Return what the result was made from: versions, the original, the calibration."""
    return {
        "moefit": __version__,
        "format": written,
        "original": {"source": checkpoint.source, "fingerprint": checkpoint.fingerprint()},
        "calibration": None if calibration is None else calibration.fingerprint,
        "method": plan.method,
        "parameters": dict(plan.parameters),
        "budget": plan.budget,
        "bytes": {"original": checkpoint.nbytes, "compressed": plan.nbytes},
    }


def _constants(
    stack: DiskStack, layer: LayerPlan, anatomy: Anatomy, compute: Callable[[int, str], torch.Tensor]
) -> Piece:
    assert stack.index is not None
    moe = anatomy.layers[stack.index]
    shape = (len(layer.constants), moe.width)
    return Piece(f"{moe.experts}.constant", stack.dtype, shape, compute=partial(compute, stack.index, "constant"))


def _stand_in_reader(
    plan: Plan, calibration: Calibration | None, weights: ExpertWeights
) -> Callable[[int, str], torch.Tensor]:
    def read(layer: int, name: str) -> torch.Tensor:
        assert calibration is not None
        return build_stand_ins(plan, layer, calibration, weights)[name]

    return read


def _copy_others(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in WRITTEN_ANEW and any(file.match(pattern) for pattern in COPIED):
            shutil.copyfile(file, folder / file.name)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
