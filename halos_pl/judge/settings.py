"""Settings of a judge; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge is asked.

    Args:
        again: Number of pairs, or of answers, that are judged a second time to measure the judge's self-consistency.
        max_tokens: Maximum number of tokens of a reply; default: the judge's own.
        temperature: Sampling temperature of the judge; default: the judge's own.
        seed: Sampling seed that is sent to the endpoint; default: none.
        logprobs: Whether to ask for log-probs if the judge reads its verdict from them. With false, for servers that
            have none, the verdict is read from the text.
        transcripts: File of all requests and replies, which later runs reuse by content; default: transcripts.jsonl in
            the output folder.

    Raises:
        ValueError: A setting is out of range; names it.
    """

    again: int = 50
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    logprobs: bool = True
    transcripts: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("again", 0), ("max_tokens", 1), ("temperature", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"judging.{name} is {value}; it must be at least {least}")
