"""The stored notebooks: whole runs from top to bottom, nothing in them that a reader trips over."""

import ast
import dis
import json
import linecache
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from alternative_texts import false_claims
from numbers_in_texts import (
    INTERVAL,
    PRINTED,
    changed,
    following_from,
    holds,
    is_among,
    is_rounded,
    numbers_printed,
    numbers_said,
    sentences,
)
from PIL import Image

import normlab as nl
from normlab.comparisons.report import report_text, results_as_dict
from normlab.runs.folder import RunFolder
from tests.drawings import DRAWINGS, LADDER
from tests.pages import fill_pages, read_results

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OF_ASSIGNMENTS = [path for path in NOTEBOOKS if "01" <= path.name < "06"]
ASSIGNMENTS = {path: path.stem[3:].replace("_", "-") for path in OF_ASSIGNMENTS}
KEPT = read_results(ROOT / "notebooks" / "results")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_assignment = pytest.mark.parametrize("path", ASSIGNMENTS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def text_of(path: Path) -> str:
    return text_in(nbformat.read(path, as_version=4).cells)


def text_in(cells: list) -> str:
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def python_of(source: str) -> ast.Module:
    """The cell without the lines that only IPython understands."""
    lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def test_there_is_a_notebook_for_each_assignment():
    assert set(ASSIGNMENTS.values()) == set(nl.ASSIGNMENTS)
    assert set(nl.ASSIGNMENTS) <= set(KEPT)  # their outputs come from whole runs


@every_notebook
def test_it_is_valid_small_and_was_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 1.5e6
    assert "widgets" not in notebook.metadata
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_no_output_is_a_warning_an_error_or_speaks_of_a_machine(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            assert not re.search(r"(/root|/home|/tmp|/Users)/", json.dumps(output))


@every_notebook
def test_cells_are_short_and_import_nothing_that_is_not_used(path):
    cells = code_cells(path)
    trees = [python_of(cell.source) for cell in cells]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for cell, tree in zip(cells, trees, strict=True):
        assert len(cell.source.splitlines()) <= 13, cell.source
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {(name.asname or name.name).split(".")[0] for name in node.names}
                assert names <= used, cell.source


@every_notebook
def test_one_parameters_cell_reads_the_smoke_variable_and_nothing_else_does(path):
    cells = code_cells(path)
    (parameters,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    readers = [cell for cell in cells if "NORMLAB_SMOKE" in cell.source]
    assert readers == [parameters]
    assert sum("SMOKE" in cell.source for cell in cells) == 1


@every_notebook
def test_the_files_and_options_that_it_names_are_there(path):
    text = text_of(path)
    files = re.findall(r"`((?:normlab|tests)/[\w/]+\.\w+|README\.md)`", text)
    assert not [file for file in files if not (ROOT / file).is_file()]
    options = set(
        re.findall(r"(?<![\w-])--[a-z][a-z-]+", "".join(re.findall(r"\bnormlab .*", text)))
    )
    there = (ROOT / "normlab" / "support" / "command_line.py").read_text()
    assert options <= set(re.findall(r"--[a-z-]+", there))


@every_notebook
def test_what_it_takes_from_the_library_is_there(path):
    source = "\n".join(cell.source for cell in code_cells(path))
    for name, inside in re.findall(r"\bnl\.(\w+)(?:\.(\w+))?", source):
        found = getattr(nl, name)
        assert not inside or not isinstance(found, ModuleType) or hasattr(found, inside)


@every_notebook
def test_the_badge_opens_this_notebook_of_the_repository_that_colab_clones(path):
    badges = re.findall(
        r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([^)]+)\)", text_of(path)
    )
    ((repository, place),) = badges
    assert ROOT / place == path
    (clone,) = [cell.source for cell in code_cells(path) if "google.colab" in cell.source]
    assert f'"https://github.com/{repository}"' in clone


@every_notebook
def test_a_picture_in_its_first_cell_is_one_that_it_draws_or_a_drawing(path):
    first, *cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    drawn = ["".join(output.get("data", {}).get("image/png", "").split()) for output in outputs]
    for file in re.findall(r"!\[[^\]]+\]\(([\w/.-]+\.png)\)", first.source):
        there = b64encode((path.parent / file).read_bytes()).decode()
        assert there in drawn or Path(file).name in DRAWINGS


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_what_its_program_draws(name, tmp_path):
    DRAWINGS[name]().savefig(tmp_path / name)
    kept, drawn = (
        np.asarray(Image.open(folder / name).convert("L"), dtype=float)
        for folder in (ROOT / "notebooks" / "results", tmp_path)
    )
    assert kept.shape == drawn.shape
    assert abs(kept - drawn).mean() < 2  # of 255: letters may lie a little elsewhere
    assert any(f"results/{name}" in text_of(path) for path in NOTEBOOKS)


@every_notebook
def test_every_figure_has_an_alternative_text(path):
    """In the field of the cell that nbviewer and nbconvert's classic template take it from."""
    for cell in code_cells(path):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert len(cell.metadata.get("alt", "")) >= 40, cell.source


def texts_printed_by(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@every_notebook
def test_an_alternative_text_says_of_zero_what_the_cell_prints(path):
    for cell in code_cells(path):
        text = cell.metadata.get("alt", "")
        assert false_claims(text, texts_printed_by(cell)) == [], text


@pytest.mark.parametrize(
    ("name", "cell", "words"),
    [
        ("01_mnist_l1", "cell-33", "all three intervals contain zero"),
        ("01_mnist_l1", "cell-33", "only that of BN + L1 and LN excludes zero, in favour of LN"),
        ("01_mnist_l1", "cell-33", "only that of GN and LN excludes zero, in favour of GN"),
        ("01_mnist_l1", "cell-33", "all three intervals exclude zero"),
        ("01_mnist_l1", "cell-33", "those of BN + L1 contain zero"),  # how many?
        ("02_mnist_eva6", "cell-13", "element-wise LN is ahead, level with LN at the end"),
        (
            "02_mnist_eva6",
            "cell-24",
            "only BN + L1 against the two kinds of LN excludes zero, in favour of LN",
        ),
        ("05_cifar10_skip", "gains", "all four intervals contain zero"),
        ("05_cifar10_skip", "gains", "three contain zero, one lies below it"),
        ("05_cifar10_skip", "gains", "zero is where they begin"),  # not understood
    ],
)
def test_a_false_alternative_text_is_noticed(name, cell, words):
    (found,) = [c for c in code_cells(ROOT / "notebooks" / f"{name}.ipynb") if c.id == cell]
    assert false_claims(words, texts_printed_by(found)) != []


@pytest.mark.parametrize(
    "words",
    [
        "only that of GN and LN excludes zero, in favour of LN",
        "two of the three intervals contain zero",
        "all but one contain zero; that of GN and LN lies below it",
        "the two of BN + L1 contain zero, the third one excludes it",
        "the steps are equal",
    ],
)
def test_a_true_alternative_text_is_not(words):
    cells = code_cells(ROOT / "notebooks" / "01_mnist_l1.ipynb")
    (found,) = [cell for cell in cells if cell.id == "cell-33"]
    assert false_claims(words, texts_printed_by(found)) == []


@every_assignment
def test_it_has_both_graphs_and_the_mistakes_of_each_variant(path):
    source = "\n".join(cell.source for cell in code_cells(path))
    assert '"test_loss"' in source
    assert '"test_accuracy"' in source
    assert "nl.find_mistakes(" in source
    assert "rows=5, cols=2" in source
    figures = [o for c in code_cells(path) for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(figures) >= 3 + len(KEPT[ASSIGNMENTS[path]]["variants"])  # its own comes first


@every_assignment
def test_the_stored_run_is_that_of_the_kept_results(path):
    (table,) = [
        output["data"]["text/plain"]
        for cell in code_cells(path)
        if "nl.run_assignment(" in cell.source
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    shown = np.array([float(number) for number in re.findall(r"\b0\.\d+", table)])
    for variant in KEPT[ASSIGNMENTS[path]]["variants"]:
        assert abs(shown - variant["test_accuracy"]).min() < 0.000051  # a half goes either way
        assert variant["recipe"]["epochs"] == 20


def test_no_number_in_a_text_is_stale():
    assert (
        fill_pages(
            [ROOT / "README.md", ROOT / "notebooks/results.md", *NOTEBOOKS], KEPT, write=False
        )
        == []
    )


# --- drivers ----------------------------------------------------------------------------------
#
# The notebooks of the assignments, each with a question of its own, are read in a quarter of an
# hour. What they share is said in the first one, and the others link to it.


def words_in(text: str) -> int:
    """The words that a reader sees, without those of code blocks and links' targets."""
    tags = r"<!--.*?-->|</?[a-z][^<>]*>"  # not from the sign in "p < 0.05" to the next tag's end
    text = re.sub(rf"```.*?```|{tags}|(?<=\])\([^)]*\)", " ", text, flags=re.S)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


@every_assignment
def test_a_driver_is_read_in_a_quarter_of_an_hour(path):
    cells = code_cells(path)
    assert len(cells) <= 20
    assert words_in(text_of(path)) <= 1300
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs) <= 10


@every_assignment
def test_the_title_of_a_driver_is_its_question(path):
    assert re.search(r"^# \d · .+\?$", text_of(path), re.M)


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_it_asks_first_folds_answers_and_has_three_exercises(path):
    text = text_of(path)
    assert path.read_text(encoding="utf-8").count("not answered yet") >= 3  # they run untouched
    assert text.count("<summary>Solution</summary>") >= 3
    assert text.count("<details>") == text.count("</details>")
    assert "<summary>Answer</summary>" in text
    assert "cannot be concluded" in text


def is_set_up(cell) -> bool:
    """Whether it installs normlab, holds the settings, or only imports."""
    kinds = {type(node) for node in python_of(cell.source).body}
    settings = "parameters" in cell.metadata.get("tags", [])
    return settings or "google.colab" in cell.source or kinds <= {ast.Import, ast.ImportFrom}


def what_is_said(path: Path) -> set[str]:
    """Its paragraphs of some length, and the code of its cells, however it is laid out."""
    paragraphs = {" ".join(each.split()) for each in re.split(r"\n\s*\n", text_of(path))}
    cells = [cell for cell in code_cells(path) if not is_set_up(cell)]
    code = {ast.unparse(python_of(cell.source)) for cell in cells}
    return {each for each in paragraphs if words_in(each) > 7} | code


@every_assignment
def test_nothing_but_set_up_stands_in_another_notebook_too(path):
    said = what_is_said(path)
    for other in (each for each in NOTEBOOKS if each != path):
        assert not said & what_is_said(other), other.stem


def test_the_parts_of_notebooks_that_are_linked_to_are_there():
    for path in NOTEBOOKS:
        for name, part in re.findall(r"\]\((\w+\.ipynb)?(?:#([\w-]+))?\)", text_of(path)):
            there = text_of(path.with_name(name) if name else path)
            assert not part or f'<a id="{part}">' in there, part


def index_of_answers() -> str:
    """The last cell of the first notebook."""
    *_, cell = nbformat.read(NOTEBOOKS[0], as_version=4).cells
    assert cell.source.startswith("## Where is what answered?")
    return cell.source


def test_the_index_names_each_notebook_and_sections_that_are_there():
    index = index_of_answers()
    assert set(re.findall(r"\w+\.ipynb", index)) == {path.name for path in NOTEBOOKS[1:]}
    lines = re.findall(r"^1\. .+", index, re.M)
    assert len(lines) == 20
    for line in lines:
        assert re.match(r"1\. .+\? \[(Above|Notebook \d+)\]\(", line)
        for name, section in re.findall(r'\((\w+\.ipynb)\), "([^"]+)"', line):
            assert re.search(rf"^#+ {section}\b", text_of(NOTEBOOKS[0].with_name(name)), re.M)


def test_the_index_has_the_order_in_which_a_course_reads():
    table = (ROOT / "notebooks" / "teaching.md").read_text(encoding="utf-8")
    taught = re.findall(r"^\| \[(\d\d)\]", table, re.M)
    (order,) = re.findall(r"^\*\*The order to read in:\*\* (.+)", index_of_answers(), re.M)
    read = re.findall(r"\d\d(?=\]| →)", order)
    assert [number for number in read if number in taught] == taught
    assert sorted(read) == [path.name[:2] for path in NOTEBOOKS]
    answers = re.findall(r"^1\. .+?\? \[(?:Above|Notebook (\d+))", index_of_answers(), re.M)
    numbers = [f"{int(number or 0):02}" for number in answers]  # "Above" is notebook 0
    places = [taught.index(number) for number in numbers if number in taught]  # 03 to 05: in any
    assert places == sorted(places)


# --- numbers in sentences ---------------------------------------------------------------------
#
# A number in a sentence stands in an output or the code of the same section, or anywhere in the
# notebook if it has four digits or the section prints nothing; or it is an integer of the cell of
# parameters; or it follows from the kept results; or it is listed here with the reason, which is
# checked where it is a formula ("= …"). Integers up to ten count only before "%" and "points": the
# others are names, such as notebook 3, or few things.

CONVENTIONS = {
    "95": "percent, the confidence of all intervals",
    "0.05": "the level of all tests",
    "100": "cases of 100",
    "10,000": "test images of MNIST and of CIFAR-10",
    "1,000": "CIFAR-10's test images of a class",
    "5,000": "CIFAR-10's training images of a class, and as many for validation",
    "50,000": "training images of CIFAR-10",
    "60,000": "training images of MNIST",
    "0.01": "one of 10,000 test images in points; the submissions' rate",
    "70": "percent, what the assignments on CIFAR-10 ask for",
    "128": "the submissions' batches",
}
FIGURE = "read off the figure"
SECONDS = "test_the_seconds_of_the_runs_on_a_gpu computes it"
NOT_PRINTED = {
    "00_normalization_by_hand": {
        "1.177": "= (6 - 3) / 6.5**0.5",
        "0.289": "= (6 - 5) / 12**0.5",
        "1.706": "= (6 - 2) / 5.5**0.5",
        **dict.fromkeys(("5.5", "6.5", "12"), "variances that are printed above"),
    },
    "01_mnist_l1": {
        "15": "= 16 - 1",
        "4.5": "= (0 + 1 + 8 + 9) / 4",
        "16.25": "= (4.5**2 + 3.5**2) / 2",
        "0.05": "= 99.355 - 99.303",
        "0.11": "= 99.195 - 99.083",
        "0.02": "in notebooks/results/search/mnist-l1.csv",
        "37": SECONDS,
    },
    "02_mnist_eva6": {
        "34": SECONDS,
        "152": "= 2 * (8 + 10 + 12 + 14 + 16 + 16)",
        "29,728": "= 2 * (26**2 * 8 + 24**2 * 10 + 10**2 * 12 + 8**2 * (14 + 16) + 6**2 * 16)",
        "29,576": "= 37592 - 8016",
        "676": "= 26**2",
        "56": "the side of images that are made up",
    },
    "03_cifar10_norms": {
        "104,448": "= 2 * (32**2 * (8 + 16) + 16**2 * (16 + 32 + 32) + 8**2 * (16 + 32 + 64))",
        "15": "= 52.92 - 37.70",
        "19": "= 58.97 - 40.21",
        "16": "= 69.39 - 52.92",
        "29": "= 66.51 - 37.70",
        "2.9": "= 69.39 - 66.51",
        "2.5": "= 69.39 - 66.93",
        "432": "= 2 * (8 + 16 + 16 + 32 + 32 + 16 + 32 + 64)",
        "1.2": "= 83.68 - 82.48",
        "0.5": "= 82.43 - 81.90",
        "3.15": "= 71.30 - 68.15",
        "9.29": "= 80.59 - 71.30",
        "11.16": "= 79.41 - 68.25",
        "0.39": "counted by exercise 2",
        "1.36": "= 80.59 - 79.23",
        "2.12": "= 73.42 - 71.30",
        "2.11": "= 70.36 - 68.25",
        "0.49": "= 68.15 - 67.66",
        "1,275": "counted by exercise 3; below, that of its runs",
        "2,100": "= 21 * 100",
        **dict.fromkeys(("32", "64"), "channels of the layers"),
    },
    "04_cifar10_add": {
        "5.86": "= 75.26 - 69.40",
        "2.84": "= 72.07 - 69.23",
        "0.32": "= 74.10 - 73.78",
        "73.78": "the last line of the submission's log",
        "72.07": "the last line of the submission's log",
        "32": "the submission's batches",
        "4.27": "= 78.37 - 74.10",
        "8.08": "= 77.48 - 69.40",
        "8.30": "= 77.53 - 69.23",
        "15": FIGURE,
    },
    "05_cifar10_skip": {
        "58": SECONDS,
        "15": "= 74.56 - 59.43",
        "800": "= 34520 - 33720",
        "59": "= 100 * 0.5936",
    },
    "06_batch_size": {
        "20": "= ceil(10000 / 512)",
        "313": "= ceil(10000 / 32)",
        "320": "= 16 * 20",
        "2,000": "= 0.2 * 10000",
    },
    "07_inside_the_network": dict.fromkeys(
        ("0.7", "0.9", "1.2", "2.3", "2.5", "90", "150", "300"), FIGURE
    )
    | dict.fromkeys(("0.0102", "0.123", "1.88", "0.0823"), FIGURE)
    | {
        "0.0006": "printed above",
        "0.41": "= sqrt(1 / 6)",
        "0.002": "= sqrt(1 / 6) ** 7",
        "0.001": "= 0.66 * sqrt(1 / 6) ** 7",
        "44": "= ceil(log(0.01) / log(0.9))",
    },
    "09_other_images": {
        "0.02": "= 99.25 - 99.23",
        "2.33": "= 99.30 - 96.97",
        "9.64": "= 99.30 - 89.66",
        "1.4": "= 99.36 - 97.98",
        "23": "= 82.6 - 59.2",
        "30": "= 89.0 - 59.2",
        "18": "= 84.7 - 66.5",
        "9.5": "= 82.9 - 73.4",
        "12": "= 85.7 - 73.4",
        "125": "= 500 / 4",
        "0.9": "counted by exercise 2",
        "11": "counted by exercise 2",
        "67.8": "counted by exercise 3",
        "37.2": "counted by exercise 3",
        "255": "the largest value of a pixel",
        "360": "= 1797 // 5 + 1",
    },
    "10_the_way_back": {"216": "= 41992 - 41776"},
    "12_what_follows": {
        "0.00001": "= 10**-5",
        "0.95": "= 0.9 * 0.5 + 0.1 * 5",
        "0.99": "= 1 - 0.01",
        "900": "= 10**2 * 9",
        "44": "= ceil(log(0.01) / log(0.9))",
        "459": "= ceil(log(0.01) / log(0.99))",
    },
    "11_how_many_groups": {
        "11": "its number",
        "16": "channels of a layer",
        "32": "channels of a layer, pixels of a side, groups in Wu & He 2018",
    },
    "08_batch_norm_on_many_devices": {
        "256": "of a made-up network",
        "30": "of a made-up network",
        "15": "= 5 * 3",
        "205200": "= 50 * 4 * 2 * (256 + 1 + 256)",
        "6.0": "= 50 * 4 * 0.03",
    },
    "13_weights_and_rates": {
        "157": "= ceil(10000 / 64)",
        "184": "= 8 * ceil(1437 / 64)",
        "360": "= 1797 // 5 + 1",
    },
}


def printed_by(cells: list) -> str:
    """Texts of the outputs, and the cells, whose numbers are settings."""
    texts = []
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        texts.append(cell.source)
        for output in cell.outputs:
            texts.append(output.get("text", ""))
            texts.append(output.get("data", {}).get("text/plain", ""))
    return "\n".join(texts)


def sections(path: Path) -> list[list]:
    """The cells of each section, which begins with a heading."""
    found = [[]]
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            found.append([])
        found[-1].append(cell)
    return found


def numbers_with_sources(path: Path) -> Iterator[tuple[str, Callable[[str], bool]]]:
    """Each number in a notebook's sentences, with a test of what else would pass in its place."""
    cells = nbformat.read(path, as_version=4).cells
    everything = numbers_printed(printed_by(cells))
    parameters = printed_by([c for c in cells if "parameters" in c.metadata.get("tags", [])])
    sizes = [number for number in PRINTED.findall(parameters) if number.isdigit()]
    kept = [KEPT[name] for name in KEPT if name.startswith(ASSIGNMENTS.get(path, "none"))]
    follows = [number for each in kept for number in following_from(each)]
    for section in sections(path):
        prints = any(cell.get("outputs") for cell in section)
        own = [*numbers_printed(printed_by(section)), *sizes] if prints else everything
        passes = partial(is_known, own=[*own, *follows], long=[*everything, *follows])
        yield from ((number, passes) for number in numbers_said(text_in(section)))


def is_known(number: str, *, own: list[str], long: list[str]) -> bool:
    has_four_digits = len(re.sub(r"\D", "", number).lstrip("0")) > 3
    return number in CONVENTIONS or is_among(number, long if has_four_digits else own)


@every_notebook
def test_every_number_in_a_sentence_was_printed_or_has_a_reason(path):
    reasons = NOT_PRINTED.get(path.stem, {})
    said = list(numbers_with_sources(path))
    missing = {number for number, passes in said if not passes(number)}
    assert missing <= reasons.keys(), "neither printed nor explained in NOT_PRINTED"
    assert reasons.keys() <= {number for number, _ in said}, "to be removed from NOT_PRINTED"
    assert [number for number, reason in reasons.items() if not holds(number, reason)] == []


def test_a_changed_number_is_noticed():
    """Nearly always where it has three digits: others may be printed beside it by chance."""
    noticed = []
    for number, passes in (each for path in NOTEBOOKS for each in numbers_with_sources(path)):
        if len(re.sub(r"\D", "", number).lstrip("0")) > 2:
            noticed += [not passes(other) for other in changed(number)]
    assert len(noticed) > 200
    assert sum(noticed) / len(noticed) > 0.9


@every_notebook
def test_every_interval_in_a_sentence_was_printed(path):
    printed = INTERVAL.findall(printed_by(nbformat.read(path, as_version=4).cells))
    for said in INTERVAL.findall("\n".join(sentences(text_of(path)))):
        assert any(
            all(is_rounded(number, value) for number, value in zip(said, each, strict=True))
            for each in printed
        ), said


# --- kept runs --------------------------------------------------------------------------------


def suggested() -> dict[str, SimpleNamespace]:
    """The rates that a range test had suggested when the runs with them were kept."""
    table = pd.read_csv("results/inside/suggested.csv").set_index("variant")["base_lr"]
    return {
        name.removesuffix(", suggested"): SimpleNamespace(suggestion=table[name].iloc[0])
        for name in table.index.unique()
    }


# What a notebook measures, which depends on rounding, before it asks for the runs that follow.
MEASURED = {"13_weights_and_rates": lambda: {"tests": suggested()}}


def names_of(code: CodeType) -> tuple[set[str], set[str]]:
    """The names that a cell makes, and those that it uses and has not made before."""
    made, used = set(), set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_NAME":
            made.add(step.argval)
        elif step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            used |= {step.argval} - made
        elif isinstance(step.argval, CodeType):
            used |= names_of(step.argval)[1] - made
    return made, used


def cells_that_load(path: Path, given: set[str]) -> list[str]:
    """The cells that ask for kept runs and those that these need, but for names that are given."""
    needed, names = [], set()
    for cell in reversed(code_cells(path)):
        made, used = names_of(compile(python_of(cell.source), path.name, "exec"))
        if made & names or re.search(r'\bkept=|"kept":', cell.source):
            needed.append(cell.source)
            names = names - made | used - given
    return needed[::-1]


def run_cells(cells: list[str], names: dict) -> dict:
    """Runs the cells as a kernel does, which knows their source."""
    for number, source in enumerate(f"{cell}\n" for cell in cells):
        file = f"<cell {number}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), names)
    return names


def kept_in(folder: str) -> set[str]:
    """The folders of the runs, and the digests in tables, that lie in the results of that name."""
    found = set()
    for place in (ROOT / "notebooks" / "results").glob(f"{folder}*/"):
        found |= {file.parent.resolve().as_posix() for file in place.rglob("config.json")}
        for file in place.glob("*.csv"):
            found |= set(pd.read_csv(file).get("run", ()))
    return found


WITH_KEPT_RUNS = {
    path: match[1]
    for path in NOTEBOOKS
    for cell in code_cells(path)
    if (match := re.search(r'^KEPT = .*"results/([\w-]+)"', cell.source, re.M))
}


def test_every_kept_run_belongs_to_a_notebook():
    assert set.union(*map(kept_in, WITH_KEPT_RUNS.values())) == kept_in("")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder like that of the notebooks, with a cache: CIFAR-10 takes a while to decode."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "results").symlink_to(ROOT / "notebooks" / "results")
    return folder


@pytest.fixture(scope="module", params=WITH_KEPT_RUNS, ids=lambda path: path.stem)
def loaded(request, place, real_data_root):
    """A notebook, its variables after the cells that load kept runs, and what these took.

    Whatever would be trained in the place of a kept run is an error.
    """
    taken = set()

    def load(self, network):
        taken.add(self.directory.resolve().as_posix())
        return load_run(self, network)

    def sweep(*arguments, **options):
        table = run_sweep(*arguments, **options)
        taken.update(table["run"])
        return table

    def train(*_, **__):
        pytest.fail("a kept run was not taken: see what was printed")

    load_run, run_sweep = RunFolder.load, nl.run_sweep
    looked_at = SimpleNamespace(last={"test_accuracy": 0.5})  # for which no run was kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "load", load)
        patch.setattr(nl, "run_sweep", sweep)
        patch.setattr(nl, "fit", lambda *_, **__: looked_at)
        patch.setattr("normlab.runs.trainer.make_engine", train)
        patch.setattr("normlab.runs.processes.WORTHWHILE", float("inf"))  # not in other processes
        patch.setattr("torch.cuda.is_available", lambda: False)  # where drivers load kept runs
        patch.setenv("NORMLAB_DATA", str(real_data_root))
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.delenv("NORMLAB_SMOKE", raising=False)
        patch.chdir(place)
        variables = run_to_the_kept_runs(request.param)
    return request.param, variables, taken


def run_to_the_kept_runs(path: Path) -> dict:
    given = MEASURED.get(path.stem, dict)()
    cells = cells_that_load(path, set(given))
    dataset = re.search(r'^DATASET = .* else "(\w+)"', "\n".join(cells), re.M)[1]
    try:
        nl.load_dataset(dataset, download=False)
    except FileNotFoundError:
        pytest.skip(f"NORMLAB_DATA names a folder without {dataset}")
    return run_cells(cells, {"__name__": "notebook", **given})


def test_every_kept_run_is_loaded_by_the_very_call_of_its_notebook(loaded):
    path, _, taken = loaded
    assert taken >= kept_in(WITH_KEPT_RUNS[path])


def test_the_published_results_are_those_of_the_kept_runs(loaded):
    """Where this fails after a change, `normlab run` with the folder for --out writes them anew."""
    path, variables, _ = loaded
    of_name = {v.assignment.name: v for v in variables.values() if isinstance(v, nl.Results)}
    folders = sorted((ROOT / "notebooks" / "results").glob(f"{WITH_KEPT_RUNS[path]}*/results.json"))
    for folder in (file.parent for file in folders):
        results = of_name[folder.name]
        fresh = json.loads(json.dumps(results_as_dict(results)))
        assert flat(json.loads((folder / "results.json").read_text())) == flat(fresh)
        assert (folder / "results.csv").read_text() == results.table().to_csv(index=False)
        assert (folder / "report.md").read_text() == report_text(results)


def flat(value: object, key: str = "") -> dict:
    """The numbers and words of nested dicts and lists by their places; numbers to ten digits."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, each in inner for k, v in flat(each, f"{key}/{name}").items()}
    return {key: float(f"{value:.10g}") if isinstance(value, float) else value}


def test_the_published_results_without_kept_runs_agree_with_themselves():
    """Those of the README's first command, which takes a minute: its runs are not kept."""
    without = [kept for kept in KEPT.values() if not (kept["folder"] / "runs").is_dir()]
    assert [kept["folder"].name for kept in without] == ["digits"]
    for variant in without[0]["variants"]:
        (run,) = variant["runs"]  # of a single seed, so there is neither spread nor difference
        assert (variant["seeds"], variant["sd"], without[0].get("differences", [])) == (
            1,
            None,
            [],
        )
        assert variant["test_accuracy"] == run["test_accuracy"] <= variant["best_accuracy"]
        assert (variant["test_accuracy"] * 360) % 1 == pytest.approx(0, abs=1e-9)
        assert variant["seconds"] == run["seconds"]
        network = nl.build_network(**variant["network"])
        assert variant["parameters"] == sum(weight.numel() for weight in network.parameters())
        page = (without[0]["folder"] / "report.md").read_text()
        assert f"| {100 * variant['best_accuracy']:.2f} in epoch {variant['best_epoch']} |" in page


@pytest.mark.parametrize("name", ["01_mnist_l1", "02_mnist_eva6", "05_cifar10_skip"])
def test_the_seconds_of_the_runs_on_a_gpu(name):
    assignment = name[3:].replace("_", "-")
    folders = (ROOT / "notebooks/results" / assignment / "runs").glob("*/seed-*")
    read = [RunFolder(folder).read_finished() for folder in folders]
    seconds = [sum(row["seconds"] for row in rows) for about, rows in read if on_a_gpu(about)]
    (said,) = (number for number, why in NOT_PRINTED[name].items() if why == SECONDS)
    assert round(sum(seconds) / len(seconds)) == int(said)


def on_a_gpu(config: dict) -> bool:
    return "NVIDIA" in config["from"]["device"]


def test_the_ladder_of_notebook_3_leads_from_the_submission_to_the_recipe_and_one_step_back():
    cells = code_cells(ROOT / "notebooks" / "03_cifar10_norms.ipynb")
    (source,) = [cell.source for cell in cells if cell.source.startswith("STEPS")]
    steps = ast.literal_eval(python_of(source).body[0].value)
    assert list(steps)[:-1] == list(LADDER)
    assignment = nl.ASSIGNMENTS["cifar10-norms"]
    submitted = vars(nl.as_submitted(assignment).recipe) | {"dropout": None}
    ours = vars(assignment.recipe) | {"dropout": assignment.dropout}
    *up, back = steps.values()
    rung = submitted | {key: value for changes in up for key, value in changes.items()}
    assert rung == ours
    assert back == {key: submitted[key] for key in steps["Muon"]}
    ladder = pd.read_csv(ROOT / "notebooks" / "results" / "ladder" / "accuracies.csv")
    assert list(ladder["step"].unique()) == list(steps)
    assert (ladder.groupby(["step", "norm"]).size() == 3).all()
    assert len(ladder) == 3 * 3 * len(steps)


def test_a_cell_of_the_assignment_is_seen_at_once():
    """Longer than those of the lessons, since a task of its own is solved in each."""
    cells = code_cells(ROOT / "notebooks" / "assignment" / "normalization.ipynb")
    assert max(len(cell.source.splitlines()) for cell in cells) <= 21
