"""One process of the trainings in `test_replicas.py`, which starts several of them.

RANK=0 WORLD_SIZE=2 … python tests/replicas_worker.py TASK OUT
"""

import functools
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import normlab as nl
import normlab.replicas
from normlab.replicas import Replicas, replicas
from normlab.synchronized import synchronized_batch_norm

RECIPE = nl.Recipe(
    epochs=2, batch_size=32, lr=0.05, dtype="float64", augment=("shift:1", "rotate:5")
)
MUON = {"optimizer": "muon", "weight_decay": 0.01, "centred": True}  # as the assignments train
WISHES = {
    "gn": {"norm": "gn", "recipe": {"l1": 1e-4}},
    "ln": {"norm": "ln"},
    "bn": {"norm": "bn"},
    "bn, synchronized": {"norm": "bn", "sync": True},
    "bn of one dimension, synchronized": {"build": lambda: vectors(), "sync": True},
    "gn, channel dropout": {"norm": "gn", "network": "mnist-eva6", "dropout": 0.1},
    "bn, synchronized, muon": {"norm": "bn", "recipe": MUON, "sync": True, "images": 93},
}


@functools.cache
def few_digits(images: int = 69) -> nl.Dataset:
    """Images whose number no count of processes divides.

    The last batch of 32 has 5; of 93 images it has 29, as of all the digits.
    """
    return nl.load_dataset("digits").subset(train=images, test=41)


