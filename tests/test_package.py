"""The package as a whole: its layers, its public names, its wheel, its README."""

import ast
import configparser
import contextlib
import email
import importlib.metadata
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

import normlab as nl
from normlab.cli import main
from normlab.datasets import loading
from normlab.datasets.loading import load_dataset
from normlab.engines import doctor
from tests.pages import PAGES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "normlab"

# A module imports only those that stand before it: support, the leaves of the shelf, the rooms that
# they do not need, what trains, what compares and teaches, the command.
ORDER = (
    *("support.type_hints", "support.module_state", "support.checks", "support.output"),
    *("support.files", "support.locks", "support.colours", "support.figures", "support.curves"),
    *("support.seeding", "support.tensor_checks", "support.devices", "support.progress"),
    *("support.signals", "support.summaries", "support.grad_cam", "support.dataset_base"),
    *("support.epoch_rows", "support.filter_banks", "support.schedulers", "support.layers"),
    "support.command_line",
    *("norms", "penalties", "augment", "data", "model", "training", "optimizers", "recipes"),
    *("history", "assignments", "plots"),
    *("datasets.cache", "datasets.folders", "datasets.downloads", "datasets.loading"),
    *("datasets.given", "analysis", "images"),
    *("engines.dropout", "engines.plain", "engines.agreement", "engines.cpu"),
    *("engines.cuda_graph", "engines.choice", "engines.doctor"),
    *("runs.probe", "runs.identity", "runs.folder", "runs.jobs", "runs.trainer"),
    *("runs.transfer", "runs.processes", "runs.cluster"),
    *("fitting", "experiment"),
    *("comparisons.intervals", "comparisons.comparison", "comparisons.fairness"),
    *("comparisons.report", "comparisons.review", "comparisons.sweep_plots"),
    *("comparisons.submissions", "comparisons.sweeps"),
    *("lessons.layer_table", "lessons.by_hand", "lessons.sharing", "lessons.diagrams"),
    *("lessons.explorer", "lessons.spreadsheet", "lessons.invariance", "lessons.sparsity"),
    *("lessons.watching", "lessons.watch_plots", "lessons.range_test"),
    *("lessons.sentences", "lessons.checking", "lessons.norm_mistakes", "lessons.student_norm"),
    *("lessons.norm_checks", "lessons.training_checks", "lessons.mistake_checks"),
    *("cli", "__main__"),
)
# Imported by the functions that need them, so that the rest does not wait for them.
ON_DEMAND = {"torchvision", "matplotlib", "pandas", "scipy", "sklearn", "torchsummary"}
# Only one function needs each of these, and says so where it is missing.
EXTRAS = {"ipywidgets": "notebooks", "distributed": "cluster"}

TOP_LEVEL = {
    *("notebooks", "normlab", "tests", "README.md", "setup.cfg", "pyproject.toml", "LICENSE"),
    *(".gitignore", ".gitattributes", ".ci", ".github"),
}
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


# --- layers -----------------------------------------------------------------------------------


