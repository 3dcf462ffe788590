"""The load-balancing loss of a mixture of experts: that of transformers on the whole step, however it is split."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_halos import ROOT, binary_data, fit, refused
from torch import Tensor
from transformers import (
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from halos_pl.batch import LogProbBatch, Needs, TokenBatch
from halos_pl.cli.main import main
from halos_pl.labels import Labels
from halos_pl.objective.baselines import RouterLoss
from halos_pl.objective.build import load_objective
from halos_pl.objective.composite import Sum
from halos_pl.policy.limits import warn_of_ignored_losses
from halos_pl.policy.loading import ModelSpec, load_tokenizer
from halos_pl.policy.logprobs import completion_mask
from halos_pl.policy.scorer import Scorer
from halos_pl.training.engine import StepEngine

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=5)),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ),
    "granite-moe": lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**SIZE, num_local_experts=4)),
}


def model(name: str = "mixtral") -> Any:
    """A tiny random one whose routers prefer some experts."""
    torch.manual_seed(0)
    created = MODELS[name]()
    for p in created.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return created.train()


def batch() -> TokenBatch:
    """Two pairs on one prompt, one pair on another, and two mismatched rows, one of them with a prompt of its own."""
    draw = torch.Generator().manual_seed(0)

    def some(n: int) -> Tensor:
        return torch.randint(0, 61, (n,), generator=draw)

    return TokenBatch(
        prompts=[some(7), some(1), some(4)],
        completions=[some(n) for n in (3, 1, 9, 2, 5, 4, 6, 2)],
        prompt=torch.tensor([0, 0, 0, 0, 1, 1, 2, 1]),
        labels=Labels(
            desirable=torch.tensor([True, False] * 4),
            pair=torch.tensor([1, 0, 3, 2, 5, 4, -1, -1]),
            mismatched=torch.tensor([False] * 6 + [True] * 2),
        ),
    )


def gradients(network: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal up to rounding; a gradient of zero and none at all are the same."""
    size = max(float(g.abs().max()) for g in theirs.values())
    for name in ours.keys() | theirs.keys():
        difference = ours.get(name, torch.zeros(())) - theirs.get(name, torch.zeros(()))
        assert difference.abs().max() <= 5e-6 * size, name


def of_transformers(network: Any, rows: TokenBatch) -> Tensor:
    """``aux_loss`` of the rows that carry a loss: prompts and completions without their last token, padded."""
    ids = [
        torch.cat([rows.prompts[p], completion[:-1]])
        for p, completion, train in zip(rows.prompt.tolist(), rows.completions, rows.labels.train.tolist(), strict=True)
        if train
    ]
    width = max(map(len, ids))
    real = torch.stack([torch.arange(width) < len(row) for row in ids]).long()
    padded = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in ids])
    network.config._attn_implementation = "sdpa"
    loss: Tensor = network(input_ids=padded, attention_mask=real, output_router_logits=True).aux_loss
    return loss


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("prefix_sharing", ["never", "always"])
@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_loss_of_transformers(name: str, prefix_sharing: Any, checkpointed: bool) -> None:
    network, rows = model(name), batch()
    loss = of_transformers(network, rows)
    loss.backward()
    expected = gradients(network)
    network.zero_grad()
    if checkpointed:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scores = Scorer(network, prefix_sharing=prefix_sharing)(rows, wanted="scores", needs=Needs(routing=True))
    step = LogProbBatch(scores.logps, None, completion_mask(rows), rows.labels, routing=scores.routing)
    ours = RouterLoss(weight=0.5)(step).loss
    ours.backward()
    assert 2 * ours.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_close({name: 2 * g for name, g in gradients(network).items()}, expected)


class _Recorded:
    """A reference whose log-probs do not matter."""

    def logps(self, rows: TokenBatch) -> Tensor:
        return -completion_mask(rows).float()


@pytest.mark.parametrize("objective", ["kto", "dpo", "aot_unpaired"])  # the last compares all rows of the step
def test_the_split_of_a_step_does_not_change_it(objective: str) -> None:
    parts = load_objective(ROOT / "experiments" / "objectives" / f"{objective}.yaml")
    results = []
    for micro_batch_rows in (None, 4, 2):
        network = model()
        scorer = Scorer(network, prefix_sharing="never" if micro_batch_rows == 2 else "always")
        engine = StepEngine(Sum([parts, RouterLoss(weight=0.5)]), scorer, _Recorded(), micro_batch_rows)  # type: ignore[arg-type]
        rows = batch() if parts.needs.mismatched else batch().select(torch.arange(6))
        results.append((sum(float(part.result.loss) for part in engine.step(rows)), gradients(network)))
    (loss, expected), *others = results
    for other, slopes in others:
        assert other == pytest.approx(loss, rel=1e-5)
        assert_close(slopes, expected)


# -- what a user sees ---------------------------------------------------------------------------------------

TERM = "--model.extra_terms=[{class_path: RouterLoss, init_args: {weight: 0.02}}]"


def test_a_model_without_experts_is_refused(tiny_folder: Path, tmp_path: Path, capfd: Any) -> None:
    message = refused(capfd, fit(tiny_folder, "kto", binary_data(tmp_path / "d.jsonl"), tmp_path / "run", TERM))
    assert "RouterLoss" in message
    assert "mixture of experts" in message


@pytest.mark.filterwarnings("ignore")
def test_a_fit_trains_and_logs_it(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelSpec(str(tiny_folder)))
    config = MixtralConfig(**SIZE | {"vocab_size": len(tokenizer)}, num_local_experts=4, output_router_logits=True)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = fit(tmp_path / "model", "kto", binary_data(tmp_path / "d.jsonl"), tmp_path / "run", TERM)
    main([*words, "--trainer.max_steps=2", "--model.micro_batch_rows=2"])
    header, first = (line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[:2])
    figures = dict(zip(header, first, strict=True))
    assert 0.02 * 2 <= float(figures["loss/1_RouterLoss"]) < 0.02 * 4  # 2 experts per token: 2 if balanced, 4 at most


def test_a_loss_that_the_config_enables_and_nothing_trains_is_named() -> None:
    """trl#1544."""

    def created(**options: Any) -> Any:
        return MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=2, **options))

    with pytest.warns(UserWarning, match=r"router_aux_loss_coef 0\.02.*RouterLoss, init_args: \{weight: 0\.02\}"):
        warn_of_ignored_losses(created(output_router_logits=True, router_aux_loss_coef=0.02), router_loss=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ignored_losses(created(output_router_logits=True, router_aux_loss_coef=0.02), router_loss=True)
        warn_of_ignored_losses(created(output_router_logits=False), router_loss=False)
        warn_of_ignored_losses(created(output_router_logits=True, router_aux_loss_coef=0.0), router_loss=False)
