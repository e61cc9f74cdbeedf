"""One training over two processes against one process: `python -m tests.benchmarks.replicas`.

Each training is timed in a process, or two, of its own, one thread each, in turns; what counts is
the second epoch, in seconds by the clock, since the first one makes what is made once. Needs two
cores that nothing else uses. The efficiency is the time of one process over twice that of two.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

import normlab as nl

KINDS = {
    "GN": ("gn", 1, False),
    "GN, two processes": ("gn", 2, False),
    "BN": ("bn", 1, False),
    "BN apart, two processes": ("bn", 2, False),
    "BN synchronised, two processes": ("bn", 2, True),
}


def main() -> None:
    """Prints a Markdown table, a row for each way."""
    options = _options()
    if options.train:
        train(options)
        return
    times: dict[str, list[float]] = {label: [] for label in KINDS}
    for _ in range(options.repeats):
        for label, found in times.items():
            found.append(seconds(options, label))
    print("| way | seconds an epoch | efficiency |\n| --- | ---: | ---: |")
    for label, (norm, processes, _) in KINDS.items():
        alone = median(times[norm.upper()])
        efficiency = f"{alone / 2 / median(times[label]):.2f}" if processes > 1 else "1"
        print(f"| {label} | {median(times[label]):.2f} | {efficiency} |")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.replicas")
    parser.add_argument("--network", choices=nl.NETWORKS, default="cifar10-norms")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", choices=KINDS, help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


def seconds(options: argparse.Namespace, label: str) -> float:
    """Of the second epoch, by one process or by two."""
    command = ["-m", "tests.benchmarks.replicas", *sys.argv[1:], "--train", label]
    processes = KINDS[label][1]
    if processes > 1:
        command = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *command]
    command.insert(0, sys.executable)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def train(options: argparse.Namespace) -> None:
    """Trains for two epochs; the first process prints the seconds of the second."""
    norm, _, synchronised = KINDS[options.train]
    torch.set_num_threads(1)
    name = "mnist" if options.network.startswith("mnist") else "cifar10"
    data = nl.load_dataset(name, options.data_root).subset(train=options.images, test=100)
    recipe = nl.Recipe(epochs=2, batch_size=options.batch_size, lr=0.01)
    with nl.data_parallel(sync_batch_norm=synchronised, device="cpu") as here:
        network = nl.build_network(options.network, norm, dropout=0.0, seed=0)
        run = nl.fit(network, data, recipe, device="cpu", progress=False)
        if here.is_first:
            print(json.dumps(run.history[1]["seconds"]))


if __name__ == "__main__":
    main()
