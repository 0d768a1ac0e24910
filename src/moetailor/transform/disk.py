"""The plan carried out on a checkpoint: streamed shard to shard, written beside, renamed at the end."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from moetailor._version import __version__
from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.anatomy import Anatomy, discover
from moetailor.checkpoint.facts import facts_of_checkpoint
from moetailor.checkpoint.files import DTYPES, INDEX, Checkpoint, TensorInfo, open_checkpoint, read_header
from moetailor.checkpoint.layout import DiskStack, find_stacks
from moetailor.checkpoint.loader import StreamedModel, disk_tensors, load_config
from moetailor.checkpoint.models import resolve_device
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.checkpoint.writer import Piece, check_place, new_folder, rows, save_tensors, whole, write_shards
from moetailor.errors import CheckpointError, PlanError
from moetailor.planning.checks import check_plan
from moetailor.planning.plan import Plan
from moetailor.planning.slots import LayerPlan
from moetailor.runtime.experts import STAND_IN_TENSORS
from moetailor.transform.beside import copy_others
from moetailor.transform.build import Propagate, Tensors, build_layer, check_calibration, opened
from moetailor.transform.card import model_card
from moetailor.transform.formats import Format, patched_config, resolve_format
from moetailor.transform.propagate import propagated
from moetailor.transform.verify import verify_result

PLAN_FILE, PROVENANCE_FILE = "moetailor_plan.json", "moetailor_provenance.json"
Progress = Callable[[str, int, int], None]
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
    propagate: Propagate = "original",
    device: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the compressed checkpoint that a plan describes.

    Args:
        plan: what becomes of the slots.
        model: folder or hub name of the original.
        out: folder of the result; it appears when it is complete.
        calibration: the calibration of the plan; needed when the plan has stand-ins or merged experts.
        format: ``native``, ``moetailor``, or ``auto`` for native where the plan allows it.
        overwrite: replace an existing folder, at the end.
        allow_other_weights: apply the plan to another model of the same shapes.
        trust_remote_code: run code that comes with the checkpoint.
        verify: open the result and run it once before it takes its place.
        propagate: what stand-ins and merged experts are fitted on: the inputs of their layer in the ``original`` model,
            or those that the ``compressed`` layers before it give.
        device: where they are computed; CUDA when there is one.
        progress: called with ("fit", layers done, layers in all) and ("write", bytes done, bytes in all).

    Raises:
        CheckpointError: the original cannot be used.
        PlanError: the plan does not fit it.
        MoetailorError: the output folder exists, or the disk is full.
    """
    out, checkpoint = Path(out), open_checkpoint(model)
    inputs = {"the original": checkpoint.folder, "the calibration": calibration.folder if calibration else None}
    check_place(out, overwrite=overwrite, inputs=inputs)
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    source = StreamedModel(checkpoint, config, dtype=torch.float32, device=resolve_device(device))
    anatomy = discover(config, source.model, trust_remote_code=trust_remote_code)
    facts = facts_of_checkpoint(checkpoint, anatomy, source.names)
    check_plan(plan, facts, allow_other_weights=allow_other_weights)
    check_calibration(plan, calibration, propagate)
    if unknown := plan.layers.keys() - {stack.prefix for stack in facts.stacks}:
        raise PlanError(f"{checkpoint.source}: has no {', '.join(sorted(unknown))}, which the plan changes")
    # Other weights of the same shapes may have another dtype, hence other bytes; of the same ones the name is kept.
    if plan.model.stacks != facts.stacks or plan.model.nbytes != facts.nbytes:
        plan = replace(plan, model=facts)
    written = resolve_format(plan, format)
    stacks = find_stacks(checkpoint, anatomy, source.names)
    with new_folder(out, overwrite=overwrite, nbytes=plan.nbytes) as folder:
        scratch = folder / "built"
        built = _build(plan, calibration, source, anatomy, stacks, scratch, propagate, progress)
        shards = plan_shards(plan, checkpoint, anatomy, stacks, built)
        nbytes = write_shards(folder, shards, progress and partial(progress, "write"))
        shutil.rmtree(scratch, ignore_errors=True)
        assert nbytes == plan.nbytes, f"{nbytes} bytes written, {plan.nbytes} planned"
        copy_others(checkpoint.folder, folder, left_out=WRITTEN_ANEW, trust_remote_code=trust_remote_code)
        write_json(folder / "config.json", patched_config(checkpoint.config, config, plan, written))
        plan.save(folder / PLAN_FILE)
        write_json(folder / PROVENANCE_FILE, provenance(plan, checkpoint, calibration, written, propagate))
        (folder / "README.md").write_text(model_card(plan, checkpoint.folder, written))
        if verify:
            verify_result(folder, plan, trust_remote_code=trust_remote_code)
    return out