def imports_of(tree: ast.AST) -> list[str]:
    """Dotted names of everything that is imported, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def parsed(module: str) -> ast.AST:
    return ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text())


def every_file() -> list[Path]:
    return sorted(SOURCE.glob("**/*.py"))


def test_the_order_lists_every_module():
    files = {".".join(file.relative_to(SOURCE).with_suffix("").parts) for file in every_file()}
    rooms = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    assert files == {*ORDER, "__init__", *(f"{room}.__init__" for room in rooms)}


def test_the_library_stays_thin():
    # What it has come to, with room for an entry of a table. The shelf is what a student reads.
    lines = {file: len(file.read_text().splitlines()) for file in every_file()}
    shelf = [file for file in lines if file.parent == SOURCE]
    assert len(shelf) <= 18
    assert sum(map(lines.get, shelf)) <= 2_600
    assert max(map(lines.get, shelf)) <= 206
    assert sum(lines.values()) <= 13_095


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way(module):
    earlier = ORDER[: ORDER.index(module)]
    for name in imports_of(parsed(module)):
        if name.startswith("normlab.") and name != "normlab.__version__":
            imported = name.removeprefix("normlab.")
            assert {imported, imported.rpartition(".")[0]} & {*earlier}, f"{module} imports {name}"


@pytest.mark.parametrize("module", ORDER)
def test_no_module_goes_through_the_public_names(module):
    # `normlab.fit` inside the package would be an import that the order above does not see.
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "normlab":
            assert node.attr == "__version__"


def test_the_requirements_are_what_is_imported():
    imported = {name.split(".")[0] for module in ORDER for name in imports_of(parsed(module))}
    imported -= {*sys.stdlib_module_names, "normlab"}
    imported -= {"IPython"}  # in a notebook's kernel only
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert set(EXTRAS) <= imported
    for package, extra in EXTRAS.items():
        assert package in declared(config["options.extras_require"][extra])
        assert package in declared(config["options.extras_require"]["test"])
    other_names = {"sklearn": "scikit-learn", "PIL": "pillow"}
    names = {other_names.get(name, name) for name in imported - set(EXTRAS)}
    assert names == declared(config["options"]["install_requires"])


def declared(requirements: str) -> set[str]:
    lines = requirements.splitlines()
    return {Requirement(line).name for line in lines if line and not line.startswith("#")}


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """What is in `sys.modules` after importing normlab, then each of its modules in turn."""
    code = f"""
import importlib, json, sys
found = {{}}
for name in ["normlab", *(f"normlab.{{module}}" for module in {ORDER[:-1]})]:
    importlib.import_module(name)
    found[name] = sorted({{module.split(".")[0] for module in sys.modules}})
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_normlab_waits_for_nothing(loaded):
    assert not {"torch", "numpy", "safetensors", *ON_DEMAND, *EXTRAS} & set(loaded["normlab"])


@pytest.mark.parametrize("module", ORDER[:-1])
def test_a_module_leaves_large_packages_to_those_who_need_them(module, loaded):
    assert not {*ON_DEMAND, *EXTRAS} & set(loaded[f"normlab.{module}"])


# --- public names -----------------------------------------------------------------------------


