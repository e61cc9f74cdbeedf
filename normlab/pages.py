"""Numbers in text: marked places in Markdown files and notebooks, filled from `results.json`.

A place looks like this, and reads as "99.53 ± 0.04 %" where it is shown:

    <!-- normlab: mnist-l1 / LN / accuracy -->99.53 ± 0.04 %<!-- / -->

So a text never says anything else than the results that lie beside it.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean, stdev

from normlab.assignments import ASSIGNMENTS, folder_name
from normlab.checks import one_of
from normlab.files import read_json, write_text
from normlab.report import (
    ACCURACY_FIGURE,
    LOSS_FIGURE,
    TRAINING_FIGURE,
    mistakes_file,
    percent,
)
from normlab.runs import RunFolder

_PLACE = re.compile(r"(<!-- normlab: (?P<what>.+?) -->)(?P<text>.*?)(<!-- / -->)", re.DOTALL)

MISSING = "(not trained yet)"  # what stands for results of an assignment that has none
ONE_SEED = "(one seed: no interval)"

Kept = Mapping[str, dict]
"""What each `results.json` holds and the "folder" it lies in, by that folder's name."""


def read_results(folder: str | Path) -> dict[str, dict]:
    """The contents of all `FOLDER/*/results.json`; `FileNotFoundError` if there is none.

    Raises `ValueError` if one says something else than the runs that lie beside it.
    """
    files = sorted(Path(folder).glob("*/results.json"))
    if not files:
        raise FileNotFoundError(f"there are no results in {folder}: no folder has a results.json")
    results = {file.parent.name: read_json(file) | {"folder": file.parent} for file in files}
    for kept in results.values():
        if wrong := next(_contradictions(kept), None):
            raise ValueError(
                f"{kept['folder'] / 'results.json'} says something else of {wrong} than the runs "
                f"beside it: write it anew, by `normlab run` with --out {kept['folder']}"
            )
    return results


def _contradictions(kept: dict) -> Iterator[str]:
    """Variants and pairs of which the results tell something else than their runs, if kept."""
    runs = kept["folder"] / "runs"
    if not runs.is_dir():
        return
    for variant in kept["variants"]:
        if not _is_of_runs(variant, runs / folder_name(variant["variant"])):
            yield variant["variant"]
    for each in kept.get("differences", ()):
        first, second = each["first"], each["second"]
        if not math.isclose(each["mean"], _mean(kept, first) - _mean(kept, second), abs_tol=1e-9):
            yield f"{first} − {second}"


def _is_of_runs(variant: dict, place: Path) -> bool:
    """Whether accuracies and losses are those of the last epochs of the runs in the folder."""
    names = ("test_accuracy", "test_loss")
    told = [tuple(run[name] for name in names) for run in variant["runs"]]
    folders = (RunFolder(place / f"seed-{run['seed']}") for run in variant["runs"])
    last = [row for folder in folders for row in folder.history_so_far()[-1:]]
    accuracies = [accuracy for accuracy, _ in told]
    spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
    return (
        told == [tuple(row[name] for name in names) for row in last]
        and math.isclose(variant["test_accuracy"], fmean(accuracies), abs_tol=1e-9)
        and math.isclose(variant["sd"] or 0.0, spread, abs_tol=1e-9)
    )


def fill_pages(pages: Iterable[str | Path], results: Kept, *, write: bool = True) -> list[Path]:
    """Fills the marked places of Markdown files and notebooks; returns the pages that changed.

    With `write=False` it only says which would. Raises `ValueError` that names page and place for
    a place that cannot be filled; then no page is changed.
    """
    changed = {}
    for page in map(Path, pages):
        text = page.read_text(encoding="utf-8")
        filled = (_fill_notebook if page.suffix == ".ipynb" else _fill_text)(text, results, page)
        if filled != text:
            changed[page] = filled
    for page, filled in changed.items() if write else ():
        write_text(page, filled)
    return list(changed)


def _fill_text(text: str, results: Kept, page: Path) -> str:
    def fill(place: re.Match) -> str:
        try:
            value = place_text(place["what"], results, beside=page.parent)
        except ValueError as error:
            raise ValueError(f"{page.name}, place {place['what']!r}: {error}") from None
        return f"{place[1]}{value}{place[4]}"

    return _PLACE.sub(fill, text)


def _fill_notebook(text: str, results: Kept, page: Path) -> str:
    """Fills the Markdown cells; a notebook is JSON with each source as its lines."""
    notebook = json.loads(text)
    changed = False
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        filled = _fill_text(source, results, page) if cell["cell_type"] == "markdown" else source
        if filled != source:
            cell["source"], changed = filled.splitlines(keepends=True), True
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" if changed else text


