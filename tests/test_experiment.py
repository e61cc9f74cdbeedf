"""Assignments run as a whole: folders, tables, and what is not trained twice."""

import csv
import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

import normlab as nl
from normlab.datasets.loading import load_assignment_data
from normlab.runs.folder import RunFolder
from normlab.runs.jobs import seed_numbers

FOLDERS = ["bn-l1", "gn", "ln"]


def run(assignment, data, directory=None, **options) -> nl.Results:
    return nl.run_assignment(
        assignment, data=data, directory=directory, device="cpu", progress=False, **options
    )


class Watch(list):
    """The (class, convolution weights) of each training step of the small networks.

    `stop` interrupts before that many steps, as Ctrl-C would.
    """

    STEPS = 6  # 96 images in batches of 16

    def __init__(self, monkeypatch, network_type: type, stop: int | None = None) -> None:
        forward = network_type.forward

        def watched(network, images):
            if network.training and len(images) == 16:  # no trial on a few images, no test
                if len(self) == stop:
                    raise KeyboardInterrupt
                self.append((type(network.norm), network.conv.weight.detach().clone()))
            return forward(network, images)

        monkeypatch.setattr(network_type, "forward", watched)

    @property
    def epochs(self) -> float:
        return len(self) / self.STEPS


@pytest.fixture
def watch(monkeypatch, tiny_network) -> Watch:
    return Watch(monkeypatch, type(tiny_network()))


def facts(results: nl.Results) -> dict:
    """What a training gave, but for how long it took."""
    return {
        (label, one.recipe.seed): (
            one.config["final_weights"],
            one.predicted.tolist(),
            [{k: v for k, v in row.items() if k != "seconds"} for row in one.history],
        )
        for label in results
        for one in results[label]
    }


@pytest.fixture(scope="module")
def finished(tiny, tiny_assignment, tmp_path_factory):
    """Two seeds of the small assignment, and the folder that holds them."""
    folder = tmp_path_factory.mktemp("finished")
    return run(tiny_assignment, tiny, folder, seeds=2), folder


def test_each_run_has_a_folder_for_its_variant_and_seed(finished):
    _, folder = finished
    runs = {file.parent.relative_to(folder).as_posix() for file in folder.rglob("config.json")}
    assert runs == {f"{variant}/seed-{seed}" for variant in FOLDERS for seed in (0, 1)}
    assert not list(folder.rglob("checkpoint*"))


def test_results_hold_a_run_for_each_variant_and_seed(finished, tiny, tiny_assignment):
    results, folder = finished
    assert list(results) == ["BN + L1", "GN", "LN"]
    for variant in tiny_assignment.variants:
        for seed, one in enumerate(results[variant.label]):
            assert one.recipe == tiny_assignment.recipe_for(variant, seed=seed)
            assert one.directory == folder / variant.folder / f"seed-{seed}"
    assert results.data is tiny


def test_the_table_follows_from_the_histories_on_disk(finished, tiny_network):
    results, folder = finished
    table = results.table()
    assert table["variant"].tolist() == ["BN + L1", "GN", "LN"]
    for variant, row in zip(FOLDERS, table.to_dict("records"), strict=True):
        histories = []
        for seed in (0, 1):
            with open(folder / variant / f"seed-{seed}" / "history.csv") as file:
                histories.append([(e["test_accuracy"], e["seconds"]) for e in csv.DictReader(file)])
        accuracies = [[float(accuracy) for accuracy, _ in one] for one in histories]
        last = [one[-1] for one in accuracies]
        means = [statistics.mean(epoch) for epoch in zip(*accuracies, strict=True)]
        assert row["seeds"] == 2
        assert row["parameters"] == sum(w.numel() for w in tiny_network().parameters())
        assert row["test_accuracy"] == pytest.approx(statistics.mean(last))
        assert row["sd"] == pytest.approx(statistics.stdev(last))
        assert row["best_accuracy"] == pytest.approx(max(means))
        assert row["best_epoch"] == means.index(max(means)) + 1
        seconds = [sum(float(wall) for _, wall in one) for one in histories]
        assert row["seconds"] == pytest.approx(statistics.mean(seconds))


