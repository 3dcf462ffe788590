"""Short fits of objective files by the real command, and their steps computed again from their rows' names.

A fit leaves, of each step, the weights before it, the gradient and the loss. From the names of the step's rows their
text is looked up in the data file, tokenised, and put through the model one row at a time, without padding: so
nothing of the package's batches, log-probs or losses is used a second time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import newer_formulas  # noqa: F401  (registers its losses)
import pytest
import torch
import yaml
from formulas import LOSSES, Step
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.callbacks import Callback
from run_halos import EXAMPLES, ROOT, fit, metrics
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos_pl.batch import LogProbBatch, Needs
from halos_pl.cli.lightning_cli import HalosCLI
from halos_pl.conformance.steps import with_leaf
from halos_pl.objective.build import build_objective
from halos_pl.objective.halo import Objective
from halos_pl.testing import random_rows

FOLDER = ROOT / "experiments" / "objectives"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
Weights = dict[str, Tensor]


@dataclass
class Recorded:
    """One optimizer step of a fit.

    Attributes:
        names, mismatched row: of its rows, in the order of the batch.
        weights: of the policy before the step; of an adapter, merged into the model's own.
        head: weight of the scalar head before the step, [1, size]; None without one.
        gradient: of each trained parameter of the policy, before clipping.
        head_gradient: of the head.
        logged: the step's line in ``metrics.csv``.
    """

    names: list[str]
    mismatched: list[bool]
    weights: Weights
    head: Tensor | None = None
    gradient: Weights = field(default_factory=dict)
    head_gradient: Tensor | None = None
    logged: dict[str, float] = field(default_factory=dict)


class Recorder(Callback):
    """Keeps what a fit does. Chosen on the command line by its dotted path."""

    def __init__(self) -> None:
        self.steps: list[Recorded] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        policy = pl_module.policy
        if hasattr(policy, "merge_and_unload"):
            policy = deepcopy(policy).merge_and_unload()
        weights = {name: weight.detach().clone() for name, weight in policy.state_dict().items()}
        head = pl_module.scorer.scalar_head
        before = None if head is None else head.weight.detach().clone()
        self.steps.append(Recorded(batch.row_ids, batch.labels.mismatched.tolist(), weights, before))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = pl_module.policy.named_parameters()
        self.steps[-1].gradient = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
        if pl_module.scorer.scalar_head is not None:
            self.steps[-1].head_gradient = pl_module.scorer.scalar_head.weight.grad.clone()


def run(
    objective: str, model: Path, data: dict[str, list[str]], folder: Path, *options: str, steps: int
) -> list[Recorded]:
    """Fits ``steps`` steps in this process; what was recorded of each."""
    kind = LOSSES[objective].data
    words = fit(
        model,
        objective,
        "[" + ",".join(data[kind]) + "]",
        folder,
        f"--data.batch_size={EXAMPLES[kind]}",
        "--data.seed=1",  # with which z0 is clamped in some steps and not in others
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=9",
        "--checkpoint.every_n_steps=99",
        "--model.lr_schedule=constant_with_warmup",
        "--model.warmup_ratio=0",
        f"--trainer.callbacks+={Recorder.__module__}.{Recorder.__name__}",
        *options,
    )
    cli = HalosCLI(words)
    recorder: Recorder = next(c for c in cli.trainer.callbacks if isinstance(c, Recorder))
    lines = metrics(folder)[-len(recorder.steps) :]  # of a run that goes on, the later ones
    for step, line in zip(recorder.steps, lines, strict=True):
        step.logged = {name: float(value) for name, value in line.items()}
    return recorder.steps


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_function_arguments(build_objective, "model")
    return parser


@cache
def _parsed(name: str) -> Namespace:
    model = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]
    model.pop("reference_model", None)
    return _parser().parse_object({"model": model})


def _spaces(part: Any) -> Any:
    """The parser's namespaces in place of a parsed file's mappings."""
    if isinstance(part, list):
        return [_spaces(each) for each in part]
    return Namespace(**{key: _spaces(each) for key, each in part.items()}) if isinstance(part, dict) else part


def objective(name: str, change: Callable[[dict[str, Any]], None] = lambda model: None) -> Objective:
    """The objective of a file, by the parser of the command line.

    Args:
        name: of the file.
        change: edits the file's ``model``, as the parser has read it.
    """
    model = deepcopy(_parsed(name).model).as_dict()
    change(model)
    return build_objective(**_parser().instantiate_classes(Namespace(model=_spaces(model))).model)


class Rescorer:
    """Steps of a fit as the formulas take them, computed from the names of their rows."""

    def __init__(self, model: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.policy, self.reference = (AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(2))
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self.head: Tensor = torch.zeros(1, self.policy.config.hidden_size)

    def text(self, name: str) -> tuple[str, str, bool]:
        """Prompt, completion and label of the row ``FILE:LINE``, with ``#chosen``, ``#rejected`` or ``#gold``."""
        place, _, side = name.partition("#")
        path, _, line = place.rpartition(":")
        if path not in self.lines:
            self.lines[path] = [json.loads(row) for row in Path(path).read_text().splitlines()]
        row = self.lines[path][int(line) - 1]
        if side:
            return row["prompt"], row["reference" if side == "gold" else side], side != "rejected"
        return row["prompt"], row["completion"], row["label"]

    def score(self, name: str) -> float:
        """The score of the row ``name``; without one, 1 if it is desirable and 0 if not."""
        place, _, side = name.partition(" with ")[0].partition("#")
        path, _, line = place.rpartition(":")
        row = self.lines[path][int(line) - 1]
        desirable = side == "chosen" if side else row["label"]
        return float(row.get(f"{side}_score" if side else "score", desirable))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def logps(self, model: Any, prompt: list[int], completion: list[int]) -> Tensor:
        """float64 [T], of one row alone."""
        everything = torch.tensor([prompt + completion])
        of_all = model(everything).logits[0].double().log_softmax(-1)
        return of_all[:-1].gather(1, everything[0, 1:, None]).squeeze(1)[-len(completion) :]

    def scalar(self, prompt: list[int], completion: list[int]) -> Tensor:
        """float64, of one row alone: the head on the hidden state after its last token."""
        hidden = self.policy.model(torch.tensor([prompt + completion])).last_hidden_state
        return hidden[0, -1].double() @ self.head[0].double()

    def rows(self, objective: str, step: Recorded) -> list[tuple[str, list[int], list[int], bool]]:
        """Prompt's text and ids, completion's ids and label of each row of a step."""
        control = LOSSES[objective].control
        found = []
        for name, mismatched in zip(step.names, step.mismatched, strict=True):
            # A mismatched row "A with B" has the prompt of A and the completion of B.
            sides = [self.text(side) for side in name.split(" with ")]
            assert len(sides) == 1 + mismatched
            assert len({prompt for prompt, *_ in sides}) == len(sides)
            label = sides[0][2] and not mismatched
            prompt = self.ids(sides[0][0]) + (self.ids(control[not label]) if control else [])
            found.append((sides[0][0], prompt, [*self.ids(sides[-1][1]), self.tokenizer.eos_token_id], label))
        return found

    def step(self, objective: str, steps: list[Recorded], number: int, *, gradient: bool = True) -> Step:
        """Step ``number`` of a fit; the gradient of what is made of it arrives in ``self.policy``."""
        recorded = steps[number]
        self.policy.load_state_dict(recorded.weights)
        if recorded.head is not None:
            self.head = recorded.head.clone().requires_grad_()
        rows = self.rows(objective, recorded)
        with torch.set_grad_enabled(gradient):
            policy = [self.logps(self.policy, prompt, completion) for _, prompt, completion, _ in rows]
            scalar = torch.stack([self.scalar(prompt, completion) for _, prompt, completion, _ in rows])
        with torch.no_grad():
            reference = [torch.zeros(len(completion), dtype=torch.float64) for _, _, completion, _ in rows]
            for share, weights in LOSSES[objective].references([s.weights for s in steps[: number + 1]]):
                self.reference.load_state_dict(weights)
                for total, (_, prompt, completion, _) in zip(reference, rows, strict=True):
                    total += share * self.logps(self.reference, prompt, completion)
        places = {name: i for i, name in enumerate(recorded.names)}
        pair = []
        for name, is_mismatched in zip(recorded.names, recorded.mismatched, strict=True):
            stem, _, side = name.rpartition("#")
            paired = LOSSES[objective].data.endswith(("pairs", "triples")) and not is_mismatched and side != "gold"
            pair.append(places[f"{stem}#{'rejected' if side == 'chosen' else 'chosen'}"] if paired else -1)
        prompts = [text for text, *_ in rows]
        padded = torch.nn.utils.rnn.pad_sequence
        return Step(
            policy=padded(policy, batch_first=True),
            reference=padded(reference, batch_first=True),
            mask=padded([torch.ones(len(p), dtype=torch.bool) for p in policy], batch_first=True),
            desirable=torch.tensor([label for *_, label in rows]),
            pair=torch.tensor(pair),
            mismatched=torch.tensor(recorded.mismatched),
            prompt=torch.tensor([prompts.index(text) for text in prompts]),
            scalar=scalar,
            score=torch.tensor([self.score(name) for name in recorded.names], dtype=torch.float64),
            gold=torch.tensor([name.endswith("#gold") for name in recorded.names]),
        )


