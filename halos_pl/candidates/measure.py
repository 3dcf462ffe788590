"""What policies over candidates are trained and measured on, and the choice of their learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halos_pl.candidates.fitting import Fitted
from halos_pl.candidates.policy import Candidates
from halos_pl.candidates.read import Preferences
from halos_pl.candidates.spec import Sweep
from halos_pl.data.sources import sources_of

METRICS: Mapping[str, str] = {
    "accuracy": "share of pairs of which the reward log(pi/pi_ref) is higher for the chosen completion",
    "follows": "share of pairs of which the policy makes the chosen completion likelier than the rejected one",
    "chosen": "probability of the chosen completion, given that the policy answers with one of the pair",
    "gap": "log-prob of the chosen completion minus that of the rejected one, in nats",
    "kl": "KL divergence from pi_ref over the prompt's candidates, in nats",
}


@dataclass
class Measured:
    """Candidates of some prompts, and preferences about them. Each prompt weighs the same, whatever its pairs.

    Attributes:
        candidates: of m prompts.
        pairs: LongTensor [n, 2], places of chosen and rejected.
        names: row of the first preference about each prompt.
    """

    candidates: Candidates
    pairs: Tensor
    names: list[str]

    @property
    def before(self) -> Tensor:
        """The mean gap of each prompt under pi_ref in nats, float [m]."""
        before = self.candidates.reference_logps.flatten()[self.pairs]
        return self._of_prompts((before[:, 0] - before[:, 1])[None])[0]

    def _of_prompts(self, of_pairs: Tensor) -> Tensor:
        """The mean over each prompt's pairs, [fits, m]."""
        number = self.pairs[:, 0] % self.candidates.prompts
        counts = torch.bincount(number, minlength=self.candidates.prompts)
        total = of_pairs.new_zeros(len(of_pairs), len(counts)).index_add_(1, number, of_pairs)
        return total / counts

    def __call__(self, theta: Tensor) -> dict[str, Tensor]:
        """``METRICS`` of each fit and prompt, float [fits, m]; ``theta`` is [fits, d]. Equal ones count half."""
        logps = self.candidates.logps(theta)
        chosen, rejected = (logps.flatten(1)[:, places] for places in self.pairs.T)
        before = self.candidates.reference_logps.flatten()[self.pairs]
        gap = chosen - rejected
        gain = gap - (before[:, 0] - before[:, 1])
        of_pairs = {
            "accuracy": (gain > 0).float() + 0.5 * (gain == 0),
            "follows": (gap > 0).float() + 0.5 * (gap == 0),
            "chosen": gap.sigmoid(),
            "gap": gap,
        }
        return {name: self._of_prompts(each) for name, each in of_pairs.items()} | {"kl": self.candidates.kl(logps)}


@dataclass
class Data:
    """What a sweep is fitted and measured on.

    Attributes:
        candidates, pairs: to train on.
        tune: to choose rates by; None: by the training loss.
        report: to report.
    """

    candidates: Candidates
    pairs: Tensor
    tune: Measured | None
    report: Measured


def features_of(sweep: Sweep, read: Preferences, train: list[int]) -> Tensor | None:
    """phi of all completions, float32 [n, d]; each column has standard deviation 1 over those of training.

    Raises:
        ValueError: training has fewer completions than ``states``.
    """
    if sweep.words == "free":
        return None
    features = read.features(sweep.words)
    rows = sorted({row for i in train for row in read.pairs[i]})
    if sweep.states:
        states = torch.stack(read.states)
        if sweep.states > min(len(rows) - 1, states.shape[1]):
            raise ValueError(
                f"states is {sweep.states}; it can be at most {min(len(rows) - 1, states.shape[1])}, as there are"
                f" {len(rows)} completions to train on, with states of {states.shape[1]} numbers"
            )
        states = states - states[rows].mean(0)
        components = torch.linalg.svd(states[rows], full_matrices=False).Vh[: sweep.states]
        features = torch.cat([features, states @ components.T], 1)
    scale = features[rows].std(0)
    return features / torch.where(scale > 0, scale, 1.0)  # of what never varies, every policy is the same


def prepare(sweep: Sweep, read: Preferences) -> Data:
    """Splits what was read.

    Raises:
        ValueError: training and held-out data overlap where they must not, or do not where they must, or a seed cannot
            draw its votes.
    """
    files = tuple(f"{source.label}{source.before_line}" for source in sources_of("test", list(sweep.train)))
    numbers = range(len(read.pairs))
    train = [i for i in numbers if read.names[i].startswith(files)]
    held_out = sorted({*numbers} - {*train})
    if sweep.votes > len(train):
        raise ValueError(f"votes is {sweep.votes}, but train has {len(train)} preferences")
    same = sweep.votes == len(train) and {*sweep.noise} == {0.0} and {*sweep.desirable} == {1.0}
    for name, number in (("seeds", sweep.seeds), ("tune_seeds", sweep.tune_seeds)):
        if same and number > 1:
            raise ValueError(
                f"all {number} {name} would be the same, as each draws all {len(train)} votes; set {name} to 1"
            )

    def prompt(i: int) -> int:
        return read.prompt[read.pairs[i][0]]

    known = {prompt(i) for i in train}
    features = features_of(sweep, read, train)

    def measured(pairs: list[int]) -> Measured:
        first = dict[int, str]()
        for i in pairs:
            first.setdefault(prompt(i), Path(read.names[i]).name)
        return Measured(*read.sets(pairs, features), [*first.values()])

    if sweep.measure_on == "training_prompts":
        if far := [read.names[i] for i in held_out if prompt(i) not in known]:
            raise ValueError(
                f"{far[0]}: measure_on is training_prompts, but this prompt is not one of train ({len(far)} are not)"
            )
        order = {number: k for k, number in enumerate(dict.fromkeys(prompt(i) for i in train))}
        shown = sorted(held_out or train, key=lambda i: order[prompt(i)])
        candidates, places = read.sets([*train, *shown], features)
        names = measured(shown).names
        if len(names) < candidates.prompts:
            raise ValueError(f"held_out has {len(names)} of the {candidates.prompts} prompts of train; it needs all")
        return Data(candidates, places[: len(train)], None, Measured(candidates, places[len(train) :], names))
    words = {read.words[number] for number in known}  # a space more does not make another prompt
    if near := [read.names[i] for i in held_out if read.words[prompt(i)] in words]:
        raise ValueError(f"{near[0]}: the held-out prompt is also one of train ({len(near)} are); leave it out")
    order = {number: k for k, number in enumerate(dict.fromkeys(map(prompt, held_out)))}
    if len(order) < 4:
        raise ValueError(
            f"held_out has {len(order)} prompts; it needs 4, to choose rates on one half and report the other"
        )
    halves = [measured([i for i in held_out if order[prompt(i)] % 2 == half]) for half in (0, 1)]
    return Data(*read.sets(train, features), halves[0], halves[1])


def choose(fitted: Fitted, tune: Measured | None, metric: str) -> tuple[int, list[float]]:
    """The number of the best learning rate, and the figure of each.

    Raises:
        ValueError: no rate gives finite figures.
    """
    if tune is None:
        figures = -fitted.loss.mean(1)
    else:
        figures = torch.stack([tune(theta)[metric].mean() for theta in fitted.theta])
    figures = figures.where(fitted.theta.isfinite().flatten(1).all(1), torch.nan)
    if not bool(figures.isfinite().any()):
        raise ValueError("the policies of all rates have parameters that are not finite; try lower rates")
    return int(figures.nan_to_num(nan=-torch.inf).argmax()), figures.tolist()