def test_one_seed_has_no_standard_deviation(tiny, tiny_assignment):
    table = run(tiny_assignment, tiny, epochs=1).table()
    assert table["seeds"].tolist() == [1, 1, 1]
    assert all(map(math.isnan, table["sd"]))


@pytest.mark.parametrize("length", [2, 18, 36])
def test_a_narrow_terminal_shows_the_test_accuracy(finished, monkeypatch, length):
    import pandas

    monkeypatch.setenv("COLUMNS", "80")
    results, _ = finished
    named = {f"{name:.<{length}.{length}}": runs for name, runs in results.items()}
    table = replace(results, runs=named).table()
    with pandas.option_context("display.width", 80, "display.max_columns", 0):
        head, *rows = str(table).splitlines()
    assert head.split()[:2] == ["variant", "test_accuracy"]
    assert len(head) <= 80
    for row, (name, runs) in zip(rows[: len(named)], named.items(), strict=True):
        assert name in row
        mean = statistics.mean(run.last["test_accuracy"] for run in runs)
        assert float(row.partition(name)[2].split()[0]) == pytest.approx(mean)


def test_finished_runs_are_loaded(finished, tiny, tiny_assignment, watch):
    results, folder = finished
    again = run(tiny_assignment, tiny, folder, seeds=2)
    assert watch.epochs == 0
    assert facts(again) == facts(results)
    assert again.table().equals(results.table())
    for label in results:
        loaded, trained = again[label][1].network, results[label][1].network
        assert torch.equal(nl.predict(loaded, tiny), nl.predict(trained, tiny))


def test_another_seed_trains_only_what_is_missing(tiny, tiny_assignment, tmp_path, watch):
    first = run(tiny_assignment, tiny, tmp_path, seeds=[4], epochs=1)
    assert watch.epochs == 3
    both = run(tiny_assignment, tiny, tmp_path, seeds=[4, 2], epochs=1)
    assert watch.epochs == 6
    assert {key: value for key, value in facts(both).items() if key[1] == 4} == facts(first)


@pytest.mark.parametrize("steps", [8, 24, 31])
def test_an_interrupted_assignment_goes_on_to_the_same_result(
    steps, finished, tiny, tiny_assignment, tiny_network, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        Watch(patch, type(tiny_network()), stop=steps)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_assignment, tiny, tmp_path)
    watch = Watch(monkeypatch, type(tiny_network()))
    resumed = facts(run(tiny_assignment, tiny, tmp_path))
    assert watch.epochs == 6 - steps // 6  # three variants of two epochs
    assert resumed == {key: value for key, value in facts(finished[0]).items() if key[1] == 0}


def test_fresh_trains_anew_and_leaves_other_files_alone(tiny, tiny_assignment, tmp_path, watch):
    first = run(tiny_assignment, tiny, tmp_path, epochs=1)
    notes = [tmp_path / "notes.txt", tmp_path / "gn" / "seed-0" / "notes.txt"]
    for file in notes:
        file.write_text("mine")
    elsewhere = tmp_path / "gn" / "seed-7" / "weights.safetensors"
    elsewhere.parent.mkdir()
    elsewhere.write_text("a seed that was not asked for")
    watch.clear()
    # Without `fresh` another number of epochs would be refused.
    second = run(tiny_assignment, tiny, tmp_path, epochs=2, fresh=True)
    assert watch.epochs == 6
    assert all(len(one.history) == 2 for label in second for one in second[label])
    assert [file.read_text() for file in notes] == ["mine", "mine"]
    assert elsewhere.read_text() == "a seed that was not asked for"
    assert facts(second) != facts(first)


