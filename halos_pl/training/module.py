"""The LightningModule: built from plug-ins, one optimizer step per batch.

Optimization stays automatic, so clipping, loss scaling, closures (LBFGS) and DDP are Lightning's own. Lightning
back-propagates the last micro-batch of a step, the engine the others.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import TokenBatch
from halos_pl.distributed import world_size
from halos_pl.objective.build import OF_THE_OBJECTIVE, build_objective
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import Objective
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from halos_pl.policy.loading import ModelSpec
from halos_pl.policy.memory import keep_freed_memory
from halos_pl.policy.quantization import check_gradients
from halos_pl.policy.reference import ReferenceModel
from halos_pl.policy.sampling import PolicySamples
from halos_pl.policy.scorer import PrefixSharing, Scorer
from halos_pl.policy.sharding import average_plain_gradients
from halos_pl.training import checkpoint_contents
from halos_pl.training.absent import keep_out_absent
from halos_pl.training.checks import check_arguments, check_trainer
from halos_pl.training.clamped import ClampWatch
from halos_pl.training.displaced import DisplacementWatch
from halos_pl.training.engine import Deferral, StepEngine
from halos_pl.training.gradients import GradientWatch, clip_gradients, finish_watch
from halos_pl.training.guards import check_fit, check_loaded, check_setup
from halos_pl.training.held_out import HeldOut
from halos_pl.training.models import Models, Policy
from halos_pl.training.non_finite import check_policy
from halos_pl.training.optim import LRShape, MasterWeights, configured_optimizer
from halos_pl.training.predictions import records_of
from halos_pl.training.resume import Record, align_logged_step
from halos_pl.training.settings import weights_sample
from halos_pl.training.step_log import StepFigures, outcomes_of
from halos_pl.training.watch import Watch
from value_functions import ValueFunction


class HALOModule(LightningModule):
    """Aligns a language model with a human-aware loss.

    A batch of the DataModule is one optimizer step. ``micro_batch_rows`` splits it when memory is short, without
    changing the result (see :class:`~halos_pl.training.engine.StepEngine`).

    Args:
        policy: the model to align; in Python, also a causal language model in memory.
        reference_model: source of log pi_ref. Null: the policy with its adapter off under LoRA, otherwise a frozen
            copy; none is loaded if nothing needs it.
        reward: r(x, y), in nats.
        reference_point: z0, in nats.
        value_function: v.
        feedback: sign, weight and denominator of each row.
        reflect_undesirable: value of undesirable rows: true for -v(-u), as in the KTO paper; false for +v(u).
        loss_offset: constant C of each row, in utility; it shifts the loss, never its gradient.
        extra_terms: further terms of a composite, or the whole objective if the above are null.
        micro_batch_rows: number of rows per forward pass with gradient; null for all rows of the step.
        prefix_sharing: ``always``: each prompt is computed once for all rows that share it (mismatched ones
            included), without padding. ``never``: each row is computed separately. ``auto``: prompts are shared if a
            self-test finds the same log-probs; otherwise a log line gives the reason.
        reference_store: whether to keep the reference's log-probs on disk, by content, and reuse them in later epochs
            and runs; a run that finds all of them does not even load a ``FrozenCopy``. They were computed in other
            batches, so they are equal within rounding, not bit for bit.
        optimizer: a callable that makes the optimizer from the trainable parameters.
        lr_schedule: shape of the learning rate after warm-up, a name from ``transformers.get_scheduler``.
        warmup_ratio: share of the run's optimizer steps during which the learning rate rises from 0.
        master_weights: whether the optimizer steps on float32 copies of bfloat16 or float16 weights, as small updates
            would be rounded away. With AdamW: 18 bytes per trained parameter instead of 8 (float32: 16). Logged figures
            are those of the rounded weights, which lag behind at first if the learning rate is small.

    Raises:
        TypeError: if the policy is not a model.
        ValueError: if the objective is incomplete or a number is out of range.
    """

    def __init__(
        self,
        policy: Policy,
        reference_model: ReferenceModel | None = None,
        reward: Reward | None = None,
        reference_point: ReferencePoint | None = None,
        value_function: ValueFunction | None = None,
        feedback: Feedback | None = None,
        reflect_undesirable: bool | None = None,
        loss_offset: float = 0.0,
        extra_terms: list[Objective] | None = None,
        micro_batch_rows: int | None = None,
        prefix_sharing: PrefixSharing = "auto",
        reference_store: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-6, weight_decay=0.0, fused=True),
        lr_schedule: LRShape = "linear",
        warmup_ratio: float = 0.1,
        master_weights: bool = True,
    ) -> None:
        super().__init__()
        arguments = locals()
        check_arguments(**{k: arguments[k] for k in inspect.signature(check_arguments).parameters})
        self.objective = build_objective(**{k: arguments[k] for k in OF_THE_OBJECTIVE})
        self.models = Models(
            policy,
            reference_model,
            needs=self.objective.needs,
            prefix_sharing=prefix_sharing,
            reference_store=reference_store,
        )
        self.scorer: Scorer | None = None
        self.micro_batch_rows, self.make_optimizer = micro_batch_rows, optimizer
        self.lr_schedule, self.warmup_ratio, self.master_weights = lr_schedule, warmup_ratio, master_weights
        self.record = Record(
            **{name: arguments[name] for name in _RECORDED},
            policy=policy if isinstance(policy, ModelSpec) else type(policy).__name__,
            reference_model=self.models.reference_model,
        )
        #: Names of the batch's rows, and the figures that its step logs.
        self.row_ids: list[str] = []
        self.figures: dict[str, float] = {}
        self._held_out, self._gradients = HeldOut(self), GradientWatch()
        self._watches: list[Watch[Any]] = [ClampWatch()]
        if self.models.reference_model.initial:
            self._watches.append(DisplacementWatch())
        self._masters, self._deferral = MasterWeights([]), Deferral()
        self._last_loss: Tensor | None = None
        self._step: StepFigures | None = None
        self.rng_states: list[dict[str, Any]] | None = None

    @property
    def policy(self) -> Any:
        """The model that is trained, a transformers or peft model; None before it is loaded."""
        return self.scorer.model if self.scorer is not None else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; assign one for a model in memory whose folder has none."""
        return self.models.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.models.tokenizer = tokenizer

    @property
    def engine(self) -> StepEngine:
        """The engine that computes the steps, with the current models."""
        assert self.scorer is not None
        sampler = PolicySamples(self.scorer, self.tokenizer, n) if (n := self.objective.needs.samples) else None
        return StepEngine(self.objective, self.scorer, self.models.reference, self.micro_batch_rows, sampler)

    def configure_callbacks(self) -> list[Callback]:
        """Connects the data to the tokenizer and the objective; no other hook runs before ``prepare_data``."""
        connect = getattr(getattr(self.trainer, "datamodule", None), "connect", None)
        if connect is not None:
            connect(tokenizer=lambda: self.tokenizer, needs=self.objective.needs)
        return []

    def setup(self, stage: str) -> None:
        check_setup(self, self.trainer, stage)
        keep_out_absent(self.trainer)
        self.models.sharding = getattr(self.trainer.strategy, "sharding", None)
        self.models.load_in(str(self.trainer.precision))

    def configure_model(self) -> None:
        """Loads policy and reference once the data have been validated."""
        fresh, data = self.scorer is None, getattr(self.trainer, "datamodule", None)
        if fresh:
            self.scorer = self.models.policy()
            frozen = self.scorer._ddp_params_and_buffers_to_ignore
            self._ddp_params_and_buffers_to_ignore = [f"scorer.{name}" for name in frozen]
            check_loaded(self)
            self.record.start = weights_sample(self.policy)
        assert self.scorer is not None
        self.models.check_rows(self.scorer, data)
        # Testing measures the KL divergence, so even a loss that needs no reference gets one.
        wanted = self.objective.needs.reference or (self.trainer.testing and self.models.can_compare)
        if wanted and not self.models.bound:
            self.models.bind(self.scorer, fresh=fresh, data=data)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step. All micro-batches but the last are back-propagated here, the last by Lightning.

        Returns:
            ``loss`` of the last micro-batch, with gradient; for a HALO, also this rank's ``outcome`` (u in nats,
            float [n]) and ``desirable`` (BoolTensor [n]).
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self._masters.begin_pass()
        self.row_ids = batch.train_ids
        parts = self.engine.step(batch, backward=self._back_propagate, defer_sync=self._deferral)
        self._step = StepFigures(self, parts)
        loss, self._last_loss = self._last_loss, None
        return {"loss": loss} | outcomes_of(parts)

    def _back_propagate(self, loss: Tensor) -> None:
        if self._deferral.active:
            self.trainer.strategy.backward(loss, None)
        else:
            self._last_loss = loss

    check_fit, check_policy = check_fit, check_policy

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        for _ in self._held_out.measured(batch):
            pass

    def on_validation_epoch_end(self) -> None:
        self._held_out.log("val")

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Like validation, plus the exact token-level KL divergence along the held-out completions."""
        for part in self._held_out.measured(batch):
            batch = part.batch
        if self.models.reference is not None:
            for kl, tokens in self.engine.divergences(batch):
                self._held_out.add_kl(kl, tokens)

    def on_test_epoch_end(self) -> None:
        self._held_out.log("test")

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per row: log-probs, r, z0, u (nats) and value.

        Raises:
            NonFiniteLossError: if one of them is not finite, which JSON cannot express.
        """
        return [record for part in self._held_out.parts(batch) for record in records_of(part)]

    def configure_optimizers(self) -> Any:
        """The optimizer of the trainable parameters, and its schedule by optimizer step.

        Raises:
            ValueError: if the optimizer rejects its settings, or nothing limits the number of steps.
        """
        self._masters, configured = configured_optimizer(self)
        return configured

    def on_after_backward(self) -> None:
        """Moves the gradients to the weights that the optimizer steps on."""
        # DDP sums the ranks' gradients in the step's last backward pass, so they must not be moved before.
        if not self._deferral.active or world_size() == 1 or self.models.sharding:
            self._masters.take_gradients()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Averages over the ranks the gradients that FSDP does not: those of an adapter or of the objective."""
        if self.models.sharding:
            average_plain_gradients(p for group in optimizer.param_groups for p in group["params"])

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: ``training_step`` zeroes gradients, and those of earlier micro-batches must stay."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips, and logs the step: the first moment when the whole gradient is known, and the last to stop."""
        assert self._step is not None
        step, self._step = self._step, None
        clip_gradients(self, self._gradients, step, optimizer, gradient_clip_val, gradient_clip_algorithm)
        for watch in self._watches:
            watch.see(self.figures)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, and updates a reference that follows the policy before anything is saved."""
        super().optimizer_step(*args, **kwargs)
        if self.models.bound:
            self.models.reference_model.follow(self.global_step + 1)  # counted once this hook returns

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint_contents.fill(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint_contents.take(self, checkpoint)

    def on_fit_start(self) -> None:
        keep_freed_memory(self.device)
        if self.device.type != "cpu" and self.models.sharding is None:  # tested on the CPU when it was loaded
            check_gradients(self.policy)

    def on_train_start(self) -> None:
        """Restores the random state last, after everything that draws numbers during setup."""
        self.record.say(self.trainer)
        checkpoint_contents.restore_random_state(self)

    def on_train_epoch_start(self) -> None:
        check_trainer(self.trainer)  # a callback may have changed its settings

    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> None:
        align_logged_step(self.trainer)

    def on_train_end(self) -> None:
        finish_watch(self, self._gradients)
        for watch in self._watches:
            watch.finish()


#: Arguments that a checkpoint stores unchanged.
_RECORDED = (
    *OF_THE_OBJECTIVE,
    *("micro_batch_rows", "prefix_sharing", "reference_store", "lr_schedule", "warmup_ratio", "master_weights"),
)
