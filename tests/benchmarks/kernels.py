"""How many calls that compute something a training step makes on the path that a GPU takes.

    python -m tests.benchmarks.kernels

With networks this small a step on a GPU costs its number of kernels. No GPU is needed to count: the
step of the captured graph runs on tensors without values (device "meta"), and torch tells of every
call. Calls that only look at memory otherwise, or reserve some, are left out.
"""

from collections import Counter
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from normlab.assignments import ASSIGNMENTS, Assignment, Variant
from normlab.comparisons.report import in_markdown
from normlab.data import BatchLoader
from normlab.engines.cuda_graph import GraphEngine
from normlab.model import NETWORKS
from normlab.runs.jobs import build_variant

NOTHING_COMPUTED = ("empty", "new_empty", "_unsafe_view", "profiler::")


class Counted(TorchDispatchMode):
    """Counts calls by name inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if not (function.is_view or name.startswith(NOTHING_COMPUTED)):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def step_calls(assignment: Assignment, variant: Variant) -> Counter[str]:
    """The calls of one step of a variant, by name."""
    shape = NETWORKS[assignment.network].input_shape
    recipe = assignment.recipe_for(variant, seed=0)
    like = SimpleNamespace(classes=range(10), input_shape=shape)
    network = build_variant(assignment, variant, like, seed=0)
    network.to("meta", memory_format=torch.channels_last)
    images = torch.empty(4, *shape, dtype=torch.uint8, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    statistics = {"mean": [0.5] * shape[0], "std": [0.25] * shape[0]}
    options = {"memory_format": torch.channels_last, "batch_size": 4, **statistics}
    train = BatchLoader(images, labels, augment=recipe.augment, **options)
    engine = GraphEngine(network, recipe, train, BatchLoader(images, labels, **options))
    engine._train_step(4)  # the first one makes the optimiser's state
    with Counted() as counted:
        engine._train_step(4)
    return counted.calls


def main() -> None:
    """Prints the table of all assignments."""
    rows = [
        (f"`{assignment.name}`", variant.label, str(step_calls(assignment, variant).total()))
        for assignment in ASSIGNMENTS.values()
        for variant in assignment.variants
    ]
    print(in_markdown(("network", "variant", "calls of a step"), rows))


if __name__ == "__main__":
    main()
