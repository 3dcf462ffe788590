"""Recomputes numbers in results/README.md from its tables, the held-out pairs and the value functions.

.venv/bin/python experiments/ablations/readings.py
.venv/bin/python experiments/ablations/readings.py --reference runs/pandalm/reference/held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy import stats

from value_functions import CARA, Identity, KahnemanTversky, Logistic, LogSigmoid, ValueFunction

HERE = Path(__file__).resolve().parent
BETA = 0.1


def by_length() -> Iterator[str]:
    """The rule "fewer words wins" on the held-out pairs."""
    pairs = [json.loads(line) for line in (HERE / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    words = [[len(pair[side][-1]["content"].split()) for side in ("chosen", "rejected")] for pair in pairs]
    signs = Counter(int(np.sign(chosen - rejected)) for chosen, rejected in words)
    accuracy = (signs[-1] + signs[0] / 2) / len(pairs)
    yield f"fewer words wins: {accuracy:.3f} of {len(pairs)} pairs; chosen shorter in {signs[-1]}, longer in {signs[1]}"


def weight(value_function: ValueFunction, u: float = -0.5) -> float:
    """Weight of a desirable row relative to a reflected undesirable one, at an outcome of ``u`` nats."""
    points = torch.tensor([u, -u], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(value_function(points).sum(), points)
    return float(slopes[0] / slopes[1])


def slopes() -> Iterator[str]:
    """Studies 1 and 3: ratios of slopes, and how much of the KL they explain."""
    functions = {"kto": Logistic(beta=BETA), "identity": Identity(beta=BETA), "log sigmoid": LogSigmoid(beta=BETA)}
    functions |= {"cara": CARA(), "Kahneman-Tversky": KahnemanTversky()}
    yield "ratio of slopes: " + ", ".join(f"{name} {weight(each):.2f}" for name, each in functions.items())
    study = yaml.safe_load((HERE / "sensitivity.yaml").read_text(encoding="utf-8"))
    points = []
    table = (HERE / "results/sensitivity/report.md").read_text(encoding="utf-8").partition("\n## ")[0]
    for line in table.splitlines():
        if line.startswith("| kto_kahneman_tversky "):
            cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
            options = dict(part.split("=") for part in cells[0].split() if "=" in part)
            v = KahnemanTversky(alpha=float(options["alpha"]), loss_aversion=float(options["loss_aversion"]))
            points.append((math.log(weight(v)), math.log(float(cells[4]))))
    axes = [len(values) for key, values in study["axes"].items() if key != "objective"]
    assert len(points) == math.prod(axes)
    fit = stats.linregress(*zip(*points, strict=True))
    yield f"log KL on the log ratio of slopes, {len(points)} points: R2 = {fit.rvalue**2:.2f}"


def imbalance() -> Iterator[str]:
    """Study 4: all desirable rows compared with a quarter and a tenth of them, paired by seed."""
    page = (HERE / "results/README.md").read_text(encoding="utf-8").partition("## 4.")[2].partition("\n## ")[0]
    rule = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].partition(" (")[0].endswith("%"):
            rule[cells[0].partition(" (")[0]] = np.array([float(share) for share in cells[1].split(" / ")])
    for few in ("25 %", "10 %"):
        less = rule["100 %"] - rule[few]
        yield f"rule, {few} below 100 %: {less.mean():.2f}, p = {stats.ttest_1samp(less, 0).pvalue:.3f} over seeds"


def detectable() -> Iterator[str]:
    """Power at the size that earlier code called detectable, at the strictest of 49 comparisons, with 2 df."""
    bound, df = stats.t.isf(0.05 / 49 / 2, 2), 2
    yield f"power for a 'detectable' size: {stats.nct.sf(bound, df, bound + stats.t.isf(0.2, df)):.2f}"


def shown(studies: int = 2000) -> Iterator[str]:
    """How often a study of 8 arms and 7 independent metrics without any difference reported one as "shown"."""
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
    from family_wise_error import Setting, count

    for setting in (Setting(8, 3, 100, 0.4, binary=True), Setting(8, 3, 100, 0.2)):
        least = count(setting, studies, 0).least_before  # of one metric, after Holm's correction over its 7 comparisons
        share = 1 - float((least >= 0.05 / 7).mean()) ** 7
        yield f"false 'shown' in a study without differences ({setting.kind}, run SD {setting.run}): {share:.2f}"


def contradictions(path: Path) -> Iterator[str]:
    """Study 5b: how often the reference prefers the minority's completion by more than DPO's optimum can offset."""
    logps: dict[str, dict[bool, float]] = defaultdict(dict)
    prompts: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        logps[row["pair"]][row["desirable"]] = row["policy_logp"]
        prompts[row["pair"]] = row["prompt"]
    far = sum(pair[False] - pair[True] > math.log(2) / BETA for pair in logps.values())
    most = Counter(prompts.values()).most_common(1)[0][1]
    yield f"the reference prefers the minority's by over {math.log(2) / BETA:.1f} nats: {far} of {len(logps)} pairs"
    yield f"{len(set(prompts.values()))} prompts, one of which has {most} pairs"


def main() -> None:
    """Prints all numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="held_out.jsonl of the model before training, see study 5b")
    args = parser.parse_args()
    for part in (by_length(), slopes(), imbalance(), detectable(), shown()):
        print(*part, sep="\n")
    if args.reference is not None:
        print(*contradictions(args.reference), sep="\n")


if __name__ == "__main__":
    main()
