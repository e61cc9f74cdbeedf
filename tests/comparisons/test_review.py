"""Folders of a class become rows: whole, damaged, unfinished, foreign, unfair ones."""

import json
import shutil
from pathlib import Path

import pytest

import normlab as nl
from normlab.cli import main

COLUMNS = ["folder", "network", "data", "epochs", "seeds", "accuracy", "whole", "fair"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory, tiny, tiny_assignment) -> Path:
    """What a student hands in."""
    folder = tmp_path_factory.mktemp("kept") / "jane"
    options = {"data": tiny, "seeds": 2, "epochs": 2, "progress": False}
    nl.run_assignment(tiny_assignment, directory=folder, **options)
    return folder


@pytest.fixture
def jane(kept, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(kept, tmp_path / "jane")


def only(folder: Path) -> dict[str, str]:
    table = nl.review_runs(folder)
    assert [*table] == COLUMNS
    (row,) = table.to_dict("records")
    return row


def test_a_whole_comparison_is_told(kept, tiny_assignment):
    row = only(kept)
    assert row["folder"] == str(kept)
    assert row["network"].startswith("TinyNetwork")
    assert (row["data"], row["epochs"], row["seeds"]) == ("made-up patterns", "2", "2")
    assert [each.split()[0] for each in row["accuracy"].split(", ")] == ["bn-l1", "gn", "ln"]
    assert (row["whole"], row["fair"]) == ("yes", "yes")


def damage_weights(jane):
    weights = jane / "gn" / "seed-0" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


def damage_config(jane):
    (jane / "gn" / "seed-0" / "config.json").write_text("[" * 100_000)


def take_predictions_away(jane):
    (jane / "gn" / "seed-0" / "predictions.safetensors").unlink()


def interrupt(jane):
    """As a run is that was stopped before its last epoch."""
    file = jane / "gn" / "seed-0" / "config.json"
    config = {"is": json.loads(file.read_text())["is"], "from": {}}
    file.write_text(json.dumps(config))
    (jane / "gn" / "seed-0" / "weights.safetensors").unlink()
    history = jane / "gn" / "seed-0" / "history.csv"
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:2]))


def put_in_another_model(jane):
    shutil.rmtree(jane / "gn" / "seed-0")
    (jane / "gn" / "seed-0").mkdir()
    (jane / "gn" / "seed-0" / "config.json").write_text('{"architectures": ["BertModel"]}')


def put_in_something_alike(jane):
    (jane / "gn" / "seed-0" / "config.json").write_text('{"is": {"recipe": 3}, "from": {}}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damage_weights, "gn/seed-0/weights.safetensors is damaged"),
        (damage_config, "gn/seed-0/config.json is damaged"),
        (take_predictions_away, "gn/seed-0/predictions.safetensors is missing"),
        (interrupt, "gn/seed-0 is not finished: 1 of 2 epochs are"),
        (put_in_another_model, "gn/seed-0/config.json is damaged"),
        (put_in_something_alike, "gn/seed-0/config.json is damaged"),
    ],
)
def test_what_is_not_whole_is_a_sentence_and_the_rest_is_told(change, said, jane):
    change(jane)
    row = only(jane)
    assert row["whole"].startswith(said)
    assert row["seeds"] == "2, 1"
    assert row["fair"] == "seeds: bn-l1 0, 1; gn 1; ln 0, 1"


def test_numbers_that_are_none_of_a_run_are_no_traceback(jane):
    for file in jane.glob("gn/*/config.json"):
        config = json.loads(file.read_text())
        del config["is"]["network"], config["digest"]
        file.write_text(json.dumps(config))
    row = only(jane)
    assert row["whole"] == "; ".join(f"gn/seed-{n} is not as normlab keeps runs" for n in range(2))
    assert row["accuracy"].startswith("bn-l1 ")
    assert row["fair"] == "yes"


def test_what_differs_beside_the_norm_and_the_name_is_unfair(tiny, tiny_network, tmp_path):
    recipe = nl.Recipe(epochs=1, batch_size=16, lr=0.1)
    changes = {"bn-l1": {"l1": 1e-4}, "gn": {"lr": 0.05, "epochs": 2}}
    for name, change in changes.items():
        how = recipe.replace(**change)
        network = tiny_network(name[:2])
        nl.fit(network, tiny, how, directory=tmp_path / "runs" / name, progress=False)
    row = only(tmp_path)
    assert row["folder"] == str(tmp_path / "runs")
    assert row["epochs"] == "1, 2"
    found = "epochs: bn-l1 1; gn 2; lr: bn-l1 0.1; gn 0.05; images seen: bn-l1 96; gn 192"
    assert (row["whole"], row["fair"]) == ("yes", found)


def test_folders_without_runs_are_rows(kept, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "empty", tmp_path / "file", tmp_path / "none", kept / "gn"]
    table = nl.review_runs(folders)
    assert [*table["whole"]] == ["there are no runs in it"] + ["there is no such folder"] * 2 + [
        "yes"
    ]
    assert table["fair"].iloc[-1] == "nothing to compare"
    assert main(["review", *map(str, folders)]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == f"| {' | '.join(COLUMNS)} |"
    assert [row.count("|") for row in rows] == [9] * 4


def test_nothing_is_changed(jane):
    before = {file: (file.read_bytes(), file.stat().st_mtime) for file in jane.rglob("*.*")}
    nl.review_runs(jane)
    assert before == {file: (file.read_bytes(), file.stat().st_mtime) for file in jane.rglob("*.*")}
