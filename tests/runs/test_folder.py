"""A run on disk: what lies in its folder, what is loaded, and what is refused."""

import csv
import json
import linecache
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import normlab as nl
from normlab.history import COLUMNS
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.identity import (
    NETWORK_ARGUMENTS,
    RECIPE_FIELDS,
    _describe,
    identity,
    weights_digest,
)
from normlab.support.locks import InUse

RECIPE = nl.Recipe(epochs=3, batch_size=32, lr=0.1, augment=("flip",))
FILES = {"config.json", "history.csv", "predictions.safetensors", "weights.safetensors"}


def fit(network, data, directory, recipe=RECIPE):
    return nl.fit(network, data, recipe, directory=directory, device="cpu", progress=False)


def interrupted(network, data, directory, recipe=RECIPE):
    """Leaves a run in `directory` that was interrupted in its third epoch."""
    batches = 0

    def hook(module, inputs):
        nonlocal batches
        batches += module is network and module.training  # copies only try the network
        if batches > 2 * 3:
            raise KeyboardInterrupt

    handle = network.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        fit(network, data, directory, recipe)
    handle.remove()


def everything_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "gn" / "seed-0"


@pytest.fixture
def run(tiny, tiny_network, folder):
    """A finished run that lies in `folder`."""
    return fit(tiny_network("gn"), tiny, folder)


# --- what lies there -------------------------------------------------------------------------


def test_a_finished_run_is_four_files(run, folder):
    assert set(everything_in(folder)) == FILES
    assert run.directory == folder


def test_an_interrupted_run_has_a_checkpoint_and_no_results(tiny, tiny_network, folder):
    interrupted(tiny_network("gn"), tiny, folder)
    assert set(everything_in(folder)) == {"config.json", "history.csv", "checkpoint.safetensors"}
    fit(tiny_network("gn"), tiny, folder)
    assert set(everything_in(folder)) == FILES


def test_no_file_can_execute_code(tiny, tiny_network, folder):
    """Every file is read whole by json, csv or safetensors, none of which runs what it reads."""
    interrupted(tiny_network("gn"), tiny, folder)
    kinds = {".json": json.loads, ".csv": lambda text: list(csv.reader(text.splitlines()))}
    for state in ("interrupted", "finished"):
        for path in folder.iterdir():
            content = (
                load_file(path)
                if path.suffix == ".safetensors"
                else kinds[path.suffix](path.read_text())
            )
            assert content, (state, path.name)
        fit(tiny_network("gn"), tiny, folder)


def test_the_config_says_what_the_run_is_and_where_it_came_from(run, folder, tiny):
    config = json.loads((folder / "config.json").read_text())
    assert config == run.config
    what = config["is"]
    assert nl.Recipe(**what["recipe"]) == RECIPE
    assert what["parameters"] == sum(weight.numel() for weight in run.network.parameters())
    assert what["data"]["fingerprint"] == tiny.fingerprint
    assert (what["data"]["train_images"], what["data"]["test_images"]) == (96, 40)
    assert config["from"]["torch"] == torch.__version__
    assert config["from"]["device"] == "cpu"
    assert config["from"]["data_source"] == tiny.source


def test_no_file_names_a_place_on_the_machine(run, folder, tmp_path):
    for name, content in everything_in(folder).items():
        assert str(tmp_path).encode() not in content, name
    values = []

    def collect(value):
        for inner in value.values() if isinstance(value, dict) else value:
            collect(inner) if isinstance(inner, dict | list) else values.append(inner)

    collect(run.config)
    assert not [value for value in values if str(value).startswith(("/", "~"))]


def test_the_history_in_the_file_is_that_of_the_run_exactly(run, folder):
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [{key: float(value) for key, value in row.items()} for row in rows] == run.history
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]


def test_the_weights_in_the_file_are_those_of_the_network(run, folder):
    weights = load_file(folder / "weights.safetensors")
    state = run.network.state_dict()
    assert weights.keys() == state.keys()
    for name, value in weights.items():
        assert torch.equal(value, state[name])


