"""README, results and handbook: the worked example is right, and the numbers are measured."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pandas as pd
import pytest
import torch
from numbers_in_texts import (
    INTERVAL,
    changed,
    exactly,
    following_from,
    holds,
    is_among,
    numbers_said,
)
from scipy.stats import t, ttest_1samp, tukey_hsd

import normlab as nl
from normlab.runs.folder import RunFolder
from tests.pages import PAGES, read_results

ROOT = Path(__file__).parents[1]
README = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)
KEPT = read_results(ROOT / "notebooks" / "results")
NORMS = {
    "BN": (nl.batch_norm, (0, 2, 3)),
    "LN": (nl.layer_norm, (1, 2, 3)),
    "GN, 2 groups": (lambda x: nl.group_norm(x, 2), (2, 3, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_worked_example_is_right(name):
    (row,) = re.findall(rf"^\| {re.escape(name)} \| .*: .*$", README, re.M)
    cells = [cell.strip().replace("−", "-") for cell in row.strip("|").split("|")]
    mean, variance, deviation, becomes = map(float, cells[2:6])
    x = torch.arange(16.0).reshape(2, 4, 1, 2)
    norm, axes = NORMS[name]
    blocks = x.view(2, 2, 2, 1, 2) if "groups" in name else x
    assert blocks.mean(axes).flatten()[0].item() == mean
    assert blocks.var(axes, correction=0).flatten()[0].item() == variance
    assert deviation == pytest.approx(math.sqrt(variance), abs=5e-4)
    assert becomes == pytest.approx(norm(x)[0, 0, 0, 0].item(), abs=5e-4)
    shared = set(map(int, re.findall(r"\d+", cells[1].partition(":")[2])))
    if "to" in cells[1].partition(":")[2]:
        shared = set(range(min(shared), max(shared) + 1))
    assert sum(shared) / len(shared) == mean


def test_no_rate_of_mnist_l1_is_significantly_better_for_any_norm():
    trials = pd.read_csv(ROOT / "notebooks/results/search/mnist-l1.csv")
    trials = trials.query("epochs == 8 and batch_size == 64")
    trials = trials[trials["trial"].str.fullmatch(r"muon [\d.]+ centred")]
    halves, spreads = [], []
    for _, rows in trials.groupby("norm"):
        accuracies = [100 * each["accuracy"] for _, each in rows.groupby("trial")]
        assert [len(each) for each in accuracies] == 4 * [3]
        means = [each.mean() for each in accuracies]
        every = tukey_hsd(*accuracies)
        assert every.pvalue.min() > 0.05
        interval = every.confidence_interval()
        halves.append((interval.high - interval.low)[0, 1] / 2)
        spreads.append(max(means) - min(means))
    assert f"lie at most {max(spreads):.2f} points apart for each norm" in README
    assert f"a difference of {min(halves):.2f} to {max(halves):.2f} points would" in README


def _beside_one_cycle(name: str, epochs: int, trial: str) -> pd.Series:
    """Differences of the accuracy in points to the same norm and seed by one-cycle at 0.05."""
    trials = pd.read_csv(ROOT / f"notebooks/results/search/{name}.csv")
    trials = trials.query("epochs == @epochs").set_index(["norm", "seed"])
    usual, other = (
        trials.loc[trials["trial"] == each, "accuracy"]
        for each in ("muon 0.05 centred", f"muon 0.05 centred, {trial}")
    )
    return 100 * (other - usual).dropna()


TRIED = {  # what a row of the table is called, and its trial
    "the rate rises for 10 % of the steps, not 30 %": "warm-up",
    "the same, falling along a line": "linear",
    "it rises for 5 % of the steps": "rise of a twentieth",
    "it rises for 50 % of the steps": "rise of a half",
    "momentum 0.95, not 0.9": "momentum 0.95",
    "the same, and the rate rises for 10 % of the steps": "momentum 0.95, warm-up",
    "half the rate for the first layer": "first layer 0.5",
    "half the rate for the last layer": "last layer 0.5",
    "twice the rate for the last layer": "last layer 2",
    "batches of 32": "batch 32",
    "batches of 128": "batch 128",
    "label smoothing 0.05": "smoothing 0.05",
    "label smoothing 0.1": "smoothing 0.1",
    "no weight decay": "decay 0",
    "weight decay 0.05, not 0.01": "decay 0.05",
    "a square of 8 (MNIST: 6) pixels covered": "cutout:8",
    "`affine:10`, not `rotate:10` and `shift:2`": "affine:10",
    "each image mirrored in every second epoch": "alternating flip",
    "a running average of the weights": "averaged weights",
    "the same, with a rate that ends at a tenth": "averaged weights, to a tenth",
    "the mean of the last five epochs' weights": "mean of the end",
}


def test_what_was_tried_beside_the_recipe_is_computed_from_the_tables_of_the_search():
    table = README.partition("| tried instead")[2].partition("\n\n")[0].splitlines()[2:]
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in table)}
    assert rows.keys() == TRIED.keys()
    chances, halves = {"cifar10-norms": {}, "mnist-l1": {}}, []
    for name, *cells in ((name, *cells) for name, cells in rows.items()):
        covered = TRIED[name] == "cutout:8"
        columns = {
            ("cifar10-norms", 20): TRIED[name],
            ("mnist-l1", 10): "rotate:10, shift:2, cutout:6" if covered else TRIED[name],
        }
        for text, ((images, epochs), trial) in zip(cells, columns.items(), strict=True):
            found = _beside_one_cycle(images, epochs, trial)
            due = f"{found.mean():+.2f} ({len(found)})".replace("-", "−") if len(found) else "–"
            assert text == due, (images, trial)
            if len(found):
                chances[images][trial] = ttest_1samp(found, 0).pvalue
            if images == "cifar10-norms" and len(found) == 3:
                halves.append(half_of(found))
    for each in chances.values():
        assert min(each.values()) * len(each) > 0.05
    alone = {name for each in chances.values() for name, p in each.items() if p < 0.05}
    assert alone == {"batch 32", "last layer 0.5"}
    for trial in ("batch 32", "momentum 0.95", "warm-up", "last layer 0.5"):
        assert interval(_beside_one_cycle("cifar10-norms", 20, trial)) in README, trial
    assert f"three pairs reach {min(halves):.2f} to {max(halves):.2f} points" in README
    assert f"corrected for {len(chances['cifar10-norms'])} trials" in README
    shorter = _beside_one_cycle("mnist-l1", 10, "warm-up")
    assert (shorter.groupby("norm").mean() > 0).all()
    assert f"{interval(shorter)} points, paired over nine trainings" in README


def interval(differences: pd.Series) -> str:
    """Their mean with the 95 % interval of Student's t."""
    return f"{differences.mean():+.2f} ± {half_of(differences):.2f}".replace("-", "−")


