"""What other processes train is what this one has, whatever the session defined or changed."""

import importlib
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import joblib
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

import normlab as nl
from normlab.runs import processes as parallel
from normlab.runs import transfer
from normlab.runs.jobs import make_jobs
from normlab.support.files import read_json

RECIPE = nl.Recipe(epochs=1, batch_size=32)

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn
import normlab as nl

slope = 0.2

def act(x):
    return F.leaky_relu(x, slope)

class Net(nn.Module):
    def __init__(self, norm="bn"):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nl.make_norm(norm, 4)
        self.linear = nn.Linear(16, 4)
        self.scale = lambda x: 2 * x

    def forward(self, x):
        x = F.adaptive_avg_pool2d(act(self.norm(self.conv(x))), 2)
        return self.scale(self.linear(x.flatten(1)))
"""


def assignment_of(build, *norms):
    variants = tuple(nl.Variant(norm, norm) for norm in norms)
    return nl.Assignment(
        name="own", title="Own", dataset="tiny", variants=variants, build=build, recipe=RECIPE
    )


def facts(results: nl.Results, data) -> dict:
    """All that a training gives to the last bit, but for the time that it took."""
    return {
        label: (
            run.identity,
            run.config["final_weights"],
            run.predicted.tolist(),
            run.probability.tolist(),
            nl.predict(run.network, data).tolist(),
            [{key: row[key] for key in row if key != "seconds"} for row in run.history],
        )
        for label, (run,) in results.items()
    }


@pytest.fixture
def apart_and_here(tiny, monkeypatch, one_thread):
    """Trains an assignment in two processes and in this one; returns the facts of both.

    Fails if of the former any but those that are to `stay` are trained here.
    """
    monkeypatch.setattr(joblib, "cpu_count", lambda *_, **__: 2)
    here = []
    fit_each = parallel.fit_each

    def noted(jobs, *arguments, **options):
        here.extend(job.label for job in jobs)
        return fit_each(jobs, *arguments, **options)

    monkeypatch.setattr(parallel, "fit_each", noted)

    def train(assignment, *, stay=()):
        found = []
        for threshold in (0, float("inf")):
            monkeypatch.setattr(parallel, "WORTHWHILE", threshold)
            here.clear()
            results = nl.run_assignment(assignment, data=tiny, device="cpu", progress=False)
            found.append(facts(results, tiny))
            if threshold == 0:
                assert here == [f"{label}, seed 0" for label in stay]
        return found

    return train


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A student's module in a folder that is not installed."""
    (tmp_path / "models_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("models_of_mine")
    del sys.modules["models_of_mine"]


@pytest.mark.process
def test_a_module_that_is_loaded_again_and_its_globals_go_along(models, apart_and_here):
    apart, here = apart_and_here(assignment_of(lambda norm: models.Net(norm), "bn", "ln"))
    assert apart == here
    path = Path(models.__file__)
    path.write_text(MODULE.replace("leaky_relu(x, slope)", "elu(x, slope)"))
    importlib.reload(models)
    again, here = apart_and_here(assignment_of(models.Net, "bn", "ln"))
    assert again == here
    assert again["bn"][1] != apart["bn"][1]
    models.slope = 0.9  # in the session alone, as is the code once the file has yet another
    path.write_text(MODULE.replace("leaky_relu(x, slope)", "relu(x)"))
    changed, here = apart_and_here(assignment_of(models.Net, "bn", "ln"))
    assert changed == here
    assert changed["bn"][1] not in (apart["bn"][1], again["bn"][1])


@pytest.mark.process
def test_what_has_no_name_goes_along(tiny_network, apart_and_here):
    def build(norm):
        factor = 3.0
        network = tiny_network("gn")

        class Closed(type(network)):
            def forward(self, x):
                return factor * super().forward(x)

        if norm == "closure":
            network.__class__ = Closed
        elif norm == "lambda":
            network.conv.forward = lambda x, conv=network.conv: conv._conv_forward(
                x.flip(2), conv.weight, conv.bias
            )
        else:
            network.norm.register_forward_hook(lambda *inputs: factor * inputs[-1])
        return network

    assignment = assignment_of(build, "closure", "lambda", "hook")
    apart, here = apart_and_here(assignment)
    assert apart == here
    assert len({facts[1] for facts in apart.values()}) == 3


@pytest.fixture
def open_file(tmp_path, monkeypatch):
    """The class `Watched` writes into a file that is open."""
    with open(tmp_path / "seen.txt", "w") as file:
        monkeypatch.setattr(Watched, "file", file)
        yield


class Watched(nn.Sequential):
    """Writes down what it sees in a file that is open."""

    file = None

    def forward(self, x):
        self.file.write(f"{len(x)}\n")
        return super().forward(x)


class Counting(nn.Sequential):
    """Gives other classes in evaluation once it was trained for a while."""

    steps = 0

    def forward(self, x):
        self.steps += self.training
        logits = super().forward(x)
        return logits.flip(1) if self.steps > 2 and not self.training else logits


class Patched(nn.Sequential):
    """Refers to an installed package, which the session may change."""

    def forward(self, x):
        return nn.functional.celu(super().forward(x))


@pytest.mark.process
def test_what_cannot_go_along_is_trained_here_and_said(apart_and_here, open_file, monkeypatch):
    kinds = {"open": Watched, "counts": Counting, "patched": Patched, "plain": nn.Sequential}
    monkeypatch.setattr(nn.functional, "celu", lambda x: x * 3)

    def build(norm):
        return kinds[norm](
            nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
        )

    sentence = "open, seed 0 and 2 more: trained in this process, not beside it: its network cannot"
    with pytest.warns(UserWarning, match=sentence):
        apart, here = apart_and_here(
            assignment_of(build, *kinds), stay=("open", "counts", "patched")
        )
    assert apart == here


def test_a_sweep_trains_here_what_cannot_go_along(
    tiny, tmp_path, monkeypatch, one_thread, open_file
):
    monkeypatch.setattr(joblib, "cpu_count", lambda *_, **__: 2)
    monkeypatch.setattr(parallel, "WORTHWHILE", 0)
    assignment = assignment_of(
        lambda _: Watched(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 4)), "bn"
    )
    options = {"data": tiny, "seeds": 2, "device": "cpu", "progress": False}
    with pytest.warns(UserWarning, match="seed 0 and 1 more: trained in this process"):
        table = nl.run_sweep(assignment, directory=tmp_path / "a", **options)
    monkeypatch.setattr(parallel, "WORTHWHILE", float("inf"))
    here = nl.run_sweep(assignment, directory=tmp_path / "b", **options)
    assert table.drop(columns="seconds").equals(here.drop(columns="seconds"))


