"""The rule of the quickstart: the answer is one short sentence, as the prompt asks."""

from __future__ import annotations

import re

REQUEST = "Answer in one short sentence."
FEWEST_WORDS, MOST_WORDS = 8, 20


def ask(question: str) -> list[dict[str, str]]:
    """The prompt for a question: a user message that asks for one short sentence."""
    return [{"role": "user", "content": f"{question} {REQUEST}"}]


def meets_rule(answer: str, finished: bool) -> bool:
    """Whether an answer is one short sentence.

    The model ended it before the length limit, and it is one line of 8 to 20 words with a single full stop, exclamation
    mark or question mark, at its end. The lower bound excludes answers that are short because they say nothing.

    Args:
        answer: text without special tokens.
        finished: whether the model ended the answer (EOS), rather than the length limit.
    """
    text = answer.strip()
    ends = re.findall(r"[.!?]+(?=\s|$)", text)
    words = len(text.split())
    return (
        finished and "\n" not in text and len(ends) == 1 and text[-1] in ".!?" and FEWEST_WORDS <= words <= MOST_WORDS
    )
