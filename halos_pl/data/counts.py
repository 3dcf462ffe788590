"""What became of a source's rows, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FileCounts:
    """What became of one source's rows.

    Attributes:
        examples: valid rows of the source; each may hold several completions.
        faulty: faulty rows, left out (``on_bad_rows: skip``).
        faults: the first ten of them.
        skipped: valid rows that no loss can use, such as ties, by reason.
        pairs: pairs in use.
        rows: rows in use; a pair has two.
        desirable, undesirable: the same rows by label.
        gold: gold answers in use.
        prompts_cut: rows whose prompt is cut at its start.
        completions_cut: rows whose completion is cut at its end, and so has no EOS.
        dropped_too_long: rows whose completion does not fit (``truncate_completions: false``).
        dropped_without_loss: rows whose tokens that carry the loss all lie beyond ``max_length``.
        dropped_undesirable: undesirable rows, if the objective uses only desirable ones.
        dropped_gold: gold answers, if the objective does not use them.
        negative_margins: pairs whose chosen completion has the lower score, if the objective compares the scores.
        alone: rows that are the only one of their prompt, if the objective compares the rows of a prompt.
        alike: rows of prompts whose rows, two or more, all have the same score, or the same label without scores.
    """

    examples: int = 0
    faulty: int = 0
    faults: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    rows: int = 0
    desirable: int = 0
    undesirable: int = 0
    gold: int = 0
    prompts_cut: int = 0
    completions_cut: int = 0
    dropped_too_long: int = 0
    dropped_without_loss: int = 0
    dropped_undesirable: int = 0
    dropped_gold: int = 0
    negative_margins: int = 0
    alone: int = 0
    alike: int = 0

    def __str__(self) -> str:
        text = f"{self.examples} examples, {self.rows} rows ({self.desirable} desirable, "
        text += f"{self.undesirable} undesirable), {self.pairs} pairs"
        notes = (
            (self.gold, "gold answers"),
            (self.faulty, "faulty rows skipped"),
            *((number, f"rows skipped: {reason}") for reason, number in self.skipped.items()),
            (self.prompts_cut, "prompts cut at the start"),
            (self.completions_cut, "completions cut at the end (so without EOS)"),
            (self.dropped_too_long, "rows dropped: completion too long"),
            (self.dropped_without_loss, "rows dropped: the turn that carries the loss lies beyond max_length"),
            (self.dropped_undesirable, "rows dropped: undesirable, which the objective does not use"),
            (self.dropped_gold, "gold answers dropped, which the objective does not use"),
            (self.negative_margins, "pairs with a negative margin: the chosen completion may lose by that much"),
            (self.alone, "rows alone with their prompt: the objective has nothing to compare them with"),
            (self.alike, "rows whose prompt has no better or worse row: a comparison by score gives them no weight"),
        )
        return "; ".join([text, *(f"{number} {what}" for number, what in notes if number)])