def public_callables() -> list[tuple[str, object]]:
    """Functions, classes, and the classes' public methods, by name."""
    found = []
    for name in nl.__all__:
        value = getattr(nl, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            found.append((name, value))
        if inspect.isclass(value):
            methods = inspect.getmembers(value, inspect.isroutine)
            found += [
                (f"{name}.{method}", function)
                for method, function in methods
                if not method.startswith("_")
                and getattr(function, "__module__", "").startswith("normlab")
            ]
    return found


@pytest.mark.parametrize("name", nl.__all__)
def test_a_public_name_is_there_and_listed(name):
    assert getattr(nl, name) is not None
    assert name in dir(nl)


@pytest.mark.parametrize(("name", "value"), public_callables())
def test_public_names_are_explained(name, value):
    text = inspect.getdoc(value) or ""
    # A dataclass without a docstring gets its signature for one.
    assert len(text.split()) >= 4
    assert not text.startswith(f"{name}(")


@pytest.mark.parametrize(("name", "value"), public_callables())
def test_public_arguments_have_type_hints(name, value):
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name not in ("self", "cls"):
            assert parameter.annotation is not parameter.empty, parameter.name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'normlab' has no attribute 'fitt'"):
        nl.fitt  # noqa: B018


# --- the wheel --------------------------------------------------------------------------------


def can_build_here() -> bool:
    """Whether setuptools is here, new enough to make a wheel on its own."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, version.split(".")[:2])) >= (70, 1)


def pip(*arguments: str, cwd: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel made from a copy of the sources: setuptools leaves a build folder behind."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "source"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(SOURCE, copy / "normlab", ignore=shutil.ignore_patterns("__pycache__"))
    isolation = ["--no-build-isolation"] if can_build_here() else []
    pip("wheel", ".", "--no-deps", "--wheel-dir", str(place), *isolation, cwd=copy)
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_all_modules_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert b"normlab = normlab.cli:main" in b"".join(
            archive.read(name) for name in archive.namelist() if name.endswith("entry_points.txt")
        )
    modules = {file.relative_to(ROOT).as_posix() for file in every_file()}
    others = {"normlab/py.typed", "normlab/lessons/normalization_by_hand.xlsx"}
    assert names == modules | others


def test_the_version_is_written_in_one_place(metadata):
    assert metadata["Version"] == nl.__version__
    assert nl.__version__ not in (ROOT / "setup.cfg").read_text()


def test_requirements_have_lower_bounds_only(metadata):
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {"torch", "nbval", "jupyter"} <= {requirement.name for requirement in requirements}
    for requirement in requirements:
        assert [bound.operator for bound in requirement.specifier] == [">="], requirement.name


def test_the_python_versions_named_are_those_that_the_workflow_begins_and_ends_with(metadata):
    (oldest,) = SpecifierSet(metadata["Requires-Python"])
    assert oldest.operator == ">="  # as everywhere else, no upper bound
    classifiers = metadata.get_all("Classifier")
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(classifiers), re.M)
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    tested = re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", workflow)[1])
    assert tested == [named[0], named[-1]]
    assert named == [f"3.{minor}" for minor in range(11, 15)]
    assert oldest.version == named[0]
    assert f"Python {oldest.version} or newer" in README


def test_the_installed_wheel_works_from_another_folder(wheel, tmp_path, monkeypatch):
    target = tmp_path / "installed"
    pip("install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(target))
    code = "import normlab; print(normlab.__file__); from normlab.cli import main; main(['list'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    place, *listed = done.stdout.splitlines()
    assert Path(place) == target / "normlab" / "__init__.py"
    assert listed[0] == "Assignments"


# --- the repository and its README ------------------------------------------------------------


def test_the_repository_holds_what_belongs_there():
    try:
        done = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git checkout")
    assert {name.split("/")[0].strip('"') for name in done.stdout.splitlines()} <= TOP_LEVEL


def blocks(*languages: str) -> list[str]:
    """The README's code blocks in one of these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    """Each `normlab …` in the README's shell blocks and tables."""
    lines = [part for block in blocks("sh", "bash") for part in re.split(r"\n|;|&&", block)]
    lines += re.findall(r"^\| `(normlab [^`]*)` \|", README, re.M)
    plain = [line.strip().removeprefix("$ ").removeprefix(".venv/bin/") for line in lines]
    return list(dict.fromkeys(line for line in plain if line.startswith("normlab ")))


def programs() -> list[str]:
    """The README's Python blocks, but for those of notebooks and of a student's own tests."""
    apart = r"^[%!]|^import work$"
    return [block for block in blocks("python", "py") if not re.search(apart, block, re.M)]


def needed_data(words: list[str]) -> str | None:
    """The data set that a command takes from elsewhere."""
    if words[0] == "data":
        return words[1] if words[1] != "digits" else None
    if words[0] in ("run", "sweep") and len(words) > 1 and "--dataset" not in words:
        return nl.ASSIGNMENTS[words[1]].dataset if words[1] in nl.ASSIGNMENTS else None
    return None


def test_the_readme_shows_commands_and_a_program():
    assert any(line.startswith("normlab run") for line in commands())
    assert programs()


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_works(command, request, tmp_path, monkeypatch, capsys):
    words = shlex.split(command, comments=True)[1:]
    if (name := needed_data(words)) is not None:
        root = request.getfixturevalue("real_data_root")
        monkeypatch.setenv("NORMLAB_DATA", str(with_few_jpegs(root, tmp_path / "data")))
        try:
            load_dataset(name, download=False)
        except FileNotFoundError:
            pytest.skip(f"NORMLAB_DATA names a folder without {name}")
    if "FOLDER" in words:
        words[words.index("FOLDER")] = str(image_folder(tmp_path / "images"))
    if "--dask" in words:
        words = words[: words.index("--dask")]  # `test_cluster.py` has a scheduler
    if words[0] in ("run", "sweep"):
        words += ["--epochs", "1", "--seeds", "1", "--device", "cpu"]  # the last one counts
        monkeypatch.setattr(loading, "load_dataset", load_few)
    if words == ["doctor"]:
        estimated = {doctor.ESTIMATED: nl.ASSIGNMENTS[doctor.ESTIMATED]}
        monkeypatch.setattr(doctor, "ASSIGNMENTS", estimated)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert capsys.readouterr().out


def load_few(*arguments, **options) -> nl.Dataset:
    """Of a large data set a few hundred images, which show as well that the command works."""
    data = load_dataset(*arguments, **options)
    return data.subset(384, 128) if len(data.train_images) > 384 else data


def with_few_jpegs(root: Path, place: Path) -> Path:
    """A folder like this one, with few images of a JPEG copy, since decoding all takes long."""
    for kind in root.glob("cifar10/*/*"):
        folder = place / kind.relative_to(root)
        folder.mkdir(parents=True)
        for file in sorted(kind.iterdir())[:40]:
            (folder / file.name).symlink_to(file)
    place.mkdir(exist_ok=True)
    for other in root.iterdir():
        if other.name != "cifar10":
            (place / other.name).symlink_to(other)
    return place


def image_folder(place: Path) -> Path:
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for number, name in enumerate(("cats", "dogs")):
            folder = place / part / name
            folder.mkdir(parents=True)
            for picture in range(3):
                pixels = random.integers(100 * number, 100 * number + 100, (28, 28))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{picture}.png")
    return place


def few_digits(root, train, transform, *, download):
    """A data set like torchvision's MNIST, of pictures that need no download."""
    some = nl.load_dataset("digits").subset(64, 32)
    part = "train" if train else "test"
    images, labels = getattr(some, f"{part}_images"), getattr(some, f"{part}_labels")
    pictures = [transform(Image.fromarray(image[0].numpy())) for image in images]
    kind = type("Pictures", (list,), {"train": train})
    return kind(zip(pictures, labels.tolist(), strict=True))


def test_a_loop_of_ones_own_takes_twelve_lines():
    [program] = [program for program in programs() if "DataLoader" in program]
    assert len([line for line in program.splitlines() if line and "import" not in line]) <= 12


@pytest.mark.parametrize("program", programs())
def test_a_program_of_the_readme_runs(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.MNIST", few_digits)
    program = program.replace("epochs=20", "epochs=1").replace('"mnist"', '"digits"')
    with contextlib.redirect_stdout(None):
        exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    assert pyplot.get_fignums() or "plot" not in program
    pyplot.close("all")


def test_the_files_that_the_pages_name_are_there():
    for page in PAGES:
        links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        here = [link.partition("#") for link in links if "://" not in link]
        assert here
        for name, _, part in here:
            other = page.parent / name if name else page
            assert other.is_file(), name
            if part and other.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M)
                assert part in map(anchor, headings), f"{name}#{part}"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_copy_on_github_gets_its_own_name(tmp_path):
    for part in (".github", "notebooks"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT / "README.md", tmp_path)

    def put(name):
        return subprocess.run(["bash", ".github/own_name.sh", name], cwd=tmp_path, check=False)

    assert put("jane; rm -rf").returncode == 2
    assert put("jane/norms").returncode == 0
    pages = [tmp_path / "README.md", *sorted((tmp_path / "notebooks").glob("*.ipynb"))]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "OWNER/normlab" not in text
        assert "github.com/jane/norms" in text
    for page in pages[1:]:
        assert f"github/jane/norms/blob/main/notebooks/{page.name}" in page.read_text("utf-8")
        json.loads(page.read_text("utf-8"))
    before = [page.read_bytes() for page in pages]
    assert put("jane/norms").returncode == 0
    assert [page.read_bytes() for page in pages] == before


def anchor(heading: str) -> str:
    """A heading as GitHub names it in links."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_readme_is_short_and_begins_with_a_picture_and_a_command():
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.M | re.S).split()) <= 1500
    first = text[: text.index("normlab run")]
    assert "![" in first
    assert len(first.split()) < 250
