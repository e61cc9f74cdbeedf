"""Trainings on their way to other processes, with the networks that were built here.

What the session defined or changed goes by value, as it is in this process and with the globals
that it uses: a process that looked for it by its name might find something else, or nothing.
"""

import copy
import io
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

import cloudpickle
import torch
from torch import Tensor, nn

from normlab.data import Dataset
from normlab.fitting import Job, agrees, identified, move
from normlab.recipes import DTYPES
from normlab.runs.folder import RunFolder, remove_run
from normlab.support.seeding import seeded

MOST_BYTES = 50_000_000  # of a parcel: a network whose class refers to all images has more
TRIAL_IMAGES = 8

# How far apart the same logits may be in two processes, relative to the largest one: they may have
# other numbers of threads or, in a cluster, other processors.
TRIAL_APART = 1e-4


class Planned(Protocol):
    """A run to be done."""

    label: str
    directory: Path
    epochs: int

    def job(self, data: Dataset) -> Job:
        """What is trained, its network built anew."""


class StaysHere(Exception):
    """Why a run is left to this process."""


@dataclass(frozen=True, eq=False)
class Parcel:
    """A run that other processes can do.

    Args:
        plan: what it is, for this process.
        sent: its `Job` as bytes, and what its network gives here for a few images.
    """

    plan: Planned
    sent: tuple[bytes, list] = field(repr=False)


def pack_all(
    plans: Sequence[Planned], data: Dataset
) -> tuple[list[Parcel], list[tuple[Planned, StaysHere]]]:
    """Parcels of those that can be sent, and the others with the reason."""
    parcels, here = [], []
    with _session_by_value():
        for plan in plans:
            try:
                parcels.append(Parcel(plan, _pack(plan.job(data), data)))
            except StaysHere as reason:
                here.append((plan, reason))
    return parcels, here


def _pack(job: Job, data: Dataset) -> tuple[bytes, list]:
    """What `unpack` makes the same job of in another process."""
    job = identified(job, data)
    if type(data) is not Dataset:  # another has only what a file keeps of it
        raise StaysHere(f"its images are in a {type(data).__name__}, not a plain Dataset")
    if name := _hooked(job.network):
        raise StaysHere(f"a hook of its weight {name!r} cannot be sent to another")
    content = io.BytesIO()
    try:
        torch.save(job, content, pickle_module=cloudpickle, pickle_protocol=5)
        logits = _trial(job, data).tolist()
    except Exception as error:  # pickling calls a student's code, which may raise anything
        raise StaysHere(f"its network cannot be sent to another ({error})") from error
    if len(content.getvalue()) > MOST_BYTES:
        raise StaysHere(f"its network would be sent with {len(content.getvalue()):,} bytes")
    return content.getvalue(), logits


def _hooked(network: nn.Module) -> str:
    """The first weight at whose gradient a hook is called, which pickling leaves out silently."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    each = network.named_parameters()
    return next((name for name, w in each if any(getattr(w, hook, None) for hook in hooks)), "")


def unpack(sent: tuple[bytes, list], data: Dataset) -> Job:
    """The job, in the process that is to do it.

    Raises `StaysHere` if the network computes something else than where it comes from: because
    the session changed an installed package, say. Never to be called there, since loading a class
    by value would change the one that it comes from.
    """
    content, logits = sent
    try:
        job = torch.load(io.BytesIO(content), weights_only=False)
        found, wanted = _trial(job, data), torch.tensor(logits, dtype=torch.float64)
        apart = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    except Exception as error:  # as above
        raise StaysHere(f"another cannot compute with its network ({error})") from error
    if not apart <= TRIAL_APART:  # as NaN is not
        raise StaysHere("another computes something else with its network")
    return job


def _trial(job: Job, data: Dataset) -> Tensor:
    """Logits for a few training images, in training and in evaluation mode: float64 (2, B, C)."""
    network = copy.deepcopy(job.network)
    loader = data.loader(batch_size=TRIAL_IMAGES, shuffle=False, dtype=DTYPES[job.recipe.dtype])
    images, _ = next(iter(loader))
    with torch.no_grad(), seeded(job.recipe.seed, "trial"):
        return torch.stack([network.train(mode)(images).double() for mode in (True, False)])


def mismatch(plan: Planned, data: Dataset) -> StaysHere | None:
    """Why a run that came home is not this process's, if so; its files are then removed.

    The plan's network, with the weights that came, must predict what was stored beside them. A run
    that diverged has no weights.
    """
    if not RunFolder(plan.directory).is_finished():
        return None
    job = plan.job(data)
    move(job.network, torch.device("cpu"), job.recipe)
    try:
        if agrees(RunFolder(plan.directory).load(job.network), data):
            return None
    except RuntimeError:  # the weights do not fit
        pass
    remove_run(plan.directory)
    return StaysHere("its network predicts otherwise here, with the weights that another found")


@contextmanager
def _session_by_value() -> Iterator[None]:
    """Inside the block classes and functions of the session's modules are pickled by value."""
    packages = {name.partition(".")[0] for name in sys.modules}
    packages = {name for name in packages if _may_differ_elsewhere(name)}
    known = cloudpickle.list_registry_pickle_by_value()
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in packages and name not in known
        if isinstance(module, ModuleType) and name == module.__name__
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _may_differ_elsewhere(name: str) -> bool:
    """Whether a package or module is none that is installed: it may be edited, or made by hand."""
    module = sys.modules.get(name)
    if name in ("normlab", "torch") or not isinstance(module, ModuleType):
        return False  # the former may lie anywhere, and are too much to send
    about = vars(module)
    place = about.get("__file__") or next(iter(about.get("__path__", ())), None)
    if place is None:  # Python's own have a specification
        return about.get("__spec__") is None
    folders = Path(place).resolve().parents
    return Path(sysconfig.get_path("stdlib")).resolve() not in folders and not any(
        folder.name in ("site-packages", "dist-packages") for folder in folders
    )