def test_the_stored_predictions_are_those_of_the_network(run, folder, tiny):
    probability, predicted = nl.predict(run.network, tiny).softmax(1).max(1)
    stored = load_file(folder / "predictions.safetensors")
    for values in (run.predicted, stored["predicted"].long()):
        assert torch.equal(values, predicted)
    for values in (run.probability, stored["probability"]):
        torch.testing.assert_close(values, probability, rtol=0, atol=0)


def test_the_history_as_a_table(run):
    table = run.frame()
    assert list(table.columns) == list(COLUMNS)
    assert table.to_dict("records") == run.history
    assert table["epoch"].tolist() == [1, 2, 3]


def test_best_and_last_epoch(run):
    history = [
        {"epoch": 1, "test_accuracy": 0.5, "seconds": 1.0},
        {"epoch": 2, "test_accuracy": 0.9, "seconds": 2.0},
        {"epoch": 3, "test_accuracy": 0.7, "seconds": 4.0},
    ]
    other = replace(run, history=history)
    assert (other.last["epoch"], other.best["epoch"], other.seconds) == (3, 2, 7.0)


# --- loaded, not repeated --------------------------------------------------------------------


def assert_loaded(network, data, directory, run):
    """`fit` gives `run` back with `network`, which never sees a training batch."""
    handle = network.register_forward_pre_hook(
        lambda module, _: (
            pytest.fail("it was trained") if module is network and module.training else None
        )
    )
    before = everything_in(directory)
    loaded = fit(network, data, directory)
    handle.remove()
    assert loaded.history == run.history
    assert loaded.config == run.config
    assert (loaded.recipe, loaded.directory) == (run.recipe, run.directory)
    assert torch.equal(loaded.predicted, run.predicted)
    assert torch.equal(loaded.probability, run.probability)
    assert loaded.network is network
    weights = load_file(directory / "weights.safetensors")
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])
    assert everything_in(directory) == before


def test_a_finished_run_is_loaded_into_an_untrained_network(tiny, tiny_network, run, folder):
    assert_loaded(tiny_network("gn"), tiny, folder, run)


def test_a_finished_run_is_loaded_when_given_its_own_trained_network(tiny, run, folder):
    assert_loaded(run.network, tiny, folder, run)


@pytest.mark.parametrize("norm", ["bn", "ln-elementwise", "none"])
def test_every_kind_of_network_comes_back(tiny, tiny_network, tmp_path, norm):
    run = fit(tiny_network(norm), tiny, tmp_path)
    assert_loaded(tiny_network(norm), tiny, tmp_path, run)


def test_what_a_killed_process_left_is_cleared_away(tiny, tiny_network, tmp_path):
    (tmp_path / ".weights.safetensors.4711.part").write_bytes(b"half")
    fit(tiny_network("gn"), tiny, tmp_path)
    assert set(everything_in(tmp_path)) == FILES


LITTER = (".lock", ".weights.safetensors.4711.part", "checkpoint.safetensors")


def test_what_a_kill_at_the_very_end_left_goes_at_the_next_look(tiny, tiny_network, run, folder):
    for name in LITTER:
        (folder / name).write_bytes(b"")
    assert fit(tiny_network("gn"), tiny, folder).history == run.history
    assert set(everything_in(folder)) == FILES


def test_a_look_changes_nothing_where_somebody_else_is_at_work(tiny, tiny_network, run, folder):
    with FileLock(folder / ".lock"):
        (folder / LITTER[1]).write_bytes(b"half")
        before = everything_in(folder)
        assert fit(tiny_network("gn"), tiny, folder).history == run.history
        assert everything_in(folder) == before


@pytest.mark.usefixtures("run")
def test_a_run_in_use_is_not_removed_and_none_beside_it(folder):
    before = everything_in(folder)
    with (
        FileLock(folder.parent / "other" / ".lock"),
        pytest.raises(InUse, match=r"other is in use by another process: wait for its end, or"),
    ):
        remove_runs(folder, folder.parent / "other")
    assert everything_in(folder) == before