@pytest.mark.parametrize("name", ["config.json", "history.csv", "weights.safetensors"])
def test_what_a_run_has_lost_is_named_and_fresh_is_the_way_out(
    tiny, tiny_assignment, tmp_path, watch, name
):
    first = run(tiny_assignment, tiny, tmp_path)
    file = tmp_path / "gn" / "seed-0" / name
    file.unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    watch.clear()
    with pytest.raises(ValueError, match=rf"{name} is missing: delete .*--fresh"):
        run(tiny_assignment, tiny, tmp_path)
    assert watch.epochs == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert facts(run(tiny_assignment, tiny, tmp_path, fresh=True)) == facts(first)


def test_fresh_removes_nothing_before_all_is_checked(finished, tiny, tiny_assignment):
    _, folder = finished
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    images = {name: getattr(tiny, name)[..., :6, :6] for name in ("train_images", "test_images")}
    small = replace(tiny, **images)
    with pytest.raises(ValueError, match="cannot take images"):
        run(tiny_assignment, small, folder, seeds=2, fresh=True)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_other_epochs_in_the_same_folder_are_refused(finished, tiny, tiny_assignment):
    _, folder = finished
    with pytest.raises(ValueError, match=r"recipe\.epochs is 2 there and 3 here"):
        run(tiny_assignment, tiny, folder, epochs=3)


def test_variants_of_a_seed_start_from_the_same_convolutions(tiny, tiny_assignment, watch):
    run(tiny_assignment, tiny, seeds=2, epochs=1)
    starts = watch[:: watch.STEPS]  # each run's first step
    layers = [layer.__name__ for layer, _ in starts]
    assert layers == ["BatchNorm2d", "GroupNorm", "GroupNorm"] * 2
    weights = [weight for _, weight in starts]
    for first, *others in (weights[:3], weights[3:]):
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(weights[0], weights[3])


@pytest.mark.parametrize(
    ("seeds", "numbers"),
    [
        (1, [0]),
        (3, [0, 1, 2]),
        ([5, 2], [5, 2]),
        (range(2, 4), [2, 3]),
        (np.array([5, 2]), [5, 2]),
        (torch.tensor([5, 2]), [5, 2]),
        (pandas.Series([5, 2]), [5, 2]),
        (np.array(2), [0, 1]),
        (torch.tensor(2), [0, 1]),
        (np.int64(2), [0, 1]),
    ],
)
def test_seeds_are_a_number_or_a_list(seeds, numbers):
    assert seed_numbers(seeds) == numbers


@pytest.mark.parametrize(
    ("seeds", "error", "words"),
    [
        (0, ValueError, "seeds must be at least 1, not 0"),
        (-1, ValueError, "seeds must be at least 1, not -1"),
        ("3", TypeError, "seeds must be a whole number, not '3'"),
        (1.5, TypeError, "seeds must be a whole number, not 1.5"),
        (True, TypeError, "seeds must be a whole number, not True"),
        ([0, 0], ValueError, "each once, not [0, 0]"),
        ([], ValueError, "at least one seed"),
        ([0, -1], ValueError, "each of seeds must be at least 0, not -1"),
        ([0.5], TypeError, "each of seeds must be a whole number, not 0.5"),
    ],
)
def test_bad_seeds_are_refused_before_anything_is_trained(
    seeds, error, words, tiny, tiny_assignment, watch
):
    with pytest.raises(error) as caught:
        run(tiny_assignment, tiny, seeds=seeds)
    assert not watch
    assert words in str(caught.value)


def test_an_unknown_assignment_is_answered_with_the_nearest(tiny):
    with pytest.raises(ValueError, match="did you mean 'cifar10-norms'"):
        nl.run_assignment("cifar-norms", data=tiny)


def test_a_diverging_variant_is_named(tiny, tiny_assignment):
    variants = (nl.Variant("BN", "bn"), nl.Variant("GN high", "gn", changes={"lr": 1e30}))
    with pytest.raises(FloatingPointError, match=r"^GN high, seed 3: the training loss became"):
        run(replace(tiny_assignment, variants=variants), tiny, seeds=[3])


