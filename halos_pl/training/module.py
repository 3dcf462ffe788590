"""The LightningModule: plug-ins in, one optimizer step per batch.

Optimization stays automatic, so that clipping, loss scaling, closures (LBFGS) and DDP are Lightning's own. Only the
last micro-batch of a step is back-propagated by Lightning; the engine does the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import TokenBatch
from halos_pl.distributed import sum_over_ranks, world_size
from halos_pl.objective.build import build_objective
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import HALO, Objective
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import Reward
from halos_pl.policy.kl import completion_kl
from halos_pl.policy.limits import check_length, check_vocabulary, warn_of_ignored_losses
from halos_pl.policy.loading import ModelSpec, load_model, load_tokenizer
from halos_pl.policy.memory import keep_freed_memory
from halos_pl.policy.reference import AdapterOff, FrozenCopy, NoReference, ReferenceModel
from halos_pl.policy.sampling import PolicySamples
from halos_pl.policy.scorer import PrefixSharing, Scorer
from halos_pl.policy.store import ReferenceStore, StoredReference
from halos_pl.training import checkpoint_contents
from halos_pl.training.absent import keep_out_absent
from halos_pl.training.checks import check_clipping, check_float16, check_trainer
from halos_pl.training.engine import Part, StepEngine
from halos_pl.training.gradients import GradientWatch, clip_gradients
from halos_pl.training.held_out_figures import HeldOutFigures
from halos_pl.training.metrics import Losses, Means, Suspects, implied_reward, row_figures, with_margin
from halos_pl.training.non_finite import NonFiniteLossError, highest_lr, last_good, non_finite
from halos_pl.training.optim import MasterWeights, check_optimizer, prepared_optimizer
from halos_pl.training.predictions import records_of
from halos_pl.training.random_state import set_random_state
from halos_pl.training.resume import Record, align_logged_step
from halos_pl.training.settings import weights_sample
from value_functions import ValueFunction

if TYPE_CHECKING:
    Policy = ModelSpec | nn.Module
else:
    Policy = ModelSpec  # what a config may name


class HALOModule(LightningModule):
    """Aligns a language model with a human-aware loss.

    A batch of the DataModule is one optimizer step. ``micro_batch_rows`` splits it when memory is short, without
    changing the result (see :class:`~halos_pl.training.engine.StepEngine`).

    Args:
        policy: the model to align; in Python also a causal language model in memory.
        reference_model: where log pi_ref comes from. Null: the policy with its adapter off under LoRA, else a
            frozen copy; none is loaded where nothing needs it.
        reward: r(x, y), in nats.
        reference_point: z0, in nats.
        value_function: v.
        feedback: sign, weight and denominator of each row.
        reflect_undesirable: how undesirable rows are read: true for -v(-u), as the KTO paper does; false for +v(u).
        loss_offset: C of each row, in utility; it moves the loss, never its gradient.
        extra_terms: further terms of a composite; or the whole objective, where the above are null.
        micro_batch_rows: rows that are forwarded with gradient at a time; null for all rows of the step.
        prefix_sharing: ``always``: each prompt is computed once for all rows that share it (mismatched ones
            included), without padding. ``never``: each row is computed by itself. ``auto``: prompts are shared where a
            self-test finds the same log-probs; otherwise a line says why not.
        reference_store: keep the reference's log-probs on disk, by content, and take them from there: a further epoch
            or run over the same rows does not recompute them, and a run that finds all of them does not even load a
            ``FrozenCopy``. They are those of other batches, so equal to within rounding, not bit by bit.
        optimizer: makes the optimizer from the trainable parameters.
        lr_schedule: shape of the learning rate after warm-up; a name of ``transformers.get_scheduler``.
        warmup_ratio: share of the run's optimizer steps during which the learning rate rises from 0.
        master_weights: the optimizer steps on float32 copies of bfloat16 or float16 weights, as small updates would
            otherwise be rounded away. With AdamW it takes 18 bytes per trained parameter instead of 8 (float32: 16).
            Logged figures are those of the rounded weights: in the first steps at a small learning rate they lag behind
            those of a float32 run.

    Raises:
        ValueError: for an incomplete objective or a number outside its range.
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
        lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear",
        warmup_ratio: float = 0.1,
        master_weights: bool = True,
    ) -> None:
        super().__init__()
        parts = {name: value for name, value in locals().items() if name in _OBJECTIVE}
        options = {name: value for name, value in locals().items() if name in _OPTIONS}
        in_memory = isinstance(policy, nn.Module)
        if not in_memory and not isinstance(policy, ModelSpec):
            raise TypeError(
                f"policy is a {type(policy).__name__}; it takes a ModelSpec, such as ModelSpec(path), or a causal"
                " language model of transformers"
            )
        if micro_batch_rows is not None and micro_batch_rows < 1:
            raise ValueError(f"micro_batch_rows is {micro_batch_rows}; it must be at least 1, or null")
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {warmup_ratio}; it is a share of the run, between 0 and 1")
        if optimizer is None:
            raise ValueError("model.optimizer is null; name one, such as torch.optim.AdamW, or leave it out")
        self.objective = build_objective(**parts)
        if self.objective.needs.samples and self.objective.needs.mismatched:
            raise ValueError(
                "one term's reference point needs mismatched rows and another one's samples of the policy, which a step"
                " holds in the same place: give all terms the same kind of reference point"
            )
        self.policy_spec = policy if isinstance(policy, ModelSpec) else None
        self.scorer: Scorer | None = None
        # In a list, so as not to be a submodule twice.
        self._in_memory = [policy] if isinstance(policy, nn.Module) else []
        with_adapter = bool(self.policy_spec and self.policy_spec.lora) or hasattr(policy, "peft_config")
        self.reference_model = reference_model or (AdapterOff() if with_adapter else FrozenCopy())
        self.reference_bound = False
        self.reference: ReferenceModel | StoredReference | None = None
        if self.policy_spec is not None and self.objective.needs.reference:
            self.reference_model.check(self.policy_spec)
        if self.policy_spec and prefix_sharing == "always" and self.policy_spec.attn_implementation != "sdpa":
            raise ValueError(
                f"model.prefix_sharing is always, which takes sdpa attention, but model.policy.attn_implementation is"
                f" {self.policy_spec.attn_implementation}; choose auto or never"
            )
        if reference_store and not self.reference_model.storable and not isinstance(self.reference_model, NoReference):
            raise ValueError(
                f"model.reference_store is true, but log-probs of {type(self.reference_model).__name__} cannot be"
                " stored: it changes during the run, or has no fingerprint; say false, or choose FrozenCopy or"
                " AdapterOff"
            )
        self.micro_batch_rows, self.prefix_sharing = micro_batch_rows, prefix_sharing
        self.reference_store, self.make_optimizer = reference_store, optimizer
        self.lr_schedule, self.warmup_ratio, self.master_weights = lr_schedule, warmup_ratio, master_weights
        self.record = Record(
            policy=type(policy).__name__ if in_memory else policy,
            reference_model=self.reference_model,
            **parts,
            **options,
        )
        #: Names of the rows of the batch, and what its step logs.
        self.row_ids: list[str] = []
        self.figures: dict[str, float] = {}
        self._held_out = HeldOutFigures()
        self._gradients = GradientWatch()
        self._masters = MasterWeights([])
        self._deferred = False
        self._last_loss: Tensor | None = None
        self._rng_states: list[dict[str, Any]] | None = None

    # -- models ---------------------------------------------------------------------------------------

    @property
    def policy(self) -> Any:
        """The model that is trained; None before it is loaded."""
        return self.scorer.model if self.scorer is not None else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded without the model. Assign it for a model in memory that has no folder."""
        return load_tokenizer(self.policy_spec or ModelSpec(str(self._in_memory[0].name_or_path)))

    @property
    def halo(self) -> HALO | None:
        """The HALO whose outcomes are reported, None for a pure baseline."""
        return next((m for m in self.objective.modules() if isinstance(m, HALO)), None)

    @property
    def reference_rows(self) -> dict[str, int]:
        """Rows whose reference log-probs were found in the store, and those that were computed."""
        return {
            "stored": getattr(self.reference, "rows_stored", 0),
            "computed": getattr(self.reference, "rows_computed", 0),
        }

    @property
    def engine(self) -> StepEngine:
        """What computes the steps, with the models as they are now."""
        assert self.scorer is not None
        samples = self.objective.needs.samples
        sampler = PolicySamples(self.scorer, self.tokenizer, samples) if samples else None
        return StepEngine(self.objective, self.scorer, self.reference, self.micro_batch_rows, sampler)

    def configure_callbacks(self) -> list[Callback]:
        """Connects the data to the tokenizer and the objective; no other hook comes before ``prepare_data``."""
        connect = getattr(getattr(self.trainer, "datamodule", None), "connect", None)
        if connect is not None:
            connect(tokenizer=lambda: self.tokenizer, needs=self.objective.needs)
        return []

    def setup(self, stage: str) -> None:
        """Refuses what would silently train something else."""
        check_trainer(self.trainer)
        keep_out_absent(self.trainer)
        if stage == "fit":
            self.check_fit(self.trainer)

    def check_fit(self, trainer: Any) -> None:
        """Refuses, before a model is loaded, settings that it cannot be trained with.

        Raises:
            ValueError: naming the setting.
        """
        lora = self.policy_spec.lora if self.policy_spec else None
        check_float16(trainer, self.policy_spec.dtype if self.policy_spec else "")
        check_optimizer(self.make_optimizer, trainer.strategy.root_device, vectors=lora is None)

    def load_policy(self) -> None:
        """Loads the policy as it was before training, on the CPU."""
        self.scorer = self._scorer()

    def configure_model(self) -> None:
        """Loads policy and reference, after the data have been validated."""
        fresh = self.scorer is None
        if fresh:
            self.load_policy()
            self.record.start = weights_sample(self.policy)
            if self.trainer.state.fn == TrainerFn.FITTING:
                warn_of_ignored_losses(self.policy)
        self._check_rows(self.policy)
        # Testing measures the KL divergence, so there even a loss that needs no reference gets one.
        wanted = self.objective.needs.reference or (
            self.trainer.testing and not isinstance(self.reference_model, NoReference)
        )
        if wanted and not self.reference_bound:
            # The policy may have been trained since it was loaded, by a fit that needed no reference.
            start = self.scorer if fresh or self.policy_spec is None else self._scorer()
            assert start is not None
            self.bind_reference(start)

    def _scorer(self) -> Scorer:
        # transformers loads in eval mode; the only difference here is gradient checkpointing (dropout is off).
        spec = self.policy_spec
        model = load_model(spec) if spec else self._in_memory[0]
        compiled = spec is not None and spec.compile
        return Scorer(model.train(), prefix_sharing=self.prefix_sharing, compiled=compiled, name="the policy")

    def bind_reference(self, start: Scorer) -> None:
        """Makes the reference of the policy as it was before training, ``start``."""
        self.reference_model.bind(start, self.policy_spec, stored=self.reference_store)
        self.reference_bound = True
        if self.reference_store:
            assert self.scorer is not None
            scorer = self.scorer
            self.reference = StoredReference(self.reference_model, ReferenceStore(), lambda: scorer.numerics)
        else:
            self.reference = self.reference_model
            with self.reference.scoring() as scorer:
                self._check_rows(scorer.model)

    def _check_rows(self, model: nn.Module) -> None:
        """Refuses rows that are too long for a model, or hold tokens that it does not know."""
        data: Any = getattr(self.trainer, "datamodule", None)
        check_length(model, getattr(data, "longest", 0))
        if hasattr(data, "tokens"):
            check_vocabulary(model, self.tokenizer, data.tokens())

    # -- training -------------------------------------------------------------------------------------

    def training_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step. All micro-batches but the last are back-propagated here, the last by Lightning.

        Returns:
            ``loss`` of the last micro-batch, with gradient; for a HALO, of this rank's rows, also ``outcome``
            (u in nats, float [n]) and ``desirable`` (BoolTensor [n]).
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self._masters.begin_pass()
        self.row_ids = _row_ids(batch)
        parts = self.engine.step(batch, backward=self._back_propagate, defer_sync=self._more_follow)
        self._log_step(parts, len(batch))
        output: dict[str, Any] = {"loss": self._last_loss}
        self._last_loss = None
        if outcomes := [part.result.outcomes.outcome for part in parts if part.result.outcomes]:
            desirable = [part.rows.labels.desirable for part in parts]
            output |= {"outcome": torch.cat(outcomes), "desirable": torch.cat(desirable)}
        return output

    def _back_propagate(self, loss: Tensor) -> None:
        if self._deferred:
            self.trainer.strategy.backward(loss, None)
        else:
            self._last_loss = loss

    @contextmanager
    def _more_follow(self) -> Iterator[None]:
        """While entered, what is back-propagated is not the step's last micro-batch.

        DDP synchronizes in the backward pass that follows the forward pass of the whole module, which is Lightning's.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _log_step(self, parts: list[Part], rows: int) -> None:
        means, losses, suspects = Means(), Losses(), Suspects()
        for part in parts:
            losses.add(part.result)
            means.add(row_figures(part.rows, part.result, self.halo))
            suspects.add(part.row_ids, part.rows, part.result)
        # Losses of the ranks sum to the step's, so one rank counts for all of them.
        once = torch.tensor(float(self.global_rank == 0), dtype=torch.float32, device=self.device)
        means.add({name: (value, once) for name, value in losses.items()})
        self.figures = with_margin(means.compute())
        if not math.isfinite(self.figures["loss"]):
            sound = all(bool(part.rows.policy_logps.isfinite().all()) for part in parts)
            what = f"the loss is {self.figures['loss']}"
            raise non_finite(self, what, self.row_ids, suspects.names, diverged=not sound)
        in_bar: dict[str, Any] = {
            name: self.figures[name] for name in ("loss", "rewards/margins") if name in self.figures
        }
        self.log_dict({k: v for k, v in self.figures.items() if k not in in_bar}, batch_size=rows)
        self.log_dict(in_bar, prog_bar=True, batch_size=rows)

    def check_policy(self, batch: TokenBatch) -> None:
        """Checks on one row that the last step has not made the policy diverge; of earlier steps the next loss tells.

        Raises:
            NonFiniteLossError: where the policy has no finite log-probs for it.
        """
        assert self.scorer is not None
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=cuda), self.trainer.precision_plugin.train_step_context():
            logps = self.scorer(batch.select(torch.tensor([0], device=self.device)))
        if float(sum_over_ranks((~logps.isfinite()).any().float())):
            raise NonFiniteLossError(
                f"after the last optimizer step, {self.global_step}, the policy has no finite log-probs for"
                f" {batch.row_ids[0]}: it has diverged. Lower the learning rate (model.optimizer.init_args.lr).\n"
                + last_good(self.trainer, self.global_step)
            )

    # -- evaluation -----------------------------------------------------------------------------------

    def _evaluated(self, batch: TokenBatch) -> Iterator[Part]:
        """The parts of a batch.

        Raises:
            NonFiniteLossError: on every rank, after the last part, where a row of any rank has no finite figures.
        """
        self.row_ids = _row_ids(batch)
        suspects = Suspects()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for part in self.engine.evaluate(batch, self.global_step):
            suspects.add(part.row_ids, part.rows, part.result)
            loss = loss + part.result.loss
            yield part
        wrong = torch.tensor(float(bool(suspects.names)), device=loss.device) + (~loss.isfinite()).float()
        if bool(sum_over_ranks(wrong) > 0):
            self._held_out.reset()
            raise non_finite(
                self, f"a held-out figure is not finite (loss {loss.item()})", self.row_ids, suspects.names
            )

    def _measured(self, batch: TokenBatch) -> Iterator[Part]:
        losses = Losses()
        for part in self._evaluated(batch):
            losses.add(part.result)
            figures = row_figures(part.rows, part.result, self.halo)
            self._held_out.add(part, figures, implied_reward(part.rows, part.result))
            yield part
        self._held_out.add_losses(losses, batch.labels.train.sum())

    def _log_held_out(self, prefix: str) -> None:
        # The figures are those of all ranks already: the same on each, and their mean with them.
        figures = self._held_out.compute(self.device)
        self.log_dict({f"{prefix}/{name}": value for name, value in figures.items()}, sync_dist=True)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Adds a batch to the held-out figures."""
        for _ in self._measured(batch):
            pass

    def on_validation_epoch_end(self) -> None:
        """Logs them under ``val/``."""
        self._log_held_out("val")

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """As in validation, and the exact token-level KL divergence along the held-out completions."""
        for part in self._measured(batch):
            if self.scorer is not None and self.reference is not None:
                kl = completion_kl(self.scorer, self.reference, part.batch.select(part.index))
                tokens = part.rows.mask.sum().float()
                count = kl.new_tensor(float(len(kl)))
                self._held_out.means.add({"kl/sequence": (kl.sum(), count), "kl/token": (kl.sum(), tokens)})

    def on_test_epoch_end(self) -> None:
        """Logs under ``test/``."""
        self._log_held_out("test")

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per row: log-probs, r, z0, u (nats) and value.

        Raises:
            NonFiniteLossError: where one of them is not a finite number, which JSON does not know.
        """
        return [record for part in self._evaluated(batch) for record in records_of(part)]

    # -- optimizer ------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The optimizer over trainable parameters, and its schedule by optimizer step.

        Raises:
            ValueError: where the optimizer does not take its settings, or nothing limits the steps.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        self._masters = MasterWeights(trained if self.master_weights else [])
        optimizer, schedule = prepared_optimizer(
            self.make_optimizer,
            self._masters,
            trained,
            kind=self.lr_schedule,
            warmup_ratio=self.warmup_ratio,
            steps=self.trainer.estimated_stepping_batches,
            changed=self.record.add,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_after_backward(self) -> None:
        """Moves the gradients to the weights that the optimizer steps on."""
        # Several ranks sum them in the step's last backward pass, so they must not be moved before.
        if not self._deferred or world_size() == 1:
            self._masters.take_gradients()

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: gradients of earlier micro-batches are already there; ``training_step`` has zeroed before."""

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer says, by the norm that is logged as ``grad_norm``: the one before clipping.

        Raises:
            NonFiniteLossError: where it is not finite, so that the step would make the policy NaN.
            ValueError: for an invalid clipping value, which a callback may have set.
        """
        check_clipping(gradient_clip_val, gradient_clip_algorithm)
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            # float16's scaler skips such steps, and knows the scale.
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            how = gradient_clip_val, gradient_clip_algorithm
            self.log("grad_norm", clip_gradients(self, self._gradients, optimizer, *how))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, and lets a reference that follows the policy follow it before anything is saved."""
        super().optimizer_step(*args, **kwargs)
        if self.reference_bound:
            self.reference_model.follow(self.global_step + 1)  # counted once this hook returns

    # -- a run's beginning and end --------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :func:`halos_pl.training.checkpoint_contents.fill`."""
        checkpoint_contents.fill(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :func:`halos_pl.training.checkpoint_contents.take`."""
        checkpoint_contents.take(self, checkpoint)
        self._rng_states = checkpoint.get("rng_states")

    def on_fit_start(self) -> None:
        """Makes a step on the CPU spend less on memory."""
        if self.device.type == "cpu":
            keep_freed_memory()

    def on_train_start(self) -> None:
        """Restores the random state last, after everything that draws numbers while a run is set up."""
        self.record.say(self.trainer)
        if self._rng_states and self.global_rank < len(self._rng_states):
            set_random_state(self._rng_states[self.global_rank], self.device)
        self._rng_states = None

    def on_train_epoch_start(self) -> None:
        """Refuses settings that a callback has changed since the run began."""
        check_trainer(self.trainer)

    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> None:
        """Logs the step under the number of optimizer steps before it."""
        align_logged_step(self.trainer)

    def on_train_end(self) -> None:
        """Says what applies to all steps of the run."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self._gradients.finish(
            self.trainer.gradient_clip_val,
            lr=highest_lr(self.optimizers()),
            scale=scaler.get_scale() if scaler is not None else None,
        )


_OBJECTIVE = {
    *("reward", "reference_point", "value_function", "feedback", "reflect_undesirable", "loss_offset", "extra_terms"),
}
_OPTIONS = {
    *("micro_batch_rows", "prefix_sharing", "reference_store", "lr_schedule", "warmup_ratio", "master_weights"),
}


def _row_ids(batch: TokenBatch) -> list[str]:
    return [name for name, train in zip(batch.row_ids, batch.labels.train.tolist(), strict=True) if train]
