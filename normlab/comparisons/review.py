"""`review_runs`: what was trained in folders of runs, such as a class hands in."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from normlab.assignments import Variant
from normlab.comparisons.fairness import differing, facts_of, facts_of_seeds
from normlab.comparisons.report import escaped, in_markdown
from normlab.runs.folder import FILES, RunFolder
from normlab.support.files import user_path
from normlab.support.type_hints import DataFrame

COLUMNS = ("folder", "network", "data", "epochs", "seeds", "accuracy", "whole", "fair")


def review_runs(folders: str | Path | Iterable[str | Path]) -> DataFrame:
    """A table of what was trained, whether it is whole, and whether the comparison was fair.

        nl.review_runs(Path("submitted").glob("*/runs"))

    Runs beside each other are the variants of one comparison, called as their folders, with a row:
    "accuracy" is the mean over the seeds of the last epoch, in percent of the test images; "whole"
    and "fair" are "yes", or say what is damaged, missing or unfinished, and what differs beside the
    norm. What the name of a folder says, such as "bn-l1", may differ. A folder with nothing that
    can be read has a row that says so.

    Args:
        folders: one or several, with runs at any depth, as `fit` and `normlab run` leave them.

    Nothing is trained or changed, and no code of the runs is called. Whoever writes files of the
    same form by hand is not found out.
    """
    import pandas

    alone = isinstance(folders, str | Path)
    places = map(user_path, [folders] if alone else folders)
    rows = [dict.fromkeys(COLUMNS, "") | row for place in places for row in _rows(place)]
    return pandas.DataFrame(rows, columns=list(COLUMNS))


def print_review(folders: Iterable[Path]) -> None:
    """Prints the table of `review_runs`, as Markdown."""
    rows = (map(escaped, row) for row in review_runs(folders).to_numpy())
    print(in_markdown(COLUMNS, map(list, rows), rule="---"))


def _rows(folder: Path) -> Iterator[dict]:
    """A row for each comparison in the folder."""
    if not folder.is_dir():
        yield {"folder": str(folder), "whole": "there is no such folder"}
        return
    runs = sorted({file.parent for file in folder.rglob("*") if file.name in FILES})
    comparisons: dict[Path, dict[str, list[Path]]] = {}
    for run in runs:
        variant = run.parent if re.fullmatch(r"seed-\d+", run.name) and run != folder else run
        comparison = variant.parent if variant != folder else folder
        comparisons.setdefault(comparison, {}).setdefault(variant.name, []).append(run)
    for comparison, variants in comparisons.items():
        yield {"folder": str(comparison), **_row(comparison, variants)}
    if not runs:
        yield {"folder": str(folder), "whole": "there are no runs in it"}


def _row(comparison: Path, variants: dict[str, list[Path]]) -> dict[str, str]:
    """What is said of the runs of each variant of a comparison."""
    problems, facts, accuracy, told = [], {}, {}, {}
    for name, runs in variants.items():
        read = []
        for run in runs:
            try:
                read.append(_read(run))
            except (OSError, ValueError) as error:
                said = str(error).partition(": delete")[0]
                problems.append(said.replace(f"{comparison}/", ""))
            except (AttributeError, LookupError, RuntimeError, TypeError):
                problems.append(f"{run.relative_to(comparison)} is not as normlab keeps runs")
        if read:
            facts[name] = facts_of_seeds([each for each, _, _ in read])
            accuracy[name] = 100 * sum(last for _, last, _ in read) / len(read)
            told[name] = read[0][2]
    return {
        "network": _each(some.get("name") or some.get("class", "") for some in facts.values()),
        "data": _each(told.values()),
        "epochs": _each(some["epochs"] for some in facts.values()),
        "seeds": _each(len(some["seeds"]) for some in facts.values()),
        "accuracy": ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items()),
        "whole": "; ".join(problems) or "yes",
        "fair": _fairness(facts),
    }


def _each(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _read(run: Path) -> tuple[dict, float, str]:
    """The facts of a finished run, its last test accuracy, and the source of its images."""
    config, history = RunFolder(run).read_finished()
    facts = facts_of(config["is"], len(history))
    return facts, history[-1]["test_accuracy"], config["from"]["data_source"]


def _fairness(facts: dict[str, dict]) -> str:
    if len(facts) < 2:
        return "nothing to compare" if facts else ""
    variants = [
        Variant(name, "", skip=some.get("skip", True), changes=dict.fromkeys(name.split("-")))
        for name, some in facts.items()
    ]
    unfair = [each for each in differing(facts, variants) if not each.declared]
    return "; ".join(map(str, unfair)).replace(": NOT declared", "") or "yes"
