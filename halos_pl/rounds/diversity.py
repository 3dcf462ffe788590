"""A simple measure of diversity: distinct-n (Li et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Share of n-grams of words that are distinct, over some answers to one prompt: distinct-n.

    1 if no n-gram occurs twice. Longer answers and more of them contain more repetitions, so it compares models on the
    same prompts with the same number of answers, and should be read together with their length. Answers without any
    n-gram, which repeat nothing, have 1.

    Args:
        texts: The answers.
        n: Number of words of an n-gram.
    """
    grams = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len({*grams}) / len(grams) if grams else 1.0
