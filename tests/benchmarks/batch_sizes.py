"""What an image costs in a training with batches of each size, on one thread.

    python -m tests.benchmarks.batch_sizes --data-root DATA

Trains `cifar10-norms` with BN on the same images at each size, all sizes in turn, several
times over, and prints the median of each as a multiple of the cost at batch 64. It counts the
processor's time, which neighbours on the machine lengthen less than the clock's.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch

import normlab as nl

SIZES, REFERENCE = (2, 4, 8, 16, 32, 64, 128, 512), 64
IMAGES = 2048  # four steps of the largest batch


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.batch_sizes")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = nl.load_dataset("cifar10", options.data_root)
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(options.repeats):
        for size in SIZES:
            found[size].append(seconds_an_image(data, size))
    costs = {size: median(times) for size, times in found.items()}
    print("| batch size | milliseconds an image | of that at 64 |\n| ---: | ---: | ---: |")
    for size, cost in costs.items():
        print(f"| {size} | {1000 * cost:.2f} | {cost / costs[REFERENCE]:.2f} |")


def seconds_an_image(data: nl.Dataset, size: int) -> float:
    """Of one epoch, with its making and its test on ten images."""
    some = data.subset(train=IMAGES, test=10)
    recipe = nl.ASSIGNMENTS["cifar10-norms"].recipe.replace(batch_size=size, epochs=1, lr=1e-4)
    network = nl.build_network("cifar10-norms", "bn", dropout=0.0, seed=0)
    start = time.process_time()
    nl.fit(network, some, recipe, device="cpu", progress=False)
    return (time.process_time() - start) / IMAGES


if __name__ == "__main__":
    main()