def test_a_run_that_comes_home_leaves_one_that_was_finished_meanwhile(
    tiny, tiny_network, run, folder
):
    home, other = folder.with_name("home"), folder.with_name("other")
    RunFolder(home).receive(RunFolder(folder).pack())
    assert everything_in(home) == everything_in(folder)
    fit(tiny_network("gn"), tiny, other)
    assert RunFolder(other).pack() != RunFolder(folder).pack()  # it took other seconds
    RunFolder(home).receive(RunFolder(other).pack())
    assert everything_in(home) == everything_in(folder)


@pytest.mark.parametrize("files", range(len(FILES)))
def test_a_run_of_which_a_part_came_home_comes_again(run, folder, files, monkeypatch):
    home, written = folder.with_name("home"), []

    def write_so_many(path, content):
        if len(written) == files:
            raise KeyboardInterrupt
        written.append(path.write_bytes(content))

    packed = RunFolder(folder).pack()
    with monkeypatch.context() as patch:
        patch.setattr("normlab.runs.folder.write_bytes", write_so_many)
        with pytest.raises(KeyboardInterrupt):
            RunFolder(home).receive(packed)
    assert not RunFolder(home).is_finished()
    assert not RunFolder(home).open(run.config["is"])  # nor is it damage
    RunFolder(home).receive(packed)
    assert everything_in(home) == everything_in(folder)


# --- another run in the same folder ----------------------------------------------------------


def with_a_norm(groups):
    return nl.build_network("mnist-l1", lambda channels, _: nn.GroupNorm(groups, channels), seed=0)


def with_a_layer(activation):
    network = nl.build_network("mnist-l1", seed=0)
    network[0][1] = activation
    return network


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (with_a_norm(2), with_a_norm(5)),
        (with_a_layer(nn.ReLU()), with_a_layer(nn.Tanh())),
    ],
)
def test_networks_that_compute_something_else_are_other_runs(one, other, digits):
    assert weights_digest(one.state_dict()) == weights_digest(other.state_dict())
    descriptions = [identity(network, digits, RECIPE)["network"] for network in (one, other)]
    assert descriptions[0] != descriptions[1]


def test_a_built_network_is_described_by_its_arguments(digits):
    network = nl.build_network("mnist-l1", "gn", groups=2, dropout=0.0, seed=3)
    state = torch.get_rng_state()
    description = identity(network, digits, RECIPE)["network"]
    assert torch.equal(torch.get_rng_state(), state)
    assert description == json.loads(json.dumps(network.description))


def other_images(data):
    return replace(data, train_images=255 - data.train_images)


OTHERS = {
    "recipe.lr is 0.1 there and 0.2 here": {"recipe": RECIPE.replace(lr=0.2)},
    "recipe.seed is 0 there and 1 here": {"recipe": RECIPE.replace(seed=1)},
    "recipe.epochs is 3 there and 9 here": {"recipe": RECIPE.replace(epochs=9)},
    "recipe.augment is": {"recipe": RECIPE.replace(augment=())},
    "data.fingerprint differs": {"change": other_images},
    "data.train_images is 96 there and 50 here": {"change": lambda data: data.subset(50)},
    "data.validation_images": {"change": lambda data: data.with_validation()},
    "network.layers differs": {"norm": "bn"},
}


@pytest.mark.parametrize("difference", OTHERS)
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_another_run_in_the_same_folder_is_refused(tiny, tiny_network, folder, state, difference):
    (fit if state == "finished" else interrupted)(tiny_network("gn"), tiny, folder)
    before = everything_in(folder)
    other = {"norm": "gn", "seed": 0, "recipe": RECIPE, "change": lambda data: data}
    other |= OTHERS[difference]
    network = tiny_network(other["norm"], other["seed"])
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="something else") as caught:
        fit(network, other["change"](tiny), folder, other["recipe"])
    assert difference in str(caught.value)
    assert str(folder) in str(caught.value)
    assert everything_in(folder) == before
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_network_trained_elsewhere_is_not_taken_for_this_run(tiny, tiny_network, run, folder):
    elsewhere = fit(tiny_network("gn", 1), tiny, folder.parent / "seed-1")
    with pytest.raises(ValueError, match="initial_weights differs"):
        fit(elsewhere.network, tiny, folder)


