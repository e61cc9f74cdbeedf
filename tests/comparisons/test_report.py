"""The page, the tables and the figures that a comparison leaves behind agree with its runs."""

import csv
import html
import json
import re
import statistics
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import nn

import normlab as nl
from normlab.comparisons.report import escaped, report_text, results_as_dict
from normlab.support.summaries import described_norm

FILES = {
    "test-loss.png",
    "test-accuracy.png",
    "training-and-test.png",
    "mistakes-bn-l1.png",
    "mistakes-gn.png",
    "mistakes-ln.png",
    "results.csv",
    "results.json",
    "report.md",
}


def train(assignment, data, seeds: int, directory: Path | None = None) -> nl.Results:
    return nl.run_assignment(
        assignment, data=data, seeds=seeds, directory=directory, device="cpu", progress=False
    )


def read_json(folder: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


def read_csv(folder: Path) -> list[dict]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_table(folder: Path, head: str) -> list[list[str]]:
    """The rows of the page's table whose first line starts with `head`."""
    lines = iter((folder / "report.md").read_text().splitlines())
    for line in lines:
        if line.startswith(head):
            break
    next(lines)  # the rule below the head
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture(scope="module")
def two_seeds(tiny, tiny_assignment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-seeds")
    results = train(tiny_assignment, tiny, 2, folder / "runs")
    page = nl.write_report(results, folder)
    assert page == folder / "report.md"
    return results, folder


@pytest.fixture(scope="module")
def one_seed(tiny, tiny_assignment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-seed")
    lacking = replace(tiny_assignment, variants=tiny_assignment.variants[1:])
    results = train(lacking, tiny, 1)
    nl.write_report(results, folder)
    return results, folder


def test_all_files_are_there_and_nothing_else(two_seeds):
    _, folder = two_seeds
    assert {entry.name for entry in folder.iterdir()} == FILES | {"runs"}
    for picture in folder.glob("*.png"):
        image = matplotlib.image.imread(picture)
        assert image[..., :3].std() > 0.01, f"{picture.name} is empty"


def test_there_are_mistakes_of_each_variant(one_seed):
    _, folder = one_seed
    assert {path.name for path in folder.glob("mistakes-*")} == {
        "mistakes-gn.png",
        "mistakes-ln.png",
    }


def test_the_page_shows_each_figure_once(two_seeds):
    _, folder = two_seeds
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (folder / "report.md").read_text())
    assert sorted(links) == sorted(name for name in FILES if name.endswith(".png"))


def test_page_and_tables_hold_the_numbers_of_the_runs(two_seeds):
    results, folder = two_seeds
    shown, rows = read_table(folder, "| variant "), read_csv(folder)
    variants = read_json(folder)["variants"]
    assert [row["variant"] for row in rows] == [cells[0] for cells in shown] == list(results)
    for cells, row, variant in zip(shown, rows, variants, strict=True):
        runs = results[row["variant"]]
        last = [run.history[-1]["test_accuracy"] for run in runs]
        mean, sd = statistics.mean(last), statistics.stdev(last)
        histories = [[epoch["test_accuracy"] for epoch in run.history] for run in runs]
        by_epoch = [statistics.mean(epoch) for epoch in zip(*histories, strict=True)]
        best = max(by_epoch)
        epoch = by_epoch.index(best) + 1
        parameters = sum(weight.numel() for weight in runs[0].network.parameters())

        assert cells[1:3] == [f"{parameters:,}", "2"]
        assert cells[3] == f"{100 * mean:.2f} ± {100 * sd:.2f}"
        assert cells[4] == f"{100 * best:.2f} in epoch {epoch}"
        for source in (row, variant):
            assert int(source["parameters"]) == parameters
            assert float(source["test_accuracy"]) == pytest.approx(mean)
            assert float(source["sd"]) == pytest.approx(sd)
            assert float(source["best_accuracy"]) == pytest.approx(best)
            assert int(source["best_epoch"]) == epoch
            assert float(cells[5]) == pytest.approx(float(source["seconds"]), abs=0.051)
        assert [run["test_accuracy"] for run in variant["runs"]] == last
        assert [run["test_loss"] for run in variant["runs"]] == [
            run.last["test_loss"] for run in runs
        ]
        assert [run["seed"] for run in variant["runs"]] == [0, 1]


def check_kept(kept: list[dict], expected: list[nl.Difference], page: str) -> None:
    """What is kept of differences, and what the page says of them, is what they are."""
    for difference, stored in zip(expected, kept, strict=True):
        assert f"- {difference}\n" in page
        for name in ("mean", "margin", "detectable"):
            assert stored[name] == getattr(difference.interval, name)
        for name in ("first", "second", "seeds", "method", "pairs", "p", "interaction", "mcnemar"):
            assert stored[name] == getattr(difference, name)


def test_page_and_results_hold_the_differences_of_all_pairs(two_seeds):
    results, folder = two_seeds
    page, kept = (folder / "report.md").read_text(), read_json(folder)
    check_kept(kept["differences"], nl.compare(results), page)
    assert "The intervals hold for all pairs together (3) with 95 %" in page
    assert kept["main_effects"] == []  # only BN has an L1
    assert "on average" not in page


def test_page_and_results_hold_the_main_effects_of_crossed_factors(tiny, tiny_assignment):
    changes = {"": {}, " + L1": {"l1": 1e-4}}
    variants = [
        nl.Variant(f"{norm.upper()}{what}", norm, changes=change)
        for what, change in changes.items()
        for norm in ("bn", "gn")
    ]
    results = train(replace(tiny_assignment, variants=tuple(variants)), tiny, 2)
    rows = {"BN + L1, GN + L1": ["BN + L1", "GN + L1"], "BN, GN": ["BN", "GN"]}
    norms = {"BN, BN + L1": ["BN", "BN + L1"], "GN, GN + L1": ["GN", "GN + L1"]}
    expected = [each for levels in (rows, norms) for each in nl.main_effects(results, levels)]
    page = report_text(results)
    check_kept(results_as_dict(results)["main_effects"], expected, page)
    assert "- (BN + L1, GN + L1) − (BN, GN) = " in page


def test_one_seed_has_no_spread_anywhere(one_seed):
    results, folder = one_seed
    for cells in read_table(folder, "| variant "):
        (run,) = results[cells[0]]
        assert cells[3] == f"{100 * run.last['test_accuracy']:.2f}"
    assert [row["sd"] for row in read_csv(folder)] == ["", ""]
    assert [variant["sd"] for variant in read_json(folder)["variants"]] == [None, None]
    assert read_json(folder)["differences"] == []
    assert "Which differences count" not in (folder / "report.md").read_text()


def test_the_recipes_tell_what_differs(two_seeds):
    _, folder = two_seeds
    rows = {name: cells for name, *cells in read_table(folder, "| | BN + L1 | GN | LN |")}
    assert rows["l1"] == ["0.0001", "0", "0"]
    differing = [name for name, cells in rows.items() if len(set(cells)) > 1]
    assert differing == ["l1"]
    assert rows["batch_size"] == ["16"] * 3
    assert [v["recipe"]["l1"] for v in read_json(folder)["variants"]] == [1e-4, 0, 0]


def test_the_report_says_where_it_comes_from(two_seeds, tiny):
    _, folder = two_seeds
    page, facts = (folder / "report.md").read_text(), read_json(folder)
    assert page.startswith("# tiny-norms: BN with L1, GN and LN on patterns, on made-up patterns\n")
    assert "made-up patterns, 96 training and 40 test images." in page
    assert facts["data"]["fingerprint"] == tiny.fingerprint
    assert facts["data"]["source"] == "made-up patterns"
    for words in ("Device: cpu", f"torch {torch.__version__}", f"normlab {nl.__version__}"):
        assert words in page
    origin = facts["from"]
    assert (origin["torch"], origin["normlab"]) == ([torch.__version__], [nl.__version__])


def test_the_report_names_every_version_device_and_the_dates_of_its_runs(two_seeds, monkeypatch):
    results, _ = two_seeds
    runs = [run for label in results for run in results[label]]
    for day, run in enumerate(runs):
        monkeypatch.setitem(run.config["from"], "date", f"2030-01-0{9 - day} 10:00 UTC")
        monkeypatch.setitem(run.config["from"], "torch", ("3.2", "3.1", "3.0")[day // 2])
    monkeypatch.setitem(runs[0].config["from"], "device", "Some GPU")
    monkeypatch.setitem(runs[0].config["from"], "before", [{"until_epoch": 1, "threads": 1}])
    where = report_text(results).split("\n\n")[1]
    assert f"Device: cpu and Some GPU, torch 3.0, 3.1 and 3.2, normlab {nl.__version__}" in where
    assert where.endswith(", 2030-01-04 10:00 UTC to 2030-01-09 10:00 UTC.")
    origin = results_as_dict(results)["from"]
    assert origin["device"] == ["cpu", "Some GPU"]
    assert origin["date"] == [f"2030-01-0{day} 10:00 UTC" for day in range(4, 10)]
    assert origin["before"] == [[{"until_epoch": 1, "threads": 1}]]


def test_the_page_says_how_many_runs_went_on_at_once(two_seeds, monkeypatch):
    results, _ = two_seeds
    alone = "went on at once"
    assert alone not in report_text(results)
    run = results.runs["GN"][1]
    monkeypatch.setitem(run.provenance, "at_once", 8)
    assert f"Up to 8 runs {alone}" in report_text(results)


def test_a_validation_part_is_called_so(tiny, tiny_assignment):
    assignment = replace(tiny_assignment, variants=tiny_assignment.variants[1:2])
    results = train(assignment, tiny.with_validation(0.25), 1)
    assert ", 72 training and 24 validation images." in report_text(results)
    assert results_as_dict(results)["tested_on"] == "validation"


def test_no_text_names_a_folder_of_this_machine(two_seeds):
    _, folder = two_seeds
    texts = [file for kind in ("md", "csv", "json") for file in folder.rglob(f"*.{kind}")]
    assert len(texts) >= 3 + 2 * 6  # the page and two tables; config and history of each run
    for file in texts:
        text = file.read_text()
        for place in (folder, Path(nl.__file__).parent):
            assert str(place) not in text, f"{file.relative_to(folder)} names {place}"
        assert not re.search(r"[\"\s(](/|[A-Z]:\\)\w+[/\\]", text), file.name


def test_the_kept_report_on_the_digits_is_of_todays_assignment():
    folder = Path(__file__).parents[2] / "notebooks" / "results" / "digits"
    kept = json.loads((folder / "results.json").read_text())
    assignment = nl.ASSIGNMENTS["mnist-l1"]
    page = (folder / "report.md").read_text()
    assert page.startswith(f"# mnist-l1: {assignment.title}, on scikit-learn digits\n")
    for variant, row in zip(assignment.variants, kept["variants"], strict=True):
        recipe = assignment.recipe_for(variant, seed=0).as_dict()
        assert row["recipe"] == {key: recipe[key] for key in row["recipe"]}
        assert f"| {variant.label} | {row['parameters']:,} |" in page
        assert f"| {100 * row['test_accuracy']:.2f} |" in page


# --- names are text, and drawing costs nothing ------------------------------------------------

NORMS = ("bn", "gn", "ln", "in")
ODD = ("=1+1", "Ca$h | <b>x</b> -->", "_l_ `*", "$\\frac{$")


@pytest.fixture(scope="module")
def odd_labels(tiny, tiny_assignment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    variants = tuple(nl.Variant(label, norm) for label, norm in zip(ODD, NORMS, strict=True))
    strange = replace(tiny, classes=("Ca$h", "$0-$10", "_x", "=a|b"), source="<i>$a$ and $b$")
    results = train(replace(tiny_assignment, variants=variants), strange, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nl.write_report(results, folder)
    return results, folder


def test_any_name_ends_in_a_whole_report(odd_labels):
    _, folder = odd_labels
    assert len(list(folder.glob("*.png"))) == 3 + len(ODD)


def test_names_are_no_markup_in_the_page(odd_labels):
    _, folder = odd_labels
    page = (folder / "report.md").read_text()
    assert "<" not in page
    assert "$" not in page
    rows = read_table(folder, "| variant ")
    assert [html.unescape(cells[0]) for cells in rows] == list(ODD)
    assert {len(cells) for cells in rows} == {6}
    assert {len(cells) for cells in read_table(folder, "| | ")} == {1 + len(ODD)}


def test_names_are_no_formulas_in_a_spreadsheet(odd_labels):
    _, folder = odd_labels
    assert [row["variant"] for row in read_csv(folder)] == ["'=1+1", *ODD[1:]]
    assert [row["variant"] for row in read_json(folder)["variants"]] == list(ODD)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("GN, 4 groups (my_net)", "GN, 4 groups (my_net)"),
        ("BN − GN = +0.40 ± 0.60", "BN − GN = +0.40 ± 0.60"),
        ("a|b\nc", "a&#124;b c"),
        ("_a_ - -->", "&#95;a&#95; - --&#62;"),
        ('<img alt="x">', "&#60;img alt=&#34;x&#34;&#62;"),
        ("- a", "&#45; a"),
        ("__init__ of a_net", "&#95;&#95;init&#95;&#95; of a_net"),
    ],
)
def test_only_markup_is_escaped(name, shown):
    assert escaped(name) == shown
    assert html.unescape(shown) == " ".join(name.split())


def test_one_test_image_costs_no_report(tiny, tiny_assignment):
    results = train(tiny_assignment, tiny.subset(test=1), 2)
    assert "Which differences count" not in report_text(results)


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(two_seeds, tmp_path, monkeypatch):
    results, whole = two_seeds

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("normlab.comparisons.report.plot_loss_and_accuracy", fail)
    with pytest.warns(UserWarning, match=r"training-and-test\.png could not be drawn"):
        nl.write_report(results, tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == FILES - {"training-and-test.png"}
    page = (tmp_path / "report.md").read_text()
    assert "(training-and-test.png could not be drawn.)" in page
    assert "](training-and-test.png)" not in page
    for name in ("results.csv", "results.json"):
        assert (tmp_path / name).read_text() == (whole / name).read_text()


def norm_rows(results: nl.Results) -> dict[str, tuple[str, str]]:
    text = html.unescape(report_text(results))
    table = text[text.index("layers that normalise") :].splitlines()[2:]
    rows = [line.strip("|").split("|") for line in table[: len(results)]]
    return {label.strip(): (layers.strip(), count.strip()) for label, layers, count in rows}


def test_the_page_names_the_layers_that_normalise_whatever_variants_are_called(
    tiny, tiny_assignment
):
    class Own(nn.Module):
        def forward(self, x):
            return x / x.std()

    class MyNorm(Own):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    layers = {
        "A": nn.BatchNorm2d(1),
        "B": nn.GroupNorm(1, 1),
        "C": nn.LayerNorm([1, 12, 12]),
        "D": nn.InstanceNorm2d(1),
        "E": MyNorm(),
        "F": Own(),
    }

    def build(name):
        return nn.Sequential(layers[name], nn.Flatten(), nn.Linear(144, 4))

    variants = tuple(nl.Variant(label, label) for label in layers)
    results = train(replace(tiny_assignment, variants=variants, build=build), tiny, 1)
    assert norm_rows(results) == {
        "A": ("1 × BatchNorm2d over N, H, W", "2"),
        "B": ("1 × GroupNorm of 1 group over C, H, W", "2"),
        "C": ("1 × LayerNorm over C, H, W", "288"),
        "D": ("1 × InstanceNorm2d over H, W", "0"),
        "E": ("1 × MyNorm", "3"),
        "F": ("none known by its class", "0"),
    }
    groups = nl.build_network("mnist-l1", "gn", groups=5, seed=0)
    assert described_norm(groups[0][2]) == "GroupNorm of 5 groups over C/G, H, W"


def test_a_limit_that_is_passed_is_on_the_page_and_said_before_training(
    tiny, tiny_assignment, capsys
):
    small = replace(tiny_assignment, parameter_limit=100, epoch_limit=1)
    results = nl.run_assignment(small, data=tiny, device="cpu")
    said = capsys.readouterr().out
    label, first = small.variants[0].label, results[small.variants[0].label][0]
    over = f"{label} has {first.parameters} parameters, more than the 100 that are allowed"
    assert said.startswith(over)
    assert f"{label} has 2 epochs, more than the 1 that are allowed" in said
    page = html.unescape(report_text(results))
    assert f"The assignment allows 100 parameters: {label} has {first.parameters}," in page
    assert f"The assignment allows 1 epochs: {label} has 2," in page
    assert "The assignment allows" not in report_text(train(tiny_assignment, tiny, 1))
