"""float32 matrix products as torch makes them (MKL) and by oneDNN, at the sizes of SmolLM2-135M's layers.

    python benchmarks/products.py [--threads 2] [--tokens 637]

GFLOP/s of the quickest quarter of the calls, each way called in turn. Rounding is oneDNN's over MKL's, root mean
squares of the differences from the product in float64.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from halos_pl.policy.products import _onednn

WIDTHS = {"feed-forward, in": (576, 1536), "feed-forward, out": (1536, 576), "attention": (576, 576), "key": (576, 192)}
HEAD = (576, 49152)


def seconds(ways: dict[str, Callable[[], Tensor]], calls: int) -> dict[str, float]:
    """Of each way, the quickest quarter of its calls."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(calls):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.quantiles(found, n=4)[0] for name, found in times.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=637)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = ["layer", "tokens", "in", "out", "result, MKL", "oneDNN", "rounding"]
    columns += ["gradient of what goes in, MKL", "oneDNN", "rounding"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    layers = {**WIDTHS, "head": HEAD, "head, one token": HEAD}
    for name, (width, size) in layers.items():
        tokens = {"head": 86, "head, one token": 1}.get(name, args.tokens)
        x, weight, slope = torch.randn(tokens, width), torch.randn(size, width), torch.randn(tokens, size)
        ways = {
            "forward, MKL": lambda x=x, weight=weight: x @ weight.t(),
            "forward, oneDNN": lambda x=x, weight=weight: _onednn(x, weight, None),
            "backward, MKL": lambda slope=slope, weight=weight: slope @ weight,
            "backward, oneDNN": lambda slope=slope, weight=weight: _onednn(slope, weight.t(), None),
        }
        flop = 2 * tokens * width * size
        speeds = [f"{flop / found / 1e9:.0f}" for found in seconds(ways, 40).values()]
        exact = {"forward": x.double() @ weight.double().t(), "backward": slope.double() @ weight.double()}
        off = {way: float((call().double() - exact[way.split(",")[0]]).norm()) for way, call in ways.items()}
        ratios = [f"{off[f'{way}, oneDNN'] / off[f'{way}, MKL']:.1f}" for way in exact]
        figures = [*speeds[:2], ratios[0], *speeds[2:], ratios[1]]
        print(f"| {name} | {tokens} | {width} | {size} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