def assert_the_formulas(objective: str, steps: list[Recorded], rescorer: Rescorer, *, gradient: bool = True) -> list:
    """Loss and gradient of each step are those of the formula; the steps as the formula has seen them."""
    loss, seen = LOSSES[objective], []
    for number, recorded in enumerate(steps):
        step = rescorer.step(objective, steps, number, gradient=gradient)
        value = loss.of(step, seen)
        assert recorded.logged["loss"] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), f"loss of step {number}"
        if gradient:
            rescorer.policy.zero_grad()
            value.backward()
            expected = {name: p.grad for name, p in rescorer.policy.named_parameters() if p.grad is not None}
            gradient_of = dict(recorded.gradient)
            if recorded.head_gradient is not None:
                expected["head"], gradient_of["head"] = rescorer.head.grad, recorded.head_gradient
            assert gradient_of.keys() == expected.keys()
            whole = torch.stack([each.norm() for each in expected.values()]).norm()
            assert whole > (1e-9 if loss.faint else 1e-4), f"step {number} has nothing to learn"
            for name, theirs in expected.items():
                error = (gradient_of[name] - theirs).norm()
                assert error <= 1e-5 * (theirs.norm() + 0.1 * whole), f"step {number}: gradient of {name}"
        seen.append(step)
    return seen