def test_all_others_are_trained_before_a_diverging_one_is_named(tiny, tiny_assignment, tmp_path):
    variants = (
        nl.Variant("GN high", "gn", changes={"lr": 1e30}),
        nl.Variant("LN high", "ln", changes={"lr": 1e30}),
        nl.Variant("BN", "bn"),
    )
    with (
        pytest.warns(UserWarning, match="^GN high, seed 0: the training .*; the others go on"),
        pytest.raises(FloatingPointError, match=r"^GN high, seed 0"),
    ):
        run(replace(tiny_assignment, variants=variants), tiny, tmp_path)
    assert RunFolder(tmp_path / "bn" / "seed-0").is_finished()


def test_without_a_directory_nothing_is_trained_in_vain(tiny, tiny_assignment, watch):
    variants = (nl.Variant("GN high", "gn", changes={"lr": 1e30}), nl.Variant("BN", "bn"))
    with pytest.raises(FloatingPointError, match=r"^GN high, seed 0"):
        run(replace(tiny_assignment, variants=variants), tiny)
    assert watch.epochs == 1


def test_the_data_set_of_the_assignment_is_loaded(tiny, tiny_assignment, monkeypatch):
    asked = []

    def load(name, root, **options):
        asked.append((name, root))
        return tiny

    monkeypatch.setattr("normlab.datasets.loading.load_dataset", load)
    results = nl.run_assignment(tiny_assignment, epochs=1, device="cpu", progress=False)
    assert asked == [("tiny", None)]
    assert results.data is tiny


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist-eva6", (1, 28, 28)), ("cifar10-skip", (3, 32, 32))]
)
def test_digits_take_the_shape_of_the_network(name, shape):
    data = load_assignment_data(nl.ASSIGNMENTS[name], "digits")
    assert data.input_shape == shape
    assert data.source == "scikit-learn digits"


def test_a_named_network_is_run_on_other_images(tiny, tmp_path):
    small = replace(
        nl.ASSIGNMENTS["mnist-eva6"], variants=nl.ASSIGNMENTS["mnist-eva6"].variants[3:]
    )
    padded = [torch.nn.functional.pad(i, (4,) * 4) for i in (tiny.train_images, tiny.test_images)]
    data = replace(tiny, train_images=padded[0], test_images=padded[1])
    results = run(small, data, tmp_path, epochs=1)
    (one,) = results["LN element-wise"]
    assert one.identity["network"]["input_shape"] == [1, 20, 20]
    assert one.identity["network"]["classes"] == 4
    assert nl.predict(one.network, data).shape == (40, 4)


def test_results_are_a_mapping(finished):
    results, _ = finished
    assert list(results) == list(results.keys()) == ["BN + L1", "GN", "LN"]
    assert len(results) == 3
    assert len(nl.plot_curves(results, "test_loss").axes[0].lines) == 3


def test_a_folder_with_another_run_is_refused_before_a_word(
    finished, tiny, tiny_assignment, capsys
):
    _, folder = finished
    other = replace(tiny_assignment, recipe=tiny_assignment.recipe.replace(lr=0.3))
    with pytest.raises(ValueError, match=r"something else .recipe.lr is 0\.1 there and 0\.3 here"):
        nl.run_assignment(other, data=tiny, seeds=2, directory=folder, device="cpu")
    assert capsys.readouterr().out == ""


def test_kept_runs_are_taken_where_they_fit_and_only_read(
    finished, tiny, tiny_assignment, tmp_path, watch, capsys
):
    before_results, kept = finished
    (kept / "gn" / "seed-1" / ".history.csv.0.part").touch()
    before = {file: file.read_bytes() for file in kept.rglob("*") if file.is_file()}
    results = nl.run_assignment(
        tiny_assignment, data=tiny, seeds=2, directory=tmp_path, device="cpu", kept=kept
    )
    assert not watch
    assert facts(results) == facts(before_results)
    assert "6 of 6 runs are loaded, 0 trained" in capsys.readouterr().out
    one_more = run(tiny_assignment, tiny, tmp_path, seeds=[1, 2], kept=kept)
    assert len(watch) == 3 * Watch.STEPS * tiny_assignment.recipe.epochs
    assert sorted(folder.name for folder in tmp_path.glob("*/*")) == ["seed-2"] * 3
    assert one_more["GN"][0].directory == kept / "gn" / "seed-1"
    assert {file: file.read_bytes() for file in kept.rglob("*") if file.is_file()} == before


