"""Callbacks that write a run's files besides its checkpoints: config, predictions, summary and plots."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from halos_pl.batch import TokenBatch
from halos_pl.common import spent, stopping
from halos_pl.common.files import naming, part_of, whole, write
from halos_pl.data.datamodule import FeedbackDataModule
from halos_pl.data.template import CHAT_TEMPLATE
from halos_pl.distributed import sum_over_ranks
from halos_pl.objective.halo import HALO
from halos_pl.provenance import provenance
from halos_pl.run_dir import CONFIG, LAST, SUMMARY, TEST, shortfall
from halos_pl.training.amounts import Amounts
from halos_pl.training.checkpoint_reading import step_of
from halos_pl.training.ending import record, why_ended
from halos_pl.training.monitors import check_interval, check_monitors, say_no_validation
from halos_pl.training.plots import plot_training, plot_value_function
from halos_pl.training.resume import align_logged_step
from halos_pl.training.run_folder import move_aside
from halos_pl.training.run_lock import RunLock
from halos_pl.training.run_log import METRICS, RunCSVLogger
from halos_pl.training.slurm import note_job
from halos_pl.training.step_log import on_host
from halos_pl.training.throughput import Cost, StepClock, cost, matmul_speed, slow_half, step_flops, step_tokens
from value_functions import reward_scale

PREDICTIONS = "predictions.jsonl"


def _reference_rows(module: Any) -> dict[str, int]:
    return module.models.reference_rows if hasattr(module, "models") else {}


def _reference_rows_of_all(module: Any) -> dict[str, int]:
    """The reference rows of all ranks, which must all call this."""
    rows = _reference_rows(module)
    if not rows:
        return {}
    totals = sum_over_ranks(torch.tensor(list(rows.values()), device=module.device))
    return dict(zip(rows, totals.tolist(), strict=True))


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` to the run's folder: the resolved config, which ``halos`` reads with ``--config``.

    A new run renames an earlier one and writes its config once the data have been validated; a resumed run writes it
    once its checkpoint has been loaded. At any time, at most one fit, one ``halos test`` and one ``halos predict``
    write to a folder, on whichever machine.
    """

    _lock: RunLock | None = None

    def _claim(self, folder: Path, command: str = "fit") -> None:
        """Keeps other processes out of the folder.

        Raises:
            FileExistsError: if another process is writing to it.
        """
        self._lock = RunLock(folder, command)
        self._lock.take()

    def _let_go(self, moved: Path | None = None) -> None:
        if self._lock is not None:
            self._lock.release(moved)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _save(self, trainer: Trainer) -> None:
        path = Path(trainer.default_root_dir) / CONFIG
        path.parent.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config.ckpt_path = None  # with --config, it describes a run from the start
        beside = part_of(path)
        # The parser has checked it.
        self.parser.save(config, str(beside), skip_none=False, skip_validation=True, overwrite=True, multifile=False)
        os.replace(beside, path)
        template = getattr(trainer.datamodule, "chat_template", None)  # type: ignore[attr-defined]
        if template is None:
            (path.parent / CHAT_TEMPLATE).unlink(missing_ok=True)
        else:
            write(path.parent / CHAT_TEMPLATE, template)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_interval(trainer, trainer.datamodule)  # type: ignore[attr-defined]
            say_no_validation(trainer, trainer.datamodule)  # type: ignore[attr-defined]
            check_monitors(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        if stage == "validate" or not trainer.is_global_zero:
            return
        folder, checkpoint = Path(trainer.default_root_dir), self.config.get("ckpt_path")
        self._claim(folder, TrainerFn(stage).value)  # an enum, whose text is "TrainerFn.FITTING"
        if stage != "fit":
            return
        # A checkpoint from another folder starts a new run.
        new = not checkpoint or not Path(checkpoint).resolve().is_relative_to(folder.resolve())
        if new and (aside := move_aside(folder)):
            self._let_go(aside)
            self._claim(folder)
        note_job(folder)
        if not checkpoint:
            self._save(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.config.get("ckpt_path"):
            self._save(trainer)


def _numbers(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {k: v.item() for k, v in metrics.items() if not v.isnan()}


#: Outcomes in nats, float [n], and labels, BoolTensor [n], of a step's rows; on the device until a plot needs them.
_Rows = tuple[torch.Tensor, torch.Tensor]


def _read(steps: Iterable[_Rows]) -> list[tuple[float, bool]]:
    return [row for outcome, good in steps for row in zip(outcome.tolist(), good.tolist(), strict=True)]


def _cost(module: Any) -> Cost | None:
    """The cost per token; None for a model of unknown structure, which can still be trained."""
    try:
        return cost(module.policy, logps=module.objective.needs.policy_logps)
    except (AttributeError, TypeError) as error:
        rank_zero_info(f"halos: TFLOP/s are not logged, as the model's cost is unknown: {error}")
        return None


class RunReport(Callback):
    """Logs the speed. At the end, writes a summary and plots, and prints where they are.

    ``tokens/s`` counts the tokens that a step has to process, ``TFLOP/s`` the least arithmetic that it needs (see
    ``halos_pl.training.throughput``), and ``of_matmul`` is the latter as a share of the rate of a matrix product,
    measured when the fit begins. If a step is faster, the machine was busy during that measurement; from then on, the
    share is relative to the fastest step. TFLOP/s and of_matmul are per rank and exclude sampling for the reference
    point. A step's time includes the optimizer step. On a GPU, only steps that are logged are measured, because a
    measurement waits for the GPU; other steps show the figures of the last one that was.

    The outcomes of the first and the last rows are kept for a plot. In a run's first epoch each row is measured
    before the policy is trained on it, so the plot shows rows that are new to the policy.
    """

    ROWS_IN_PLOT = 64

    def __init__(self) -> None:
        self._began = 0.0
        self._clock = StepClock(torch.device("cpu"))
        self._speed: dict[str, float] = {}
        self._cost: Cost | None = None
        self._matmul = 1.0
        self._rows_before: dict[str, int] = {}
        self._first: _Rows | None = None
        self._last: deque[_Rows] = deque()
        self._amounts = Amounts()

    def state_dict(self) -> dict[str, Any]:
        return self._amounts.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._amounts.load(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        spent.started()
        self._began = time.monotonic()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            (Path(trainer.default_root_dir) / SUMMARY).unlink(missing_ok=True)  # from an earlier fit
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger) and trainer.is_global_zero:
                self._warn_of_lost_lines(trainer, logger.drop_from(trainer.global_step))
        self._amounts.begin(resumed=trainer.global_step > 0)
        self._clock = StepClock(pl_module.device)
        policy: Any = getattr(pl_module, "policy", None)
        if policy is not None:
            self._cost = _cost(pl_module)
            kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))
            kind = kind or next(policy.parameters()).dtype
            self._matmul = matmul_speed(pl_module.device, kind)
            if pl_module.device.type == "cpu" and (why := slow_half(kind, self._matmul)):
                rank_zero_warn(f"halos: {why}")

    @staticmethod
    def _warn_of_lost_lines(trainer: Trainer, last: int) -> None:
        """Warns if log lines are missing before the step at which a run resumes."""
        folder, every = Path(trainer.default_root_dir), trainer.log_every_n_steps  # type: ignore[attr-defined]
        from_here = trainer.ckpt_path and Path(trainer.ckpt_path).resolve().is_relative_to(folder.resolve())
        if from_here and trainer.global_step - 1 - last >= max(every, 1):
            rank_zero_warn(
                f"halos: {folder / METRICS} has no lines for steps {last + 1} to {trainer.global_step - 1}; they are"
                " lost, but the run resumes exactly"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        align_logged_step(trainer)  # before other callbacks log figures of this step
        self._clock.start()
        self._rows_before = dict(_reference_rows(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: TokenBatch, batch_idx: int
    ) -> None:
        if not (self._clock.waits and self._speed) or trainer._logger_connector.should_update_logs:
            self._speed = self._measured(pl_module, batch, self._clock.seconds(), trainer.world_size)
        speed = on_host(self._speed)
        pl_module.log("rows/s", speed.pop("rows/s"))
        pl_module.log_dict(speed, prog_bar=True)
        self._amounts.add(batch)
        if "outcome" in outputs and len(outputs["outcome"]):
            rows = outputs["outcome"], outputs["desirable"]
            self._first = self._first or rows
            self._last.append(rows)
            while sum(len(outcome) for outcome, _ in self._last) - len(self._last[0][0]) >= self.ROWS_IN_PLOT:
                self._last.popleft()

    def _measured(self, module: Any, batch: TokenBatch, seconds: float, ranks: int) -> dict[str, float]:
        """The figures of a step that took ``seconds``."""
        rows = len(batch) - sum(batch.host.mismatched)
        speed = {"rows/s": rows * ranks / seconds, "tokens/s": step_tokens(batch) * ranks / seconds}
        if self._cost is not None:
            counts = {k: n - self._rows_before[k] for k, n in _reference_rows(module).items()}
            share = counts["computed"] / max(1, sum(counts.values()))
            flops = step_flops(self._cost, batch, reference=share) / seconds
            self._matmul = max(self._matmul, flops)
            speed |= {"TFLOP/s": flops / 1e12, "of_matmul": flops / self._matmul}
        return speed

    def _last_rows(self) -> list[tuple[float, bool]]:
        return _read(self._last)[-self.ROWS_IN_PLOT :]

    def _totals(self, module: Any) -> dict[str, Any]:
        """The entries of the summary that are sums over all ranks, which must all call this."""
        return {"trained": self._amounts.of_all(module.device), "reference_rows": _reference_rows_of_all(module)}

    def _write_summary(
        self, trainer: Trainer, pl_module: LightningModule, end: dict[str, Any], totals: dict[str, Any]
    ) -> float:
        """Writes ``summary.json`` and returns the duration of the fit in seconds."""
        folder = Path(trainer.default_root_dir)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        counts = datamodule.counts() if hasattr(datamodule, "counts") else {}
        seconds = round(time.monotonic() - self._began, 3) if self._began else 0.0
        summary = {
            **end,
            "epochs": trainer.current_epoch,
            "wall_seconds": seconds,
            "seconds": spent.training(seconds),
            "data": counts,
            "digests": datamodule.digests("train") if counts else {},
            **totals,
            "metrics": _numbers(trainer.callback_metrics),
            "last_outcomes": self._last_rows(),
            "resumed": getattr(getattr(pl_module, "record", None), "history", []),
            "by": provenance(),
        }
        write(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return seconds

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the summary of a run that a signal has stopped."""
        number = stopping.received()
        stopped = self._began and isinstance(exception, SIGTERMException)
        if number and stopped and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            totals = self._totals(pl_module)  # the ranks have agreed to stop
            if trainer.is_global_zero:
                end = record(trainer, stopping.name_of(number), finished=False)
                self._write_summary(trainer, pl_module, end, totals)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also called if nothing was left to train, because the run had been killed after its last step."""
        totals = self._totals(pl_module)
        if not trainer.is_global_zero:
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(f"halos: the trial run of {trainer.global_step} optimizer step(s) is over; it saved nothing")
            return
        for logger in trainer.loggers:
            logger.save()
        folder = Path(trainer.default_root_dir)
        if not self._began and (folder / SUMMARY).is_file() and shortfall(folder) is None:
            # The existing summary has the figures of those steps.
            rank_zero_info(f"halos: nothing was left to train; {folder}/ contains all {trainer.global_step} steps")
            return
        ended = why_ended(trainer)
        seconds = self._write_summary(trainer, pl_module, record(trainer, ended, finished=True), totals)
        files = [str(name) for name in (CONFIG, LAST, SUMMARY) if (folder / name).exists()]
        halo: HALO | None = getattr(getattr(pl_module, "objective", None), "halo", None)
        if (folder / METRICS).is_file():
            files.append(METRICS)
            beta = reward_scale(halo.value_function) if halo else 1.0
            plot = plot_training(folder / METRICS, folder / "training.png", beta=beta)
            files += [plot.name] if plot else []
        if halo is not None and self._first is not None and (last := self._last_rows()):
            moments = {"before: the first step": _read([self._first]), f"after: the last {len(last)} rows": last}
            files.append(plot_value_function(halo.value_function, moments, folder / "value_function.png").name)
        rank_zero_info(
            f"halos: {trainer.global_step} optimizer step(s) in {seconds:.0f} s ({ended}); {folder}/ contains "
            + ", ".join(files)
        )
        others = [logger.log_dir for logger in trainer.loggers if not isinstance(logger, RunCSVLogger)]
        if any(others):
            rank_zero_info(f"halos: other loggers wrote to {', '.join(filter(None, others))}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / TEST
            path.parent.mkdir(parents=True, exist_ok=True)
            step = {"step": step_of(Path(trainer.ckpt_path))} if trainer.ckpt_path else {}
            write(path, json.dumps(step | _numbers(trainer.callback_metrics), indent=2) + "\n")
            rank_zero_info(f"halos: held-out metrics are in {path}")


class PredictionWriter(BasePredictionWriter):
    """Writes ``predictions.jsonl`` to the run's folder: one record of ``HALOModule.predict_step`` per line.

    They are in the order of the data, however ranks and micro-batches share the rows.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def _part(self, trainer: Trainer, rank: int) -> Path:
        return Path(trainer.default_root_dir) / f"{PREDICTIONS}.rank{rank}"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("", encoding="utf-8")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.predicting:  # a part must not pass for all predictions
            self._part(trainer, trainer.global_rank).unlink(missing_ok=True)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        part = self._part(trainer, trainer.global_rank)
        with naming(part), part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("PredictionWriter")
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / PREDICTIONS
            parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
            lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines(keepends=True)]
            if isinstance(data := trainer.datamodule, FeedbackDataModule):  # type: ignore[attr-defined]
                place = {name: i for i, name in enumerate(data.row_names("predict"))}
                lines.sort(key=lambda line: place.get(json.loads(line)["row"], len(place)))
            with whole(path) as file:
                file.writelines(lines)
            for part in parts:
                part.unlink()
            rank_zero_info(f"halos: predictions are in {path}")
