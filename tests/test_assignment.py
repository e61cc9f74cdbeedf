"""The assignment, through nbgrader: the commands of `notebooks/teaching.md`, in their order."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.grading

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks" / "assignment"
NOTEBOOK = "normalization.ipynb"
COMMENT = re.compile(r"\s*### (BEGIN|END) .*\n?")

# Answers that are wrong or missing in places: for each what stands where in which cell, and the
# points of the tests that do not give all of theirs. Whoever has no trainings has nothing to draw.
NO_TRAINING = {"test_training": 0, "test_graphs": 0, "test_mistakes": 0, "test_grids": 0}
HALF_RIGHT = {
    "unbiased-variance": (
        {"layer_norm": ("x.var((1, 2, 3), correction=0,", "x.var((1, 2, 3),")},
        {"test_layer_norm": 3.3},
    ),
    "epsilon-outside": (
        {
            "group_norm": ("torch.sqrt(variance + EPSILON)", "(torch.sqrt(variance) + EPSILON)"),
            "training": None,
        },
        {"test_group_norm": 3.3, **NO_TRAINING},
    ),
    "momentum-turned": (
        {"batch_norm_layer": ("lerp_(mean, self.momentum)", "lerp_(mean, 1 - self.momentum)")},
        {"test_batch_norm_layer": 7.5},
    ),
    "constant-statistics": (
        {"backward": ("d - d.mean(axes, keepdim=True) - along", "d"), "training": None},
        {"test_backward_x": 0, **NO_TRAINING},
    ),
    "mean-of-weights": (
        {"l1": (".abs().sum()", ".abs().mean()"), "training": None},
        {"test_l1": 2.0, "test_loop_l1": 0, **NO_TRAINING},
    ),
    "loop-without-modes": (
        {"loop_test": ("network.eval()", "print('testing', file=sys.stderr)"), "training": None},
        {"test_loop": 7.5, **NO_TRAINING},
    ),
    "pictures": (
        {
            "graphs": ("axes.legend()", ""),
            "mistakes": (" * data.std[0] + data.mean[0]", ""),
            "grids": ("{true}, not {predicted}", "{predicted}"),
        },
        {"test_graphs": 4.0, "test_mistakes": 3.3, "test_grids": 2.0},
    ),
    "questions": (
        {
            "network": (
                '"LN": lambda channels: nn.GroupNorm(1',
                '"LN": lambda channels: nn.GroupNorm(2',
            ),
            "interval": ('"c"', '"a"'),
            "unfair": ('{"c", "d", "f", "h", "i"}', '{"a", "c", "d", "i"}'),
        },
        {"test_network": 5.0, "test_interval": 3.0, "test_unfair": 2.0},
    ),
}


def read(path: Path) -> dict[str, nbformat.NotebookNode]:
    """The cells of a notebook by their names."""
    return {cell.metadata.nbgrader.grade_id: cell for cell in nbformat.read(path, 4).cells}


SOURCE = read(FOLDER / NOTEBOOK)
POINTS = {
    name: cell.metadata.nbgrader.points
    for name, cell in SOURCE.items()
    if cell.metadata.nbgrader.grade
}


@dataclass
class Course:
    """The folder of a course."""

    folder: Path

    def run(self, commands: str) -> str:
        """Runs commands of the page in it."""
        done = subprocess.run(
            ["bash", "-ec", commands], cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def hand_in(self, student: str, changes: dict[str, tuple[str, str] | None] | None) -> None:
        """What comes back from a student: the solution with changes, or the notebook as it was."""
        notebook = nbformat.read(self.folder / "release" / "normalization" / NOTEBOOK, 4)
        for cell in notebook.cells if changes is not None else ():
            name = cell.metadata.nbgrader.grade_id
            change = changes.get(name, ("", ""))
            if cell.metadata.nbgrader.solution and change is not None:
                source = COMMENT.sub("\n", SOURCE[name].source)
                assert change[0] in source, f"{student} changes what is not in {name}"
                cell.source = source.replace(*change)
        place = self.folder / "downloaded" / "normalization" / "archive"
        place.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, place / f"{student}_{NOTEBOOK}")


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Course:
    """A course that has gone through all that the page says."""
    from nbgrader.apps import NbGraderApp  # noqa: F401 - the extra "grading" brings it

    page = (ROOT / "notebooks" / "teaching.md").read_text(encoding="utf-8")
    section = page.partition("\n## An assignment")[2].partition("\n## ")[0]
    set_up, generate, collect, grade, *_ = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    place = tmp_path_factory.mktemp("teaching")
    clone = Course(place / "normlab")
    shutil.copytree(FOLDER, clone.folder / "notebooks" / "assignment")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
            patch.setenv(variable, str(place / "home"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        clone.run("".join(re.findall(r"^(?!test -x|source).*\n", set_up, re.M)))
        made = Course(place / "course")
        made.run(generate)
        made.hand_in("solution", {})
        made.hand_in("empty", None)
        for student, (changes, _) in HALF_RIGHT.items():
            made.hand_in(student, changes)
        made.run(collect)
        made.run(grade)
        yield made


@pytest.fixture(scope="module")
def grades(course) -> dict[str, dict]:
    """For each student the grades by the names of their cells."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course.folder / 'gradebook.db'}") as book:
        return {
            each.student.id: {grade.name: grade for grade in each.notebooks[0].grades}
            for each in book.assignment_submissions("normalization")
        }