def test_kept_runs_of_other_data_are_told_and_trained_anew(
    finished, tiny, tiny_assignment, tmp_path, watch, capsys
):
    _, kept = finished
    other = replace(tiny, train_images=tiny.train_images.flip(-1))
    run(tiny_assignment, other, tmp_path, kept=kept)
    assert len(watch) == 3 * Watch.STEPS * tiny_assignment.recipe.epochs
    assert "Not taken from the kept runs" in capsys.readouterr().out


def test_a_run_of_a_network_that_computes_something_else_is_not_taken(
    tiny, tiny_network, tmp_path, capsys
):
    """What a class refers to, and what it was built with, is not in its source."""

    def own(slope):
        def build(norm):
            network = tiny_network(norm)
            network.pool.register_forward_hook(lambda layer, images, output: slope * output)
            return network

        recipe = nl.Recipe(epochs=1, batch_size=32)
        return nl.Assignment("own", "Own", "tiny", (nl.Variant("BN", "bn"),), recipe, build=build)

    first = run(own(1.0), tiny, tmp_path / "a", seeds=2)
    assert facts(run(own(1.0), tiny, tmp_path / "a", seeds=2)) == facts(first)
    with pytest.raises(ValueError, match="something else"):
        run(own(3.0), tiny, tmp_path / "a", seeds=2)
    with pytest.raises(ValueError, match="something else"):  # before the others are trained
        run(own(3.0), tiny, tmp_path / "a", seeds=3)
    assert not (tmp_path / "a" / "bn" / "seed-2").exists()
    anew = run(own(3.0), tiny, tmp_path / "b", seeds=2, kept=tmp_path / "a")
    assert "Not taken from the kept runs: " in capsys.readouterr().out
    assert facts(anew) == facts(run(own(3.0), tiny, seeds=2))


def test_a_network_whose_kept_run_is_refused_keeps_its_weights(tiny, tiny_network, tmp_path):
    recipe = nl.Recipe(epochs=1, batch_size=32)
    nl.fit(tiny_network(), tiny, recipe, directory=tmp_path, device="cpu", progress=False)
    network = tiny_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.pool.register_forward_hook(lambda layer, images, output: -output)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["digest"]
    for key in ("logits_by_drawn_weights", "numbers"):  # as in former versions
        del config["is"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="predicted otherwise"):
        nl.fit(network, tiny, recipe, directory=tmp_path, device="cpu", progress=False)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Counting(torch.nn.Sequential):
    """Gives other classes in evaluation once it was trained: no file keeps what Python counts."""

    steps = 0

    def forward(self, x):
        self.steps += self.training
        logits = super().forward(x)
        return logits.flip(1) if self.steps > 2 and not self.training else logits


def test_a_network_that_remembers_more_than_its_weights_comes_back_or_is_refused(tiny, tmp_path):
    own = nl.Assignment(
        "own", "Own", "tiny", ("bn",), nl.Recipe(epochs=1, batch_size=32),
        build=lambda _: Counting(torch.nn.Flatten(), torch.nn.Linear(144, 4)),
    )  # fmt: skip
    (one,) = run(own, tiny, tmp_path)[own.variants[0].label]
    assert torch.equal(nl.predict(one.network, tiny).argmax(1), one.predicted)
    with pytest.raises(ValueError, match="predicted otherwise"):
        run(own, tiny, tmp_path)


def test_fresh_trains_even_what_is_kept(finished, tiny, tiny_assignment, tmp_path, watch):
    _, kept = finished
    run(tiny_assignment, tiny, tmp_path, kept=kept, fresh=True)
    assert len(watch) == 3 * Watch.STEPS * tiny_assignment.recipe.epochs