def test_where_the_images_came_from_does_not_change_what_a_run_is(tiny, tiny_network, run, folder):
    assert_loaded(tiny_network("gn"), replace(tiny, source="another disk"), folder, run)


# --- damage ----------------------------------------------------------------------------------


def cut(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def scrambled(content):
    return bytes(byte ^ 0xA5 for byte in content)


@pytest.mark.parametrize("damage", [cut, emptied, scrambled])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_file_of_a_finished_run_is_named(tiny, tiny_network, run, folder, name, damage):
    assert_damage_is_told(tiny, tiny_network, folder, name, damage)


@pytest.mark.parametrize("damage", [cut, emptied, scrambled])
@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors"])
def test_a_damaged_file_of_an_interrupted_run_is_named(tiny, tiny_network, folder, name, damage):
    interrupted(tiny_network("gn"), tiny, folder)
    assert_damage_is_told(tiny, tiny_network, folder, name, damage)


def assert_damage_is_told(data, tiny_network, folder, name, damage):
    """A sentence names the file and what to delete; having done that, the same call works."""
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    before = everything_in(folder)
    network = tiny_network("gn")
    with pytest.raises(ValueError, match="delete") as caught:
        fit(network, data, folder)
    assert str(folder / name) in str(caught.value)
    assert everything_in(folder) == before
    shutil.rmtree(folder)
    fit(network, data, folder)
    alone = fit(tiny_network("gn"), data, None)
    for key, value in alone.network.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '"text"', '{"is": 1}', '{"is": {}, "final_weights": 3}']
)
def test_a_config_that_is_json_but_no_config_is_named(tiny, tiny_network, run, folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"delete|another directory") as caught:
        fit(tiny_network("gn"), tiny, folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["predictions.safetensors", "weights.safetensors"])
def test_other_tensors_in_the_place_of_the_results_are_damage(
    tiny, tiny_network, run, folder, name
):
    save_file({"something": torch.zeros(3)}, folder / name)
    with pytest.raises(ValueError, match="delete") as caught:
        fit(tiny_network("gn"), tiny, folder)
    assert str(folder / name) in str(caught.value)


def test_other_tensors_in_the_place_of_the_checkpoint_are_damage(tiny, tiny_network, folder):
    interrupted(tiny_network("gn"), tiny, folder)
    save_file({"something": torch.zeros(3)}, folder / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged: delete"):
        fit(tiny_network("gn"), tiny, folder)


def test_a_single_changed_weight_is_noticed(tiny, tiny_network, run, folder):
    weights = load_file(folder / "weights.safetensors")
    weights["linear.bias"][0] += 1e-6
    save_file(weights, folder / "weights.safetensors")
    network = tiny_network("gn")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged: delete"):
        fit(network, tiny, folder)
    # The network is not left with the damaged weights either: the next training begins with it.
    for name, value in tiny_network("gn").state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


def test_a_missing_epoch_in_the_history_is_noticed(tiny, tiny_network, run, folder):
    lines = (folder / "history.csv").read_text().splitlines(keepends=True)
    (folder / "history.csv").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"history\.csv is damaged: delete"):
        fit(tiny_network("gn"), tiny, folder)


def test_a_damaged_history_costs_an_interrupted_run_nothing(tiny, tiny_network, folder):
    interrupted(tiny_network("gn"), tiny, folder)
    file = folder / "history.csv"
    whole = file.read_text()
    assert len(RunFolder(folder).history_so_far()) == 2
    for damage in (whole[:-50], "", "epoch\nx\n", None):
        file.unlink() if damage is None else file.write_text(damage)
        assert RunFolder(folder).history_so_far() == []
    batches = []
    network = tiny_network("gn")
    network.register_forward_pre_hook(
        lambda module, _: batches.append(1) if module is network and module.training else None
    )
    history = fit(network, tiny, folder).history
    assert len(batches) == 3  # of the third epoch
    assert file.read_text().startswith(whole)
    assert [row["epoch"] for row in history] == [1, 2, 3]