def packed(assignment, data, folder):
    """The jobs that can be sent, and the sentences of what stays here."""
    sent, left = transfer.pack_all(make_jobs(assignment, data, [0], 1, folder), data)
    return sent, [str(reason) for reason in left.values()]


def another_loss(monkeypatch):
    loss = nn.functional.cross_entropy
    double = lambda *each, **options: 2 * loss(*each, **options)  # noqa: E731
    monkeypatch.setattr(nn.functional, "cross_entropy", double)


def another_rate(monkeypatch):
    monkeypatch.setattr("normlab.optimizers.PLAIN_FACTOR", 6.0)


def another_order(monkeypatch):
    loader = nl.Dataset.loader
    monkeypatch.setattr(nl.Dataset, "loader", lambda *each, **o: loader(*each, **o | {"seed": 3}))


@pytest.mark.parametrize("change", [another_loss, another_rate, another_order])
def test_a_change_that_only_training_shows_is_seen(
    change, tiny, tiny_network, tmp_path, monkeypatch
):
    assignment = replace(assignment_of(tiny_network, "bn"), recipe=RECIPE.replace(optimizer="muon"))
    with monkeypatch.context() as patch:
        change(patch)
        (sent,) = packed(assignment, tiny, tmp_path)[0].values()
    with pytest.raises(transfer.NotSendable, match="another computes something else"):
        transfer.unpack(sent, tiny)
    (sent,) = packed(assignment, tiny, tmp_path)[0].values()
    assert transfer.unpack(sent, tiny).directory == tmp_path / "bn" / "seed-0"


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_weights_are_not_lost(kind, tiny_network, apart_and_here):
    """Pickling would leave them out without a word."""

    def hook(weight):
        if kind == "register_hook":  # is given the gradient
            return weight * 0
        weight.grad.zero_()
        return None

    def build(norm):
        network = tiny_network(norm)
        getattr(network.conv.weight, kind)(hook)
        return network

    with pytest.warns(UserWarning, match=r"a hook of its weight 'conv\.weight' cannot be sent"):
        apart, here = apart_and_here(assignment_of(build, "bn", "ln"), stay=("bn", "ln"))
    assert apart == here


