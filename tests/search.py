"""The search for recipes: short trainings, judged on a validation part of the training set.

    python -m tests.search cifar10-norms --data-root DATA
    python -m tests.search mnist-l1 --data-root DATA --norms ln --trials "muon 0.05 centred"
    python -m tests.search cifar10-norms --data-root DATA --epochs 20 --seeds 3 --trials rates
    python -m tests.search mnist-l1 --data-root DATA --norms "bn + l1" gn ln --epochs 10 \\
        --trials "muon 0.05 centred, warm-up"

Each trial trains the assignment's network by its recipe with a few fields changed (or with
the library changed, by `search_patches.py`), on nine tenths of the training images, and is tested
on the last tenth; the test set is not looked at. The rows go
to `notebooks/results/search/NETWORK.csv`; what is there is not trained again.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import normlab as nl
from normlab.datasets.loading import load_assignment_data
from normlab.support.files import atomic_write
from tests.search_patches import PATCHES, patched

EPOCHS, VALIDATION = 3, 0.1
AT_ONCE = 2  # norms of a trial
L1 = 1e-5  # of a norm that is called "bn + l1"
ONE_CYCLE = {"batch_size": 64, "schedule": "one-cycle", "centred": False}
SGD = {**ONE_CYCLE, "optimizer": "sgd", "nesterov": True, "weight_decay": 5e-4}
MUON = {**ONE_CYCLE, "optimizer": "muon", "weight_decay": 0.01}
CENTRED = {**MUON, "lr": 0.05, "centred": True}
SHIFTED = ("shift:2", "flip")

TRIALS: dict[str, dict] = {
    "sgd 0.05 centred": {**SGD, "lr": 0.05, "centred": True},
    "sgd 0.1 centred": {**SGD, "lr": 0.1, "centred": True},
    "sgd 0.2 centred": {**SGD, "lr": 0.2, "centred": True},
    "adamw 0.005": {**ONE_CYCLE, "optimizer": "adamw", "lr": 0.005, "weight_decay": 0.01},
    "muon 0.02": {**MUON, "lr": 0.02},
    "muon 0.02 centred": {**MUON, "lr": 0.02, "centred": True},
    "muon 0.05 centred": CENTRED,
    "muon 0.1 centred": {**MUON, "lr": 0.1, "centred": True},
    "muon 0.2 centred": {**MUON, "lr": 0.2, "centred": True},
    "muon 0.4 centred": {**MUON, "lr": 0.4, "centred": True},
    "muon 0.05 centred, batch 32": {**CENTRED, "batch_size": 32},
    "muon 0.05 centred, batch 128": {**CENTRED, "batch_size": 128},
    "muon 0.05 centred, decay 0.1": {**CENTRED, "weight_decay": 0.1},
    "muon 0.05 centred, shift:1": {**CENTRED, "augment": ("shift:1",)},
    "muon 0.05 centred, rotate:7, shift:1": {**CENTRED, "augment": ("rotate:7", "shift:1")},
    "muon 0.05 centred, rotate:10, shift:2": {**CENTRED, "augment": ("rotate:10", "shift:2")},
    "muon 0.05 centred, shift:1, flip": {**CENTRED, "augment": ("shift:1", "flip")},
    "muon 0.05 centred, shift:2, flip": {**CENTRED, "augment": SHIFTED},
    "muon 0.05 centred, shift:4, flip": {**CENTRED, "augment": ("shift:4", "flip")},
    "muon 0.05 centred, shift:2, flip, cosine": {
        **CENTRED,
        "augment": SHIFTED,
        "schedule": "cosine",
    },
    "muon 0.05 centred, shift:2, flip, decay 0.1": {
        **CENTRED,
        "augment": SHIFTED,
        "weight_decay": 0.1,
    },
    "muon 0.05 centred, shift:2, flip, batch 32": {
        **CENTRED,
        "augment": SHIFTED,
        "batch_size": 32,
    },
    "muon 0.05 centred, warm-up": {**CENTRED, "schedule": "warm-up"},
    "muon 0.05 centred, smoothing 0.05": {**CENTRED, "label_smoothing": 0.05},
    "muon 0.05 centred, smoothing 0.1": {**CENTRED, "label_smoothing": 0.1},
    "muon 0.05 centred, momentum 0.95": {**CENTRED, "momentum": 0.95},
    "muon 0.05 centred, momentum 0.95, warm-up": {
        **CENTRED,
        "momentum": 0.95,
        "schedule": "warm-up",
    },
    "muon 0.05 centred, decay 0": {**CENTRED, "weight_decay": 0.0},
    "muon 0.05 centred, decay 0.05": {**CENTRED, "weight_decay": 0.05},
    "muon 0.05 centred, cutout:8": {**CENTRED, "augment": (*SHIFTED, "cutout:8")},
    "muon 0.05 centred, rotate:10, shift:2, cutout:6": {
        **CENTRED,
        "augment": ("rotate:10", "shift:2", "cutout:6"),
    },
    "muon 0.05 centred, affine:10": {**CENTRED, "augment": ("affine:10",)},
    # What no recipe can say: `PATCHES` has how it is done.
    "muon 0.05 centred, alternating flip": {**CENTRED, "augment": SHIFTED},
    "muon 0.05 centred, linear": CENTRED,
    "muon 0.05 centred, rise of a twentieth": CENTRED,
    "muon 0.05 centred, rise of a half": CENTRED,
    "muon 0.05 centred, first layer 0.5": CENTRED,
    "muon 0.05 centred, last layer 0.5": CENTRED,
    "muon 0.05 centred, last layer 2": CENTRED,
    "muon 0.05 centred, averaged weights": CENTRED,
    "muon 0.05 centred, averaged weights, to a tenth": CENTRED,
    "muon 0.05 centred, mean of the end": CENTRED,
}
# The likeliest first.
RATES = tuple(f"muon {rate} centred" for rate in (0.05, 0.1, 0.02, 0.2, 0.4))
FIELDS = (
    *("norm", "trial", "epochs", "accuracy", "loss", "train_loss", "seconds"),
    *("batch_size", "augment"),  # empty in rows from before they were kept
    "seed",
    "device",  # empty likewise: those were all trained on a CPU
)


def main() -> None:
    """Trains what is missing, a seed of everything before the next, and writes the table."""
    options = _options()
    assignment = nl.ASSIGNMENTS[options.assignment]
    table = Path("notebooks/results/search") / f"{assignment.name}.csv"
    data = load_assignment_data(assignment, root=options.data_root).with_validation(VALIDATION)
    place = options.out / f"{assignment.name}-{options.epochs}"
    for seed in range(options.seeds):
        for trial in _trials(options.trials):
            variants = [_variant(norm, trial) for norm in options.norms]
            done = _read(table)
            left = [v for v in variants if _key(_planned(assignment, v, options, seed)) not in done]
            # One alone is trained in this process, where a patch is.
            at_once = 1 if trial in PATCHES else AT_ONCE
            for start in range(0, len(left), at_once):  # so that the table grows as they finish
                search = replace(assignment, variants=tuple(left[start : start + at_once]))
                with patched(trial):
                    results = nl.run_assignment(
                        search,
                        data=data,
                        epochs=options.epochs,
                        seeds=[seed],
                        directory=place,
                        fresh=trial in PATCHES,  # no checkpoint holds what a patch keeps
                    )
                _keep(table, [_row(label, runs[0]) for label, runs in results.runs.items()])


def _variant(norm: str, trial: str) -> nl.Variant:
    """The norm, with its L1 if it is called so, trained as the trial says."""
    penalty = {"l1": L1} if norm.endswith(" + l1") else {}
    changes = TRIALS[trial] | penalty
    return nl.Variant(f"{norm}, {trial}", norm.removesuffix(" + l1"), changes=changes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.search", description=__doc__)
    parser.add_argument("assignment", choices=nl.ASSIGNMENTS)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--norms", nargs="+", default=("bn", "gn", "ln"))
    parser.add_argument("--trials", nargs="+", choices=(*TRIALS, "rates"), default=tuple(TRIALS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    return parser.parse_args()


def _trials(names: Sequence[str]) -> list[str]:
    """The names, with those of all rates in the place of "rates"."""
    return [trial for name in names for trial in (RATES if name == "rates" else (name,))]


def _planned(
    assignment: nl.Assignment, variant: nl.Variant, options: argparse.Namespace, seed: int
) -> dict:
    """The part of a row that is known before the training."""
    recipe = assignment.recipe_for(variant, seed=seed, epochs=options.epochs)
    return _about(variant.label, recipe)


def _about(label: str, recipe: nl.Recipe) -> dict:
    norm, _, trial = label.partition(", ")
    return {
        "norm": norm,
        "trial": trial,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "augment": " ".join(recipe.augment),
        "seed": recipe.seed,
    }


def _row(label: str, run: nl.Run) -> dict:
    measured = {"accuracy": "test_accuracy", "loss": "test_loss", "train_loss": "train_loss"}
    numbers = {name: f"{run.last[column]:.4f}" for name, column in measured.items()}
    device = run.provenance["device"]
    return _about(label, run.recipe) | numbers | {"seconds": f"{run.seconds:.0f}", "device": device}


def _read(path: Path) -> dict[tuple, dict]:
    """The rows of the table by their keys; none if there is no table."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        return {_key(row): row for row in csv.DictReader(file)}


def _keep(path: Path, rows: list[dict]) -> None:
    """Adds the rows to the table, in the place of those of the same trial."""
    kept = _read(path) | {_key(row): row for row in rows}
    with atomic_write(path) as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[key] for key in sorted(kept))
    for row in sorted(rows, key=lambda row: (row["norm"], -float(row["accuracy"]))):
        print(f"{row['norm']:15} {row['trial']:30} {float(row['accuracy']):.2%}")


def _key(row: dict) -> tuple:
    """What tells a trial from another: two of the same name may differ in their batches."""
    names = ("norm", "trial", "epochs", "batch_size", "augment", "seed")
    return tuple(str(row[name] or 0) for name in names)


if __name__ == "__main__":
    main()