def rows(
    pairs: int = 4, mismatched: int = 2, *, gold: int = 0, seed: int = 0, tokens: int = 5, scale: float = 1.0
) -> LogProbBatch:
    """Random log-probs and scores without a model, in groups of two pairs: an advantage is over more than two rows."""
    made = random_rows(seed, pairs, mismatched, gold=gold, tokens=tokens, scale=scale)
    group = torch.minimum(torch.arange(len(made)), made.labels.pair.clamp(min=0)) // 2
    draw = torch.Generator().manual_seed(seed)
    score = torch.randint(-6, 7, (len(made),), generator=draw) / 4
    return replace(made, labels=replace(made.labels, group=group, score=score))


def rows_for(name: str, pairs: int = 4, mismatched: int = 2, **options: Any) -> LogProbBatch:
    """As :func:`rows`, with gold answers for a loss that has them."""
    return rows(pairs, mismatched, gold=min(3, pairs) if LOSSES[name].data == "triples" else 0, **options)


def as_step(rows: LogProbBatch, policy: torch.Tensor) -> Step:
    reference, scalar, labels = rows.reference_logps, rows.scalar, rows.labels
    assert reference is not None
    assert scalar is not None
    who = labels.desirable, labels.pair, labels.mismatched, labels.group
    return Step(policy, reference, rows.mask, *who, scalar, labels.score.double(), labels.gold)


def assert_equals_formula(name: str, rows: LogProbBatch, made: Objective | None = None) -> None:
    """Loss and its slope in every log-prob and scalar, on plain tensors, of the file's objective or of ``made``."""
    (ours, mine), (theirs, other) = (with_leaf(rows, Needs(scalar=True)) for _ in range(2))
    result = (made or objective(name))(mine)
    assert result.loss.shape == ()
    result.loss.backward()
    value = LOSSES[name].of(as_step(other, other.policy_logps), [])
    value.backward()
    assert result.loss.item() == pytest.approx(value.item(), rel=1e-6, abs=1e-7)
    read = torch.cat([rows.mask, torch.ones_like(rows.mask[:, :1])], dim=1)  # what is padded is a constant 0
    slope = ours.grad[read]
    assert torch.allclose(slope, theirs.grad[read], rtol=1e-5, atol=1e-8)
    assert slope.abs().max() > (1e-9 if LOSSES[name].faint else 1e-4)
