"""What train.py needs to train on the sparse host itself, and to go on from a trained predictor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gnomon.budget import Budget, HeadUnit, Spread
from gnomon.data.blocks import BlockSettings
from gnomon.data.criteria import Criterion
from gnomon.host import HostSpec, UnitKind
from gnomon.policies.base import Refresh
from gnomon.policies.learned import Choose
from gnomon.predictors.base import Predictor
from gnomon.predictors.folder import load_predictor
from gnomon.predictors.module import PredictorModule, Rates
from gnomon.predictors.objectives import Kl, Objective
from gnomon.predictors.prior import Prior
from gnomon.predictors.sketch import Sketch
from gnomon.predictors.student_module import StudentModule
from gnomon.runtime.student import Student


@dataclass(frozen=True)
class Settings:
    """The node ``student`` of train.yaml, which documents the fields."""

    blocks: int = 8
    refresh: Refresh = "token"
    protocol: str = "all"
    prompts: tuple[float, float] = (0.125, 0.75)
    spread: Spread = "layer"
    head_unit: HeadUnit = "head"
    input_gradient: bool = False
    choose: Choose = "topk"
    spread_rate: float = 1e-2
    heldout_tokens: int | None = None

    @property
    def block_settings(self) -> BlockSettings:
        """What a step is made of."""
        prompts = tuple(self.prompts) if self.protocol == "decode" else None
        return BlockSettings(self.blocks, prompts, self.heldout_tokens)  # type: ignore[arg-type]

    def student(
        self,
        model: nn.Module,
        spec: HostSpec,
        predictor: Predictor,
        density: Mapping[UnitKind, float],
    ) -> Student:
        """The sparse host at a density of each kind.

        Raises:
            ValueError: nothing to train, or settings that exclude each other.
        """
        if self.spread != "learned":
            predictor.forget_spread()
        budget = Budget(
            heads=density["heads"],
            neurons=density["neurons"],
            spread=self.spread,
            head_unit=self.head_unit,
        )
        return Student(
            model,
            spec,
            predictor,
            budget,
            self.refresh,
            self.protocol,
            self.input_gradient,
            self.choose,
        )


def make_module(
    student: Student | None,
    predictor: Predictor,
    objective: Objective,
    criterion: Criterion,
    optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
    scheduler: Callable[..., LRScheduler] | None,
    density: Mapping[UnitKind, float],
    warm: bool,
    rates: Rates | None = None,
) -> PredictorModule:
    """The module that fits a predictor: on rows, or on the sparse host where there is a student.

    Raises:
        ValueError: a sketch to be tuned, a prior, or a spread to be learned by another objective
            than ``kl``.
    """
    if student is None:
        predictor.forget_spread()
    else:
        check_spread(student.policy.budget.spread, objective)
    if isinstance(predictor, Prior) and not isinstance(objective, Kl):
        raise ValueError(
            f"objective={objective.name} with predictor=prior: its rows have no prompt to weigh "
            "the prior against: use objective=kl student.refresh=prompt student.protocol=decode"
        )
    if isinstance(predictor, Sketch) and predictor.tune and not isinstance(objective, Kl):
        raise ValueError(
            f"predictor.tune=true with objective={objective.name} would turn logs of magnitudes "
            "into something else: use objective=kl, or predictor.tune=false (heads alone)"
        )
    how = (optimizer, scheduler, density, warm, rates)
    if student is None:
        return PredictorModule(predictor, objective, *how)
    return StudentModule(student, objective, criterion, *how)


def check_spread(spread: str, objective: Objective) -> None:
    """Raises ValueError where a spread is to be learned by another objective than ``kl``."""
    if spread == "learned" and not isinstance(objective, Kl):
        raise ValueError(
            f"student.spread=learned with objective={objective.name}, whose loss says nothing of "
            "what a layer's next unit is worth: use objective=kl, or student.spread=layer"
        )


def start_from(predictor: Predictor, folder: str, spec: HostSpec) -> None:
    """Takes over a trained predictor: weights (int8 becomes fp32 parameters), means and record.

    Args:
        predictor: as configured; changed in place.
        folder: a predictor folder or hub id.
        spec: the host.

    Raises:
        ValueError: no predictor there, or one of another class, other sizes or another host.
    """
    try:
        found = load_predictor(folder)
    except ValueError as error:
        raise ValueError(f"init={folder}: {error}") from error
    if found.name != predictor.name:
        raise ValueError(
            f"init={folder} holds a {found.name} predictor, but predictor={predictor.name} is "
            f"configured: use predictor={found.name}, or another folder"
        )
    found.check_host(spec)
    predictor.follow(found)
    wanted, have = predictor.params, found.params
    differ = [key for key in wanted if wanted[key] != have.get(key)]
    if differ:
        raise ValueError(
            f"init={folder} was trained with "
            + ", ".join(f"predictor.{key}={have.get(key)}" for key in differ)
            + "; configured are "
            + ", ".join(f"{key}={wanted[key]}" for key in differ)
            + ": set them alike"
        )
    predictor.load_state_dict(found.dequantize().state_dict())
    predictor.begin()
    predictor.info = found.info
