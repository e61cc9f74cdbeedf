"""What `normlab run` leaves behind: figures, tables, and a page that shows them."""

import math
from pathlib import Path

from normlab.analysis import find_mistakes
from normlab.experiment import Results
from normlab.files import write_json, write_text
from normlab.plots import plot_curves, plot_mistakes, save_figure

LOSS_FIGURE, ACCURACY_FIGURE = "test-loss.png", "test-accuracy.png"


def write_report(results: Results, directory: str | Path) -> Path:
    """Writes figures, `results.csv`, `results.json` and `report.md`; returns the page's path."""
    directory = Path(directory)
    save_figure(plot_curves(results.runs, "test_loss"), directory / LOSS_FIGURE)
    save_figure(plot_curves(results.runs, "test_accuracy"), directory / ACCURACY_FIGURE)
    for variant in results.assignment.variants:
        wrong = find_mistakes(results.runs[variant.label][0], results.data)
        figure = plot_mistakes(wrong, title=variant.label)
        save_figure(figure, directory / f"mistakes-{variant.folder}.png")
    write_text(directory / "results.csv", results.table().to_csv(index=False))
    write_json(directory / "results.json", results_as_dict(results))
    write_text(directory / "report.md", report_text(results))
    return directory / "report.md"


def results_as_dict(results: Results) -> dict:
    """Everything a reader of the numbers needs, as JSON can hold it."""
    rows = results.table().to_dict("records")
    variants = []
    for variant, row in zip(results.assignment.variants, rows, strict=True):
        runs = results.runs[variant.label]
        spread = None if math.isnan(row["sd"]) else row["sd"]
        variants.append(
            row
            | {
                "sd": spread,
                "norm": variant.norm,
                "reported": variant.reported,
                "network": runs[0].config["is"]["network"],
                "recipe": {k: v for k, v in runs[0].recipe.as_dict().items() if k != "seed"},
                "runs": [
                    {"seed": run.recipe.seed, "test_loss": run.last["test_loss"]}
                    | {"test_accuracy": run.last["test_accuracy"], "seconds": run.seconds}
                    for run in runs
                ],
            }
        )
    first = next(iter(results.runs.values()))[0]
    return {
        "assignment": results.assignment.name,
        "title": results.assignment.title,
        "data": first.config["is"]["data"] | {"source": results.data.source},
        "test": results.data.test_name,
        "from": {k: v for k, v in first.config["from"].items() if k != "data_source"},
        "variants": variants,
    }


def markdown_table(results: Results) -> str:
    """The table for people: percentages, mean ± standard deviation of the last epoch."""
    lines = [
        "| variant | parameters | seeds | test accuracy, last epoch (%) | best epoch (optimistic) "
        "| seconds a run |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results.table().to_dict("records"):
        best = f"{100 * row['best_accuracy']:.2f} in epoch {row['best_epoch']}"
        cells = [row["variant"], f"{row['parameters']:,}", str(row["seeds"]), percent(row), best]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def percent(row: dict) -> str:
    """ "97.50 ± 0.31", or the mean alone where one seed says nothing of the spread."""
    spread = "" if math.isnan(row["sd"]) else f" ± {100 * row['sd']:.2f}"
    return f"{100 * row['test_accuracy']:.2f}{spread}"


def report_text(results: Results) -> str:
    """`report.md`: the table, the figures, and how everything was trained."""
    runs = results.runs
    first = next(iter(runs.values()))[0]
    data, origin = results.data, first.config["from"]
    images = f"{len(data.train_images):,} training and {len(data.test_images):,} {data.test_name}"
    parts = [
        f"# {results.assignment.title}, {results.data.source}",
        f"Images: {data.source} ({images} images). Device: {origin['device']}, "
        f"torch {origin['torch']}, normlab {origin['normlab']}, {origin['date']}.",
        markdown_table(results),
        _caution(first),
        f"## Test loss\n\n![Test loss of all variants]({LOSS_FIGURE})",
        f"## Test accuracy\n\n![Test accuracy of all variants]({ACCURACY_FIGURE})",
        "## Misclassified images\n\nOf the first seed's final network, the mistakes it is surest "
        "of.",
        *(
            f"### {variant.label}\n\n![Ten misclassified images of {variant.label}]"
            f"(mistakes-{variant.folder}.png)"
            for variant in results.assignment.variants
        ),
        "## Recipes",
        _recipe_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def _caution(first) -> str:
    epochs = len(first.history)
    return (
        f"The number to quote is that of the last epoch, number {epochs}. With few seeds, "
        "differences of a few standard deviations and less are noise, not a ranking."
    )


def _recipe_table(results: Results) -> str:
    """The fields of all recipes: shared ones once, declared differences for each variant."""
    recipes = {label: runs[0].recipe.as_dict() for label, runs in results.runs.items()}
    fields = [field for field in next(iter(recipes.values())) if field != "seed"]
    lines = ["| | " + " | ".join(recipes) + " |", "| --- |" + " --- |" * len(recipes)]
    for field in fields:
        cells = [_cell(recipe[field]) for recipe in recipes.values()]
        lines.append(f"| {field} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
