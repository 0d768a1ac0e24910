"""Expanded: an ordinary checkpoint as large as the original, in which each slot has an expert of its own again.

It saves nothing. It shows in any engine what a compressed model says, and feeds tools that know no other form.
"""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch

from moetailor.checkpoint.artifact import save_tensors, write_json
from moetailor.checkpoint.experts import Experts
from moetailor.checkpoint.files import DTYPES, TensorInfo, read_header
from moetailor.checkpoint.folder import CONFIG, INDEX
from moetailor.checkpoint.layout import DiskStack, Stack
from moetailor.checkpoint.names import disk_tensors
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.tensors import check_stored
from moetailor.checkpoint.writer import Piece, whole, write_shards
from moetailor.errors import CheckpointError, PlanError
from moetailor.planning.layer_plan import LayerPlan
from moetailor.planning.plan import Plan
from moetailor.runtime.experts import CompressedExperts
from moetailor.runtime.parts import in_parts, lenders_of
from moetailor.transform.formats.format import Finish
from moetailor.transform.formats.moetailor import Moetailor
from moetailor.transform.formats.native import with_count


class Expanded(Moetailor):
    """What moetailor's own form holds, written out."""

    name = "expanded"
    one_count = True
    automatic = False
    loading = "An ordinary checkpoint: it loads wherever the original does, and takes as much memory."
    example = ""

    def refusal(self, plan: Plan) -> str | None:
        """Refuse answers that no expert gives, and counts that differ."""
        for prefix, layer in plan.layers.items():
            for slot, answer in enumerate(layer.slots):
                if not (answer.drops or answer.expands):
                    told = f"slot {slot} of {prefix} does ({answer.describe()})"
                    return f"gives each slot an expert of its own; no expert gives what {told}"
        left = {stack.prefix: stack.num_experts for stack in plan.model.stacks}
        left |= {prefix: len(layer.kept_slots) for prefix, layer in plan.layers.items()}
        if len(set(left.values())) > 1:
            return f"has one number of slots for all layers; this plan leaves {sorted(set(left.values()))}"
        return None

    def check(self, plan: Plan, original: Original) -> None:
        """Refuse quantized originals: what is computed of codes lies beside numbers nowhere.

        Raises:
            PlanError: see the message.
        """
        if original.checkpoint.coded:
            raise PlanError(f"format {self.name} has numbers alone; {original.source} is quantized: use another format")

    def finished_nbytes(self, plan: Plan) -> int:
        """Return the original's bytes without those of slots that are gone."""
        return plan.model.nbytes - sum(
            (stack.num_experts - len(layer.kept_slots)) * (stack.expert_bytes + stack.slot_bytes)
            for layer, stack in plan.changed
        )

    def written_out(self, plan: Plan) -> int:
        """Return the numbers of all slots' experts of the largest layer."""
        run = ((len(layer.kept_slots), stack.shape) for layer, stack in plan.changed)
        sizes = (slots * sum(map(prod, shape.tensors.values())) for slots, shape in run if shape is not None)
        return max(sizes, default=0)

    def laid_nbytes(self, layer: LayerPlan, stack: Stack) -> int:
        """Return the bytes of a layer's experts written out."""
        return len(layer.kept_slots) * stack.expert_bytes

    def room(self, plan: Plan, finish: Finish) -> int:
        """Return the bytes of the compressed form, of the one written out, and of its layers on the way there."""
        layers = sum(self.laid_nbytes(layer, stack) for layer, stack in plan.changed if stack.shape is not None)
        return max(super().room(plan, finish), self.nbytes(plan) + layers + self.finished_nbytes(plan))

    def finish(self, folder: Path, finish: Finish) -> int:
        """Write out what lies there in moetailor's own form.

        Raises:
            CheckpointError: the experts lie in the original in a way that transformers' rules do not give back, or a
                number is larger than the original's dtype holds.
        """
        original, trusted = finish.original, finish.original.trust_remote_code
        result = Original(folder, takes="results", trust_remote_code=trusted)
        scratch = folder / "expanded"
        scratch.mkdir()
        experts: dict[str, TensorInfo] = {}
        old: set[str] = set()
        for stack, file in self._each_layer(result, finish, scratch):
            experts |= read_header(file)
            old |= {*stack.experts, *stack.fused}
        # Of the rest the router's rows may be fewer than in the original, and experts of layers that it does not run.
        lying = original.checkpoint.tensors
        rest = {name: info for name, info in result.checkpoint.tensors.items() if name in lying.keys() - old}
        shards: dict[Path, list[Piece]] = defaultdict(list)
        for name, info in (rest | experts).items():
            shards[lying[name].file].append(whole(info))
        nbytes = write_shards(scratch, [shards[file] for file in sorted(shards)])
        for file in (*result.checkpoint.shards, folder / INDEX, *scratch.glob("layer-*")):
            file.unlink(missing_ok=True)
        for file in scratch.iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(scratch)
        write_json(folder / CONFIG, self.ordinary(copy.deepcopy(original.checkpoint.config), finish))
        _ = Original(folder, trust_remote_code=trusted).skeleton  # compares names and shapes with those of the model
        return nbytes

    def ordinary(self, config: dict, finish: Finish) -> dict:
        """Return config.json of the ordinary checkpoint.

        Args:
            config: that of the original, a copy.
            finish: what is at hand.
        """
        slots = {len(layer.kept_slots) for layer in finish.plan.layers.values()}
        return with_count(config, finish.original.config, next(iter(slots), None))

    def laid(self, experts: dict[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
        """Return the stacked experts of a layer as they are to lie, see `Experts`; they have the original's shapes.

        Args:
            experts: one for each slot.
            plan: the plan.
        """
        return experts

    def _each_layer(self, result: Original, finish: Finish, scratch: Path) -> Iterator[tuple[DiskStack, Path]]:
        """Yield each changed layer, and a file of its experts by their names on disk, one for each slot."""
        original, plan = finish.original, finish.plan
        source, family = in_parts(result, dtype=torch.float32), original.skeleton.model
        lenders, stacks = lenders_of(source.model), {stack.index: stack for stack in original.stacks.values()}
        for index, layer in original.anatomy.layers.items():
            module = source.model.get_submodule(layer.experts)
            if not isinstance(module, CompressedExperts):
                continue
            asked = [original.anatomy.layers[other].experts for other in sorted(lenders.get(index, ()))]
            stack, file = stacks[index], scratch / f"layer-{index:04d}.safetensors"
            with source.loaded(layer.experts, *asked):
                # No name holds what is made: it would be there while the next layer is.
                save_tensors(_on_disk(stack, family, original, layer.experts, self._one_each(module, plan)), file)
            yield stack, file

    def _one_each(self, module: CompressedExperts, plan: Plan) -> dict[str, torch.Tensor]:
        """Return the family's parameters with an expert for each slot, float32."""
        every = [module.weights(slot) for slot in range(len(module.slots.rows))]
        stacked = {name: torch.stack([one[name] for one in every]) for name in every[0]}
        return Experts(module).packed(self.laid(stacked, plan))


def _on_disk(
    stack: DiskStack, family: object, original: Original, path: str, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a layer's experts by the names that they have on disk, in the dtypes of the original."""
    given = {f"{path}.{name}": tensor for name, tensor in parameters.items()}
    found = {stack.named(name): tensor for name, tensor in disk_tensors(family, given).items()}
    like = {stack.renamed(name, 0): original.checkpoint.tensors[name] for name in (*stack.experts, *stack.fused)}
    made = {}
    for name, tensor in found.items():
        if (info := like.get(stack.renamed(name, 0))) is None:
            raise CheckpointError(
                f"{original.source}: its experts lie as {min(like)!r}, transformers would write them as {name!r}; save "
                "the checkpoint again with this transformers"
            )
        made[name] = tensor.to(DTYPES[info.dtype])
        check_stored(made[name], name)
    return made
