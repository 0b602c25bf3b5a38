"""The output layer and its loss on a CPU, forward and backward: plain, by chunks, and torch's own.

    python -m benchmarks.loss [--tokens 2048] [--width 320] [--vocabulary 16384] [--threads 2] [--rounds 7]

All in turn in one process; given is the median of each one's CPU time and its share of the plain loss'. On a GPU the
same question is answered by `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.loss import chunked_loss, weighted_loss


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 2048), ("width", 320), ("vocabulary", 16384), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    hidden = torch.randn(options.tokens, options.width, requires_grad=True)
    weight = (0.02 * torch.randn(options.vocabulary, options.width)).requires_grad_()
    targets, weights = torch.randint(options.vocabulary, (options.tokens,)), torch.ones(options.tokens)

    def by_chunks(chunk: int) -> Callable[[], Tensor]:
        return lambda: chunked_loss(hidden, weight, targets, weights, chunk)

    ways: dict[str, Callable[[], Tensor]] = {"plain": lambda: weighted_loss(hidden @ weight.t(), targets, weights)}
    ways |= {f"chunks of {chunk}": by_chunks(chunk) for chunk in (64, 256, 1024) if chunk < options.tokens}
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        own = torch.nn.LinearCrossEntropyOptions()
        ways["torch's own"] = lambda: F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=own)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):  # the first warms up
        for name, way in ways.items():
            hidden.grad = weight.grad = None
            begun = time.process_time()
            way().backward()
            times[name].append(time.process_time() - begun)
    print("| loss | CPU ms | of the plain one's |\n|---|---:|---:|")
    plain = statistics.median(times["plain"][1:])
    for name, spent in times.items():
        median = statistics.median(spent[1:])
        print(f"| {name} | {1e3 * median:,.0f} | {median / plain:.2f} |")


if __name__ == "__main__":
    main()