def half_of(differences: pd.Series) -> float:
    return t.ppf(0.975, len(differences) - 1) * differences.sem()


def test_cpus_and_a_gpu_end_alike():
    gaps = []
    for name in ("cifar10-norms", "cifar10-skip"):
        for variant in (ROOT / "notebooks" / "results" / name / "runs").iterdir():
            ends = {True: [], False: []}
            for about, rows in (RunFolder(folder).read_finished() for folder in variant.iterdir()):
                ends["NVIDIA" in about["from"]["device"]].append(100 * rows[-1]["test_accuracy"])
            assert [len(each) for each in ends.values()] == [7, 3]
            gaps.append(abs(fmean(ends[True]) - fmean(ends[False])))
    assert f"lie {min(gaps):.2f} to {max(gaps):.2f} points apart" in README


def test_the_lead_over_the_networks_is_what_notebook_5_prints():
    section = README.partition("### BN's lead on CIFAR-10")[2].partition("###")[0]
    outputs = (ROOT / "notebooks" / "05_cifar10_skip.ipynb").read_text(encoding="utf-8")
    said = INTERVAL.findall(section)
    assert len(said) == 3
    for mean, half in said:
        assert re.search(rf"= [+-]{mean} ± {half} points over 10 seeds", outputs), mean
    assert "(p = 0.195; Tukey–Kramer, 3 pairs" in outputs  # GN and LN: not significantly different


# --- numbers in sentences ---------------------------------------------------------------------
#
# A number in a sentence or a table, where `tests/pages.py` does not fill it, follows from the kept
# results that its section or its paragraph names, or is part of the worked example, or is listed
# here with the reason. A formula ("= …") and a file ("in …") are checked.

