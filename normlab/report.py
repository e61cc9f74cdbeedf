"""What `normlab run` leaves behind: figures, tables, and a page that shows them."""

import math
from collections.abc import Iterable
from pathlib import Path

from normlab.analysis import find_mistakes
from normlab.assignments import Variant, folder_name
from normlab.comparison import Difference, compare
from normlab.experiment import Results
from normlab.files import write_json, write_text
from normlab.galleries import plot_mistakes
from normlab.plots import plot_curves, plot_loss_and_accuracy, save_figure

LOSS_FIGURE, ACCURACY_FIGURE = "test-loss.png", "test-accuracy.png"
TRAINING_FIGURE = "training-and-test.png"


def write_report(results: Results, directory: str | Path) -> Path:
    """Writes figures, `results.csv`, `results.json` and `report.md`; returns the page's path."""
    directory = Path(directory)
    save_figure(plot_curves(results.runs, "test_loss"), directory / LOSS_FIGURE)
    save_figure(plot_curves(results.runs, "test_accuracy"), directory / ACCURACY_FIGURE)
    both = plot_loss_and_accuracy(results.runs, training=True)
    save_figure(both, directory / TRAINING_FIGURE)
    for variant in results.assignment.variants:
        wrong = find_mistakes(results.runs[variant.label][0], results.data)
        figure = plot_mistakes(wrong, title=variant.label)
        save_figure(figure, directory / mistakes_file(variant.label))
    write_text(directory / "results.csv", results.table().to_csv(index=False))
    write_json(directory / "results.json", results_as_dict(results))
    write_text(directory / "report.md", report_text(results))
    return directory / "report.md"


def results_as_dict(results: Results) -> dict:
    """Everything a reader of the numbers needs, as JSON can hold it."""
    first = next(iter(results.runs.values()))[0]
    rows = results.table().to_dict("records")
    return {
        "assignment": results.assignment.name,
        "title": results.assignment.title,
        "data": first.config["is"]["data"] | {"source": results.data.source},
        "tested_on": results.data.test_name,
        "from": {k: v for k, v in first.config["from"].items() if k != "data_source"},
        "variants": [
            row | _variant_as_dict(results, variant)
            for variant, row in zip(results.assignment.variants, rows, strict=True)
        ],
        "differences": [_difference_as_dict(each) for each in _differences(results)],
    }


def _differences(results: Results) -> list[Difference]:
    """Those of all pairs; none where one seed says nothing of chance."""
    if len(results.runs) < 2 or min(map(len, results.runs.values())) < 2:
        return []
    return compare(results)


def _difference_as_dict(difference: Difference) -> dict:
    return {
        "first": difference.first,
        "second": difference.second,
        "mean": difference.interval.mean,
        "margin": difference.interval.margin,
        "seeds": difference.seeds,
        "seeds_needed": difference.interval.needed,
        "mcnemar": difference.mcnemar,
    }


def _variant_as_dict(results: Results, variant: Variant) -> dict:
    runs = results.runs[variant.label]
    spread = results.spread(variant.label)
    same_data = results.data.name == results.assignment.dataset
    return {
        "sd": None if math.isnan(spread) else spread,
        "norm": variant.norm,
        "reported": variant.reported if same_data else None,
        "network": runs[0].config["is"]["network"],
        "recipe": {k: v for k, v in runs[0].recipe.as_dict().items() if k != "seed"},
        "runs": [
            {"seed": run.recipe.seed, "test_loss": run.last["test_loss"]}
            | {"test_accuracy": run.last["test_accuracy"], "seconds": run.seconds}
            for run in runs
        ],
    }


