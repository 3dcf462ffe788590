"""A callback that samples completions of fixed prompts during training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from halos_pl.common.files import naming, write
from halos_pl.data.example import DataError
from halos_pl.data.prompt_files import PromptRow, read_prompt_rows
from halos_pl.data.turns import stop_ids
from halos_pl.policy.drawing import Decoding, Drawn, draw, plan_batches
from halos_pl.policy.limits import check_prompts
from halos_pl.policy.sampling import as_samples, check_sampling, encode_prompts
from halos_pl.training.strategy import ShardedStrategy

#: The file in the run's folder.
SAMPLES = "samples.jsonl"


class SampleCompletions(Callback):
    """Samples completions of fixed prompts before training, every so many steps, and at the end.

    They go to ``samples.jsonl`` in the run's folder, and as text to loggers that take it (TensorBoard, Weights and
    Biases). Only the first rank samples; the random state of the training is left unchanged.

    Args:
        prompts: .txt file with one prompt per line, or JSON lines with "prompt".
        every_n_steps: Number of optimizer steps between samples.
        max_new_tokens: Maximum number of tokens per completion.
        temperature: Temperature of the softmax; 0 always takes the likeliest token.
        batch_size: Number of completions sampled at a time.
        seed: Seed of the sampling, the same at every step.

    Raises:
        DataError: A number is outside its range, or the file has no prompts.
    """

    def __init__(
        self,
        prompts: str,
        every_n_steps: int = 100,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size, seed=seed)
        if every_n_steps < 1:
            raise DataError(f"every_n_steps is {every_n_steps}; it must be at least 1")
        self.prompts, self.every_n_steps, self.max_new_tokens = Path(prompts), every_n_steps, max_new_tokens
        self.temperature, self.batch_size, self.seed = temperature, batch_size, seed
        read_prompt_rows(self.prompts, "chat")  # faults of the file, before anything is loaded
        self._rows: list[PromptRow] = []
        self._encoded: list[list[int]] = []
        self._last_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if pl_module.objective.needs.scalar:  # type: ignore[union-attr]
            raise ValueError(
                "trainer.callbacks: SampleCompletions cannot sample from a reward model, which writes no text;"
                " remove it"
            )
        if isinstance(trainer.strategy, ShardedStrategy):
            raise ValueError(
                "trainer.callbacks: SampleCompletions cannot sample under fsdp2, where no rank has the whole model;"
                " remove it, or use trainer.strategy ddp"
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._rows = read_prompt_rows(self.prompts, getattr(data, "text_prompts", "plain"))
        special = getattr(data, "special_tokens_in_text", "refuse")
        prompts, tools = [row.prompt for row in self._rows], [row.tools for row in self._rows]
        names, tokenizer = [row.place for row in self._rows], pl_module.tokenizer
        self._encoded = encode_prompts(tokenizer, prompts, names, "", special, tools)  # type: ignore[arg-type]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module: Any = pl_module
        names = [row.place for row in self._rows]
        check_prompts(module.policy, module.tokenizer, self._encoded, names, self.max_new_tokens)
        path = Path(trainer.default_root_dir) / SAMPLES
        lost: int | None = None
        if path.exists():  # of a run that resumes here; later steps will be repeated
            kept, lost = _earlier(path, trainer.global_step, [row.number for row in self._rows])
            write(path, "".join(f"{line}\n" for _, line in kept))
            self._last_step = kept[-1][0] if kept else None
        self._sample(trainer, module, now=lost == trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._sample(trainer, pl_module, now=True)

    def _sample(self, trainer: Trainer, module: Any, now: bool = False) -> None:
        """Samples and writes, if the step is due (or it must be ``now``) and not written yet."""
        step = trainer.global_step
        if step == self._last_step or (step % self.every_n_steps and not now):
            return
        drawn = self._drawn(module)
        samples = as_samples(module.policy, module.tokenizer, self._encoded, [each.ids for each in drawn])
        records = [
            {
                "step": step,
                "prompt_row": row.number,
                "prompt": row.prompt,
                "completion": sample.text,
                "finished": sample.finished,
                "logprob": sum(each.logprobs or ()),
            }
            for row, sample, each in zip(self._rows, samples, drawn, strict=True)
        ]
        path = Path(trainer.default_root_dir) / SAMPLES
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self._log(trainer, records, step)
        self._last_step = step

    def _drawn(self, module: Any) -> list[Drawn]:
        model, tokenizer = module.policy, module.tokenizer
        drawn: dict[int, Drawn] = {}
        for batch in plan_batches(model, self._encoded, self.max_new_tokens, self.batch_size):
            decoding = Decoding(tuple(stop_ids(tokenizer)), tokenizer.pad_token_id, batch.room, self.temperature)
            names, seeds = [self._rows[i].place for i in batch.rows], [self.seed + i for i in batch.rows]
            completions = draw(model, [self._encoded[i] for i in batch.rows], names, decoding, seeds)
            drawn |= dict(zip(batch.rows, completions, strict=True))
        return [drawn[i] for i in range(len(self._rows))]

    @staticmethod
    def _log(trainer: Trainer, records: list[dict[str, Any]], step: int) -> None:
        """Sends the completions to loggers that take text."""
        for logger in trainer.loggers:
            if callable(log_text := getattr(logger, "log_text", None)):
                rows = [[str(record["prompt"]), record["completion"]] for record in records]
                log_text("samples", columns=["prompt", "completion"], data=rows, step=step)
            elif callable(add_text := getattr(getattr(logger, "experiment", None), "add_text", None)):
                for record in records:
                    add_text(f"samples/{record['prompt_row']}", record["completion"], step)


def _earlier(path: Path, step: int, prompts: Sequence[int]) -> tuple[list[tuple[int, str]], int | None]:
    """The samples of an earlier attempt, up to a step.

    Args:
        path: The file.
        step: The step at which the run resumes.
        prompts: The rows of the prompts. If the last step does not have all of them, a kill cut it, and it is left out.

    Returns:
        The step and the line of each sample, and the step that was left out.

    Raises:
        ValueError: A line is no sample; names it.
    """
    kept: list[tuple[int, str]] = []
    last: list[int] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            text = line.decode()
            sample = json.loads(text)
            at, prompt = int(sample["step"]), sample["prompt_row"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no sample; remove the line, or the file") from error
        if at <= step:
            last = [*last, prompt] if kept and kept[-1][0] == at else [prompt]
            kept.append((at, text))
    if not kept or last == [*prompts]:
        return kept, None
    lost = kept[-1][0]
    then = "sampled again" if lost == step else "left out"
    print(f"halos: {path}: the samples of step {lost} are not those of all prompts, and are {then}")
    return [each for each in kept if each[0] != lost], lost