def points(grades: dict) -> dict[str, float]:
    return {name: grade.auto_score for name, grade in grades.items() if name != "findings"}


def test_the_students_version_holds_neither_solutions_nor_hidden_tests(course):
    handed_out = read(course.folder / "release" / "normalization" / NOTEBOOK)
    assert handed_out.keys() == SOURCE.keys()
    text = "\n".join(cell.source for cell in handed_out.values())
    assert not re.search("SOLUTION|HIDDEN|For the grader", text)
    for name, cell in SOURCE.items():
        hidden = re.findall(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n(.*?)### END", cell.source, re.S)
        lines = [line.strip() for part in hidden for line in part.splitlines()]
        assert bool(hidden) or name == "findings" or not cell.metadata.nbgrader.solution
        assert not [line for line in lines if len(line) > 12 and line in handed_out[name].source]


def test_there_are_a_hundred_points_in_twelve_tasks():
    assert sum(POINTS.values()) == 100
    assert len([name for name in SOURCE if re.fullmatch(r"task_\d+", name)]) == 12
    for number in range(1, 13):
        said = re.search(r"\((\d+) points", SOURCE[f"task_{number}"].source)[1]
        names = [*SOURCE]
        first = names.index(f"task_{number}")
        end = names.index(f"task_{number + 1}") if number < 12 else len(names)
        assert int(said) == sum(POINTS.get(name, 0) for name in names[first:end])


def test_the_solution_gets_all_points_and_a_person_reads_the_findings(grades):
    due = {name: most for name, most in POINTS.items() if name != "findings"}
    assert points(grades["solution"]) == due
    assert grades["solution"]["findings"].needs_manual_grade


def test_the_empty_notebook_gets_none(grades):
    assert set(points(grades["empty"]).values()) == {0}
    assert grades["empty"]["findings"].auto_score == 0


@pytest.mark.parametrize("student", HALF_RIGHT)
def test_half_right_answers_get_what_the_rubric_says(student, grades):
    found = points(grades[student])
    less = {name: score for name, score in found.items() if score != POINTS[name]}
    assert less == HALF_RIGHT[student][1]


def test_the_feedback_names_the_mistake(course):
    place = course.folder / "feedback" / "unbiased-variance" / "normalization"
    text = (place / "normalization.html").read_text(encoding="utf-8")
    assert "divided by n − 1" in text
    assert (course.folder / "grades.csv").is_file()