class Mirrored(nl.Dataset):
    """Mirrors the images of a training, in a way that no recipe names."""

    def loader(self, *arguments, **options):
        batches = super().loader(*arguments, **options)
        batches.images = batches.images.flip(-1) if batches.shuffle else batches.images
        return batches


def test_images_with_a_loader_of_their_own_stay_here(tiny, tiny_network, tmp_path):
    own = Mirrored(**{field.name: getattr(tiny, field.name) for field in fields(tiny)})
    found, reasons = packed(assignment_of(tiny_network, "bn"), own, tmp_path)
    assert (found, reasons) == ({}, ["its images are in a Mirrored, not a plain Dataset"])


def test_a_class_that_holds_all_images_stays_here(tiny, tmp_path, monkeypatch):
    class Holding(nn.Linear):
        images = torch.zeros(2000)

        def forward(self, x):
            return super().forward(x.flatten(1)[:, :4])

    assignment = assignment_of(lambda _: Holding(4, 4), "bn")
    assert packed(assignment, tiny, tmp_path)[1] == []
    monkeypatch.setattr(transfer, "MOST_BYTES", 8000)
    found, (reason,) = packed(assignment, tiny, tmp_path)
    assert not found
    assert re.search(r"would be sent with \d+,\d+ bytes", reason)


def test_packing_leaves_the_network_and_the_session_as_they_are(tiny, models, tmp_path):
    network = models.Net("bn")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    forward, act = models.Net.forward, models.act
    assert packed(assignment_of(lambda _: network, "bn"), tiny, tmp_path)[1] == []
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert models.Net.forward is forward
    assert forward.__globals__["act"] is act
    assert not transfer.cloudpickle.list_registry_pickle_by_value()


@pytest.mark.process
def test_the_identity_is_the_one_of_the_process_that_asked(tiny, models, tmp_path):
    ((job, sent),) = packed(assignment_of(models.Net, "bn"), tiny, tmp_path)[0].items()
    identity = job.prepared(tiny, torch.device("cpu")).identity
    code = (
        "import pickle, sys, torch, normlab as nl\n"
        "from normlab.runs import trainer, transfer\n"
        "sent, data = pickle.load(sys.stdin.buffer)\n"
        "trainer.fit_job(transfer.unpack(sent, data), data, device='cpu', progress=False)\n"
    )
    content = transfer.cloudpickle.dumps((sent, tiny))
    subprocess.run([sys.executable, "-c", code], input=content, check=True, cwd=tmp_path)
    assert read_json(job.directory / "config.json")["is"] == identity


def test_weights_that_give_other_predictions_are_not_taken(tiny, tiny_network, tmp_path):
    assignment = assignment_of(tiny_network, "bn")
    nl.run_assignment(assignment, data=tiny, directory=tmp_path, device="cpu", progress=False)
    (job,) = make_jobs(assignment, tiny, [0], None, tmp_path)
    job = job.identified(tiny, torch.device("cpu"))
    assert transfer.load_home(job, tiny).last["epoch"] == 1
    other = replace(tiny, test_images=tiny.test_images.flip(0))
    assert "predicts otherwise here" in str(transfer.load_home(job, other))
    assert not job.directory.exists()


