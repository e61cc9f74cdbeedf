"""Where the time of one training step goes, in percent: `python -m tests.benchmarks.step NETWORK`.

By torch's profiler, over 20 steps of the fast path on one CPU thread, for each normalization, with
and without the submission's dropout; the floating-point rate is that of the convolutions alone.
With `--device cuda` the times are those of the GPU, and the steps are taken without a graph, which
would hide its parts.
"""

import argparse
import time
from contextlib import ExitStack
from itertools import islice

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import normlab as nl
from normlab.engines.cpu import kept_memory
from normlab.engines.dropout import quick_dropout
from normlab.support.devices import exact_float32
from normlab.support.summaries import multiply_adds

BATCH, STEPS = 128, 20

PARTS = {
    "convolution": ("convolution",),
    "normalization": ("norm",),
    "dropout": (),  # see below
    "pooling": ("pool",),
    "ReLU": ("relu", "threshold"),
    "batch": ("index", "addcmul", "flip", "where", "constant_pad", "grid_sampler"),
    "optimizer": ("Optimizer",),
}
# With all that it calls: it multiplies, as others do, under a name that does not say for what.
DROPOUT = (
    "_Dropout",
    "_DropoutBackward",
    "aten::native_dropout",
    "aten::native_dropout_backward",
)


def main() -> None:
    """Prints a Markdown table, a row for each normalization."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=nl.NETWORKS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    name, device = options.network, torch.device(options.device)
    torch.set_num_threads(1)
    columns = ["norm", "dropout", "images a second", "GFLOP/s of convolutions", *PARTS]
    print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}")
    for norm in ("bn", "gn", "ln"):
        for dropout in (None, 0.0):
            network = nl.build_network(name, norm, dropout=dropout, seed=0)
            said = "as submitted" if dropout is None else "none"
            print(row(network.to(device), norm, said, device), flush=True)


def row(network: nl.Network, norm: str, dropout: str, device: torch.device) -> str:
    """One network's rate and shares."""
    shape = network.description["input_shape"]
    images = torch.randint(0, 256, (50 * BATCH, *shape), dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(images),))
    data = nl.Dataset("noise", images, labels, images, labels, tuple("abcdefghij"), "noise")
    augment = ("shift", "flip") if shape[0] == 3 else ("rotate",)
    batches = data.loader(batch_size=BATCH, augment=augment, device=device)
    batches.memory_format = torch.channels_last
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        if device.type == "cpu":
            stack.enter_context(quick_dropout(network))
            stack.enter_context(kept_memory())
        _steps(network, batches, optimizer)
        start = time.perf_counter()
        _steps(network, batches, optimizer)
        rate = BATCH * STEPS / (time.perf_counter() - start)
        watched = [ProfilerActivity.CPU]
        watched += [ProfilerActivity.CUDA] if device.type == "cuda" else []
        with profile(activities=watched) as recorded:
            _steps(network, batches, optimizer)
    shares = shares_of(recorded, "cpu" if device.type == "cpu" else "device")
    flops = 6 * multiply_adds(network, shape) * rate / shares["convolution"] / 1e9
    cells = [norm, dropout, f"{rate:,.0f}", f"{flops:.0f}"]
    return "| " + " | ".join(cells + [f"{share:.0%}" for share in shares.values()]) + " |"


def _steps(network, batches, optimizer) -> None:
    for images, labels in islice(batches, STEPS):
        nl.train_step(network, images, labels, optimizer)
    if images.is_cuda:
        torch.cuda.synchronize()


def shares_of(recorded: profile, clock: str = "cpu") -> dict[str, float]:
    """The share of the time in each part, by the operations' own time, the rest left out.

    `clock` is "cpu", or "device" for the time of the kernels that they start.
    """
    calls = [each for each in recorded.key_averages() if each.device_type == DeviceType.CPU]
    own = [(each.key, getattr(each, f"self_{clock}_time_total")) for each in calls]
    whole = sum(seconds for _, seconds in own)
    shares = dict.fromkeys(PARTS, 0.0)
    for key, seconds in own:
        for part, words in PARTS.items():
            if any(word.lower() in key.lower() for word in words):
                shares[part] += seconds / whole
                break
    dropouts = [each for each in calls if each.key in DROPOUT]
    shares["dropout"] = sum(getattr(each, f"{clock}_time_total") for each in dropouts) / whole
    return shares


if __name__ == "__main__":
    main()
