"""A whole assignment: all variants and seeds, those that are done already taken from disk."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from normlab.assignments import Assignment, Variant, build_variant, find_assignment
from normlab.checks import whole_number
from normlab.data import Dataset
from normlab.fitting import fit
from normlab.networks import NETWORKS
from normlab.runs import Run, remove_run
from normlab.sources import load_dataset


@dataclass
class Results:
    """The runs of an assignment: `runs[label]` holds one for each seed."""

    assignment: Assignment
    data: Dataset
    runs: dict[str, list[Run]]

    def __getitem__(self, label: str) -> list[Run]:
        return self.runs[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.runs)

    def table(self):
        """A pandas DataFrame, a row for each variant.

        `test_accuracy` is the mean over seeds of the last epoch's, a fraction, and `sd` its
        standard deviation (none for one seed). `best_accuracy` is the highest mean of any epoch,
        `best_epoch`: optimistic, since the test set picked it. `seconds` is the mean over seeds.
        """
        import pandas

        return pandas.DataFrame([self._row(label, runs) for label, runs in self.runs.items()])

    @staticmethod
    def _row(label: str, runs: list[Run]) -> dict:
        accuracy = np.array([[row["test_accuracy"] for row in run.history] for run in runs])
        by_epoch = accuracy.mean(0)
        return {
            "variant": label,
            "parameters": runs[0].parameters,
            "seeds": len(runs),
            "test_accuracy": by_epoch[-1],
            "sd": accuracy[:, -1].std(ddof=1) if len(runs) > 1 else np.nan,
            "best_epoch": int(by_epoch.argmax()) + 1,
            "best_accuracy": by_epoch.max(),
            "seconds": float(np.mean([run.seconds for run in runs])),
        }


def load_assignment_data(
    assignment: Assignment, name: str | Path | None = None, root: str | Path | None = None
) -> Dataset:
    """The assignment's data set, or the one called `name`, from `root` if it lies there.

    The bundled digits take the shape that the assignment's network is made for.
    """
    name = name or assignment.dataset
    shape = None
    if name == "digits" and assignment.network is not None:
        shape = NETWORKS[assignment.network].input_shape
    return load_dataset(name, root, input_shape=shape)


def run_assignment(
    name: str | Assignment,
    *,
    data: Dataset | None = None,
    seeds: int | Iterable[int] = 1,
    epochs: int | None = None,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    fresh: bool = False,
) -> Results:
    """Trains every variant of an assignment with every seed and returns the `Results`.

    Args:
        name: one of `ASSIGNMENTS`, or an `Assignment` of one's own.
        data: what to train and test on; without it, the assignment's data set is loaded.
        seeds: how many (0, 1, …), or which.
        epochs: other than the recipe's.
        directory: where to keep the runs, in `<variant>/seed-0` and so on. Runs found there are
            loaded if they are finished, and go on if they were interrupted.
        device, progress: as for `fit`.
        fresh: trains anew what `directory` holds already.
    """
    assignment = find_assignment(name)
    numbers = seed_numbers(seeds)
    data = data if data is not None else load_assignment_data(assignment)
    runs: dict[str, list[Run]] = {variant.label: [] for variant in assignment.variants}
    for seed in numbers:  # a first seed of everything before the second of anything
        for variant in assignment.variants:
            place = Path(directory) / variant.folder / f"seed-{seed}" if directory else None
            if fresh and place is not None:
                remove_run(place)
            run = _run_variant(assignment, variant, data, seed, epochs, place, device, progress)
            runs[variant.label].append(run)
    return Results(assignment, data, runs)


def seed_numbers(seeds: int | Iterable[int]) -> list[int]:
    """3 is [0, 1, 2]; a list is itself. Raises `ValueError` for none, twice the same or below 0."""
    if isinstance(seeds, Iterable) and not isinstance(seeds, str):
        numbers = [whole_number(seed, "each of seeds", least=0) for seed in seeds]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"seeds must name at least one seed, each once, not {numbers}")
        return numbers
    return list(range(whole_number(seeds, "seeds")))


def _run_variant(
    assignment: Assignment,
    variant: Variant,
    data: Dataset,
    seed: int,
    epochs: int | None,
    place: Path | None,
    device: str | torch.device | None,
    progress: bool,
) -> Run:
    network = build_variant(
        assignment, variant, seed=seed, classes=len(data.classes), input_shape=data.input_shape
    )
    recipe = assignment.recipe_for(variant, seed=seed, epochs=epochs)
    label = f"{variant.label}, seed {seed}"
    try:
        return fit(
            network, data, recipe, directory=place, device=device, progress=progress, label=label
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"{label}: {error}") from error