def test_weights_that_do_not_fit_are_not_taken(tiny, tiny_network, tmp_path):
    nl.run_assignment(
        assignment_of(tiny_network, "bn"), data=tiny, directory=tmp_path, device="cpu",
        progress=False,
    )  # fmt: skip
    other = assignment_of(lambda _: nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), "bn")
    identity = read_json(tmp_path / "bn" / "seed-0" / "config.json")["is"]
    (job,) = (
        replace(job, identity=identity) for job in make_jobs(other, tiny, [0], None, tmp_path)
    )
    assert "predicts otherwise here" in str(transfer.load_home(job, tiny))


def test_installed_packages_go_by_their_names_and_a_students_folder_does_not(models):
    for name in ("models_of_mine", __name__.partition(".")[0], "conftest"):
        assert transfer._is_own(name)
    for name in ("normlab", "torch", "joblib", "numpy", "subprocess", "sys", "zipimport"):
        assert not transfer._is_own(name)


def test_an_error_comes_home_without_the_class_that_went_by_value():
    class Own(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    def fail(error):
        raise error

    error = transfer.attempt(fail, Own(1, 2))
    assert (type(error), str(error)) == (RuntimeError, "Own: 1 and 2")
    assert "in fail" in error.__notes__[0]
    error = transfer.attempt(fail, ValueError("as it is"))
    assert (type(error), str(error)) == (ValueError, "as it is")


TWO_PROCESSES = """
import joblib, torch, warnings, normlab as nl
from torch import nn
from normlab.runs import processes as parallel
warnings.simplefilter("error", UserWarning)
torch.set_num_threads(1)
joblib.cpu_count = lambda *_, **__: 2
data = nl.load_dataset("digits").subset(train=96, test=40)

def compare(build):
    variants = (nl.Variant("BN", "bn"), nl.Variant("LN", "ln"))
    own = nl.Assignment("own", "Own", "digits", variants, nl.Recipe(epochs=1), build=build)
    found = []
    for parallel.WORTHWHILE in (0, float("inf")):
        results = nl.run_assignment(own, data=data, device="cpu", progress=False)
        found.append([run.config["final_weights"] for (run,) in results.values()])
    assert found[0] == found[1]
    return found[0]
"""
OWN_CLASS = """
factor = 2.0
class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nl.make_norm(norm, 4), nn.ReLU())
        self.linear = nn.Linear(4, 10)
    def forward(self, x):
        return factor * self.linear(self.layers(x).mean((2, 3)))
"""


@pytest.mark.process
def test_a_class_of_a_script(tmp_path):
    (tmp_path / "script.py").write_text(TWO_PROCESSES + OWN_CLASS + "compare(Net)")
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Every content has a time of its own, by which IPython sees that the file is another one.
WRITE = """
import os, pathlib
def write(text, time):
    path = pathlib.Path("models_of_mine.py")
    path.write_text(text)
    os.utime(path, (time, time))
"""


@pytest.mark.process
def test_a_notebook_whose_classes_and_modules_are_edited(tmp_path):
    module = MODULE.replace("Linear(16, 4)", "Linear(16, 10)")
    compare = "compare(lambda norm: Net(norm) if norm == 'bn' else Edited(norm))"
    cells = [
        TWO_PROCESSES,
        OWN_CLASS,
        WRITE + f"write({module!r}, 10**9)\n%load_ext autoreload\n%autoreload 2",
        "from models_of_mine import Net as Edited",
        f"first = {compare}",
        OWN_CLASS.replace("nn.ReLU", "nn.ELU"),
        f"write({module.replace('0.2', '0.7')!r}, 2 * 10**9)",
        f"second = {compare}",
        "assert not {*first} & {*second}",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