@pytest.mark.parametrize("name", sorted(FILES - {"config.json"}))
def test_a_missing_file_of_a_finished_run_is_named_with_what_to_do(
    tiny, tiny_network, run, folder, name
):
    (folder / name).unlink()
    with pytest.raises((ValueError, OSError), match="delete") as caught:
        fit(tiny_network("gn"), tiny, folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("damage", [None, emptied, lambda _: b"\xff", lambda _: b"[" * 10**5])
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_nothing_is_trained_over_a_run_whose_config_is_lost(
    tiny, tiny_network, folder, state, damage
):
    (fit if state == "finished" else interrupted)(tiny_network("gn"), tiny, folder)
    (folder / "config.json").unlink()
    if damage is not None:
        (folder / "config.json").write_bytes(damage(b""))
    before = everything_in(folder)
    with pytest.raises(ValueError, match=r"config\.json is (missing|damaged).*: delete"):
        fit(tiny_network("gn", seed=5), tiny, folder, RECIPE.replace(lr=0.01))
    assert everything_in(folder) == before
    remove_runs(folder)
    assert len(fit(tiny_network("gn"), tiny, folder).history) == RECIPE.epochs


def test_a_checkpoint_of_another_run_is_named(tiny, tiny_network, folder):
    other = folder.with_name("other")
    interrupted(tiny_network("gn"), tiny, folder)
    interrupted(tiny_network("gn", 1), tiny, other, RECIPE.replace(seed=1, lr=0.2))
    shutil.copy(other / "checkpoint.safetensors", folder)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is of another run .*seed is 1"):
        fit(tiny_network("gn"), tiny, folder)


@pytest.mark.parametrize("part", ["history", "is", "digest"])
def test_a_digest_covers_all_that_a_checkpoint_tells(tiny, tiny_network, folder, part):
    interrupted(tiny_network("gn"), tiny, folder)
    file = folder / "checkpoint.safetensors"
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    for changed in (about[part].replace("1", "2", 1), "", None):
        others = {name: text for name, text in about.items() if name != part}
        others |= {} if changed is None else {part: changed}
        save_file(load_file(file), file, metadata=others)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged: delete"):
            fit(tiny_network("gn"), tiny, folder)


def test_a_digest_covers_all_that_the_config_tells(tiny, tiny_network, run, folder):
    file = folder / "config.json"
    told = json.loads(file.read_text())
    changes = [{"from": told["from"] | {"threads": 99}}, {"final_weights": "0"}, {"extra": 1}]
    for config in (*(told | each for each in changes), told.keys() - {"final_weights"}):
        config = config if isinstance(config, dict) else {name: told[name] for name in config}
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json is damaged: delete"):
            fit(tiny_network("gn"), tiny, folder)


@pytest.mark.parametrize("state", ["finished", "interrupted", "both"])
def test_an_earlier_config_that_names_no_weights_needs_a_checkpoint(
    tiny, tiny_network, folder, state
):
    """It has no digest: that the run is finished may have been lost."""
    if state != "finished":
        interrupted(tiny_network("gn"), tiny, folder)
    before = everything_in(folder) if state == "both" else {}
    if state != "interrupted":
        fit(tiny_network("gn"), tiny, folder)
    for name, content in before.items():  # as if it had ended before the last file was written
        (folder / name).write_bytes(content)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"is": told["is"], "from": told["from"]}))
    if state == "finished":
        with pytest.raises(ValueError, match=r"config\.json is damaged: delete"):
            fit(tiny_network("gn"), tiny, folder)
        (folder / "weights.safetensors").unlink()  # a run that has not finished its first epoch
    fit(tiny_network("gn"), tiny, folder)
    assert set(everything_in(folder)) == FILES


