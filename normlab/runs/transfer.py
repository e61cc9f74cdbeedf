"""Jobs on their way to other processes, with the networks that were built here.

What the session defined or changed goes by value, as it is in this process and with the globals
that it uses: a process that looked for it by its name might find something else, or nothing.
"""

import io
import itertools
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import cloudpickle
import torch

from normlab.data import Dataset
from normlab.engines.plain import step_options, training_batches
from normlab.history import Run
from normlab.recipes import make_optimizer
from normlab.runs.folder import remove_runs
from normlab.runs.identity import are_apart
from normlab.runs.jobs import Job, warn_if_at_chance
from normlab.support.checks import warn
from normlab.support.module_state import copied, evaluating, with_gradient_hooks
from normlab.support.seeding import seeded
from normlab.training import train_epoch

CPU = torch.device("cpu")
MOST_BYTES = 50_000_000  # of a job: a network whose class refers to all images has more
TRIAL_IMAGES = 8

# How far apart logits, loss and penalty of the same steps may be in two processes, relative to the
# largest number: they may have other numbers of threads or, in a cluster, other processors.
TRIAL_APART = (1e-4, 1e-3, 1e-3)

SECONDS_BETWEEN_LOOKS = 0.5

Ended = Iterator[tuple[Job, Exception | None]]
"""Jobs whose finished runs lie in their directories, or the errors that ended them."""


class NotSendable(Exception):
    """Why a job is done in this process."""


def train_apart(
    jobs: Sequence[Job], data: Dataset, workers: Callable[[dict[Job, bytes]], Ended]
) -> Generator[tuple[Job, Run | Exception], None, list[Job]]:
    """Has workers in other processes do jobs; yields each with its run, or with its error.

    Returns the jobs that must be done in this process, after a warning.
    """
    sent, stay = pack_all(jobs, data)
    for job, error in workers(sent) if sent else ():
        outcome = error or load_home(job, data)
        if isinstance(outcome, NotSendable):
            stay[job] = outcome
        else:
            yield job, outcome
    left = [job for job in jobs if job in stay]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        reason = stay[left[0]]
        warn(f"{left[0].label}{more}: trained in this process, not beside it: {reason}")
    return left


def pack_all(jobs: Sequence[Job], data: Dataset) -> tuple[dict[Job, bytes], dict[Job, NotSendable]]:
    """The jobs that can be sent, as they are sent, and the others with the reason."""
    sent, stay = {}, {}
    with _session_by_value():
        for job in jobs:
            try:
                sent[job] = _pack(job.prepared(data, CPU), data)
            except NotSendable as reason:
                stay[job] = reason
    return sent, stay


def _pack(job: Job, data: Dataset) -> bytes:
    if type(data) is not Dataset:  # another has only what a file keeps of it
        raise NotSendable(f"its images are in a {type(data).__name__}, not a plain Dataset")
    # Pickling leaves hooks of weights out silently.
    for name in with_gradient_hooks(job.build().named_parameters()):
        raise NotSendable(f"a hook of its weight {name!r} cannot be sent to another")
    content = io.BytesIO()
    try:
        sent = job, _first_steps(job, data)
        torch.save(sent, content, pickle_module=cloudpickle, pickle_protocol=5)
    except Exception as error:  # pickling calls a student's code, which may raise anything
        raise NotSendable(f"its network cannot be sent to another ({error})") from error
    if len(content.getvalue()) > MOST_BYTES:
        raise NotSendable(f"its network would be sent with {len(content.getvalue()):,} bytes")
    return content.getvalue()


def unpack(sent: bytes, data: Dataset) -> Job:
    """The job, in the process that is to do it.

    Raises `NotSendable` if its training begins otherwise than where it comes from: because the
    session changed an installed package, say. Never to be called there, since loading a class by
    value would change the one that it comes from.
    """
    try:
        job, wanted = torch.load(io.BytesIO(sent), weights_only=False)
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
    network = copied(job.build())
    recipe = job.recipe.replace(batch_size=TRIAL_IMAGES, schedule="constant")
    batches, options = training_batches(data, recipe, CPU), step_options(recipe)
    options["autocast"] = None  # bfloat16 would round too differently
    with seeded(recipe.seed, "trial"):
        images, _ = next(iter(batches))
        with torch.no_grad(), evaluating(network):
            logits = network(images).flatten().double()
        optimizer = make_optimizer(network, recipe)
        steps = train_epoch(network, itertools.islice(batches, 2), optimizer, **options)
    numbers = [logits, torch.tensor([steps.loss]), torch.tensor([steps.penalty])]
    return [torch.nan_to_num(each, 0, 0, 0).tolist() for each in numbers]


def attempt(task: Callable[[bytes], object], sent: bytes) -> object:
    """What the task returns for what was sent, in a worker, or the error that it raises.

    One of a class that this process alone has, or that needs arguments of its own, is replaced.
    """
    try:
        return task(sent)
    except Exception as error:
        outcome = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            outcome = RuntimeError(f"{type(error).__name__}: {error}")
        outcome.add_note(f"in a worker:\n{''.join(traceback.format_exception(error))}")
        return outcome


def as_they_end(
    futures: dict[Future, Job], look: Callable[[], None]
) -> Iterator[tuple[Job, Future]]:
    """Jobs with their futures, once these are done; calls `look` twice a second."""
    while futures:
        done, _ = wait(futures, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
        look()
        for future in done:
            yield futures.pop(future), future


def load_home(job: Job, data: Dataset) -> Run | NotSendable:
    """The run that another process has finished; removes it if it is none of this one's."""
    try:
        run = job.find(data, CPU)
    except (RuntimeError, ValueError):  # its weights do not fit, or predict otherwise
        run = None
    if run is None:
        remove_runs(job.directory)
        return NotSendable("its network predicts otherwise here, with the weights another found")
    warn_if_at_chance(job, run.history, data)  # other processes are silent
    return run


@contextmanager
def quiet() -> Iterator[None]:
    """In a worker: one thread, for good, and in the block no warnings, which had no order."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _session_by_value() -> Iterator[None]:
    """Inside the block classes and functions of the session's modules are pickled by value."""
    known = cloudpickle.list_registry_pickle_by_value()
    own = set(filter(_is_own, {name.partition(".")[0] for name in sys.modules}))
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in own and name not in known
        if isinstance(module, ModuleType) and name == module.__name__
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _is_own(package: str) -> bool:
    """Whether a package is none that is installed: it may be edited, or made by hand."""
    module = sys.modules.get(package)
    if package in ("normlab", "torch") or package in sys.stdlib_module_names:
        return False  # the first two may lie anywhere, and are too much to send
    if not isinstance(module, ModuleType):
        return False
    about = vars(module)
    place = about.get("__file__") or next(iter(about.get("__path__", ())), None)
    if place is None:
        return about.get("__spec__") is None
    return not {"site-packages", "dist-packages"} & {*Path(place).resolve().parts}
