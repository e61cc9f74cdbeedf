"""What `watch` costs: `python -m tests.benchmarks.watching NETWORK`.

Short stretches of the students' loop on one CPU thread, in turns with and without a watch that
records one step in twenty; each stretch begins with a recorded step and holds whole twenties. What
is compared is the time that the process got from the processor, so that other work on the machine
counts little: each stretch with the one before it, and of these the median.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch

import normlab as nl
from normlab.recipes import make_optimizer

EVERY = 20


def main() -> None:
    """Prints a Markdown table, a row for each normalization."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.watching", description=__doc__
    )
    parser.add_argument("network", choices=nl.NETWORKS)
    parser.add_argument("--norms", nargs="+", default=("bn", "gn", "ln"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=EVERY, help="of a stretch")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| norm | without (ms a step) | with | share of the time (%) |")
    print("| --- | ---: | ---: | ---: |")
    for norm in options.norms:
        plain, watched = measure(options, norm)
        ratios = [after / before for before, after in zip(plain, watched, strict=True)]
        numbers = f"{statistics.median(plain):.1f} | {statistics.median(watched):.1f}"
        print(f"| {norm} | {numbers} | {100 * (statistics.median(ratios) - 1):.1f} |", flush=True)


def measure(options: argparse.Namespace, norm: str) -> tuple[list[float], list[float]]:
    """Milliseconds of a step in each stretch, without and with a watch."""
    network = nl.build_network(options.network, norm, dropout=0.0, seed=0)
    images = torch.randn(options.batch_size, *nl.NETWORKS[options.network].input_shape)
    batches = [(images, torch.arange(options.batch_size) % 10)] * options.steps
    optimizer = make_optimizer(network, nl.Recipe(optimizer="muon", lr=1e-3, centred=True))
    times: dict[bool, list[float]] = {False: [], True: []}
    nl.train_epoch(network, batches[:3], optimizer)
    for _ in range(options.repeats):
        for watched, measured in times.items():
            with nl.watch(network, every=EVERY) if watched else nullcontext():
                started = time.process_time()
                nl.train_epoch(network, batches, optimizer)
                measured.append(1000 * (time.process_time() - started) / options.steps)
    return times[False], times[True]


if __name__ == "__main__":
    main()
