"""The file of a sampling command: written as prompts finish, resumed after a kill, and bound to its settings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from halos_pl.common.files import lock, naming, part_of, unique_name, whole, write
from halos_pl.data.prompt_files import PROMPT_ROW, SAMPLE_INDEX
from halos_pl.provenance import provenance
from halos_pl.training.checkpoint_manifest import file_digest


class SampleFile:
    """A file of samples: ``TARGET.halos.part`` until it is complete, then ``TARGET``, in the order of the prompts.

    ``TARGET.settings.json`` records the settings, so that no other command adds to the file or passes for it.

    Args:
        target: Final path. A pipe or a device gets all rows at the end and cannot be resumed.
        settings: Settings by the name of their option; JSON values.
        rows_per_prompt: Number of rows that each prompt has.
        overwrite: Whether to replace the output of other settings.
        may_lack: Whether a file from which prompts were skipped is complete. Otherwise it is completed.

    Raises:
        FileExistsError: There is output of another command; names the setting that differs.
        ValueError: The incomplete file is damaged; names the line.
    """

    def __init__(
        self,
        target: Path,
        settings: Mapping[str, Any],
        rows_per_prompt: int,
        *,
        overwrite: bool = False,
        may_lack: bool = False,
    ) -> None:
        self.target, self.settings, self.rows_per_prompt = target, dict(settings), rows_per_prompt
        self.overwrite, self.may_lack = overwrite, may_lack
        self.part = part_of(target)
        self.record = target.with_name(f"{target.name}.settings.json")
        self.is_stream = self.part == target.resolve()
        self.done: set[int] = set()  #: lines of the prompts whose rows are written
        self.skipped: list[str] = []  #: places of the prompts that a complete file lacks
        self.complete = self._is_own = False
        self._rows: list[bytes] = []  # of a stream
        self._file: IO[bytes] | None = None
        self._check()

    # -- earlier output ---------------------------------------------------------------------------------

    def _earlier(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            content = json.loads(self.record.read_text(encoding="utf-8"))
            if isinstance(content, dict) and isinstance(content.get("settings"), dict):
                return content
        return {}

    def _difference(self) -> str:
        """The setting that differs from those of earlier output, as the end of a sentence; empty if none does."""
        earlier = self._earlier()
        if not earlier:
            return "its settings are not recorded"
        for name, value in self.settings.items():
            before = earlier["settings"].get(name)
            if before != value:
                return _changed(name, before, value)
        return ""

    def _check(self) -> None:
        if self.is_stream:
            return
        difference = self._difference()
        if self.target.exists():
            earlier, digest = self._earlier(), file_digest(self.target)
            self._is_own = not difference and digest == earlier.get("sha256")
            self.skipped = earlier.get("skipped", []) if self._is_own else []
            self.complete = self._is_own and (self.may_lack or not self.skipped)
            is_older = not difference and digest == earlier.get("replaces")
            if not self._is_own and not is_older and not self.overwrite:
                reason = difference or "it has changed since it was written"
                raise FileExistsError(
                    f"{self.target} exists, and {reason}; name another file with --out, or use --overwrite true"
                )
        if difference and not self.overwrite and self.part.exists() and self.part.stat().st_size:
            raise FileExistsError(
                f"{self.part} contains samples of another command: {difference}; repeat that command to resume it, name"
                " another file with --out, or use --overwrite true"
            )

    # -- writing ----------------------------------------------------------------------------------------

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Opens the file, with the rows of earlier attempts.

        Args:
            identity: Further settings, known once the model is loaded.

        Raises:
            FileExistsError: The earlier attempt had another model, or another process writes to the file.
        """
        self.settings |= identity
        if self.is_stream:
            return
        self._check()
        if self.complete:
            self.part.unlink(missing_ok=True)  # left by a kill at the very end
            return
        self._file = self.part.open("a+b")
        lock(self._file, self.part)
        if self._difference():  # replaced, or new
            self._file.truncate(0)
            content = {"settings": self.settings, "by": provenance()}
            write(self.record, _json(content, 2).decode())
        self._resume(self._file)
        if self._is_own:  # some prompts were skipped
            lines = self.target.read_bytes().split(b"\n")[:-1]
            numbers = [json.loads(line)[PROMPT_ROW] for line in lines]
            left = [line + b"\n" for line, number in zip(lines, numbers, strict=True) if number not in self.done]
            with naming(self.part):
                self._file.write(b"".join(left))
                self._file.flush()
            self.done |= {*numbers}

    def _resume(self, file: IO[bytes]) -> None:
        file.seek(0)
        content = file.read()
        lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
        kept = lines[: len(lines) - len(lines) % self.rows_per_prompt]
        before = None
        for at, line in enumerate(kept):
            index = at % self.rows_per_prompt
            try:
                row = json.loads(line)
                number = row[PROMPT_ROW]
                fits = number == before if index else number not in self.done
                fits = fits and (self.rows_per_prompt == 1 or row[SAMPLE_INDEX] == index)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{self.part}:{at + 1} is not a row of samples; remove the file to start over"
                ) from error
            if not fits:
                raise ValueError(
                    f"{self.part}:{at + 1}: a row of prompt {number} is repeated, missing or moved; remove the file to"
                    " start over"
                )
            self.done.add(number)
            before = number
        size = sum(len(line) + 1 for line in kept)
        if size < len(content):
            print(f"halos: {self.part}: dropped the rows that a killed command left incomplete", file=sys.stderr)
            file.truncate(size)

    def add(self, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows of a prompt.

        Args:
            number: Line of the prompt in its file.
            rows: Columns of each row.

        Raises:
            OSError: The file cannot be written; names it.
        """
        keys = [
            {PROMPT_ROW: number} | ({SAMPLE_INDEX: k} if self.rows_per_prompt > 1 else {}) for k in range(len(rows))
        ]
        lines = [_json({**row, **key}) for row, key in zip(rows, keys, strict=True)]
        if self._file is None:
            self._rows += lines
        else:
            with naming(self.part):
                self._file.write(b"".join(lines))
                self._file.flush()
        self.done.add(number)

    def rows(self) -> list[dict[str, Any]]:
        """All rows that are written, in the order of the prompts."""
        lines = self._rows
        if self._file is not None:
            self._file.seek(0)
            lines = self._file.readlines()
        # Stable, so completions stay in order.
        return sorted((json.loads(line) for line in lines), key=lambda row: row[PROMPT_ROW])

    def finish(self, rows: Iterable[Mapping[str, Any]] | None = None, **facts: Any) -> None:
        """Writes the complete file.

        Args:
            rows: Its rows; default: :meth:`rows`.
            facts: Further facts to record with the settings.
        """
        by = provenance()
        with whole(self.target, writer="halos" if self.is_stream else unique_name()) as file:
            file.writelines(_json(row).decode() for row in (self.rows() if rows is None else rows))
            if self._file is not None:  # recorded first, so that a kill in between leaves the rest to the same command
                file.flush()
                digest = file_digest(Path(file.name))
                replaces = file_digest(self.target) if self.target.exists() else None
                content = {"settings": self.settings, "by": by, "sha256": digest, "replaces": replaces}
                write(self.record, _json(content | facts, 2).decode())
        if self._file is not None:
            self.part.unlink(missing_ok=True)
            self.close()

    def discard(self) -> None:
        """Closes the file and removes it, as its rows are of no use, and its settings unless there is an older file."""
        if not self.is_stream:
            self.part.unlink(missing_ok=True)
            if not self.target.exists():
                self.record.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Closes the file and ends the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _changed(name: str, before: Any, now: Any) -> str:
    """How a setting has changed, as the end of a sentence; hashes, which tell a user nothing, are not shown."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in [*before, *now] if before.get(key) != now.get(key))
        before, now = before.get(key), now.get(key)
        name = name if _is_hash(now) else f"{key} of {name}"
    if _is_hash(before) and _is_hash(now):
        return f"the content of {name} has changed since then"
    return f"{name} was {json.dumps(before)} then and is {json.dumps(now)} now"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value) is not None


def _json(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    """One JSON object with a line end."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair: only an escape spells it
        return json.dumps(value, indent=indent).encode() + b"\n"