def wrong(values, *path):
    """Copies of nested dicts in which one value each is missing or of another type."""
    for key, value in values.items():
        rest = {name: each for name, each in values.items() if name != key}
        yield rest
        for other in (None, 3, "text", [], [1], {}, {"a": {"b": 1}}, [[]] * 2):
            yield rest | {key: other}
        if isinstance(value, dict):
            for inner in wrong(value):
                yield rest | {key: inner}


def test_wrong_types_in_a_config_without_digest_are_named(tiny, tiny_network, run, folder):
    """As earlier versions kept them: a sentence, or the numbers that were there."""
    file = folder / "config.json"
    told = {k: v for k, v in json.loads(file.read_text()).items() if k != "digest"}
    told["from"]["before"] = [{"until_epoch": 1}]
    named, harmless, network, configs = 0, 0, tiny_network("gn"), list(wrong(told))
    for config in configs:
        file.write_text(json.dumps(config))
        try:
            found = RunFolder(folder)
            assert not found.open(run.config["is"]) or found.load(network).history == run.history
        except ValueError as problem:
            named += str(folder) in str(problem)
        else:
            harmless += 1
    assert named + harmless == len(configs)
    assert named > harmless


# --- removal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_removed_run_leaves_nothing(tiny, tiny_network, folder, state):
    (fit if state == "finished" else interrupted)(tiny_network("gn"), tiny, folder)
    remove_runs(folder)
    assert not folder.exists()
    remove_runs(folder)  # once more does no harm


def test_the_removal_of_a_run_spares_what_is_not_part_of_it(run, folder):
    (folder / "notes.txt").write_text("mine")
    remove_runs(folder)
    assert everything_in(folder) == {"notes.txt": b"mine"}


IN_A_NOTEBOOK = """
class Halved(nn.Module):
    def forward(self, x):
        return torch.cat([part / {} for part in x.split(1)])
"""


def defined_in_a_cell(number: int, divisor: int) -> dict:
    """How a network is described whose class a notebook's cell defines, as IPython compiles it."""
    source, file = IN_A_NOTEBOOK.format(divisor), f"/tmp/ipykernel_{number}/{number}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {"nn": nn, "torch": torch, "__name__": "__main__"}
    exec(compile(source, file, "exec"), names)
    return _describe(nn.Sequential(nn.Linear(2, 2), names["Halved"]()))


def test_a_network_of_a_notebook_is_the_same_when_the_notebook_is_run_again():
    first = defined_in_a_cell(1, 2)
    assert defined_in_a_cell(2, 2) == first
    assert defined_in_a_cell(3, 4) != first


# --- what came later -------------------------------------------------------------------------

KEPT = Path(__file__).parents[2] / "notebooks" / "results" / "mnist-l1" / "runs" / "gn" / "seed-0"


@dataclass(frozen=True)
class LaterRecipe(nl.Recipe):
    """The recipe of a version to come."""

    warmup: float = 0.3


def build_later(*arguments, bias=False, width=None, **options):
    """`build_network` of a version to come: one default is a value, one follows from the rest."""
    network = nl.build_network(*arguments, **options)
    network.description |= {"bias": bias, "width": width or network.description["groups"] + 3}
    return network


@pytest.fixture
def kept(tmp_path):
    """A function that copies a kept run, its identity changed, and says whether it is found."""

    def find(part: str, wanted: dict, *, without: tuple = (), **named: object) -> bool:
        folder = shutil.copytree(KEPT, tmp_path / "kept", dirs_exist_ok=True)
        config = json.loads((KEPT / "config.json").read_text())
        values = {k: v for k, v in config["is"][part].items() if k not in without} | named
        there = config | {"is": config["is"] | {part: values}}
        del there["digest"]  # as if a version had kept it that wrote none
        (folder / "config.json").write_text(json.dumps(there))
        run_folder = RunFolder(folder)
        here = config["is"] | {part: config["is"][part] | wanted}
        found = run_folder.open(here)
        run = run_folder.load(nl.build_network("mnist-l1", "gn", groups=5, dropout=0.0, seed=0))
        assert run.last["test_accuracy"] == pytest.approx(0.9944, abs=0.001)
        return found

    return find