BENCHMARKS = "in tests/benchmarks/RESULTS.md"
COMPUTED = "computed from the minutes of the kept runs and from tests/benchmarks/RESULTS.md"
REASONS = {
    **dict.fromkeys(("0.10", "0.11"), "in notebooks/results/mnist-l1/report.md"),
    "20": "epochs, what the assignments allow",
    **dict.fromkeys(("11", "12", "13"), "a notebook"),
    "95": "percent, the confidence of all intervals",
    "3.11": "Python; `test_package.py` holds it against setup.cfg",
    "1,797": "= 1437 + 360",
    **dict.fromkeys(("0.02", "0.05"), "in notebooks/results/search/cifar10-norms.csv"),
    **dict.fromkeys(("2.1", "2.4", "2.6", "2.8", "2.9", "3.1", "1.5", "0.82"), BENCHMARKS),
    **dict.fromkeys(("34", "33", "15", "2.11", "2.12", "50,000"), BENCHMARKS),
    **dict.fromkeys(("1.05", "1.26", "0.2", "0.4"), "in notebooks/03_cifar10_norms.ipynb"),
    **dict.fromkeys(("5.1", "190", "98", "80"), COMPUTED),
    **dict.fromkeys(("0.13", "0.15", "0.27"), "the rates of mnist-l1, tested above"),
    "45": "kB of a task on a cluster",
    **dict.fromkeys(("73.78", "72.07"), "last epochs of a submission's log"),
    "5.9": "= 75.26 - 69.40",
    **dict.fromkeys(("0.01", "0.9", "0.05"), "the recipe of `as_submitted`, and a rate tried"),
    "0.20": "= 99.67 - 99.47",
    "0.28": "test_cpus_and_a_gpu_end_alike computes it",
    **dict.fromkeys(("1.17", "1.03", "0.14", "0.001"), "in notebooks/05_cifar10_skip.ipynb"),
    "0.085": "in notebooks/03_cifar10_norms.ipynb",
    "0.64": "in notebooks/results/cifar10-add/report.md",
    "0.47": "in notebooks/results/cifar10-norms/report.md",
    "0.48": "in notebooks/results/cifar10-skip/report.md",
    "19.0": "= 190 / 10",
    "3.9": "= 190 / 50 / 0.98",
    **dict.fromkeys(("50", "100"), "workers"),
    **dict.fromkeys(("16", "32", "64", "128", "512"), "images in a batch of a sweep"),
}


def blocks() -> Iterator[tuple[str, str]]:
    """Each paragraph and each row of a table, with the heading above it; no code."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    text = re.sub(r"<!-- normlab: .+? -->.*?<!-- / -->", "", text, flags=re.S)
    text = re.sub(r"<!-- tried: .+? -->.*?<!-- end of tried -->", "", text, flags=re.S)
    heading = ""
    for block in re.split(r"\n\n|\n(?=\|)", text):
        heading = block if block.startswith("#") else heading
        yield heading, block


def sources(heading: str, block: str) -> list[str]:
    """The numbers that may stand in a block, exactly."""
    names = [name for name in KEPT if f"`{name}`" in f"{heading} {block}"]
    found = [number for name in names for number in following_from(KEPT[name])]
    for name in names:
        minutes = [variant["runs"][0]["seconds"] / 60 for variant in KEPT[name]["variants"]]
        found += map(exactly, [*minutes, *gains(name)])
    return found + (worked_example() if "normalization is performed" in heading else [])


def gains(name: str) -> list[float]:
    """What the recipe was worth against the submission's manner, in points, variant by variant."""
    ours = {v["norm"]: v["test_accuracy"] for v in KEPT[name]["variants"]}
    theirs = KEPT.get(f"{name}-as-submitted", {"variants": []})["variants"]
    return [100 * (ours[v["norm"]] - v["test_accuracy"]) for v in theirs]


def worked_example() -> list[str]:
    x = torch.arange(16.0).reshape(2, 4, 1, 2)
    found = [*range(16), 4.5 - 1]
    for name, (norm, axes) in NORMS.items():
        numbers = x.view(2, 2, 2, 1, 2) if "groups" in name else x
        mean, variance = numbers.mean(axes), numbers.var(axes, correction=0)
        found += [each.flatten()[0] for each in (mean, variance, variance.sqrt(), norm(x).abs())]
    return [exactly(float(number)) for number in found]


def test_every_number_in_a_sentence_is_measured_or_has_a_reason():
    said = [(number, *where) for where in blocks() for number in numbers_said(where[1])]
    missing = {number for number, *where in said if not is_among(number, sources(*where))}
    assert missing <= REASONS.keys(), "from no result, and not explained in REASONS"
    assert REASONS.keys() <= {number for number, *_ in said}, "to be removed from REASONS"
    assert [number for number, reason in REASONS.items() if not holds(number, reason)] == []


def test_a_changed_number_is_noticed():
    """Nearly always: others may follow from the same results by chance."""
    noticed = []
    for heading, block in blocks():
        said = [number for number in numbers_said(block) if number not in REASONS]
        for other in (other for number in said for other in changed(number)):
            noticed.append(not is_among(other, sources(heading, block)) and other not in REASONS)
    assert len(noticed) > 60
    assert sum(noticed) / len(noticed) > 0.8
