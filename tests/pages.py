"""Numbers in text: marked places in Markdown files and notebooks, filled from `results.json`.

    python -m tests.pages README.md notebooks/results.md notebooks/*.ipynb
    python -m tests.pages --check README.md notebooks/results.md notebooks/*.ipynb

A place looks like this, and reads as "99.53 ± 0.04 %" where it is shown:

    <!-- normlab: mnist-l1 / LN / accuracy -->99.53 ± 0.04 %<!-- / -->

So a text never says anything else than the results that lie beside it.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from normlab.assignments import ASSIGNMENTS, folder_name
from normlab.comparisons.report import (
    ACCURACY_FIGURE,
    LOSS_FIGURE,
    TRAINING_FIGURE,
    escaped,
    mistakes_file,
    percent,
)
from normlab.runs.folder import RunFolder
from normlab.support.checks import one_of
from normlab.support.files import read_json, write_text

# A mark ends where the next comment begins, so that its search does not go on to the page's end.
_MARK = re.compile(
    r"<!-- *normlab:(?P<what>(?:[^\n<-]|(?!<!--|-->).)*)(?P<closed>-->)?|<!-- */ *-->"
)

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.md")))  # and what it leads to

FRACTIONS = ("test_accuracy", "best_accuracy", "sd", "reported")

MISSING = "(not trained yet)"  # what stands for results of an assignment that has none
ONE_SEED = "(one seed: no interval)"

Kept = Mapping[str, dict]
"""What each `results.json` holds and the "folder" it lies in, by that folder's name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0, or 1 where a page is stale or cannot be filled."""
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown files and notebooks")
    parser.add_argument("--results", type=Path, default=Path("notebooks/results"))
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if one is stale")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        changed = fill_pages(options.pages, results, write=not options.check)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("stale:" if options.check else "changed:", ", ".join(map(str, changed)) or "nothing")
    return int(options.check and bool(changed))


def read_results(folder: str | Path) -> dict[str, dict]:
    """The contents of all `FOLDER/*/results.json`; `FileNotFoundError` if there is none.

    Raises `ValueError` if one says something else than the runs that lie beside it.
    """
    files = sorted(filter(Path.is_file, Path(folder).glob("*/results.json")))
    if not files:
        raise FileNotFoundError(f"there are no results in {folder}: no folder has a results.json")
    results = {file.parent.name: _checked(file) | {"folder": file.parent} for file in files}
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


def _checked(file: Path) -> dict:
    """What one of them holds; `ValueError` that names it for what cannot have been measured."""
    kept = read_json(file)
    variants = kept.get("variants") if isinstance(kept, dict) else None
    if not isinstance(variants, list) or not all(isinstance(each, dict) for each in variants):
        raise ValueError(f"{file} has no variants: write it anew with `normlab run`")
    left = [kept]
    while left:
        each = left.pop()
        for name, value in each.items() if isinstance(each, dict) else ():
            wrong = isinstance(value, float) and not math.isfinite(value)
            if name in FRACTIONS and value is not None:
                wrong = not isinstance(value, int | float) or not 0 <= value <= 1
            if wrong:
                raise ValueError(f"{file}: {name} cannot be {value!r}")
        left += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return kept


def fill_pages(pages: Iterable[str | Path], results: Kept, *, write: bool = True) -> list[Path]:
    """Fills the marked places of Markdown files and notebooks; returns the pages that changed.

    With `write=False` it only says which would. Raises `ValueError` that names page, line and
    place for one that cannot be filled, or that has no end before the next one; then no page is
    changed.
    """
    changed = {}
    for page in map(Path, pages):
        try:
            text = page.read_bytes().decode()  # as `read_text` would not: with its own line ends
        except UnicodeDecodeError as error:
            raise ValueError(f"{page} is not in UTF-8: {error}") from error
        fill = _fill_notebook if page.suffix == ".ipynb" else _fill_text
        filled = fill(text, results, page, page.name)
        if filled != text:
            changed[page] = filled
    for page, filled in changed.items() if write else ():
        write_text(page, filled)
    return list(changed)


def _fill_text(text: str, results: Kept, page: Path, where: str) -> str:
    """The text with its places filled; `where` is what an error calls it."""
    filled, done, line_end = [], 0, _line_end(text)
    for mark, end in _places(text, where):
        try:
            value = place_text(mark["what"].strip(), results, beside=page.parent)
        except ValueError as error:
            raise _wrong(text, mark, where, str(error)) from None
        except (KeyError, TypeError) as error:
            raise _wrong(text, mark, where, f"the results have no such thing ({error})") from error
        filled += [text[done : mark.end()], value.replace("\n", line_end)]
        done = end.start()
    return "".join([*filled, text[done:]])


def _places(text: str, where: str) -> Iterator[tuple[re.Match, re.Match]]:
    """The marks where each place begins and ends; `ValueError` for one without the other."""
    opened = None
    for mark in [*_MARK.finditer(text), None]:
        ends = mark is not None and mark["what"] is None
        if opened is not None and not opened["closed"]:
            raise _wrong(text, opened, where, "its mark lacks the -->")
        if opened is not None and not ends:
            raise _wrong(text, opened, where, "its end mark, <!-- / -->, is missing")
        if opened is None and ends:
            raise _wrong(text, mark, where, "no place begins before it")
        if ends:
            yield opened, mark
        opened = None if ends else mark


def _wrong(text: str, mark: re.Match, where: str, why: str) -> ValueError:
    line = text.count("\n", 0, mark.start()) + 1
    name = f"place {mark['what'].strip()!r}" if mark["what"] else "end mark"
    return ValueError(f"{where}, line {line}, {name}: {why}")


def _line_end(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _fill_notebook(text: str, results: Kept, page: Path, where: str) -> str:
    """Fills the Markdown cells; a notebook is JSON with each source as its lines."""
    try:
        notebook = json.loads(text)
        cells = [(cell, cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{page} is no notebook as Jupyter writes them ({error!r})") from error
    changed = False
    for number, (cell, kind, source) in enumerate(cells, start=1):
        if kind == "markdown":
            filled = _fill_text(source, results, page, f"{where}, cell {number}")
            if filled != source:
                cell["source"], changed = filled.splitlines(keepends=True), True
    written = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    return written.replace("\n", _line_end(text)) if changed else text


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
    shown = round(100 * variant["test_accuracy"], 2) / 100  # so that a reader finds the same
    return _points(shown - variant["reported"])


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
    lines += [_row(escaped(variant["variant"]), variant) for variant in kept["variants"]]
    return "\n".join(lines)


def figures(kept: dict, beside: Path) -> str:
    """The graphs, and the misclassified images of all variants folded away below them."""
    place = Path(os.path.relpath(kept["folder"], beside)).as_posix()
    variants = [variant["variant"] for variant in kept["variants"]]
    labels = [escaped(label) for label in variants]
    mistakes = [
        f'<img src="{place}/{mistakes_file(variant)}" width="270" '
        f'alt="Ten test images that {label} gets wrong">'
        for variant, label in zip(variants, labels, strict=True)
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
        where = f"`{name}`, {escaped(results[name]['data']['source'])}"
        lines += [_row(f"{where} | {escaped(v['variant'])}", v) for v in results[name]["variants"]]
    return "\n".join(lines)


def _row(head: str, variant: dict) -> str:
    cells = [head, percent(variant), _reported(variant), _difference(variant)]
    cells += [str(variant["seeds"]), f"{variant['parameters']:,}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
