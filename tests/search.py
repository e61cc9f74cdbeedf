"""The search for recipes: short trainings, judged on a validation part of the training set.

    python -m tests.search cifar10-norms --data-root DATA
    python -m tests.search mnist-l1 --data-root DATA --norms ln --trials "muon 0.05 centred"

Each trial trains the assignment's network by its recipe with a few fields changed, for 3 epochs on
nine tenths of the training images, and is tested on the last tenth; the test set is not looked at.
What is done is kept in the output folder and is not trained again. The rows go to
`notebooks/results/search/NETWORK.csv`, in which those of earlier calls stay.
"""

import argparse
import csv
from pathlib import Path

import normlab as nl
from normlab.experiment import load_assignment_data
from normlab.files import written_aside

EPOCHS, VALIDATION = 3, 0.1
SGD = {"optimizer": "sgd", "nesterov": True, "weight_decay": 5e-4}
MUON = {"optimizer": "muon", "weight_decay": 0.01}
CENTRED = {**MUON, "lr": 0.05, "centred": True}
SHIFTED = ("shift:2", "flip")

TRIALS: dict[str, dict] = {
    "sgd 0.05": {**SGD, "lr": 0.05},
    "sgd 0.1": {**SGD, "lr": 0.1},
    "sgd 0.2": {**SGD, "lr": 0.2},
    "sgd 0.1 centred": {**SGD, "lr": 0.1, "centred": True},
    "adamw 0.005": {"optimizer": "adamw", "lr": 0.005, "weight_decay": 0.01},
    "muon 0.02": {**MUON, "lr": 0.02},
    "muon 0.02 centred": {**MUON, "lr": 0.02, "centred": True},
    "muon 0.05 centred": CENTRED,
    "muon 0.1 centred": {**MUON, "lr": 0.1, "centred": True},
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
}
FIELDS = (
    *("norm", "trial", "epochs", "accuracy", "loss", "train_loss", "seconds"),
    *("batch_size", "augment"),  # empty in rows from before they were kept
)


def main() -> None:
    """Trains what is missing and writes the table."""
    options = _options()
    assignment = nl.ASSIGNMENTS[options.assignment]
    data = load_assignment_data(assignment, root=options.data_root).with_validation(VALIDATION)
    variants = [
        nl.Variant(f"{norm}, {trial}", norm, changes={"batch_size": 64, **TRIALS[trial]})
        for trial in options.trials
        for norm in options.norms
    ]
    search = nl.Assignment(**vars(assignment) | {"variants": tuple(variants)})
    results = nl.run_assignment(
        search, data=data, epochs=options.epochs, directory=options.out / assignment.name
    )
    rows = [_row(label, runs[0], options.epochs) for label, runs in results.runs.items()]
    _keep(Path("notebooks/results/search") / f"{assignment.name}.csv", rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.search", description=__doc__)
    parser.add_argument("assignment", choices=nl.ASSIGNMENTS)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--norms", nargs="+", default=("bn", "gn", "ln"))
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=tuple(TRIALS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    return parser.parse_args()


def _row(label: str, run: nl.Run, epochs: int) -> dict:
    norm, _, trial = label.partition(", ")
    last, recipe = run.last, run.recipe
    measured = [f"{last[name]:.4f}" for name in ("test_accuracy", "test_loss", "train_loss")]
    values = (norm, trial, epochs, *measured, f"{run.seconds:.0f}")
    how = (recipe.batch_size, " ".join(recipe.augment))
    return dict(zip(FIELDS, (*values, *how), strict=True))


def _keep(path: Path, rows: list[dict]) -> None:
    """Adds the rows to the table, in the place of those of the same trial."""
    kept = {}
    if path.is_file():
        with open(path, newline="") as file:
            kept = {_key(row): row for row in csv.DictReader(file)}
    kept |= {_key(row): row for row in rows}
    with written_aside(path) as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept.values(), key=_key))
    for row in sorted(rows, key=lambda row: (row["norm"], -float(row["accuracy"]))):
        print(f"{row['norm']:15} {row['trial']:30} {float(row['accuracy']):.2%}")


def _key(row: dict) -> tuple[str, str, str]:
    return row["norm"], row["trial"], str(row["epochs"])


if __name__ == "__main__":
    main()
