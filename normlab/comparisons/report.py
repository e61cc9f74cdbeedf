"""What `normlab run` leaves behind: figures, tables, and a page that shows them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path

from normlab.analysis import Mistakes, find_mistakes
from normlab.assignments import Variant, folder_name
from normlab.comparisons.comparison import Difference, compare, main_effects
from normlab.comparisons.fairness import Finding, limits
from normlab.experiment import Results
from normlab.history import runs_of
from normlab.images import plot_mistakes
from normlab.norms import is_norm
from normlab.plots import Runs, plot_curves, plot_loss_and_accuracy
from normlab.support.figures import save_if_drawn
from normlab.support.files import user_path, write_json, write_text
from normlab.support.summaries import described_norm
from normlab.support.type_hints import DataFrame

LOSS_FIGURE, ACCURACY_FIGURE = "test-loss.png", "test-accuracy.png"
TRAINING_FIGURE = "training-and-test.png"
# What Markdown or HTML would take for markup. Within a word, "_" is none.
_MARKUP = re.compile(r"""[\\`*[\]>&|~#$"]|<(?=[A-Za-z/!?])|(?<![^\W_])_|_(?![^\W_])|^[-+=]""")
_FORMULA = ("=", "+", "-", "@")  # a cell that starts so is computed


def write_report(results: Results | Runs, directory: str | Path) -> Path:
    """Writes `results.csv`, `results.json`, figures and `report.md`; returns the page's path.

    Of runs or histories by their labels, such as those of loops of one's own, it writes what they
    tell: the table, the page, and the figures of loss and accuracy.
    A figure that cannot be drawn is a warning, and a sentence on the page.
    """
    whole = isinstance(results, Results)
    if not whole:
        results = Results(None, None, {label: runs_of(each) for label, each in results.items()})
    directory, runs = user_path(directory), results.runs
    write_text(directory / "results.csv", csv_text(results.table()))
    figures = {
        LOSS_FIGURE: partial(plot_curves, runs, "test_loss"),
        ACCURACY_FIGURE: partial(plot_curves, runs, "test_accuracy"),
        TRAINING_FIGURE: partial(plot_loss_and_accuracy, runs, training=True),
    }
    for label, wrong in _mistakes(results) if whole else ():
        figures[mistakes_file(label)] = partial(plot_mistakes, wrong, title=label)
    missing = [name for name in figures if not save_if_drawn(figures[name], directory / name)]
    if whole:
        write_json(directory / "results.json", results_as_dict(results))
        text = report_text(results, missing=missing)
    else:
        text = "\n\n".join(["# Runs", markdown_table(results), *_curves_part(missing)]) + "\n"
    write_text(directory / "report.md", text)
    return directory / "report.md"


def _curves_part(missing: Collection[str]) -> Iterator[str]:
    for heading, what, file in (
        ("Loss", "Loss of all variants over the epochs", LOSS_FIGURE),
        ("Accuracy", "Accuracy of all variants over the epochs", ACCURACY_FIGURE),
        ("Training against test", "Both, in training and test", TRAINING_FIGURE),
    ):
        yield f"## {heading}"
        yield _shown(what, file, missing)


def _shown(what: str, file: str, missing: Collection[str]) -> str:
    return f"({file} could not be drawn.)" if file in missing else f"![{what}]({file})"


def _mistakes(results: Results) -> Iterator[tuple[str, Mistakes]]:
    """Those of each variant's first network, with the variant's label."""
    for label, (run, *_) in results.runs.items():
        yield label, find_mistakes(run, results.data)


def csv_text(table: DataFrame) -> str:
    """The table as CSV whose labels are no formulas to a spreadsheet, which hides the `'`."""
    labels = [f"'{label}" if label.startswith(_FORMULA) else label for label in table["variant"]]
    return table.assign(variant=labels).to_csv(index=False)


def escaped(text: str) -> str:
    """A name such that Markdown and HTML, also in tables and attributes, show it as it is."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def results_as_dict(results: Results) -> dict:
    """Everything a reader of the numbers needs, as JSON can hold it."""
    first = next(iter(results.runs.values()))[0]
    rows = results.table().to_dict("records")
    return {
        "assignment": results.assignment.name,
        "title": results.assignment.title,
        "data": first.identity["data"] | {"source": results.data.source},
        "tested_on": results.data.test_name,
        "from": _provenance(results),
        "variants": [
            row | _variant_as_dict(results, variant, row["sd"])
            for variant, row in zip(results.assignment.variants, rows, strict=True)
        ],
        **{
            kind: [_difference_as_dict(each) for each in found]
            for kind, found in _differences(results).items()
        },
    }


def _provenance(results: Results) -> dict[str, list]:
    """What is known of where the runs came from: of each kind all that there is, by date."""
    origins = [run.provenance for runs in results.runs.values() for run in runs]
    origins.sort(key=itemgetter("date"))
    found: dict[str, list] = {}
    for key, value in chain.from_iterable(origin.items() for origin in origins):
        if key != "data_source" and value not in found.setdefault(key, []):
            found[key].append(value)
    return found


def _differences(results: Results) -> dict[str, list[Difference]]:
    """Those of all pairs, and the main effects; none where one seed or image tells no chance."""
    fewest = min(len(results.data.test_images), *map(len, results.runs.values()))
    if len(results.runs) < 2 or fewest < 2:
        return {"differences": [], "main_effects": []}
    effects = [each for levels in _factors(results) for each in main_effects(results, levels)]
    return {"differences": compare(results), "main_effects": effects}


def _factors(results: Results) -> list[dict[str, Sequence[str]]]:
    """The levels of the norms, and of what else the variants have, if there is all of both."""
    labels: dict[str, dict[str, str]] = {}  # by what sets variants apart beside the norm, by norm
    for each in results.assignment.variants:
        rest = str((each.groups, each.skip, each.changes))
        labels.setdefault(rest, {})[each.norm] = each.label
    rows = [tuple(by_norm.values()) for by_norm in labels.values()]
    if len({tuple(by_norm) for by_norm in labels.values()}) > 1 or 1 in (len(rows), len(rows[0])):
        return []
    factors = (rows[::-1], list(zip(*rows, strict=True)))  # what was added, less what was there
    return [{", ".join(level): level for level in factor} for factor in factors]


def _difference_as_dict(difference: Difference) -> dict:
    names = ("first", "second", "seeds", "method", "pairs", "p", "interaction", "mcnemar")
    return {name: getattr(difference, name) for name in names} | {
        "mean": difference.interval.mean,
        "margin": difference.interval.margin,
        "detectable": difference.interval.detectable,
    }


def _variant_as_dict(results: Results, variant: Variant, spread: float) -> dict:
    runs = results.runs[variant.label]
    same_data = results.data.name == results.assignment.dataset
    about = runs[0].identity  # of the recipe it names no later field that is at its default
    return {
        "sd": None if math.isnan(spread) else spread,
        "norm": variant.norm,
        "reported": variant.reported if same_data else None,
        "network": about["network"],
        "recipe": {name: value for name, value in about["recipe"].items() if name != "seed"},
        "runs": [
            {"seed": run.recipe.seed, "test_loss": run.last["test_loss"]}
            | {"test_accuracy": run.last["test_accuracy"], "seconds": run.seconds}
            for run in runs
        ],
    }


def markdown_table(results: Results) -> str:
    """The table for people: percentages, mean ± standard deviation of the last epoch."""
    part = results.data.test_name if results.data is not None else "test"
    tested = f"{part} accuracy, last epoch (%)"
    head = ("variant", "parameters", "seeds", tested, "best epoch (optimistic)", "seconds a run")
    rows = []
    for row in results.table().to_dict("records"):
        best = f"{100 * row['best_accuracy']:.2f} in epoch {row['best_epoch']}"
        counts = (f"{row['parameters']:,}" if row["parameters"] else "–", str(row["seeds"]))
        seconds = "–" if math.isnan(row["seconds"]) else f"{row['seconds']:.1f}"
        rows.append((escaped(row["variant"]), *counts, percent(row), best, seconds))
    return in_markdown(head, rows)


def in_markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, rule: str = "---:") -> str:
    """A table of cells that are Markdown already, its columns but the first aligned by `rule`."""
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    padded = ([f" {cell} " if cell else " " for cell in cells] for cells in lines)
    return "\n".join(f"|{'|'.join(cells)}|" for cells in padded)


def percent(row: dict) -> str:
    """ "97.50 ± 0.31", or the mean alone where one seed says nothing of the spread."""
    alone = row["sd"] is None or math.isnan(row["sd"])
    spread = "" if alone else f" ± {100 * row['sd']:.2f}"
    return f"{100 * row['test_accuracy']:.2f}{spread}"


def report_text(results: Results, *, missing: Collection[str] = ()) -> str:
    """`report.md`: the table, the figures but for `missing` ones, how everything was trained."""
    data, origin, source = results.data, _provenance(results), escaped(results.data.source)
    images = f"{len(data.train_images):,} training and {len(data.test_images):,} {data.test_name}"
    period = " to ".join(dict.fromkeys((origin["date"][0], origin["date"][-1])))
    most = max(origin.get("at_once", [1]))
    shared = f"Up to {most} runs went on at once: the seconds of each contain the others' share."
    parts = [
        f"# {escaped(f'{results.assignment.name}: {results.assignment.title}')}, on {source}",
        f"{source}, {images} images. Device: {_all(origin['device'])}, torch "
        f"{_all(origin['torch'])}, normlab {_all(origin['normlab'])}, {period}.",
        markdown_table(results),
        *([shared] if most > 1 else []),
        _caution(results),
        *_differences_part(results),
        *_curves_part(missing),
        "## Misclassified images",
        "Of the first seed's final network, the mistakes it is surest of.",
        *_mistakes_part(results, missing),
        "## Networks and recipes",
        _recipe_table(results),
        _norm_table(results),
        *map(_beyond, limits(results)),
    ]
    return "\n\n".join(parts) + "\n"


def _all(names: list[str]) -> str:
    """ "A", "A and B", "A, B and C"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _differences_part(results: Results) -> Iterator[str]:
    found = _differences(results)
    if any(found.values()):
        yield "## Which differences count"
    for kind, differences in found.items():
        if differences:
            yield _EXPLAINED[kind].format(pairs=len(differences))
            yield "\n".join(f"- {escaped(str(each))}" for each in differences)


_EXPLAINED = {
    "differences": (
        "The intervals hold for all pairs together ({pairs}) with 95 %: were there no difference "
        "at all, one experiment in twenty would find one. They count that other seeds and other "
        "test images would have given other accuracies. The spread between seeds is pooled over "
        "the variants (Tukey–Kramer); where one variant's is much larger, each pair also gets an "
        "interval from its own two, and the wider one counts (Games–Howell). They take the recipes "
        "as they are: what other learning rates would have given is not in them."
    ),
    "main_effects": (
        "What a factor is worth on average over the variants, and whether that depends on the "
        "variant (interaction):"
    ),
}


def _mistakes_part(results: Results, missing: Collection[str]) -> Iterator[str]:
    tested = f"{len(results.data.test_images):,} {results.data.test_name} images"
    for name, wrong in _mistakes(results):
        label = escaped(name)
        yield f"### {label}"
        yield f"{wrong.total:,} of {tested} are misclassified."
        if wrong.total:
            what = f"{min(wrong.total, 10)} misclassified images of {label}"
            yield _shown(what, mistakes_file(name), missing)


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
        label: runs[0].identity["network"] | runs[0].identity["recipe"]
        for label, runs in results.runs.items()
    }
    every = dict.fromkeys(field for recipe in recipes.values() for field in recipe)
    rows = [
        (field, *(_cell(recipe.get(field, "–")) for recipe in recipes.values()))
        for field in every
        if field not in ("seed", "layers", "code", "program")  # digests tell a reader nothing
    ]
    return in_markdown(("", *map(escaped, recipes)), rows, rule="---")


def _beyond(found: Finding) -> str:
    """What is more than the assignment allows, as a sentence."""
    counts = [f"{escaped(label)} has {count:,}" for label, count in found.values.items()]
    return f"The assignment allows {found.limit:,} {found.what}: {_all(counts)}."


def _norm_table(results: Results) -> str:
    """The layers that normalise in each variant's network, whatever the variant is called."""
    rows = []
    for label, runs in results.runs.items():
        layers = [layer for layer in runs[0].network.modules() if is_norm(layer)]
        kinds = Counter(map(described_norm, layers))
        learned = sum(weight.numel() for layer in layers for weight in layer.parameters())
        told = "; ".join(f"{n} × {kind}" for kind, n in kinds.items()) or "none known by its class"
        rows.append((escaped(label), escaped(told), f"{learned:,}"))
    return in_markdown(("", "layers that normalise", "their parameters"), rows, rule="---")


def _cell(value: object) -> str:
    if isinstance(value, list):
        return escaped(", ".join(map(str, value))) or "none"
    return f"{value:g}" if isinstance(value, float) else escaped(str(value))
