"""Which rank computes which rows of a step: about as many tokens each, as the slowest rank sets the pace."""

from __future__ import annotations

from collections.abc import Sequence, Set


class Unit:
    """Examples of a step that stay on one rank.

    Args:
        examples: places of the examples in the step.
        prompts: for each example, the lengths to which their prompt is cut.
        completions: tokens of each example's completions.
    """

    def __init__(self, examples: Sequence[int], prompts: Sequence[Set[int]], completions: Sequence[int]) -> None:
        self.examples, self.prompts, self.completions = examples, prompts, completions
        self.tokens = sum(set().union(*prompts)) + sum(completions)

    def split(self) -> list[Unit]:
        """Its examples one by one."""
        parts = zip(self.examples, self.prompts, self.completions, strict=True)
        return [Unit([example], [prompt], [completion]) for example, prompt, completion in parts]


def shares(
    group: Sequence[int], prompts: Sequence[Set[int]], completions: Sequence[int], ranks: int
) -> list[list[int]]:
    """Distributes the examples of a step over ranks, the largest first, each to the rank with the fewest tokens.

    Examples with the same prompt stay together, as a rank computes a shared prompt once, unless they have more tokens
    than an equal share or there are fewer prompts than ranks. Every rank has the same shares, as they depend on nothing
    but the arguments. No rank has more tokens than an equal share and the tokens of one unit.

    Args:
        group: number of each example's prompt.
        prompts: for each example, the lengths of its prompt in tokens: several if its rows cut it differently.
        completions: tokens of each example's completions.
        ranks: number of ranks.

    Returns:
        For each rank its examples, in the order of the step; none is empty if there are at least ``ranks`` examples.
    """
    members: dict[int, list[int]] = {}
    for example, number in enumerate(group):
        members.setdefault(number, []).append(example)
    units = [Unit(part, [prompts[e] for e in part], [completions[e] for e in part]) for part in members.values()]
    equal = sum(unit.tokens for unit in units) / ranks
    units = [part for unit in units for part in (unit.split() if unit.tokens > equal else [unit])]
    while len(units) < ranks and (several := [unit for unit in units if len(unit.examples) > 1]):
        largest = max(several, key=lambda unit: unit.tokens)
        units = [part for unit in units for part in (unit.split() if unit is largest else [unit])]
    loads = [0] * ranks
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for unit in sorted(units, key=lambda unit: (-unit.tokens, unit.examples[0])):
        rank = loads.index(min(loads))
        loads[rank] += unit.tokens
        parts[rank] += unit.examples
    return [sorted(part) for part in parts]