def test_a_field_that_only_a_later_recipe_has_counts_as_its_default(kept, monkeypatch):
    assert kept("recipe", {}, warmup=0.0)  # kept by a version to come, which had it switched off
    with pytest.raises(ValueError, match=r"recipe\.warmup is 0\.3 there and None here"):
        kept("recipe", {}, warmup=0.3)
    monkeypatch.setattr("normlab.runs.identity.Recipe", LaterRecipe)
    assert kept("recipe", {})
    assert kept("recipe", {}, warmup=0.3)
    assert kept("recipe", {"warmup": 0.3})
    with pytest.raises(ValueError, match=r"recipe\.warmup is 0\.3 there and 0\.5 here"):
        kept("recipe", {"warmup": 0.5})
    with pytest.raises(ValueError, match=r"recipe\.warmup is 0\.5 there and 0\.3 here"):
        kept("recipe", {}, warmup=0.5)


def test_a_field_that_a_kept_recipe_lacks_counts_as_its_default(kept):
    assert kept("recipe", {}, without=("nesterov", "label_smoothing"))
    with pytest.raises(ValueError, match=r"\(recipe\.centred is False there and True here\)"):
        kept("recipe", {}, without=("centred",))  # of which the default is another


def test_an_argument_that_only_a_later_network_has_counts_as_its_default(kept, monkeypatch):
    monkeypatch.setattr("normlab.runs.identity.build_network", build_later)
    assert kept("network", {})
    assert kept("network", {"bias": False, "width": 8})
    assert kept("network", {}, bias=False, width=8)
    with pytest.raises(ValueError, match=r"\(network\.bias is False there and True here\)"):
        kept("network", {"bias": True})
    with pytest.raises(ValueError, match=r"\(network\.width is 8 there and 5 here\)"):
        kept("network", {"width": 5})


def test_what_came_later_is_named_only_where_it_is_not_at_its_default(digits, monkeypatch):
    as_ever = identity(nl.build_network("mnist-l1", "gn", seed=0), digits, RECIPE)
    assert tuple(as_ever["recipe"]) == RECIPE_FIELDS
    assert tuple(as_ever["network"]) == NETWORK_ARGUMENTS
    monkeypatch.setattr("normlab.runs.identity.Recipe", LaterRecipe)
    monkeypatch.setattr("normlab.runs.identity.build_network", build_later)
    recipe = LaterRecipe(**RECIPE.as_dict())
    assert identity(build_later("mnist-l1", "gn", seed=0), digits, recipe) == as_ever
    network = build_later("mnist-l1", "gn", width=4, seed=0)
    other = identity(network, digits, recipe.replace(warmup=0.5))
    assert other["recipe"] == as_ever["recipe"] | {"warmup": 0.5}
    assert other["network"] == as_ever["network"] | {"width": 4}


def test_what_only_newer_versions_tell_of_a_network_of_ones_own_is_no_difference(
    tiny, tiny_network, run, folder
):
    config = json.loads((folder / "config.json").read_text())
    del config["digest"]
    told = config["is"]["network"].copy()
    assert {"class", "layers", "code", "program"} == told.keys()
    for network in (
        {k: told[k] for k in ("class", "layers")},
        {k: told[k] for k in ("class", "layers", "code")},  # of earlier versions
        told | {"code": "with a comment", "closure": "1f3a"},
    ):
        config["is"]["network"] = network
        (folder / "config.json").write_text(json.dumps(config))
        assert fit(tiny_network("gn"), tiny, folder).history == run.history
    config["is"]["network"] = told | {"program": "another", "closure": "1f3a"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\(network\.program is 'another' there"):
        fit(tiny_network("gn"), tiny, folder)


def test_a_built_network_with_a_layer_changed_is_not_taken_for_the_built_one(digits, folder):
    few = digits.subset(train=64, test=32)
    fit(nl.build_network("mnist-l1", seed=0), few, folder, RECIPE.replace(epochs=1))
    with pytest.raises(ValueError, match=r"network\.class is None there and 'Network' here"):
        fit(with_a_layer(nn.Tanh()), few, folder, RECIPE.replace(epochs=1))
