"""The rule of the quickstart: a person asked for one short sentence, and got it."""

from __future__ import annotations

import re

REQUEST = "Answer in one short sentence."
FEWEST_WORDS, MOST_WORDS = 8, 20


def ask(question: str) -> list[dict[str, str]]:
    """The prompt for a question: one user's message that asks for one short sentence."""
    return [{"role": "user", "content": f"{question} {REQUEST}"}]


def meets_rule(answer: str, finished: bool) -> bool:
    """Whether an answer is one short sentence.

    It is where the model ended it by itself, in one line of 8 to 20 words, with one full stop, exclamation or
    question mark, which is its last character. The lower bound keeps out answers that are short by saying nothing.

    Args:
        answer: without special tokens.
        finished: the model ended it (EOS), and no limit of length did.
    """
    text = answer.strip()
    ends = re.findall(r"[.!?]+(?=\s|$)", text)
    words = len(text.split())
    return (
        finished and "\n" not in text and len(ends) == 1 and text[-1] in ".!?" and FEWEST_WORDS <= words <= MOST_WORDS
    )