def markdown_table(results: Results) -> str:
    """The table for people: percentages, mean ± standard deviation of the last epoch."""
    lines = [
        f"| variant | parameters | seeds | {results.data.test_name} accuracy, last epoch (%) "
        "| best epoch (optimistic) | seconds a run |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results.table().to_dict("records"):
        best = f"{100 * row['best_accuracy']:.2f} in epoch {row['best_epoch']}"
        cells = [row["variant"], f"{row['parameters']:,}", str(row["seeds"]), percent(row), best]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def percent(row: dict) -> str:
    """ "97.50 ± 0.31", or the mean alone where one seed says nothing of the spread."""
    alone = row["sd"] is None or math.isnan(row["sd"])
    spread = "" if alone else f" ± {100 * row['sd']:.2f}"
    return f"{100 * row['test_accuracy']:.2f}{spread}"


def report_text(results: Results) -> str:
    """`report.md`: the table, the figures, and how everything was trained."""
    first = next(iter(results.runs.values()))[0]
    data, origin = results.data, first.config["from"]
    images = f"{len(data.train_images):,} training and {len(data.test_images):,} {data.test_name}"
    parts = [
        f"# {results.assignment.name}: {results.assignment.title}, on {data.source}",
        f"{data.source}, {images} images. Device: {origin['device']}, "
        f"torch {origin['torch']}, normlab {origin['normlab']}, {origin['date']}.",
        markdown_table(results),
        _caution(results),
        *_differences_part(results),
        f"## Loss\n\n![Loss of all variants over the epochs]({LOSS_FIGURE})",
        f"## Accuracy\n\n![Accuracy of all variants over the epochs]({ACCURACY_FIGURE})",
        f"## Training against test\n\n![Both, in training and in the test]({TRAINING_FIGURE})",
        "## Misclassified images\n\nOf the first seed's final network, the mistakes it is surest "
        "of.",
        *(_mistakes_part(results, variant) for variant in results.assignment.variants),
        "## Networks and recipes",
        _recipe_table(results),
        "`ln` is one group over channels and positions with one scale and shift a channel, "
        "`ln-elementwise` has one for every element.",
    ]
    return "\n\n".join(parts) + "\n"


def _differences_part(results: Results) -> list[str]:
    lines = [f"- {each}" for each in _differences(results)]
    if not lines:
        return []
    about = "With 95 % intervals that count other seeds and other test images:"
    return ["## Which differences count", about, "\n".join(lines)]


def _mistakes_part(results: Results, variant: Variant) -> str:
    tested = f"{len(results.data.test_images):,} {results.data.test_name} images"
    wrong = find_mistakes(results.runs[variant.label][0], results.data).total
    text = f"### {variant.label}\n\n{wrong:,} of {tested} are misclassified."
    if not wrong:
        return text
    shown = f"{min(wrong, 10)} misclassified images of {variant.label}"
    return f"{text}\n\n![{shown}]({mistakes_file(variant.label)})"


def mistakes_file(label: str) -> str:
    """The file's name of a variant's misclassified images."""
    return f"mistakes-{folder_name(label)}.png"


def _caution(results: Results) -> str:
    """What the numbers leave open: the spread between seeds, and that of so many test images."""
    first = next(iter(results.runs.values()))[0]
    images = len(results.data.test_images)
    accuracy = results.table()["test_accuracy"].clip(0.5 / images, 1 - 0.5 / images).median()
    error = 196 * math.sqrt(accuracy * (1 - accuracy) / images)
    seeds = min(len(runs) for runs in results.runs.values())
    spread = (
        "One seed says nothing of the spread between seeds."
        if seeds == 1
        else f"The spread is one standard deviation over {seeds} seeds."
    )
    return (
        f"The number to quote is that of the last epoch, number {len(first.history)}. {spread} "
        f"{images:,} images alone leave each accuracy uncertain by ±{error:.2f} points (95 %)."
    )


def _recipe_table(results: Results) -> str:
    """The fields of all recipes: shared ones once, declared differences for each variant."""
    recipes = {
        label: runs[0].config["is"]["network"] | runs[0].recipe.as_dict()
        for label, runs in results.runs.items()
    }
    hidden = ("seed", "layers", "code")  # digests tell a reader nothing
    fields = [field for field in _all_fields(recipes.values()) if field not in hidden]
    lines = ["| | " + " | ".join(recipes) + " |", "| --- |" + " --- |" * len(recipes)]
    for field in fields:
        cells = [_cell(recipe.get(field, "–")) for recipe in recipes.values()]
        lines.append(f"| {field} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _all_fields(recipes: Iterable[dict]) -> list[str]:
    """Those of any recipe, in their order."""
    return list(dict.fromkeys(field for recipe in recipes for field in recipe))


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
