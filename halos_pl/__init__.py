"""Human-aware losses composed of independent plug-ins, trained with PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halos_pl.batch import LogProbBatch, Needs, TokenBatch
    from halos_pl.conformance import check_halo, parametrize_with_checks
    from halos_pl.data import FeedbackDataModule, Source
    from halos_pl.labels import Labels
    from halos_pl.objective.build import build_objective, load_objective
    from halos_pl.objective.composite import Sum
    from halos_pl.objective.feedback import Feedback, Judgement
    from halos_pl.objective.halo import HALO, Objective, Result
    from halos_pl.objective.reference_points import Estimate, ReferencePoint
    from halos_pl.objective.rewards import Reward
    from halos_pl.policy.loading import load_model, load_tokenizer
    from halos_pl.policy.moving_reference import PastPolicies, SyncedCopy
    from halos_pl.policy.reference import AdapterOff, FixedModel, FrozenCopy, OtherModel
    from halos_pl.policy.scorer import Scorer
    from halos_pl.policy.spec import LoRASpec, ModelSpec, QuantizeSpec
    from halos_pl.training.engine import StepEngine
    from halos_pl.training.module import HALOModule
    from value_functions import ValueFunction

__version__ = "0.1.0"

# The module of each name. Imported on first use, so that objectives on plain tensors load no transformers or Lightning.
_HOMES = {
    "halos_pl.batch": ("LogProbBatch", "Needs", "TokenBatch"),
    "halos_pl.conformance": ("check_halo", "parametrize_with_checks"),
    "halos_pl.data": ("FeedbackDataModule", "Source"),
    "halos_pl.labels": ("Labels",),
    "halos_pl.objective.build": ("build_objective", "load_objective"),
    "halos_pl.objective.feedback": ("Feedback", "Judgement"),
    "halos_pl.objective.composite": ("Sum",),
    "halos_pl.objective.halo": ("HALO", "Objective", "Result"),
    "halos_pl.objective.reference_points": ("Estimate", "ReferencePoint"),
    "halos_pl.objective.rewards": ("Reward",),
    "halos_pl.policy.loading": ("load_model", "load_tokenizer"),
    "halos_pl.policy.moving_reference": ("PastPolicies", "SyncedCopy"),
    "halos_pl.policy.reference": ("AdapterOff", "FixedModel", "FrozenCopy", "OtherModel"),
    "halos_pl.policy.scorer": ("Scorer",),
    "halos_pl.policy.spec": ("LoRASpec", "ModelSpec", "QuantizeSpec"),
    "halos_pl.training.engine": ("StepEngine",),
    "halos_pl.training.module": ("HALOModule",),
    "value_functions": ("ValueFunction",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "HALO",
    "AdapterOff",
    "Estimate",
    "Feedback",
    "FeedbackDataModule",
    "FixedModel",
    "FrozenCopy",
    "HALOModule",
    "Judgement",
    "Labels",
    "LoRASpec",
    "LogProbBatch",
    "ModelSpec",
    "Needs",
    "Objective",
    "OtherModel",
    "PastPolicies",
    "QuantizeSpec",
    "ReferencePoint",
    "Result",
    "Reward",
    "Scorer",
    "Source",
    "StepEngine",
    "Sum",
    "SyncedCopy",
    "TokenBatch",
    "ValueFunction",
    "build_objective",
    "check_halo",
    "load_model",
    "load_objective",
    "load_tokenizer",
    "parametrize_with_checks",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    from halos_pl.common.renamed import renamed

    if new := renamed(name, __all__):
        raise ImportError(f"halos_pl has no {name!r}; did you mean {new}?")  # from ... import hides an AttributeError
    raise AttributeError(f"halos_pl has no {name!r}; it has {', '.join(sorted(_HOME_OF))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