def place_text(what: str, results: Kept, *, beside: Path = Path()) -> str:
    """What belongs into a place of a page in the folder `beside`.

    "overview", "NAME / table", "NAME / figures", "NAME / VARIANT / QUANTITY" with one of
    `QUANTITIES`, or in percentage points "NAME / VARIANT / minus / VARIANT", and with the interval
    of `compare` "NAME / VARIANT / against / VARIANT", or of `main_effects` with several variants on
    either side, "A, B / against / C, D". An assignment without results gets `MISSING`, a single
    seed `ONE_SEED`.
    """
    parts = [part.strip() for part in what.split(" / ")]
    if parts[0] in ASSIGNMENTS and parts[0] not in results:
        return MISSING
    match parts:
        case ["overview"]:
            return f"\n\n{overview(results)}\n\n"
        case [name, "table"]:
            return f"\n\n{table(_of(results, name))}\n\n"
        case [name, "figures"]:
            return f"\n\n{figures(_of(results, name), beside)}\n\n"
        case [name, first, "minus", second]:
            kept = _of(results, name)
            return _points(_mean(kept, first) - _mean(kept, second))
        case [name, first, "against", second]:
            return _against(_of(results, name), first, second)
        case [name, label, quantity]:
            read = QUANTITIES[one_of(quantity, QUANTITIES, "quantity")]
            return read(_variant(_of(results, name), label))
    raise ValueError("it is none of NAME / VARIANT / QUANTITY, NAME / table, overview and so on")


def _of(results: Kept, name: str) -> dict:
    return results[one_of(name, results, "results")]


def _variant(kept: dict, label: str) -> dict:
    variants = {variant["variant"]: variant for variant in kept["variants"]}
    return variants[one_of(label, variants, "variant")]


def _mean(kept: dict, label: str) -> float:
    return _variant(kept, label)["test_accuracy"]


def _against(kept: dict, first: str, second: str) -> str:
    """The difference with its interval; the results have each pair once, in one direction."""
    pair = [first, second]
    for each in (*kept.get("differences", ()), *kept.get("main_effects", ())):
        found = [each["first"], each["second"]]
        if sorted(found) == sorted(pair):
            mean = each["mean"] if found == pair else -each["mean"]
            return f"{_points(mean)} ± {100 * each['margin']:.2f}"
    for label in pair:
        _variant(kept, label)  # raises if there is none
    return ONE_SEED


def _points(difference: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return f"{100 * difference:+.2f}".replace("-", "−")


def _difference(variant: dict) -> str:
    if variant["reported"] is None:
        return "–"
    return _points(variant["test_accuracy"] - variant["reported"])


def _reported(variant: dict) -> str:
    return "–" if variant["reported"] is None else f"{100 * variant['reported']:.2f}"


QUANTITIES: dict[str, Callable[[dict], str]] = {
    "accuracy": lambda variant: f"{percent(variant)} %",
    "mean": lambda variant: f"{100 * variant['test_accuracy']:.2f} %",
    "loss": lambda variant: f"{_mean_loss(variant):.3f}",
    "parameters": lambda variant: f"{variant['parameters']:,}",
    "seeds": lambda variant: str(variant["seeds"]),
    "rate": lambda variant: f"{variant['recipe']['lr']:g}",
    "reported": lambda variant: f"{_reported(variant)} %",
    "difference": _difference,
}


def _mean_loss(variant: dict) -> float:
    return sum(run["test_loss"] for run in variant["runs"]) / len(variant["runs"])


# On a phone only the first ones are in sight.
_COLUMNS = "test accuracy (%) | submission (%) | difference | seeds | parameters"


def table(kept: dict) -> str:
    """The results of one assignment, as the README has them."""
    lines = [
        f"| variant | {_COLUMNS} |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(variant["variant"], variant) for variant in kept["variants"]]
    return "\n".join(lines)


def figures(kept: dict, beside: Path) -> str:
    """The graphs, and the misclassified images of all variants folded away below them."""
    place = Path(os.path.relpath(kept["folder"], beside)).as_posix()
    labels = [variant["variant"] for variant in kept["variants"]]
    mistakes = [
        f'<img src="{place}/{mistakes_file(label)}" width="270" '
        f'alt="Ten test images that {label} gets wrong">'
        for label in labels
    ]
    return "\n".join(
        [
            f"![Test loss of {', '.join(labels)} over the epochs]({place}/{LOSS_FIGURE})",
            f"![Test accuracy of {', '.join(labels)} over the epochs]({place}/{ACCURACY_FIGURE})",
            f"![Both of them in training and in the test]({place}/{TRAINING_FIGURE})",
            "",
            "<details><summary>Ten misclassified images of each variant</summary>",
            "",
            *mistakes,
            "",
            "</details>",
        ]
    )


def overview(results: Kept) -> str:
    """All variants of the five assignments, in one table."""
    lines = [
        f"| network and images | variant | {_COLUMNS} |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in (name for name in ASSIGNMENTS if name in results):
        where = f"`{name}`, {results[name]['data']['source']}"
        lines += [_row(f"{where} | {v['variant']}", v) for v in results[name]["variants"]]
    return "\n".join(lines)


def _row(head: str, variant: dict) -> str:
    cells = [head, percent(variant), _reported(variant), _difference(variant)]
    cells += [str(variant["seeds"]), f"{variant['parameters']:,}"]
    return f"| {' | '.join(cells)} |"
