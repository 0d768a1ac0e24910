"""compressed-tensors: every expert in 4 or 8 bits or in floats, as vLLM, SGLang and stock transformers load."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.layout import DiskStack
from moetailor.checkpoint.names import expert_names
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.storage.compressed import METHOD
from moetailor.checkpoint.writer import Piece, rows, whole
from moetailor.errors import CheckpointError, MoetailorWarning, PlanError
from moetailor.planning.plan import Plan
from moetailor.progress import Progress
from moetailor.transform.formats.format import Format
from moetailor.transform.formats.native import kept_in, other_than_drops, with_count
from moetailor.transform.formats.schemes import FORMS, GROUPS, Scheme, schemes_of, unfit
from moetailor.transform.pieces import Parts, shards_of
from moetailor.transform.verify import run_once

# An expert's matrices by name; all else is ignored.
EXPERT, REST = r".*\bexperts\.\d+\.\w+$", r"re:^(?!.*\bexperts\.\d+\.).*$"
# transformers 5.23 reads all experts by the first scheme whose target says "experts". With several, this one comes
# first, which no module has: it stops there, where it would else make other numbers of the codes.
GUARD = r"re:^experts of several schemes, which transformers reads by one$"


class CompressedTensors(Format):
    """What compressed-tensors calls W4A16, W8A16, FP8, MXFP4 and NVFP4, of the experts alone."""

    name = METHOD
    one_count = True
    loading = (
        "Loads in vLLM; in stock transformers (`pip install compressed-tensors`) where all layers have one symmetric "
        "scheme."
    )

    def refusal(self, plan: Plan) -> str | None:
        """Refuse all but dropped slots, as many in every layer, and experts in one width of 4 or 8 bits in each."""
        if told := other_than_drops(plan):
            return told
        for stack in plan.model.stacks:
            if stack.index is not None and (told := unfit(plan, stack)):
                return f"{told} ({stack.prefix})"
        if len(kinds := {scheme.form.name: scheme.codes for scheme in schemes_of(plan)}) > 1:
            return f"holds integers in all layers or one kind of floats; the plan has {' and '.join(kinds.values())}"
        return None

    def check(self, plan: Plan, original: Original) -> None:
        """Refuse a family whose experts have no names one by one, and an original of which more than the experts lies
        as codes; say which engine does not load what is planned.
        """
        replaced = {name for s in original.stacks.values() if s.index is not None for name in (*s.experts, *s.fused)}
        if beside := sorted(original.checkpoint.coded.keys() - replaced):
            raise PlanError(
                f"format {self.name} has a scheme for experts alone, and {beside[0]!r} lies as codes too "
                f"({original.checkpoint.coded[beside[0]].lies}), which would be read as numbers; use --format moetailor"
            )
        layer = next(iter(original.anatomy.layers.values()))
        stack = next(stack for stack in original.stacks.values() if stack.index == layer.index)
        names = {stack.named(name) for name in expert_names(original.skeleton.model, layer.experts).values()}
        if fused := sorted(name for name in names if not re.search(r"\bexperts\.\d+\.\w+\.weight$", name)):
            raise PlanError(
                f"format {self.name} stores experts one by one; transformers has all of a layer's in {fused[0]!r} in "
                f"model type {plan.model.model_type!r}; format moetailor can hold it"
            )
        if other := sorted({stack.renamed(name, 0) for name in stack.experts} - {stack.renamed(n, 0) for n in names}):
            raise PlanError(
                f"{original.source}: its experts lie as {other[0]!r}, transformers would write them as "
                f"{min(names)!r}; save the checkpoint again with this transformers, or use --format moetailor"
            )
        schemes, lost = schemes_of(plan), "vLLM loads it, transformers does not:"
        if len(schemes) > 1 or not all(scheme.symmetric for scheme in schemes):
            cure = "symmetric codes of one width and group, such as --bits int4g32, load in both"
            _warn(f"{lost} it has one scheme for all layers, without zero points; {cure}")
        for codes, why in {scheme.codes: scheme.form.unread for scheme in schemes if scheme.form.unread}.items():
            _warn(f"transformers does not load {codes}: {why}")
        if any(scheme.form.bf16 for scheme in schemes) and {s.dtype for s in plan.model.stacks} != {"BF16"}:
            _warn("transformers makes bfloat16 of MXFP4: load the result with dtype=torch.bfloat16")
        experts = tuple(f"{layer.experts}." for layer in original.anatomy.layers.values())
        sources = Counter(name for name in original.skeleton.names.values() if not name.startswith(experts))
        merged = [name for name, count in sources.items() if count > 1]
        if merged and any(scheme.form.stored["_packed"] != "weight" for scheme in schemes):
            _warn(f"{lost} beside packed experts it loses {merged[0]!r}, which it merges")
        if other := [scheme.group for scheme in schemes if scheme.group not in (-1, *GROUPS)]:
            _warn(f"groups of {other[0]}: vLLM's GPU kernels take 32, 64 and 128; transformers takes any")

    def nbytes(self, plan: Plan) -> int:
        """Return the bytes of all tensors: those that the plan says, and the shape of each matrix."""
        shapes = 0
        for stack in plan.model.stacks:
            if stack.shape is not None and stack.prefix in plan.layers:
                layer = plan.layers[stack.prefix]
                of_one = sum(tensor.nbytes for tensor in self.beside(stack.shape).values())
                shapes += len(layer.pool) * of_one * all(FORMS[width.codes].shapes for width in layer.packed)
        return plan.nbytes + shapes

    def beside(self, shape: ExpertShape) -> dict[str, torch.Tensor]:
        """Return the shape of each matrix, which compressed-tensors stores with its codes."""
        return {f"{name}_shape": torch.tensor(size) for name, size in shape.matrices.items()}

    def config(self, original: dict, config: Any, plan: Plan) -> dict:
        """Return the config with the smaller count, and the schemes as compressed-tensors writes them."""
        import compressed_tensors  # here: it takes seconds
        from compressed_tensors.quantization import QuantizationConfig

        schemes = schemes_of(plan)
        groups = [(_target(prefixes), scheme) for scheme, prefixes in schemes.items()]
        if len(schemes) > 1 or any(scheme.form.guarded for scheme in schemes):
            groups.insert(0, (GUARD, Scheme(bits=4, group=32, codes="uint")))
        # Layers that the model does not run keep their experts as they lie.
        unrun = [f"re:{re.escape(stack.prefix)}\\." for stack in plan.model.stacks if stack.index is None]
        told = {
            "config_groups": {
                f"group_{number}": {"targets": [target], **scheme.to_json()}
                for number, (target, scheme) in enumerate(groups)
            },
            "format": groups[-1][1].to_json()["format"],
            "quantization_status": "compressed",
            "ignore": ["lm_head", REST, *unrun],
        }
        made = QuantizationConfig.model_validate(told).model_dump(mode="json")
        # For transformers, which then leaves no scheme behind in the loaded model.
        made |= {"version": compressed_tensors.__version__, "dequantize": True}
        return with_count(original, config, kept_in(plan)) | {"quantization_config": made}

    def shards(self, parts: Parts) -> list[list[Piece]]:
        """Return what stays under the original's names, and each expert's matrices under names of its own."""
        return shards_of(parts, _one_by_one)

    def verify(
        self, folder: Path, plan: Plan, *, trust_remote_code: bool = False, progress: Progress | None = None
    ) -> None:
        """Open it as the quantized original that it now is: every part fits its scheme; load the layers, run them once.

        Raises:
            CheckpointError: bytes, names or shapes are not as planned, or a number is not finite.
        """
        result = Original(folder, trust_remote_code=trust_remote_code)
        if result.checkpoint.nbytes != self.nbytes(plan):
            raise CheckpointError(f"{folder}: {result.checkpoint.nbytes:,} bytes, not {self.nbytes(plan):,}")
        _ = result.skeleton  # compares names and shapes with those of the model
        run_once(result, progress)


def _target(prefixes: Iterable[str]) -> str:
    """Return what matches the experts of some layers, wherever an engine puts the decoder."""
    numbers = "|".join(prefix.rpartition(".")[2] for prefix in prefixes)
    return rf"re:.*\blayers\.({numbers})\.{EXPERT}"


def _one_by_one(parts: Parts, stack: DiskStack) -> list[Piece]:
    """Return the matrices of each expert of a layer under names of its own."""
    assert stack.index is not None
    layer, added, found = parts.plan.layers[stack.prefix], parts.added[stack.index], []
    names = expert_names(parts.skeleton, parts.anatomy.layers[stack.index].experts)
    (width,) = layer.packed
    for row in range(len(layer.pool)):
        for part, name in names.items():
            stem = stack.renamed(stack.named(name), row).removesuffix("weight")
            form = FORMS[width.codes]
            for suffix, stored in form.stored.items():
                if info := added.get(f"{width.stem}_{part}{suffix}"):
                    dtype = form.dtypes.get(suffix, info.dtype)
                    found.append(replace(rows(info, 0, [row]), name=stem + stored, shape=info.shape[1:], dtype=dtype))
            if form.shapes:
                found.append(whole(added[f"{part}_shape"], f"{stem}weight_shape"))
    return found


def _warn(text: str) -> None:
    warnings.warn(f"format {METHOD}: {text}", MoetailorWarning, stacklevel=4)
