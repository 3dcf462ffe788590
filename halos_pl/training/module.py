"""The LightningModule: four plug-ins, a policy, a reference, and one optimizer step per batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.classification import BinaryAUROC
from transformers import PreTrainedTokenizerBase

from halos_pl.batch import Labels, LogProbBatch, TokenBatch
from halos_pl.data.turns import stop_ids
from halos_pl.distributed import sum_over_ranks, world_size
from halos_pl.objective.build import build_objective
from halos_pl.objective.feedback import Feedback
from halos_pl.objective.halo import HALO, Context, Objective, Result
from halos_pl.objective.reference_points import ReferencePoint
from halos_pl.objective.rewards import LogRatio, Reward
from halos_pl.policy.auxiliary import warn_of_ignored_losses
from halos_pl.policy.limits import check_length, check_vocabulary
from halos_pl.policy.loading import (
    ModelError,
    ModelSpec,
    compile_layers,
    frequencies,
    load_model,
    load_tokenizer,
)
from halos_pl.policy.logprobs import completion_kl, completion_logps, completion_mask, pack, padding_fault
from halos_pl.policy.memory import keep_freed_memory
from halos_pl.policy.reference import AdapterOff, FrozenCopy, NoReference, ReferenceModel
from halos_pl.policy.sampling import sample_tokens
from halos_pl.policy.store import ReferenceStore, keys
from halos_pl.policy.tree import is_packed
from halos_pl.training.absent import keep_out_absent
from halos_pl.training.checkpoint import LastCheckpoint, check_finite, entry_kind
from halos_pl.training.gradients import GradientWatch, mostly_cut
from halos_pl.training.metrics import (
    Losses,
    Means,
    Suspects,
    Weighted,
    into_unit_interval,
    logp_figures,
    outcome_figures,
    reward_figures,
    with_margin,
)
from halos_pl.training.optim import LostUpdates, MasterWeights, Schedule, check_optimizer, guard, made
from halos_pl.training.resume import Record, align_logged_step, finished_progress
from halos_pl.training.settings import weights_sample
from value_functions import ValueFunction, reward_scale


class NonFiniteLossError(FloatingPointError):
    """The loss of a step is not a finite number; the message names its rows and the last checkpoint."""


class HALOModule(LightningModule):
    """Aligns a language model with a human-aware loss.

    A batch of the DataModule is one optimizer step. ``micro_batch_rows`` splits it when memory is short,
    without changing the result: mismatched rows first, z0 once for the whole step and all ranks, then the rows with
    gradient (a pair stays together), with one denominator for the step.

    Args:
        policy: the model to align.
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
            or run over the same rows does not compute them again, and a run that finds all of them does not
            even load a ``FrozenCopy``. They are those of other batches, so equal to within rounding, not bit by bit.
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
        policy: ModelSpec,
        reference_model: ReferenceModel | None = None,
        reward: Reward | None = None,
        reference_point: ReferencePoint | None = None,
        value_function: ValueFunction | None = None,
        feedback: Feedback | None = None,
        reflect_undesirable: bool | None = None,
        loss_offset: float = 0.0,
        extra_terms: list[Objective] | None = None,
        micro_batch_rows: int | None = None,
        prefix_sharing: Literal["auto", "always", "never"] = "auto",
        reference_store: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-6, weight_decay=0.0, fused=True),
        lr_schedule: Literal["constant_with_warmup", "linear", "cosine"] = "linear",
        warmup_ratio: float = 0.1,
        master_weights: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(policy, ModelSpec):
            raise TypeError(
                f"policy is a {type(policy).__name__}; it takes a ModelSpec, such as ModelSpec(path). Save a model and"
                ' its tokenizer with save_pretrained("folder"), and give ModelSpec("folder")'
            )
        if micro_batch_rows is not None and micro_batch_rows < 1:
            raise ValueError(f"micro_batch_rows is {micro_batch_rows}; it must be at least 1, or null")
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {warmup_ratio}; it is a share of the run, between 0 and 1")
        parts: dict[str, Any] = {
            "reward": reward,
            "reference_point": reference_point,
            "value_function": value_function,
            "feedback": feedback,
            "reflect_undesirable": reflect_undesirable,
            "loss_offset": loss_offset,
            "extra_terms": extra_terms,
        }
        self.objective = build_objective(**parts)
        if self.objective.needs.samples and self.objective.needs.mismatched:
            raise ValueError(
                "one term's reference point wants mismatched rows and another one's samples of the policy; both are"
                " mismatched rows, so a step cannot hold the two: give all terms the same kind of reference point"
            )
        self.policy_spec = policy
        self.micro_batch_rows = micro_batch_rows
        self.prefix_sharing = prefix_sharing
        if optimizer is None:
            raise ValueError("model.optimizer is null; name one, such as torch.optim.AdamW, or leave it out")
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.warmup_ratio = warmup_ratio
        self.master_weights = master_weights
        self._masters = MasterWeights([])
        self._parts_follow = False
        self.policy: nn.Module | None = None
        self._reference = reference_model or (AdapterOff() if policy.lora else FrozenCopy())
        self._reference_bound = False
        self._reference_packed = False
        if self.objective.needs.reference:
            self._reference.check(policy)
        if prefix_sharing == "always" and policy.attn_implementation != "sdpa":
            raise ValueError(
                f"model.prefix_sharing is always, which takes sdpa attention, but model.policy.attn_implementation is"
                f" {policy.attn_implementation}; choose auto or never"
            )
        if reference_store and not self._reference.storable and not isinstance(self._reference, NoReference):
            raise ValueError(
                f"model.reference_store is true, but log-probs of {type(self._reference).__name__} cannot be stored: it"
                " changes during the run, or has no fingerprint; say false, or choose FrozenCopy or AdapterOff"
            )
        self.reference_store = reference_store
        self._store: ReferenceStore | None = None
        #: Rows whose reference log-probs were found in the store, and those that were computed.
        self.reference_rows = {"stored": 0, "computed": 0}
        self._means = Means()
        self._auroc = BinaryAUROC()
        self._gradients = GradientWatch()
        self._shown: dict[str, float] = {}  # what the step logs
        self._rng_states: list[dict[str, Any]] | None = None
        self._frequencies: list[tuple[nn.Module, str, Tensor]] = []
        self.record = Record(
            policy=policy,
            reference_model=self._reference,
            **parts,
            micro_batch_rows=micro_batch_rows,
            prefix_sharing=prefix_sharing,
            reference_store=reference_store,
            lr_schedule=lr_schedule,
            warmup_ratio=warmup_ratio,
            master_weights=master_weights,
        )

    # -- models ---------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded without the model."""
        return load_tokenizer(self.policy_spec)

    @property
    def halo(self) -> HALO | None:
        """The HALO whose outcomes are reported, None for a pure baseline."""
        return next((m for m in self.objective.modules() if isinstance(m, HALO)), None)

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
        check_float16(trainer, self.policy_spec)
        check_optimizer(self.make_optimizer, trainer.strategy.root_device, vectors=self.policy_spec.lora is None)

    def configure_model(self) -> None:
        """Loads policy and reference, after the data have been validated."""
        fresh = self.policy is None
        if self.policy is None:
            # transformers loads in eval mode; the only difference here is gradient checkpointing (dropout is off).
            self.policy = load_model(self.policy_spec).train()
            self._frequencies = [(module, name, values.clone()) for module, name, values in frequencies(self.policy)]
            self._prepare(self.policy, "the policy")
            self.record.start = weights_sample(self.policy)
            if self.trainer.state.fn == TrainerFn.FITTING:
                warn_of_ignored_losses(self.policy)
        self._check_fit(self.policy)
        # Testing measures the KL divergence, so there even a loss that needs no reference gets one.
        wanted = self.objective.needs.reference or (
            self.trainer.testing and not isinstance(self._reference, NoReference)
        )
        if wanted and not self._reference_bound:
            self._store = ReferenceStore() if self.reference_store else None
            # The policy may have been trained since it was loaded, by a fit that needed no reference.
            start = self.policy if fresh else load_model(self.policy_spec).train()
            self._reference.bind(start, self.policy_spec, stored=self.reference_store)
            self._reference_bound = True
            if self._store is None:
                with self.scoring():
                    pass

    def _check_fit(self, model: nn.Module) -> None:
        """Refuses rows that are too long for a model, or hold tokens that it does not know."""
        data: Any = getattr(self.trainer, "datamodule", None)
        check_length(model, getattr(data, "longest", 0))
        if hasattr(data, "tokens"):
            check_vocabulary(model, self.tokenizer, data.tokens())

    @contextmanager
    def scoring(self) -> Iterator[nn.Module]:
        """The reference, ready for use; entered for the first time it may have to be loaded."""
        assert self.policy is not None
        with self._reference.scoring(self.policy) as model:
            if not self._reference_packed:
                self._check_fit(model)
                self._prepare(model, "the reference model")
                self._reference_packed = True
            yield model

    @torch.no_grad()
    def reference_logps(self, batch: TokenBatch) -> Tensor:
        """Log-probs of the rows under the reference, float32 [n, T], from the store where they are there."""
        known: dict[bytes, Tensor] = {}
        names: list[bytes] = []
        missing = list(range(len(batch)))
        if self._store is not None:
            device = batch.prompt.device.type
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            dtype = next(cast(nn.Module, self.policy).parameters()).dtype
            kinds = {module._buffers[name].dtype for module, name, _ in self._frequencies} - {dtype}  # type: ignore[union-attr]
            numerics = (dtype, autocast, *kinds, device, torch.get_float32_matmul_precision())
            names = keys(" ".join(map(str, (self._reference.fingerprint, *numerics))), batch)
            known = self._store.get(names)
            missing = [i for i in missing if names[i] not in known]
        self.reference_rows["computed"] += len(missing)
        self.reference_rows["stored"] += len(batch) - len(missing)
        if missing:
            part = batch.select(torch.tensor(missing, device=batch.prompt.device))
            with self.scoring() as model:
                found = completion_logps(model, part)
            if self._store is None:
                return found
            fresh = {names[i]: row[: len(batch.completions[i])] for i, row in zip(missing, found, strict=True)}
            self._store.put(fresh)
            known |= fresh
        return pad_sequence([known[name].to(batch.prompt.device) for name in names], batch_first=True)

    def _prepare(self, model: nn.Module, name: str) -> None:
        """Makes a model share prompts between rows, as ``prefix_sharing`` says, and compiles it where that is wanted.

        Raises:
            ModelError: where that is demanded of a model that cannot.
        """
        # A reference may be loaded in the middle of a step, under autocast: what rounding is would be another thing.
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            why = None if self.prefix_sharing == "never" else pack(model)
            wrong = None if is_packed(model) else padding_fault(model)
        if why and self.prefix_sharing == "always":
            raise ModelError(
                f"model.prefix_sharing is always, but {name} cannot share prompts: {why}; choose auto or never"
            )
        if why:
            rank_zero_info(f"halos: {name} computes each row by itself: {why}")
        if wrong:
            raise ModelError(f"{name} cannot be used: {wrong}")
        if self.policy_spec.compile:
            compile_layers(model)

    # -- one step -------------------------------------------------------------------------------------

    def _score(self, batch: TokenBatch, index: Tensor, *, gradient: bool, known: Tensor | None = None) -> LogProbBatch:
        """Log-probs of the rows ``index`` under policy and reference, padded to the whole batch's width.

        ``known`` are those under the reference of all rows, where an earlier pass of the step has computed them.
        """
        assert self.policy is not None
        part = batch.select(index)
        width = completion_mask(batch).shape[1]
        # The reference first, before the policy's activations take up memory.
        if known is not None:
            reference: Tensor | None = known[index]
        else:
            reference = self.reference_logps(part) if self._reference_bound else None
        with torch.set_grad_enabled(gradient):
            policy = completion_logps(self.policy, part)
        kl = None
        mismatched = part.labels.mismatched.nonzero().squeeze(1)
        if self.objective.needs.exact_kl and len(mismatched):
            found = completion_kl(self.policy, self.scoring(), part.select(mismatched))
            kl = torch.zeros_like(policy, requires_grad=False)
            kl[mismatched, : found.shape[1]] = found
        pad = (0, width - policy.shape[1])
        return LogProbBatch(
            policy_logps=F.pad(policy, pad),
            reference_logps=None if reference is None else F.pad(reference, (0, width - reference.shape[1])),
            mask=F.pad(completion_mask(part), pad),
            labels=part.labels,
            kl=None if kl is None else F.pad(kl, pad),
        )

    def _parts(self, index: Tensor, batch: TokenBatch) -> list[Tensor]:
        """``index`` in parts of at most ``micro_batch_rows`` rows: a pair is never split, and prompts are shared."""
        if self.micro_batch_rows is None or len(index) <= self.micro_batch_rows:
            return [index]
        units: dict[int, list[int]] = {}
        for i, other in zip(index.tolist(), batch.labels.pair[index].tolist(), strict=True):
            units.setdefault(min(i, other) if other >= 0 else i, []).append(i)
        prompt = batch.prompt.tolist()
        parts: list[list[int]] = [[]]
        for unit in sorted(units.values(), key=lambda unit: prompt[unit[0]]):
            if parts[-1] and len(parts[-1]) + len(unit) > self.micro_batch_rows:
                parts.append([])
            parts[-1].extend(unit)
        return [torch.tensor(part, device=index.device) for part in parts]

    def _step_rows(self, batch: TokenBatch) -> LogProbBatch:
        """All rows of the step with log-probs of zero: labels and masks, and room for what is scored."""
        mask = completion_mask(batch)
        # The dtype is named wherever a tensor is made: under bf16-true the default is another one.
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return LogProbBatch(
            policy_logps=zeros,
            reference_logps=zeros.clone() if self._reference_bound else None,
            mask=mask,
            labels=batch.labels,
            kl=zeros.clone() if self.objective.needs.exact_kl else None,
        )

    @cached_property
    def _stops(self) -> list[int]:
        return stop_ids(self.tokenizer)

    def _with_samples(self, batch: TokenBatch) -> TokenBatch:
        """Adds, for each row, a completion that the policy samples now, as a mismatched row."""
        assert self.policy is not None
        # Evaluating draws numbers of its own: a run that is resumed after an evaluation does not evaluate again.
        with nullcontext() if self.training else self._forked():
            if not self.training:
                rows = hashlib.sha256(repr((batch.row_ids, self.global_step, torch.initial_seed())).encode())
                torch.manual_seed(int.from_bytes(rows.digest()[:4]))
            ids = sample_tokens(
                self.policy,
                [batch.prompts[i].tolist() for i in batch.prompt.tolist()],
                stops=self._stops,
                pad=self.tokenizer.pad_token_id,
                max_new_tokens=self.objective.needs.samples,
                names=batch.row_ids,
            )
        device, n = batch.prompt.device, len(batch)
        return replace(
            batch,
            completions=[*batch.completions, *(torch.tensor(sampled, device=device) for sampled in ids)],
            prompt=batch.prompt.repeat(2),
            labels=Labels(
                desirable=torch.cat([batch.labels.desirable, torch.zeros_like(batch.labels.desirable)]),
                pair=torch.cat([batch.labels.pair, torch.full_like(batch.labels.pair, -1)]),
                mismatched=torch.arange(2 * n, device=device) >= n,
                group=batch.labels.group.repeat(2),
                score=batch.labels.score.repeat(2),
            ),
            row_ids=[*batch.row_ids, *(f"sample for {name}" for name in batch.row_ids)],
            loss=None if batch.loss is None else [*batch.loss, *[None] * n],
        )

    def _forked(self) -> AbstractContextManager[None]:
        """When it is left, the random state is as it was."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])  # type: ignore[no-any-return]

    def _random_state(self) -> tuple[Tensor, Tensor | None]:
        """Of this process and of its GPU."""
        cuda = self.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None

    @contextmanager
    def _with_random_state(self, state: tuple[Tensor, Tensor | None] | None) -> Iterator[None]:
        """While entered, dropout draws again what it has drawn from ``state`` on; nothing changes for None."""
        if state is None:
            yield
            return
        with self._forked():
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1], self.device)
            yield

    def _float32(self) -> torch.autocast:
        """While entered, products are not rounded: an objective is no model, whatever the Trainer's precision."""
        return torch.autocast(self.device.type, enabled=False)

    def _results(self, batch: TokenBatch, *, gradient: bool) -> Iterator[tuple[Tensor, LogProbBatch, Result]]:
        """Yields (places in the batch, rows, result) for each micro-batch; the losses sum to the step's.

        With ``gradient`` all but the last have been back-propagated when they are yielded, so that one
        micro-batch's activations are in memory at a time.
        """
        needs = self.objective.needs
        if needs.samples:
            batch = self._with_samples(batch)
        train = (~batch.labels.mismatched).nonzero().squeeze(1)
        parts = self._parts(train, batch)
        # The same on every rank, however many rows each has: what follows gathers over ranks in another order.
        at_once = needs.whole_step and self.micro_batch_rows is not None
        step = self._step_rows(batch)

        def keep(index: Tensor, rows: LogProbBatch) -> None:
            step.policy_logps[index] = rows.policy_logps.detach()
            if step.reference_logps is not None:
                step.reference_logps[index] = cast(Tensor, rows.reference_logps)
            if step.kl is not None and rows.kl is not None:
                step.kl[index] = rows.kl

        mismatched = batch.labels.mismatched.nonzero().squeeze(1)
        scored: dict[int, LogProbBatch] = {}
        # With dropout a part's second pass has to be that of the same network as its first.
        drawn: dict[int, tuple[Tensor, Tensor | None]] = {}
        assert self.policy is not None
        if len(parts) == 1 and not at_once and len(mismatched) and is_packed(self.policy):
            # One pass for all of the step: what is mismatched shares the prompts of the rest, and has no gradient.
            everything = torch.arange(len(batch), device=train.device)
            rows = self._score(batch, everything, gradient=gradient)
            keep(everything, rows)
            scored[0] = rows.select(train)
        elif len(mismatched):
            for index in self._parts(mismatched, batch):
                keep(index, self._score(batch, index, gradient=False))
        if not scored and (needs.step_rewards or at_once):
            # One part: the pass with gradient serves z0 as well. Several: a pass of its own, since the first
            # part's loss already depends on the last part's rewards.
            for number, index in enumerate(parts):
                drawn[number] = self._random_state()
                rows = self._score(batch, index, gradient=gradient and len(parts) == 1 and not at_once)
                keep(index, rows)
                if len(parts) == 1:
                    scored[number] = rows
        with self._float32():
            context = self.objective.prepare(step)
        if at_once:
            yield train, *self._judged_at_once(batch, step, context, train, parts, drawn, gradient)
            return
        for number, index in enumerate(parts):
            with self._with_random_state(drawn.get(number)):
                known = step.reference_logps if number in drawn else None
                rows = scored.get(number) or self._score(batch, index, gradient=gradient, known=known)
            with self._float32():
                result = self.objective.compute_loss(rows, context.select(index))
            if gradient and number < len(parts) - 1:
                self._backward_part(result.loss)
            yield index, rows, result

    def _judged_at_once(
        self,
        batch: TokenBatch,
        step: LogProbBatch,
        context: Context,
        train: Tensor,
        parts: list[Tensor],
        drawn: dict[int, tuple[Tensor, Tensor | None]],
        gradient: bool,
    ) -> tuple[LogProbBatch, Result]:
        """A step whose rows are compared with each other, in micro-batches all the same.

        The loss is judged on log-probs that were scored without gradient; its slope in each of them is what the
        passes with gradient are back-propagated with. Exact, at the price of one more forward pass.
        """
        rows, context = step.select(train), context.select(train)
        leaf = replace(rows, policy_logps=rows.policy_logps.clone().requires_grad_(gradient))
        with self._float32():
            result = self.objective.compute_loss(leaf, context)
        if not gradient:
            return rows, result
        slope = torch.zeros_like(step.policy_logps)
        own = [p for p in self.objective.parameters() if p.requires_grad]
        slope[train], *slopes = torch.autograd.grad(
            result.loss, [leaf.policy_logps, *own], allow_unused=True, materialize_grads=True
        )
        for number, index in enumerate(parts):
            with self._with_random_state(drawn[number]):
                scored = self._score(batch, index, gradient=True, known=step.reference_logps)
            linear = (scored.policy_logps * slope[index]).sum()
            if number < len(parts) - 1:
                self._backward_part(linear)
        for parameter, its_slope in zip(own, slopes, strict=True):
            linear = linear + (parameter * its_slope).sum()
        return rows, replace(result, loss=linear + (result.loss - linear).detach())

    def _backward_part(self, loss: Tensor) -> None:
        """Back-propagates a micro-batch that is not the step's last."""
        self._parts_follow = True
        self.trainer.strategy.backward(self._scaled(loss), None)
        self._parts_follow = False

    @staticmethod
    def _scaled(loss: Tensor) -> Tensor:
        """What is back-propagated: DDP averages gradients over ranks, but the ranks' losses sum to the step's."""
        return loss * world_size()

    def training_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step. All micro-batches but the last are back-propagated here, the last by Lightning.

        Returns:
            ``loss`` of the last micro-batch, with gradient; for a HALO, of this rank's rows, also ``outcome``
            (u in nats, float [n]) and ``desirable`` (BoolTensor [n]).
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self._masters.begin_pass()
        self._rows = _row_ids(batch)
        means, losses = Means(), Losses()
        suspects, sound = Suspects(), list[Tensor]()
        seen: list[tuple[Tensor, Tensor]] = []
        for index, rows, result in self._results(batch, gradient=True):
            losses.add(result)
            means.add(self._figures(rows, result))
            sound.append(rows.policy_logps.detach().isfinite().all())
            if result.outcomes is not None:
                seen.append((result.outcomes.outcome, rows.labels.desirable))
            suspects.add([batch.row_ids[i] for i in index.tolist()], rows, result)
        # Losses of the ranks sum to the step's, so one rank counts for all of them.
        once = torch.tensor(float(self.global_rank == 0), dtype=torch.float32, device=self.device)
        means.add({name: (value, once) for name, value in losses.items()})
        figures = self._shown = with_margin(means.compute())
        if not math.isfinite(figures["loss"]):
            diverged = not all(map(bool, sound))
            raise NonFiniteLossError(self._non_finite(f"the loss is {figures['loss']}", suspects.names, diverged))
        shown = ("loss", "rewards/margins")
        self.log_dict({k: v for k, v in figures.items() if k not in shown}, batch_size=len(batch))
        self.log_dict({k: figures[k] for k in shown if k in figures}, prog_bar=True, batch_size=len(batch))
        output: dict[str, Any] = {"loss": self._scaled(result.loss)}
        if seen:
            output |= dict(zip(("outcome", "desirable"), map(torch.cat, zip(*seen, strict=True)), strict=True))
        return output

    def _figures(self, rows: LogProbBatch, result: Result) -> dict[str, Weighted]:
        figures = logp_figures(rows)
        n = torch.tensor(float(len(rows)), dtype=torch.float32, device=self.device)
        halo, outcomes = self.halo, result.outcomes
        reward = outcomes.reward if outcomes else self._implied_reward(rows)
        if reward is not None:
            figures |= reward_figures(rows, reward, reward_scale(halo.value_function) if halo else 1.0)
        if outcomes is not None and halo is not None:
            with self._float32():
                figures |= outcome_figures(outcomes, halo.value_function)
            assert result.estimate is not None
            figures |= {f"outcome/z0_{name}": (value * n, n) for name, value in result.estimate.figures().items()}
            if halo.needs.mismatched and halo.needs.reference:
                figures["kl"] = figures["outcome/z0"]
        return figures

    def _implied_reward(self, rows: LogProbBatch) -> Tensor | None:
        return None if rows.reference_logps is None else LogRatio()(rows).detach()

    def _non_finite(self, what: str, suspects: list[str], diverged: bool = False) -> str:
        named = f"rows with a non-finite log-prob or value: {', '.join(suspects)}\n" if suspects else ""
        if not self.training:
            of = f"{self.trainer.ckpt_path or 'the policy'}" if not self.global_step else f"step {self.global_step}"
            return f"{what} with the weights of {of}.\n{named}rows of the batch: {', '.join(self._rows)}"
        return (
            f"{what} at optimizer step {self.global_step}, so the run stops before it takes that step.\n"
            + named
            + f"rows of the step: {', '.join(self._rows)}\n"
            + self._last_good(diverged)
            + (f"\n{self._lower_lr()}" if diverged and self.global_step else "")
        )

    def _lower_lr(self) -> str:
        lr = self._highest_lr(self.optimizers())
        return f"the policy has probably diverged: lower model.optimizer.init_args.lr (it is {lr:g})"

    def _last_good(self, diverged: bool = False) -> str:
        own = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
        return own[0].good(self.global_step if diverged else None) if own else "no checkpoints are kept"

    def check_policy(self, batch: TokenBatch) -> None:
        """Checks on one row that the last step has not made the policy diverge; of earlier steps the next loss tells.

        Raises:
            NonFiniteLossError: where the policy has no finite log-probs for it.
        """
        assert self.policy is not None
        with self._forked(), self.trainer.precision_plugin.train_step_context():
            logps = completion_logps(self.policy, batch.select(torch.tensor([0], device=self.device)))
        wrong = (~logps.detach().isfinite()).any().float()
        if float(sum_over_ranks(wrong)):
            raise NonFiniteLossError(
                f"after the last optimizer step, {self.global_step}, the policy has no finite log-probs for"
                f" {batch.row_ids[0]}: it has diverged. Lower the learning rate (model.optimizer.init_args.lr).\n"
                + self._last_good(diverged=True)
            )

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
        plugin: Any = self.trainer.precision_plugin
        if getattr(plugin, "scaler", None) is not None:  # float16's scaler skips such steps, and knows the scale
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for p in plugin.main_params(optimizer) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        size = norm.item()
        if not math.isfinite(size):
            what = f"the loss is finite, but its gradient's norm is {size}"
            slopes = "is each slope of the value function finite, also at u = 0? halos check looks"
            hint = f"{self._lower_lr()}. If not: {slopes}" if self.global_step else slopes
            raise NonFiniteLossError(f"{self._non_finite(what, [])}\n{hint}")
        self.log("grad_norm", norm)
        by_value = gradient_clip_algorithm == "value"
        clip, lr = gradient_clip_val, self._highest_lr(optimizer)
        cut = mostly_cut((cast(Tensor, p.grad) for p in parameters), clip) if clip and by_value else None
        self._gradients.see(size, clip, lr=lr, step=self.global_step, figures=self._shown, cut=cut)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, float(gradient_clip_val), norm)

    @staticmethod
    def _highest_lr(optimizer: Any) -> float:
        """As the config gives it, before warm-up and decay."""
        return max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)

    def on_train_end(self) -> None:
        """Says what applies to all steps of the run."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        lr = self._highest_lr(self.optimizers())
        clip = self.trainer.gradient_clip_val
        self._gradients.finish(clip, lr=lr, scale=scaler.get_scale() if scaler is not None else None)

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: gradients of earlier micro-batches are already there; ``training_step`` has zeroed before."""

    # -- evaluation -----------------------------------------------------------------------------------

    def _held_out(self, batch: TokenBatch) -> Iterator[tuple[Tensor, LogProbBatch, Result]]:
        """As ``_results`` without gradient.

        Raises:
            NonFiniteLossError: on every rank, after the last part, where a row of any rank has no finite figures.
        """
        self._rows = _row_ids(batch)
        suspects = Suspects()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for index, rows, result in self._results(batch, gradient=False):
            suspects.add([batch.row_ids[i] for i in index.tolist()], rows, result)
            loss = loss + result.loss.detach()
            yield index, rows, result
        wrong = torch.tensor(float(bool(suspects.names)), device=loss.device) + (~loss.isfinite()).float()
        if bool(sum_over_ranks(wrong) > 0):
            self._means = Means()
            self._auroc.reset()
            what = f"a held-out figure is not finite (loss {loss.item()})"
            raise NonFiniteLossError(self._non_finite(what, suspects.names))

    def _evaluate(self, batch: TokenBatch) -> Iterator[tuple[Tensor, LogProbBatch, Result]]:
        losses = Losses()
        for index, rows, result in self._held_out(batch):
            losses.add(result)
            self._means.add(self._figures(rows, result))
            reward = result.outcomes.reward if result.outcomes else self._implied_reward(rows)
            if reward is not None:
                scores = into_unit_interval(reward)
                self._auroc.update(scores, rows.labels.desirable.long().to(scores.device))
            yield index, rows, result
        # Every step counts with its number of rows: summed over ranks this is loss * rows / rows.
        here = (~batch.labels.mismatched).sum().float()
        everywhere = sum_over_ranks(here)
        self._means.add({name: (value * everywhere, here) for name, value in losses.items()})

    def _log_evaluation(self, prefix: str) -> None:
        means = with_margin(self._means.compute(empty=False))
        labels = torch.cat([t for t in self._auroc.target]) if self._auroc.target else torch.zeros(0)  # type: ignore[union-attr]
        both = sum_over_ranks(torch.stack([(labels == 0).sum(), (labels == 1).sum()]).float().to(self.device))
        if bool((both > 0).all()):
            means["rewards/auroc"] = float(self._auroc.compute())
        self._auroc.reset()
        # The figures are those of all ranks already: the same on each, and their mean with them.
        self.log_dict({f"{prefix}/{k}": v for k, v in means.items()}, sync_dist=True)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Adds a batch to the held-out figures."""
        for _ in self._evaluate(batch):
            pass

    def on_validation_epoch_end(self) -> None:
        """Logs them under ``val/``."""
        self._log_evaluation("val")

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """As in validation, and the exact token-level KL divergence along the held-out completions."""
        for index, rows, _ in self._evaluate(batch):
            if self._reference_bound:
                assert self.policy is not None
                part = batch.select(index)
                kl = completion_kl(self.policy, self.scoring(), part)
                self._means.add(
                    {
                        "kl/sequence": (kl.sum(), kl.new_tensor(float(len(kl)))),
                        "kl/token": (kl.sum(), rows.mask.sum().float()),
                    }
                )

    def on_test_epoch_end(self) -> None:
        """Logs under ``test/``."""
        self._log_evaluation("test")

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per row: log-probs, r, z0, u (nats) and value.

        Raises:
            NonFiniteLossError: where one of them is not a finite number, which JSON does not know.
        """
        records: list[dict[str, Any]] = []
        for index, rows, result in self._held_out(batch):
            columns: dict[str, list[Any]] = {
                "row": [batch.row_ids[i] for i in index.tolist()],
                "desirable": rows.labels.desirable.tolist(),
                "tokens": rows.mask.sum(dim=1).tolist(),
                "policy_logp": rows.policy_logps.sum(dim=1).tolist(),
            }
            if rows.reference_logps is not None:
                columns["reference_logp"] = rows.reference_logps.sum(dim=1).tolist()
            if result.outcomes is not None:
                o = result.outcomes
                columns |= {"r": o.reward.tolist(), "z0": o.reference_point.tolist()}
                columns |= {"u": o.outcome.tolist(), "value": o.value.tolist()}
            records += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return records

    # -- optimizer and checkpoints --------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The optimizer over trainable parameters, and its schedule by optimizer step.

        Raises:
            ValueError: where the optimizer does not take its settings, or nothing limits the steps.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        self._masters = MasterWeights(trained if self.master_weights else [])
        optimizer = made(self.make_optimizer, self._masters.parameters or trained)
        guard(optimizer, self.record.add)
        self._masters.attach(optimizer)
        LostUpdates(optimizer, "Set model.master_weights to true")
        # Else Lightning takes a fused one for an optimizer that unscales gradients, and refuses to clip them for it.
        optimizer._step_supports_amp_scaling = False
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                f"model.lr_schedule {self.lr_schedule} and model.warmup_ratio are shares of a run's length, but nothing"
                " limits its steps; set trainer.max_steps or trainer.max_epochs (trainer.max_time may end it sooner)"
            )
        warmup = round(self.warmup_ratio * steps)
        schedule = Schedule(optimizer, self.lr_schedule, warmup_steps=warmup, steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_after_backward(self) -> None:
        """Moves the gradients to the weights that the optimizer steps on."""
        # With several ranks DDP sums them in the step's last backward pass, so they must not be moved before.
        if not self._parts_follow or world_size() == 1:
            self._masters.take_gradients()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, and lets a reference that follows the policy follow it before anything is saved."""
        super().optimizer_step(*args, **kwargs)
        if self._reference_bound and self.policy is not None:
            self._reference.follow(self.policy, self.global_step + 1)  # counted once this hook returns

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops frozen weights, and adds a moving reference, the random state of every rank and the settings.

        Raises:
            NonFiniteWeightsError: where the policy has diverged.
        """
        reference = self._reference.state() if self._reference_bound else {}
        if reference:
            checkpoint["reference_model"] = reference
        for name, parameter in self.named_parameters(remove_duplicate=False):  # a tied weight has two names
            if not parameter.requires_grad:
                checkpoint["state_dict"].pop(name, None)
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        check_finite(checkpoint, trained, self._last_good())
        states: list[Any] = [_rng_state(self.device)]
        if world_size() > 1:
            states = [None] * world_size()
            torch.distributed.all_gather_object(states, _rng_state(self.device))
        checkpoint["rng_states"] = states
        checkpoint["settings"] = self.record.state(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the frozen weights of the policy that has just been loaded; refuses to resume as another run.

        Raises:
            ValueError: naming what differs from the checkpoint's run, or the limit that it has already reached.
        """
        start_matters = self._reference_bound or self.policy_spec.lora is not None
        self.record.compare(checkpoint, self.trainer, start_matters=start_matters)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                checkpoint["state_dict"].setdefault(name, parameter.detach())
        self._check_state(checkpoint["state_dict"])
        if self._reference_bound:
            self._reference.restore(checkpoint.get("reference_model", {}))
        self._rng_states = checkpoint.get("rng_states")
        if self.trainer.state.fn == TrainerFn.FITTING:
            epoch, step = finished_progress(checkpoint["loops"]["fit_loop"])
            most = self.trainer.max_epochs
            if most is not None and 0 <= most < epoch:
                raise ValueError(
                    f"trainer.max_epochs is {most}, but {self.trainer.ckpt_path} has trained {epoch} epochs; raise it"
                    " to resume"
                )
            taken, last = checkpoint["global_step"], self.trainer.max_steps
            if 0 <= last < taken:
                raise ValueError(
                    f"trainer.max_steps is {last}, but {self.trainer.ckpt_path} has taken {taken} steps; raise it to"
                    " resume"
                )
            resume_at = getattr(self.trainer.datamodule, "resume_at", None)  # type: ignore[attr-defined]
            if resume_at is not None:
                resume_at(epoch, step)

    def _check_state(self, saved: dict[str, Any]) -> None:
        own = self.state_dict()
        kinds = [{k: entry_kind(v) for k, v in state.items()} for state in (own, saved)]
        differing = sorted(k for k in own.keys() | saved.keys() if kinds[0].get(k, "-") != kinds[1].get(k, "-"))
        if differing:
            raise ValueError(
                f"{self.trainer.ckpt_path} does not fit this policy and objective: {len(differing)} entries differ,"
                f" first {', '.join(differing[:3])}. Resume with the config of its own run, or start a new run"
            )

    def on_fit_start(self) -> None:
        """Restores rounded frequencies, and makes a step on the CPU spend less on memory."""
        self._restore_frequencies()
        if self.device.type == "cpu":
            keep_freed_memory()

    def on_validation_start(self) -> None:
        self._restore_frequencies()

    def on_test_start(self) -> None:
        self._restore_frequencies()

    def on_predict_start(self) -> None:
        self._restore_frequencies()

    def _restore_frequencies(self) -> None:
        """Restores the rotary frequencies that a half-precision Trainer has rounded."""
        for module, name, values in self._frequencies:
            if module._buffers[name].dtype.itemsize < values.dtype.itemsize:  # type: ignore[union-attr]
                module._buffers[name] = values.to(self.device)

    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> None:
        align_logged_step(self.trainer)

    def on_train_epoch_start(self) -> None:
        """Refuses settings that a callback has changed since the run began."""
        check_trainer(self.trainer)

    def on_train_start(self) -> None:
        """Restores the random state last, after everything that draws numbers while a run is set up."""
        self.record.say(self.trainer)
        if self._rng_states and self.global_rank < len(self._rng_states):
            state = self._rng_states[self.global_rank]
            name, keys, *rest = state["numpy"]
            kept = {k: v for k, v in state.items() if k not in ("cuda", "device")}
            _set_rng_states({**kept, "numpy": (name, keys.numpy().astype("uint32"), *rest)})
            if "device" in state and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["device"].cpu(), self.device)
        self._rng_states = None


def _row_ids(batch: TokenBatch) -> list[str]:
    return [
        row for row, mismatched in zip(batch.row_ids, batch.labels.mismatched.tolist(), strict=True) if not mismatched
    ]


def _rng_state(device: torch.device) -> dict[str, Any]:
    """This process's random state and its GPU's, in types that ``torch.load(weights_only=True)`` accepts.

    Of its own GPU only, as the run may resume on a machine with other GPUs.
    """
    state = _collect_rng_states(include_cuda=False)
    name, keys, *rest = state["numpy"]
    cuda = {"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {**state, **cuda, "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest)}


def unsupported_strategy(name: str) -> str:
    """Why a strategy is refused, and what to do instead."""
    return (
        f"trainer.strategy {name} is not supported: the reference model is kept out of the strategy's sharding and the"
        " log-probs are read from the bare policy. Use a single device or ddp; model.policy.lora and"
        " model.micro_batch_rows save memory"
    )


def check_float16(trainer: Any, spec: ModelSpec) -> None:
    """Refuses to train in float16 without a loss scaler: small gradients would be 0, large ones infinite.

    Raises:
        ValueError: naming the setting and what to choose instead.
    """
    given = "trainer.precision is 16-true" if trainer.precision == "16-true" else ""
    if spec.dtype == "float16" and getattr(trainer.precision_plugin, "scaler", None) is None:
        given = given or f"model.policy.dtype is float16 and trainer.precision {trainer.precision}"
    if given:
        raise ValueError(
            f"{given}: gradients below 6e-8 would be 0 and above 65504 infinite, since nothing scales the loss. Choose"
            " bfloat16 (trainer.precision bf16-true or bf16-mixed), or float32 weights with 16-mixed on a GPU"
        )


def check_clipping(value: float | None, algorithm: str | None) -> None:
    """Refuses values that Lightning would silently take for no clipping; null and 0 mean none.

    Raises:
        ValueError: naming the setting.
    """
    if value is not None and not value >= 0:
        raise ValueError(
            f"trainer.gradient_clip_val is {value}; it must be at least 0, or null. 0 and null do not clip"
        )
    if algorithm not in (None, "norm", "value"):
        raise ValueError(f"trainer.gradient_clip_algorithm is {algorithm}; it must be norm or value")


def check_trainer(trainer: Any) -> None:
    """Refuses Trainer settings under which the loss would be another one than the config says.

    Raises:
        ValueError: naming the setting, the reason and what to do instead.
    """
    if trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: it would average losses with"
            " different reference points and wrong weights. A batch is one optimizer step here: raise"
            " data.batch_size, and set model.micro_batch_rows to what fits in memory"
        )
    check_clipping(trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
    whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if not whole or isinstance(trainer.strategy, DeepSpeedStrategy):  # DeepSpeed's is a subclass of DDP's
        raise ValueError(unsupported_strategy(type(trainer.strategy).__name__))