def vectors() -> nn.Module:
    """A network whose batch normalization is of vectors, not of images."""
    torch.manual_seed(0)
    layers = (nn.Linear(784, 16), nn.BatchNorm1d(16, momentum=None), nn.ReLU(), nn.Linear(16, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def build(wish: dict) -> nn.Module:
    if "build" in wish:
        return wish["build"]()
    name, dropout = wish.get("network", "mnist-l1"), wish.get("dropout", 0.05)
    return nl.build_network(name, wish["norm"], dropout=dropout, seed=0)


def trained(name: str, directory: Path | None = None, **changes) -> nl.Run:
    """The run of one of the `WISHES`, in as many processes as there are."""
    wish = WISHES[name]
    recipe = RECIPE.replace(**wish.get("recipe", {}), **changes)
    data = few_digits(wish.get("images", 69))
    options = {"device": "cpu", "progress": False, "directory": directory}
    return nl.fit(build(wish), data, recipe, **options)


def histories(out: Path) -> None:
    """Trains all wishes; the first process keeps what came of them."""
    for name, wish in WISHES.items():
        _next_port()
        with nl.data_parallel(sync_batch_norm=wish.get("sync", False), device="cpu") as here:
            run = trained(name)
            if here.is_first:
                folder = out / name
                folder.mkdir(parents=True)
                weights = {k: v.clone() for k, v in run.network.state_dict().items()}
                save_file(weights, folder / "weights.safetensors")
                config = {"is": run.config["is"], "from": run.config["from"]}
                (folder / "run.json").write_text(json.dumps(config | {"history": run.history}))


def _next_port() -> None:
    """For the next group, which cannot have the port of the one before at once."""
    os.environ["MASTER_PORT"], _, os.environ["PORTS"] = os.environ["PORTS"].partition(" ")


def batch_norm(out: Path) -> None:
    """This process's rows of OUT/whole.safetensors through a synchronized layer, and back."""
    whole = load_file(out / "whole.safetensors")
    with nl.data_parallel(device="cpu") as here:
        bounds = [0, 1, 7] if here.count == 2 else [0, 2, 2, 7]  # uneven, the second one empty
        rows = slice(bounds[here.rank], bounds[here.rank + 1])
        layer = nn.BatchNorm2d(3, dtype=torch.float64)
        layer.load_state_dict({k[6:]: v for k, v in whole.items() if k.startswith("layer.")})
        x = whole["x"][rows].clone().requires_grad_()
        with _counted() as exchanged:
            y = synchronized_batch_norm(layer, x)
            (y * whole["factor"][rows]).sum().backward()
        for weight in layer.parameters():
            dist.all_reduce(weight.grad)
        found = {"y": y.detach(), "x.grad": x.grad}
        found |= {f"{k}.grad": v.grad for k, v in layer.named_parameters()}
        found["exchanged"] = torch.tensor(exchanged)
        save_file(found | dict(layer.state_dict()), out / f"{here.count}-{here.rank}.safetensors")


@contextmanager
def _counted() -> Iterator[list[int]]:
    """How many numbers each sum over the processes takes from this one."""
    counts, all_reduce = [], dist.all_reduce

    def counted(x: torch.Tensor) -> None:
        counts.append(x.numel())
        all_reduce(x)

    dist.all_reduce = counted
    yield counts
    dist.all_reduce = all_reduce


def dies(out: Path) -> None:
    """The last process is killed in the second epoch."""
    with nl.data_parallel(device="cpu"):
        if replicas().rank == 1:
            _signal_in_epoch(2, signal.SIGKILL)
        trained("gn", out / "run", epochs=3)


def hangs(out: Path) -> None:
    """The last process stands still in the second epoch; the others wait three seconds for it."""
    normlab.replicas.PATIENCE = timedelta(seconds=3)
    with nl.data_parallel(device="cpu"):
        if replicas().rank == 1:
            _signal_in_epoch(2, signal.SIGSTOP)
        trained("gn", out / "run", epochs=3)


def _signal_in_epoch(number: int, what: signal.Signals) -> None:
    from normlab.replica_engine import ReplicaEngine

    launch = ReplicaEngine.launch

    def signalled(engine, epoch: int) -> None:
        if epoch + 1 == number:
            os.kill(os.getpid(), what)
        launch(engine, epoch)

    ReplicaEngine.launch = signalled


def resumes(out: Path) -> None:
    """Goes on with what `dies` left."""
    with nl.data_parallel(device="cpu"):
        run = trained("gn", out / "run", epochs=3)
    saying = {"history": run.history, "threads": _threads_of_gloo()}
    (out / f"resumed-{os.environ['RANK']}.json").write_text(json.dumps(saying))


def _threads_of_gloo() -> list[str]:
    """The names of this process's threads that carry messages; those outside Python have names."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def refused(out: Path) -> None:
    """What cannot be trained together, and what is said of it."""
    said = {}
    for task in (too_many, disagree, idle):
        _next_port()
        try:
            with nl.data_parallel(device="cpu") as here:
                task(here.rank)
        except ValueError as error:
            said[task.__name__] = str(error)
    (out / f"refused-{os.environ['RANK']}.json").write_text(json.dumps(said))


def too_many(rank: int) -> None:
    """A batch with fewer images than there are processes."""
    trained("gn", batch_size=17)  # 69 images: the last batch has one


def disagree(rank: int) -> None:
    """The second process has other images and another number of epochs."""
    data = few_digits()
    if rank == 1:
        data = replace(data, train_images=255 - data.train_images)
    recipe = RECIPE.replace(epochs=2 + rank)
    nl.fit(build(WISHES["gn"]), data, recipe, device="cpu", progress=False)


def idle(rank: int) -> None:
    """A network with a layer that its output does not depend on."""
    network = vectors()
    network[0].unused = nn.Linear(3, 3)
    nl.fit(network, few_digits(), RECIPE, device="cpu", progress=False)


def told(out: Path) -> None:
    """What the first process makes, and an error in it, reach the others."""
    from normlab.replicas import first_before_others, from_first

    calls = []
    with nl.data_parallel(device="cpu") as here:
        value = from_first(lambda: calls.append(1) or {"rank": here.rank})
        first_before_others(lambda: calls.append(2))
        try:
            from_first(lambda: 1 / 0)
        except ZeroDivisionError as error:
            calls.append(str(error))
        saying = {"here": asdict(here), "value": value, "calls": calls}
    (out / f"told-{here.rank}.json").write_text(json.dumps(saying))
    assert replicas() == Replicas()


if __name__ == "__main__":
    torch.set_num_threads(1)
    TASKS = (histories, batch_norm, dies, hangs, resumes, refused, told)
    {task.__name__: task for task in TASKS}[sys.argv[1]](Path(sys.argv[2]))
