"""The plan carried out on a checkpoint: streamed shard to shard, written beside, renamed at the end."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from moetailor import ranks
from moetailor._version import __version__
from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.artifact import save_tensors, write_json, write_text
from moetailor.checkpoint.devices import give_back, resolve_device
from moetailor.checkpoint.files import DTYPES, Checkpoint, TensorInfo, read_header
from moetailor.checkpoint.folder import INDEX
from moetailor.checkpoint.layout import DiskStack
from moetailor.checkpoint.loader import StreamedModel
from moetailor.checkpoint.names import disk_tensors
from moetailor.checkpoint.original import Original, open_original
from moetailor.checkpoint.place import PLAN_FILE, PROVENANCE_FILE, check_place, new_folder
from moetailor.checkpoint.tensors import check_stored
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.checkpoint.writer import write_shards
from moetailor.errors import CheckpointError, PlanError
from moetailor.planning.checks import check_plan
from moetailor.planning.plan import Plan
from moetailor.progress import Stages, part
from moetailor.transform.beside import copy_others
from moetailor.transform.build import (
    LayerTensors,
    Propagate,
    Tensors,
    check_calibration,
    layer_tensors,
    stored_tensors,
)
from moetailor.transform.card import model_card
from moetailor.transform.formats import Finish, Format, resolve_format
from moetailor.transform.formats.gguf import put_recipe, recipe_format
from moetailor.transform.pieces import Parts
from moetailor.transform.propagate import propagated

Infos = dict[str, TensorInfo]
WRITTEN_ANEW = {"config.json", "README.md", INDEX, PLAN_FILE, PROVENANCE_FILE}


def apply_to_checkpoint(
    plan: Plan,
    model: str | Path | Original,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    format: str = "auto",
    overwrite: bool = False,
    allow_other_weights: bool = False,
    trust_remote_code: bool = False,
    verify: bool = True,
    propagate: Propagate = "original",
    gguf_recipe: str | Path | None = None,
    converter: str | Path | None = None,
    quantizer: str | Path | None = None,
    device: str | None = None,
    batch_memory: int | None = None,
    progress: Stages | None = None,
) -> Path:
    """Write the compressed checkpoint that a plan describes.

    Processes (`ranks`) share out the layers that are computed and the shards that are written; the first does the rest.

    Args:
        plan: what becomes of the slots.
        model: folder or hub name of the original, or the original opened.
        out: folder of the result; it appears when it is complete.
        calibration: the calibration of the plan; needed when the plan has stand-ins or merged experts.
        format: one of `FORMATS`, or ``auto`` for the first that can hold the plan: native, else moetailor.
        overwrite: replace an earlier result, at the end.
        allow_other_weights: apply the plan to another model of the same shapes.
        trust_remote_code: run code that comes with the checkpoint.
        verify: open the result and run it once before it takes its place.
        propagate: what stand-ins and merged experts are fitted on: the inputs of their layer in the ``original`` model,
            or those that the ``compressed`` layers before it give.
        gguf_recipe: folder for what llama.cpp's quantizer needs; the format is gguf then, and the result, with experts
            as they lie, is an ordinary checkpoint.
        converter: llama.cpp's ``convert_hf_to_gguf.py``, for format gguf, which only says how to call it when None.
        quantizer: llama.cpp's ``llama-quantize``, the same.
        device: where they are computed; CUDA when there is one.
        batch_memory: bytes that experts computed together may take; what the device is good for when None.
        progress: called with ("fit", layers done, layers in all) and ("write", bytes done, bytes in all).

    Raises:
        CheckpointError: the original cannot be used.
        PlanError: the plan does not fit it.
        MoetailorError: the output folder exists, holds what is not ours or is written by another run, or the disk is
            full.
    """
    out, original = Path(out), open_original(model, trust_remote_code=trust_remote_code)
    checkpoint = original.checkpoint
    inputs = {"the original": checkpoint.folder, "the calibration": calibration.folder if calibration else None}
    if gguf_recipe is not None:
        format, inputs = recipe_format(format, calibration), inputs | {"the recipe": Path(gguf_recipe)}
        if ranks.first():
            check_place(Path(gguf_recipe), overwrite=overwrite, inputs=inputs | {"the result": out, "the recipe": None})
    if ranks.first():
        check_place(out, overwrite=overwrite, inputs=inputs)
    source = original.streamed(dtype=torch.float32, device=resolve_device(device))
    anatomy, stacks = original.anatomy, original.stacks
    plan = plan_for(original, plan, calibration, propagate=propagate, allow_other_weights=allow_other_weights)
    form = resolve_format(plan, format, original)
    form.check(plan, original)
    tools = {name: Path(tool) for name, tool in (("converter", converter), ("quantizer", quantizer)) if tool}
    finish = Finish(plan=plan, original=original, calibration=calibration, **tools)
    form.check_tools(finish)
    plan = form.carried(plan)
    from_original = {"checkpoint": checkpoint, "anatomy": anatomy, "stacks": stacks, "skeleton": source.model}
    parts = Parts(plan=plan, **from_original, rebuilt={}, added={})
    planned = form.nbytes(plan)
    with ranks.held(new_folder(out, overwrite=overwrite, nbytes=form.room(plan, finish))) as folder:
        scratch = folder / "built"
        weights = ExpertWeights(source, batch_memory=batch_memory)
        parts = _compute(parts, form, calibration, weights, source, scratch, propagate, progress)
        nbytes = write_shards(folder, form.shards(parts), ranks.of_all(part(progress, "write")), share=ranks.each)
        if not ranks.first():
            return out
        shutil.rmtree(scratch, ignore_errors=True)
        assert nbytes == planned, f"{nbytes} bytes written, {planned} planned"
        copy_others(checkpoint.folder, folder, left_out=WRITTEN_ANEW, trust_remote_code=original.trust_remote_code)
        write_json(folder / "config.json", form.config(copy.deepcopy(checkpoint.config), original.config, plan))

        def tell(plan: Plan, nbytes: int) -> None:
            plan.save(folder / PLAN_FILE)
            write_json(folder / PROVENANCE_FILE, provenance(plan, checkpoint, calibration, form, propagate, nbytes))
            write_text(folder / "README.md", model_card(plan, checkpoint.folder, form, nbytes))

        tell(plan, nbytes)
        try:
            if verify:
                trusted = original.trust_remote_code
                give_back()
                form.verify(folder, plan, trust_remote_code=trusted, progress=part(progress, "verify"))
            if made := form.finish(folder, finish):
                tell(finish.plan, made)
        except CheckpointError as error:  # of a folder that is gone when this is read
            raise CheckpointError(f"{str(error).replace(str(folder), str(out))}; nothing was kept") from None
        if gguf_recipe is not None:
            put_recipe(folder, Path(gguf_recipe), overwrite=overwrite)
    return out


def plan_for(
    original: Original,
    plan: Plan,
    calibration: Calibration | None,
    *,
    propagate: Propagate = "original",
    allow_other_weights: bool = False,
) -> Plan:
    """Return a plan as it is carried out on an original; see `apply_to_checkpoint`.

    Raises:
        PlanError: it does not fit it.
    """
    facts = original.facts
    check_plan(plan, facts, allow_other_weights=allow_other_weights)
    check_calibration(plan, calibration, propagate)
    if unknown := plan.layers.keys() - {stack.prefix for stack in facts.stacks}:
        raise PlanError(f"{original.source}: has no {', '.join(sorted(unknown))}, which the plan changes")
    # Other weights of the same shapes may have another dtype, hence other bytes; of the same ones the name is kept.
    same = plan.model.stacks == facts.stacks and plan.model.nbytes == facts.nbytes
    return plan.for_model(plan.model if same else facts)


def provenance(
    plan: Plan,
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    form: Format,
    propagate: Propagate,
    nbytes: int,
) -> dict:
    """Return what the result was made from: versions, the original, the calibration."""
    return {
        "moetailor": __version__,
        "format": form.name,
        "original": {"source": checkpoint.source, "fingerprint": checkpoint.fingerprint()},
        "calibration": None if calibration is None else calibration.fingerprint,
        "method": plan.method,
        "parameters": dict(plan.parameters),
        "fitted_on": propagate if plan.computed else None,
        "budget": plan.budget,
        "bytes": {"original": checkpoint.nbytes, "compressed": nbytes},
    }


def _compute(
    parts: Parts,
    form: Format,
    calibration: Calibration | None,
    weights: ExpertWeights,
    source: StreamedModel,
    scratch: Path,
    propagate: Propagate,
    progress: Stages | None,
) -> Parts:
    """Compute what the plan adds, layer by layer, into files beside the result; return the parts with it."""
    plan, stacks = parts.plan, {stack.index: stack for stack in parts.stacks.values()}
    if not plan.computed:
        return parts
    assert calibration is not None
    scratch.mkdir(exist_ok=True)
    layers = [layer for layer, changed in sorted(plan.by_layer.items()) if changed.computed]
    done, alone, tell = 0, propagate == "compressed", part(progress, "fit")
    tell = tell if alone else ranks.of_all(tell)

    def keep(layer: int, tensors: LayerTensors | None) -> tuple[int, Infos, Infos]:
        nonlocal done
        assert tensors is not None
        stack, shape = stacks[layer], parts.anatomy.layers[layer].expert_shape
        stored = stored_tensors(plan, layer, shape, tensors, stack.dtype) | form.beside(shape)
        file = scratch / f"{layer:04d}.safetensors"
        on_disk = _as_on_disk(parts, stack, source, tensors.rebuilt)
        save_tensors({name: tensor.cpu().contiguous() for name, tensor in (stored | on_disk).items()}, file)
        header, done = read_header(file), done + 1
        if tell:
            tell(done, len(layers))
        return layer, {name: header[name] for name in stored}, {name: header[name] for name in on_disk}

    if alone:  # each layer hangs on those before it
        front_to_back = propagated(plan, calibration, source, parts.anatomy, scratch / "states")
        kept = ranks.once(lambda: [keep(*found) for found in front_to_back])
    else:
        kept = list(ranks.each(layers, lambda layer: keep(layer, layer_tensors(plan, calibration, layer, weights))))
    rebuilt = {name: info for _, _, on_disk in kept for name, info in on_disk.items()}
    return replace(parts, rebuilt=rebuilt, added={layer: stored for layer, stored, _ in kept})


def _as_on_disk(parts: Parts, stack: DiskStack, source: StreamedModel, rebuilt: Tensors) -> Tensors:
    """Return a layer's new experts by the names on disk that they will have, each in the dtype of what it replaces.

    Args:
        parts: plan and original.
        stack: the layer on disk.
        source: the original in memory, which knows the rules of its family.
        rebuilt: the family's parameters, with a row for each new expert.

    Raises:
        CheckpointError: the experts lie on disk in a way that transformers' rules do not give back, or a number is
            larger than the dtype holds.
    """
    if not rebuilt:
        return {}
    layer, path = parts.plan.layers[stack.prefix], parts.anatomy.layers[stack.index or 0].experts
    anew = [expert for expert in layer.rebuilt if expert in layer.plain]
    places = [layer.plain.index(expert) for expert in anew]
    found = {}
    for name, tensor in disk_tensors(source.model, {f"{path}.{name}": t for name, t in rebuilt.items()}).items():
        name, number = stack.named(name), stack.expert_number(name)
        found[name if number is None else stack.renamed(name, places[number])] = tensor
    replaced = {name: name for name in stack.fused} | {
        stack.renamed(name, layer.plain.index(expert)): name for name, expert in stack.experts.items() if expert in anew
    }
    if lost := sorted(replaced.keys() - found.keys()):
        raise CheckpointError(
            f"{source.checkpoint.source}: its experts lie as {lost[0]!r}, transformers would write them as "
            f"{sorted(found)[0]!r}; save the checkpoint again with this transformers, then merge"
        )
    for name, original in replaced.items():
        found[name] = found[name].to(DTYPES[parts.checkpoint.tensors[original].dtype])
        check_stored(found[name], name)
    return found
