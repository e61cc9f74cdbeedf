"""The stored notebooks: whole runs from top to bottom, nothing in them that a reader trips over."""

import ast
import dis
import json
import linecache
import re
from pathlib import Path
from types import CodeType, SimpleNamespace

import nbformat
import pandas as pd
import pytest

import normlab as nl
from normlab.pages import fill_pages, read_results
from normlab.runs import RunFolder

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
    cells = nbformat.read(path, as_version=4).cells
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
def test_the_badge_opens_this_notebook_of_the_repository_that_colab_clones(path):
    badges = re.findall(
        r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/([^)]+)\)", text_of(path)
    )
    ((repository, place),) = badges
    assert ROOT / place == path
    (clone,) = [cell.source for cell in code_cells(path) if "google.colab" in cell.source]
    assert f'"https://github.com/{repository}"' in clone


@every_assignment
def test_it_has_both_graphs_and_the_mistakes_of_each_variant(path):
    source = "\n".join(cell.source for cell in code_cells(path))
    assert '"test_loss"' in source
    assert '"test_accuracy"' in source
    assert "nl.find_mistakes(" in source
    assert "rows=5, cols=2" in source
    figures = [o for c in code_cells(path) for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(figures) >= 5 + len(KEPT[ASSIGNMENTS[path]]["variants"])


@every_assignment
def test_the_stored_run_is_that_of_the_kept_results(path):
    (table,) = [
        output["data"]["text/plain"]
        for cell in code_cells(path)
        if "nl.run_assignment(" in cell.source
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    for variant in KEPT[ASSIGNMENTS[path]]["variants"]:
        assert f"{variant['test_accuracy']:.4f}".rstrip("0") in table
        assert variant["recipe"]["epochs"] == 20


def test_no_number_in_a_text_is_stale():
    assert fill_pages([ROOT / "README.md", *NOTEBOOKS], KEPT, write=False) == []


# What the text takes from a figure, from a submission or from arithmetic that it shows, where no
# output prints it. A place that `normlab report` fills is checked above.
NOT_PRINTED = {
    "01_mnist_l1": {4.5, 16.25, 3.5, 0.14, 2.3},
    "02_mnist_eva6": set(),
    "03_cifar10_norms": {5.76},
    "04_cifar10_add": {73.78},
    "05_cifar10_skip": {1.31, 2.07},
    "06_batch_size": set(),
    "07_inside_the_network": {0.0006, 0.13, 1.2},
}


@pytest.mark.parametrize("name", NOT_PRINTED)
def test_every_decimal_in_a_text_was_printed_or_is_cited(name):
    """A sentence that cites has a year. What is printed as a share may be told in percent."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    printed = [number for text in printed_by(path) for number in decimals(text)]
    text = re.sub(r"<!-- normlab: .+? -->.*?<!-- / -->", "", text_of(path), flags=re.S)
    sentences = re.split(r"(?<=[.:;])\s", text)
    said = [x for each in sentences if not re.search(r"\b20\d\d\b", each) for x in decimals(each)]
    assert said
    missing = {
        number
        for number, digits in said
        if not any(round(v * factor, digits) == number for v, _ in printed for factor in (1, 100))
    }
    assert missing == NOT_PRINTED[name]


def printed_by(path: Path) -> list[str]:
    """Texts of the outputs, and the cells, whose numbers are settings."""
    texts = []
    for cell in code_cells(path):
        texts.append(cell.source)
        for output in cell.outputs:
            texts.append(output.get("text", ""))
            texts.append(output.get("data", {}).get("text/plain", ""))
    return texts


def decimals(text: str) -> list[tuple[float, int]]:
    """Numbers with a decimal point, each with how many digits follow it."""
    found = re.findall(r"(?<![\w.])\d+\.\d+", text)
    return [(float(number), len(number.partition(".")[2])) for number in found]


# --- kept runs --------------------------------------------------------------------------------


def suggested() -> dict[str, SimpleNamespace]:
    """The rates that a range test had suggested when the runs with them were kept."""
    table = pd.read_csv("results/inside/suggested.csv").set_index("variant")["base_lr"]
    return {
        name.removesuffix(", suggested"): SimpleNamespace(suggestion=table[name].iloc[0])
        for name in table.index.unique()
    }


# What a notebook measures, which depends on rounding, before it asks for the runs that follow.
MEASURED = {"07_inside_the_network": lambda: {"tests": suggested()}}


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
        if made & names or re.search(r"\bkept=", cell.source):
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


@pytest.fixture(scope="session")
def decoded(tmp_path_factory) -> Path:
    """A cache folder for all notebooks: CIFAR-10 takes a while to decode."""
    return tmp_path_factory.mktemp("decoded")


@pytest.fixture
def only_loading(monkeypatch, tmp_path, real_data_root, decoded) -> set[str]:
    """Trains nothing, and notes the folders and the rows of tables that were taken instead."""
    taken = set()

    def load(self, network):
        taken.add(self.directory.resolve().as_posix())
        return loaded(self, network)

    def sweep(*arguments, **options):
        table = run_sweep(*arguments, **options)
        taken.update(table["run"])
        return table

    def train(*_, **__):
        pytest.fail("a kept run was not taken: see what was printed")

    loaded, run_sweep = RunFolder.load, nl.run_sweep
    monkeypatch.setattr(RunFolder, "load", load)
    monkeypatch.setattr(nl, "run_sweep", sweep)
    looked_at = SimpleNamespace(last={"test_accuracy": 0.5})  # for which no run was kept
    monkeypatch.setattr(nl, "fit", lambda *_, **__: looked_at)
    monkeypatch.setattr("normlab.fitting.make_engine", train)
    monkeypatch.setattr("normlab.parallel.WORTHWHILE", float("inf"))  # not in other processes
    monkeypatch.setenv("NORMLAB_DATA", str(real_data_root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(decoded))
    monkeypatch.delenv("NORMLAB_SMOKE", raising=False)
    (tmp_path / "results").symlink_to(ROOT / "notebooks" / "results")
    monkeypatch.chdir(tmp_path)
    return taken


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


@pytest.mark.parametrize("path", WITH_KEPT_RUNS, ids=lambda path: path.stem)
def test_every_kept_run_is_loaded_by_the_very_call_of_its_notebook(path, only_loading):
    given = MEASURED.get(path.stem, dict)()
    cells = cells_that_load(path, set(given))
    dataset = re.search(r'^DATASET = .* else "(\w+)"', "\n".join(cells), re.M)[1]
    try:
        nl.load_dataset(dataset, download=False)
    except FileNotFoundError:
        pytest.skip(f"NORMLAB_DATA names a folder without {dataset}")
    run_cells(cells, {"__name__": "notebook", **given})
    assert only_loading >= kept_in(WITH_KEPT_RUNS[path])