def plan_shards(
    plan: Plan,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    stacks: dict[str, DiskStack],
    built: Mapping[str, TensorInfo],
) -> list[list[Piece]]:
    """Return what each shard of the result holds, in the order of the original's shards.

    Args:
        plan: the plan.
        checkpoint: the original.
        anatomy: its MoE layers in memory.
        stacks: its MoE layers on disk.
        built: the tensors that the plan adds, by their name in the result; where experts are fused, with a row for
            each merged one.
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
                name = stack.renamed(info.name, layer.pool.index(expert))
                shards[info.file].append(whole(built[name] if expert in layer.merged else info, name))
        elif info.name in stack.fused:
            other = {centre: (built[info.name], row) for row, centre in enumerate(layer.merged)}
            shards[info.file].append(rows(info, stack.fused[info.name], layer.pool, other))
        else:
            shards[info.file].append(rows(info, stack.slots[info.name], layer.kept_slots))
    for prefix in plan.layers:
        stack = stacks[prefix]
        if stack.index is not None:
            # Stand-ins lie with the router of their layer.
            home = checkpoint.tensors[next(iter(stack.slots))].file
            names = [f"{anatomy.layers[stack.index].experts}.{name}" for name in STAND_IN_TENSORS]
            shards[home] += [whole(built[name]) for name in names if name in built]
    return [shards[file] for file in sorted(shards)]


def provenance(
    plan: Plan, checkpoint: Checkpoint, calibration: Calibration | None, written: str, propagate: Propagate
) -> dict:
    """Return what the result was made from: versions, the original, the calibration."""
    return {
        "moetailor": __version__,
        "format": written,
        "original": {"source": checkpoint.source, "fingerprint": checkpoint.fingerprint()},
        "calibration": None if calibration is None else calibration.fingerprint,
        "method": plan.method,
        "parameters": dict(plan.parameters),
        "fitted_on": propagate if plan.built else None,
        "budget": plan.budget,
        "bytes": {"original": checkpoint.nbytes, "compressed": plan.nbytes},
    }


def _build(
    plan: Plan,
    calibration: Calibration | None,
    source: StreamedModel,
    anatomy: Anatomy,
    stacks: dict[str, DiskStack],
    scratch: Path,
    propagate: Propagate,
    progress: Progress | None,
) -> dict[str, TensorInfo]:
    """Compute what the plan adds, layer by layer, into files beside the result; return where each tensor lies."""
    if not plan.built:
        return {}
    scratch.mkdir()
    found: dict[str, TensorInfo] = {}
    by_index = {stack.index: stack for stack in stacks.values()}
    total = sum(bool(layer_plan.built) for layer_plan in plan.by_layer.values())
    built = _built_layers(plan, calibration, source, anatomy, scratch, propagate)
    for done, (layer, tensors) in enumerate(built, start=1):
        named = _on_disk(plan.by_layer[layer], by_index[layer], source, anatomy.layers[layer].experts, tensors)
        file = scratch / f"{layer:04d}.safetensors"
        save_tensors({n: t.cpu().to(DTYPES[by_index[layer].dtype]).contiguous() for n, t in named.items()}, file)
        found |= read_header(file)
        if progress:
            progress("fit", done, total)
    return found


def _built_layers(
    plan: Plan,
    calibration: Calibration | None,
    source: StreamedModel,
    anatomy: Anatomy,
    scratch: Path,
    propagate: Propagate,
) -> Iterator[tuple[int, Tensors]]:
    if propagate == "compressed":
        assert calibration is not None
        yield from propagated(plan, calibration, source, anatomy, scratch / "states")
        return
    for layer, view in opened(plan, calibration, ExpertWeights(source)):
        if view is not None:
            yield layer, build_layer(plan, view)


def _on_disk(layer: LayerPlan, stack: DiskStack, source: StreamedModel, experts: str, tensors: Tensors) -> Tensors:
    """Return a layer's new tensors by their names on disk, merged experts by the rows that they will have.

    Raises:
        CheckpointError: the experts lie on disk in a way that transformers' rules do not give back.
    """
    named = {f"{experts}.{name}": tensor for name, tensor in tensors.items() if name in STAND_IN_TENSORS}
    merged = {f"{experts}.{name}": tensor for name, tensor in tensors.items() if name not in STAND_IN_TENSORS}
    rows = [layer.pool.index(centre) for centre in layer.merged]
    wanted = {name for name, expert in stack.experts.items() if expert in layer.merged} | set(stack.fused)
    found = {}
    for name, tensor in (disk_tensors(source.model, merged) if merged else {}).items():
        name, number = stack.named(name), stack.expert_number(name)
        found[name if number is None else stack.renamed(name, rows[number])] = tensor
    expected = {
        stack.renamed(name, layer.pool.index(stack.experts[name])) if name in stack.experts else name for name in wanted
    }
    if merged and (lost := sorted(expected - set(found))):
        raise CheckpointError(
            f"{source.checkpoint.source}: its experts lie as {lost[0]!r}, transformers would write them as "
            f"{sorted(found)[0]!r}; save the checkpoint again with this transformers, then merge"
        )
    return named | found


def write_json(file: Path, content: dict) -> None:
    """Write JSON that a person can read."""
    file.write_text(json.dumps(content, indent=2) + "\n")
