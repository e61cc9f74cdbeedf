"""Jobs on their way to other processes, with the networks that were built here.

What the session defined or changed goes by value, as it is in this process and with the globals
that it uses: a process that looked for it by its name might find something else, or nothing.
"""

import io
import itertools
import pickle
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import cloudpickle
import torch
from torch import nn

from normlab.data import Dataset
from normlab.engines.plain import step_options, training_batches
from normlab.recipes import make_optimizer
from normlab.runs.folder import RunFolder, remove_run
from normlab.runs.jobs import Job, Outcomes, predicts_what_is_kept
from normlab.runs.probe import are_apart
from normlab.support.checks import warn
from normlab.support.module_state import copied, evaluating
from normlab.support.seeding import seeded
from normlab.training import train_epoch

MOST_BYTES = 50_000_000  # of a job: a network whose class refers to all images has more
TRIAL_IMAGES = 8

# How far apart logits, loss and penalty of the same steps may be in two processes, relative to the
# largest number: they may have other numbers of threads or, in a cluster, other processors.
TRIAL_APART = (1e-4, 1e-3, 1e-3)

Sent = tuple[bytes, list]
"""A job that other processes can do, and what its first steps give here."""


class NotSendable(Exception):
    """Why a job is done in this process."""


def outcomes_of(
    jobs: Sequence[Job],
    data: Dataset,
    apart: Callable[[dict[Job, Sent]], Outcomes],
    here: Callable[[list[Job]], Outcomes],
) -> Outcomes:
    """Has other processes do the jobs that can be sent to them, and afterwards the rest done here.

    Args:
        apart: has other processes do jobs.
        here: does jobs in this process.
    """
    sent, left = pack_all(jobs, data)
    for job, outcome in apart(sent) if sent else ():
        reason = outcome if isinstance(outcome, NotSendable) else mismatch(job, data)
        if reason is None:
            yield job, outcome
        else:
            left[job] = reason
    if not left:
        return
    stay = [job for job in jobs if job in left]
    more = f" and {len(stay) - 1} more" if len(stay) > 1 else ""
    reason = left[stay[0]]
    warn(f"{stay[0].label}{more}: trained in this process, not beside it: {reason}")
    yield from here(stay)


def pack_all(jobs: Sequence[Job], data: Dataset) -> tuple[dict[Job, Sent], dict[Job, NotSendable]]:
    """The jobs that can be sent, as they are sent, and the others with the reason."""
    sent, left = {}, {}
    with _session_by_value():
        for job in jobs:
            try:
                sent[job] = _pack(job, data)
            except NotSendable as reason:
                left[job] = reason
    return sent, left


def _pack(job: Job, data: Dataset) -> Sent:
    job = job.prepared(data, torch.device("cpu"))
    if type(data) is not Dataset:  # another has only what a file keeps of it
        raise NotSendable(f"its images are in a {type(data).__name__}, not a plain Dataset")
    if name := _hooked(job.build()):
        raise NotSendable(f"a hook of its weight {name!r} cannot be sent to another")
    content = io.BytesIO()
    try:
        torch.save(job, content, pickle_module=cloudpickle, pickle_protocol=5)
        steps = _first_steps(job, data)
    except Exception as error:  # pickling calls a student's code, which may raise anything
        raise NotSendable(f"its network cannot be sent to another ({error})") from error
    if len(content.getvalue()) > MOST_BYTES:
        raise NotSendable(f"its network would be sent with {len(content.getvalue()):,} bytes")
    return content.getvalue(), steps


def _hooked(network: nn.Module) -> str:
    """The first weight at whose gradient a hook is called, which pickling leaves out silently."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    each = network.named_parameters()
    return next((name for name, w in each if any(getattr(w, hook, None) for hook in hooks)), "")


def unpack(sent: Sent, data: Dataset) -> Job:
    """The job, in the process that is to do it.

    Raises `NotSendable` if its training begins otherwise than where it comes from: because the
    session changed an installed package, say. Never to be called there, since loading
    a class by value would change the one that it comes from.
    """
    content, wanted = sent
    try:
        job = torch.load(io.BytesIO(content), weights_only=False)
        found = _first_steps(job, data)
    except Exception as error:  # as above
        raise NotSendable(f"another cannot compute with its network ({error})") from error
    if any(map(are_apart, found, wanted, TRIAL_APART)):
        raise NotSendable("another computes something else with its network")
    return job


def _first_steps(job: Job, data: Dataset) -> list[list[float]]:
    """Logits for a few images in evaluation mode; loss and penalty of two training steps.

    A copy of the network takes them at the full rate: the second loss tells of the optimiser. Of
    steps that diverge what is no number is 0.
    """
    network, recipe = copied(job.build()), job.recipe.replace(batch_size=TRIAL_IMAGES)
    batches = training_batches(data, recipe, torch.device("cpu"))
    options = step_options(recipe) | {"autocast": None}  # bfloat16 rounds too differently
    with seeded(recipe.seed, "trial"):
        images, _ = next(iter(batches))
        with torch.no_grad(), evaluating(network):
            logits = network(images).flatten().double()
        optimizer = make_optimizer(network, recipe)
        steps = train_epoch(network, itertools.islice(batches, 2), optimizer, **options)
    numbers = [logits, torch.tensor([steps.loss]), torch.tensor([steps.penalty])]
    return [torch.nan_to_num(each, 0, 0, 0).tolist() for each in numbers]


def attempt(task: Callable, sent: Sent) -> object:
    """What the task returns for what was sent, in a worker; or the error that it raises.

    One of a class that this process alone has, or that needs arguments of its own, is replaced.
    """
    try:
        return task(sent)
    except Exception as error:
        trace, outcome = "".join(traceback.format_exception(error)), error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            outcome = RuntimeError(f"{type(error).__name__}: {error}")
        outcome.add_note(f"in a worker:\n{trace}")
        return outcome


def mismatch(job: Job, data: Dataset) -> NotSendable | None:
    """Why a run that came home is not this process's, if so; its files are then removed.

    The network, with the weights that came, must predict what was stored beside them. A run that
    diverged has no weights.
    """
    if not RunFolder(job.directory).is_finished():
        return None
    network = job.prepared(data, torch.device("cpu")).build()
    try:
        if predicts_what_is_kept(RunFolder(job.directory).load(network), data):
            return None
    except RuntimeError:  # the weights do not fit
        pass
    remove_run(job.directory)
    return NotSendable("its network predicts otherwise here, with the weights that another found")


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
