"""What trains of a model: whole tensors of routers and stand-ins, adapters of low rank on everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moetailor.checkpoint.anatomy import Anatomy, tensors_of
from moetailor.checkpoint.storage import find_storage
from moetailor.errors import MoetailorError, did_you_mean
from moetailor.runtime.experts import CompressedExperts

WORDS = ("router", "standins", "experts", "rest")
PEFT_HINT = "training experts or the rest needs the peft library: pip install 'moetailor[recover]'"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The tensors that train, by their names in the model.

    Attributes:
        whole: parameters that train as they are.
        stacked: parameters of experts modules that get adapters.
        linear: linear modules whose weight gets adapters.
    """

    whole: tuple[str, ...]
    stacked: tuple[str, ...]
    linear: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that will have changed."""
        return (*self.whole, *self.stacked, *(f"{path}.weight" for path in self.linear))

    @property
    def adapted(self) -> bool:
        """Whether there are adapters."""
        return bool(self.stacked or self.linear)


def check_words(train: Iterable[str]) -> tuple[str, ...]:
    """Return the words of `train` in one order, ``all`` spelled out.

    Raises:
        MoetailorError: a word is unknown, there is none, or peft is needed and not installed.
    """
    given = set(train)
    for word in sorted(given - {*WORDS, "all"}):
        raise MoetailorError(f"--train {word!r}" + did_you_mean(word, (*WORDS, "all")))
    if not given:
        raise MoetailorError(f"nothing trains; name some of {', '.join(WORDS)} or all with --train")
    words = WORDS if "all" in given else tuple(word for word in WORDS if word in given)
    if {"experts", "rest"} & set(words):
        try:
            import peft  # noqa: F401
        except ImportError:
            raise MoetailorError(PEFT_HINT) from None
    return words


def select(model: Any, anatomy: Anatomy, train: Iterable[str]) -> Selection:
    """Find what trains of a model.

    Args:
        model: the model, original or compressed.
        anatomy: the MoE layers of its original.
        train: ``router``, ``standins``, ``experts``, ``rest``, or ``all`` for those of them that the model has.

    Raises:
        MoetailorError: a word that was named finds nothing.
    """
    wanted = set(train)
    found = {"router": _routers(model, anatomy), "standins": _stand_ins(model, anatomy)}
    found |= {"experts": _experts(model, anatomy), "rest": _linears(model, anatomy)}
    words = check_words(wanted)
    for word in words:
        if not found[word] and "all" not in wanted:
            there = ", ".join(f"{name} ({len(names)} tensors)" for name, names in found.items() if names)
            raise MoetailorError(f"--train {word}: the model has none; it has {there or 'nothing that trains'}")
    chosen = {word: names if word in words else [] for word, names in found.items()}
    return Selection(
        whole=(*chosen["router"], *chosen["standins"]), stacked=(*chosen["experts"],), linear=(*chosen["rest"],)
    )


class Adapters:
    """The selected tensors made trainable and everything else frozen, in place, until `merge`.

    Whole tensors and adapters are float32 while they train, whatever the model is in.

    Args:
        model: the model.
        anatomy: the MoE layers of its original.
        selection: what trains.
        rank: rank of the adapters.
        alpha: their scale is alpha / rank.

    Raises:
        MoetailorError: the rank is larger than the width of the model.
    """

    def __init__(self, model: Any, anatomy: Anatomy, selection: Selection, *, rank: int, alpha: float) -> None:
        width = model.get_input_embeddings().weight.shape[1]
        if selection.adapted and not 0 < rank <= width:
            raise MoetailorError(f"--lora-rank {rank}: the model is {width} wide; use 1 to {width}")
        self._model, self._anatomy = model, anatomy
        # By object: adapters put the modules that they wrap under other names.
        whole = [model.get_parameter(name) for name in selection.whole]
        model.requires_grad_(False)
        self._tuner = _inject(model, selection, rank, alpha) if selection.adapted else None
        self._bind_lenders()
        for parameter in whole:
            parameter.requires_grad_(True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def merge(self) -> None:
        """Add the adapters to the weights under them and take them away."""
        if self._tuner is not None:
            self._tuner.merge_and_unload()
            self._tuner = None
            self._bind_lenders()
        self._model.requires_grad_(False)

    def _bind_lenders(self) -> None:
        """Let layers ask what now stands at the place of the experts module that they were bound to."""
        for part in self._model.modules():
            if isinstance(part, CompressedExperts):
                for lender in part.lenders:
                    path = self._anatomy.layers[lender].experts
                    part.__dict__["lenders"][lender] = self._model.get_submodule(path)


def _inject(model: nn.Module, selection: Selection, rank: int, alpha: float) -> Any:
    from peft import LoraConfig, LoraModel

    # Inside a module without a config: in many families peft would else take the projections of shared experts and
    # dense layers for those of routed experts, and adapt these instead.
    holder = nn.Module()
    holder.model = model
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=[f"model.{path}" for path in selection.linear],
        target_parameters=[f"model.{name}" for name in selection.stacked],
    )
    return LoraModel(holder, config, "default")


def _routers(model: nn.Module, anatomy: Anatomy) -> list[str]:
    names = [f"{layer.block}.{name}" for layer in anatomy.layers.values() for name in layer.slot_rows]
    tensors = tensors_of(model)
    return [name for name in names if isinstance(tensors[name], nn.Parameter)]


def _stand_ins(model: nn.Module, anatomy: Anatomy) -> list[str]:
    found = []
    for layer in anatomy.layers.values():
        module = model.get_submodule(layer.experts)
        for name, spec in module.added.items() if isinstance(module, CompressedExperts) else ():
            if spec.trainable and find_storage(spec.storage).trains:
                found += [f"{layer.experts}.{part}" for part in spec.parts(name, "F32")]
    return found


def _experts(model: nn.Module, anatomy: Anatomy) -> list[str]:
    names = [f"{layer.experts}.{name}" for layer in anatomy.layers.values() for name in layer.expert_rows]
    tensors = tensors_of(model)
    # Matrices only: biases are vectors, one for each expert.
    return [name for name in names if isinstance(tensors[name], nn.Parameter) and tensors[name].dim() == 3]


def _linears(model: Any, anatomy: Anatomy) -> list[str]:
    routers = tuple(f"{layer.router}." for layer in anatomy.layers.values())
    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not f"{path}.".startswith(routers)
    ]
