"""Runs the stages of all rounds, each as a command of its own, and resumes after a kill."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from halos_pl.common.files import write
from halos_pl.common.messages import counted, plain
from halos_pl.data.prompt_files import kept_columns
from halos_pl.rounds.check import Checked
from halos_pl.rounds.spec import Round, Rounds, RoundsError, held_out, rounds_of
from halos_pl.rounds.state import ROW, answers_of, bind, check_outputs, finished, record
from halos_pl.rounds.windows import window, wraps, write_prompts
from halos_pl.run_dir import LAST, PREVIOUS, SUMMARY, shortfall
from halos_pl.study import processes
from halos_pl.study.execute import descriptor, duration
from halos_pl.training.checkpoint_links import remove_checkpoint


def execute(
    study: Rounds, out: Path, checked: Checked, *, keep_checkpoints: bool, tell: Callable[[str], None] = print
) -> None:
    """Runs all stages that are not finished.

    Args:
        study: The settings.
        out: Folder of all rounds, which is locked meanwhile.
        checked: The results of the check.
        keep_checkpoints: Whether to keep the checkpoints of all rounds, not only of the last one.
        tell: Called with each line of progress.

    Raises:
        RoundsError: A stage fails; names it and its log. Or another process has begun one with other settings.
    """
    lock = FileLock(out / "rounds.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"halos: {plain(out)}: waiting for another process that works on it", file=sys.stderr)
        lock.acquire()
    try:
        bind(study, out, checked.settings)
        processes.children.may_start()
        _Engine(study, out, checked, descriptor(lock), tell).run(keep_checkpoints)
    finally:
        lock.release()


class _Engine:
    def __init__(
        self, study: Rounds, out: Path, checked: Checked, lock: int | None, tell: Callable[[str], None]
    ) -> None:
        self.study, self.out, self.checked, self.lock, self.tell = study, out, checked, lock, tell
        self.rounds = rounds_of(study, out)
        self.total = sum(len(each.stages) for each in self.rounds)

    def run(self, keep_checkpoints: bool) -> None:
        for each in self.rounds:
            check_outputs(each)
        write_prompts(held_out(self.out), (row for row in self.checked.held_out for _ in range(self.study.answers)))
        number = 0
        for each in self.rounds:
            self._prepare(each)
            for stage in each.stages:
                number += 1
                place = f"[{number}/{self.total}] {each.name}, {stage}"
                if stage in finished(each):
                    self.tell(plain(f"{place}: finished earlier"))
                    continue
                start = time.monotonic()
                self._stage(each, stage)
                seconds = time.monotonic() - start
                record(each, stage, seconds)
                self.tell(plain(f"{place}: {duration(seconds)}"))
            if not keep_checkpoints and each.before:
                self._remove_checkpoints(each.before)

    def _prepare(self, each: Round) -> None:
        """Writes the prompts of a round; those of an offline run are the prompts of all rounds."""
        each.folder.mkdir(parents=True, exist_ok=True)
        if "sample" not in each.stages or "sample" in finished(each):
            return
        rows, size = self.checked.prompts, self.study.window
        if each.number and wraps(each.number, size, len(rows)):
            again = f"of the {counted(len(rows), 'prompt')}, some are used again"
            self.tell(plain(f"{each.name}: its window of {size} reaches the end of {self.study.prompts}: {again}"))
        numbers = [each.number] if each.number else range(1, self.study.rounds + 1)
        write_prompts(each.prompts, (rows[i] for number in numbers for i in window(number, size, len(rows))))

    def _stage(self, each: Round, stage: str) -> None:
        if stage == "score":
            write_compared(each)
        steps = None
        if stage == "fit" and not each.number:
            steps = sum(steps_of(other) for other in self.rounds if other.number)
        words = each.words(stage, self.checked.text, self.checked.like, steps)
        if stage == "fit" and (each.run / LAST).exists():
            if shortfall(each.run) is None:  # it finished, but this was not recorded
                return
            words.append("--ckpt_path=last")
        log = each.folder / processes.LOG
        start = log.stat().st_size if log.is_file() else 0
        if status := processes.run_command(words, log, dict(os.environ), self.lock):
            why = processes.last_words(log, start, status)
            raise RoundsError(f"{each.name}: {stage}: {why} (log: {log}); the same command resumes there")

    def _remove_checkpoints(self, each: Round) -> None:
        """Removes the checkpoints and the exported model of a round, which later ones no longer need."""
        for checkpoint in (LAST, PREVIOUS):
            remove_checkpoint(each.run / checkpoint)
        if each.model.is_dir():
            shutil.rmtree(each.model)


def write_compared(each: Round) -> None:
    """Writes the held-out answers of the first model and of this one as two completions of each prompt."""
    lines = []
    for answer in answers_of(each):
        both = answer["before"], answer
        row = {"prompt": answer["prompt"], "completions": [one["answer"] for one in both]}
        row["finished"] = [one["finished"] for one in both]
        row[ROW] = answer["row"]
        lines.append(json.dumps({**kept_columns(answer.get("columns", {})), **row}, ensure_ascii=False) + "\n")
    write(each.compared, "".join(lines))


def steps_of(each: Round) -> int:
    """The number of optimizer steps of a round."""
    return int(json.loads((each.run / SUMMARY).read_text(encoding="utf-8"))["steps"])
