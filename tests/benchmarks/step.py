"""Where the time of one training step goes, in percent: `python -m tests.benchmarks.step NETWORK`.

By torch's profiler, over 20 steps of the fast path on one CPU thread, for each normalization, with
and without the submission's dropout; the floating-point rate is that of the convolutions alone.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import normlab as nl
from normlab.allocator import kept_memory
from normlab.dropout import quick_dropout
from normlab.summaries import multiply_adds

BATCH, STEPS = 128, 20

PARTS = {
    "convolution": ("convolution",),
    "normalization": ("norm",),
    "dropout": ("_Dropout", "random_", "aten::ge"),
    "pooling": ("pool",),
    "ReLU": ("relu", "threshold"),
    "batch": ("index", "addcmul", "flip", "where", "constant_pad", "grid_sampler"),
    "optimizer": ("Optimizer",),
}


def main() -> None:
    """Prints a Markdown table, a row for each normalization."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=nl.NETWORKS)
    name = parser.parse_args().network
    torch.set_num_threads(1)
    columns = ["norm", "dropout", "images a second", "GFLOP/s of convolutions", *PARTS]
    print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}")
    for norm in ("bn", "gn", "ln"):
        for dropout in (None, 0.0):
            network = nl.build_network(name, norm, dropout=dropout, seed=0)
            print(row(network, norm, "as submitted" if dropout is None else "none"), flush=True)


def row(network: nl.Network, norm: str, dropout: str) -> str:
    """One network's rate and shares."""
    shape = network.description["input_shape"]
    images = torch.randint(0, 256, (50 * BATCH, *shape), dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(images),))
    data = nl.Dataset("noise", images, labels, images, labels, tuple("abcdefghij"), "noise")
    augment = ("shift", "flip") if shape[0] == 3 else ("rotate",)
    batches = data.loader(batch_size=BATCH, augment=augment)
    batches.memory_format = torch.channels_last
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    with quick_dropout(network), kept_memory():
        _steps(network, batches, optimizer)
        start = time.perf_counter()
        _steps(network, batches, optimizer)
        rate = BATCH * STEPS / (time.perf_counter() - start)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            _steps(network, batches, optimizer)
    shares = _shares(recorded)
    flops = 6 * multiply_adds(network, shape) * rate / shares["convolution"] / 1e9
    cells = [norm, dropout, f"{rate:,.0f}", f"{flops:.0f}"]
    return "| " + " | ".join(cells + [f"{share:.0%}" for share in shares.values()]) + " |"


def _steps(network, batches, optimizer) -> None:
    for step, (images, labels) in enumerate(batches):
        if step == STEPS:
            return
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()


def _shares(recorded: profile) -> dict[str, float]:
    """The share of the time in each part, by the operations' own time, the rest left out."""
    own = [(event.key, event.self_cpu_time_total) for event in recorded.key_averages()]
    whole = sum(seconds for _, seconds in own)
    shares = dict.fromkeys(PARTS, 0.0)
    for key, seconds in own:
        for part, words in PARTS.items():
            if any(word.lower() in key.lower() for word in words):
                shares[part] += seconds / whole
                break
    return shares


if __name__ == "__main__":
    main()
