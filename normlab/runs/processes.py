"""Runs side by side on a CPU: single-threaded processes, started through joblib.

For networks as small as these two processes of one thread each get through more images than one
process of two threads. A process tells of itself through its run's folder alone: the parent reads
the histories there for its display, and afterwards finds the runs finished.
"""

import functools
import os
import pickle
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from normlab.data import Dataset
from normlab.fitting import Job
from normlab.runs.folder import RunFolder
from normlab.runs.transfer import Parcel, Planned, StaysHere, mismatch, pack_all, unpack
from normlab.support.checks import warn
from normlab.support.locks import scratch_folder
from normlab.support.progress import Progress

# Starting processes that import torch takes as long as some 3·10¹¹ multiply-adds on two cores: with
# less to do they do not repay it (measured: tests/benchmarks/RESULTS.md).
WORTHWHILE = 3e11

SECONDS_BETWEEN_LOOKS = 0.5


Train = Callable[[Job, Dataset], object]
Outcomes = Iterator[tuple[Parcel, object]]  # what was returned, or the error that was raised
AfterEach = Callable[[Planned, object], None]


def nothing_more(plan: Planned, result: object) -> None:
    """What there is to do after a run if nobody waits for it."""


def is_worthwhile(jobs: Sequence, multiply_adds: float) -> bool:
    """Whether so many jobs with so much to do in all end sooner side by side.

    That depends only on what there is to do, not on what of it is done: a resumed run has as many
    threads as before, and ends bit for bit alike.
    """
    return min(len(jobs), joblib.cpu_count()) > 1 and multiply_adds >= WORTHWHILE


def rounds(jobs: Sequence) -> list[tuple[Sequence, int]]:
    """The jobs in portions that keep all cores busy to the end, each with its processes.

    As many processes as cores; where the jobs do not divide evenly, the last ones share the cores
    among a few processes more, rather than one job having them to itself at the end.
    """
    cores = joblib.cpu_count()
    odd = len(jobs) % cores
    last = min(len(jobs), cores + odd if odd else 0)
    first = len(jobs) - last
    return [(some, n) for some, n in ((jobs[:first], cores), (jobs[first:], last)) if some]


def side_by_side(
    train: Train,
    plans: Sequence[Planned],
    data: Dataset,
    *,
    progress: bool = True,
    after_each: AfterEach = nothing_more,
    keep_going: bool = True,
    train_here: Train | None = None,
) -> None:
    """Calls `train(job, data)`, which fills the job's folder, in processes of one thread each.

    They are started for this call, and end with this process. The rest is as for `train_all`.
    """
    apart = functools.partial(_in_processes, train, data, progress)
    here = train_here or train
    train_all(apart, here, plans, data, after_each, keep_going=keep_going)


def train_all(
    apart: Callable[[Sequence[Parcel]], Outcomes],
    train_here: Train,
    plans: Sequence[Planned],
    data: Dataset,
    after_each: AfterEach,
    *,
    keep_going: bool = True,
) -> None:
    """Has other processes train what can be sent to them, and trains the rest here afterwards.

    Raises the first error of a plan once the others are done, or at once without `keep_going`.

    Args:
        apart: has other processes train the jobs of parcels.
        train_here: does the same in this process.
        after_each: called here with a plan and what its training returned.
    """
    left, errors = len(plans), []
    with closing(_outcomes(apart, train_here, plans, data)) as outcomes:
        for plan, outcome in outcomes:
            left -= 1
            if not isinstance(outcome, Exception):
                after_each(plan, outcome)
            elif keep_going:
                errors.append(outcome)
                warn_others_go_on(outcome, left > 0)
            else:
                raise outcome
    if errors:
        raise errors[0]


def _outcomes(
    apart: Callable[[Sequence[Parcel]], Outcomes],
    train_here: Train,
    plans: Sequence[Planned],
    data: Dataset,
) -> Iterator[tuple[Planned, object]]:
    """What became of each plan, as soon as it is known."""
    parcels, here = pack_all(plans, data)
    for parcel, outcome in apart(parcels) if parcels else ():
        reason = outcome if isinstance(outcome, StaysHere) else mismatch(parcel.plan, data)
        if reason is None:
            yield parcel.plan, outcome
        else:
            here.append((parcel.plan, reason))
    if here:
        plan, reason = here[0]
        more = f" and {len(here) - 1} more" if len(here) > 1 else ""
        warn(f"{plan.label}{more}: trained in this process, not beside it: {reason}")
    for plan, _ in here:
        yield plan, _caught(train_here, plan.job(data), data)


def _caught(task: Callable, *arguments: object) -> object:
    """What the task returns, or the error that it raises."""
    try:
        return task(*arguments)
    except Exception as error:
        return error


def _in_processes(
    train: Train, data: Dataset, progress: bool, parcels: Sequence[Parcel]
) -> Outcomes:
    """The images are in one file that all processes map.

    When a process is killed, joblib ends them all: the runs that were under way are then taken up
    from their checkpoints, one after another, so that one whose process is killed again takes no
    other with it, and the rest goes on as ever.
    """
    left = list(parcels)
    with scratch_folder() as folder, _Watch([each.plan for each in parcels], show=progress):
        file = folder / "data.safetensors"
        data.save(file)
        work = functools.partial(_portion, functools.partial(_train_alone, train, file), file, left)
        while left:
            for parcel in (yield from work(*rounds(tuple(left))[0])):
                if (yield from work([parcel], 1)):
                    left.remove(parcel)
                    yield parcel, _killed(parcel.plan.label)


def _portion(
    task: Callable, file: Path, left: list[Parcel], parcels: Sequence[Parcel], workers: int
) -> Iterator[tuple[Parcel, object]]:
    """Does the parcels in so many processes, and takes those that are done from `left`.

    Returns those under way when a process was killed, which ends all: they are begun in their
    order, so that these are the first of those that are left.
    """
    # For a single process joblib would take this one, and change it. It takes the processes of an
    # earlier call only for the same arguments, and none of those was called with this file.
    pool = {"n_jobs": max(workers, 2), "backend": "loky"}
    pool |= {"initializer": _end_with_parent, "initargs": (os.getpid(), file)}
    pool["temp_folder"] = str(file.parent)  # else joblib leaves its own in /dev/shm when killed
    try:
        for parcel, outcome in run_tasks(task, parcels, **pool):
            left.remove(parcel)
            yield parcel, outcome
    except WorkersLost:
        return [parcel for parcel in parcels if parcel in left][:workers]
    return []


def _killed(label: str) -> RuntimeError:
    return RuntimeError(
        f"the process that trained {label} was killed, and again when no other ran, for want of "
        "memory perhaps; the same call goes on from the last finished epoch"
    )


def warn_others_go_on(error: Exception, others: bool) -> None:
    """Warns of an error that will be raised when the others are done, if there are others."""
    if others:
        warn(f"{error}; the others go on")


def run_tasks(
    task: Callable[[tuple], tuple[object, dict[str, bytes]]],
    parcels: Sequence[Parcel],
    **pool: object,
) -> Outcomes:
    """Has joblib's workers do the task for what is sent of every parcel.

    Yields each parcel as it is finished, with a result, once its files are in the run's folder; or
    with the error that the task raised.

    Args:
        task: returns the result, and the files of the run's folder if they must be brought here.
        pool: for `joblib.Parallel`.

    Raises `WorkersLost` if not all tasks came to an end.
    """
    parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, **pool)
    tasks = (joblib.delayed(_numbered)(number, task, p.sent) for number, p in enumerate(parcels))
    waited_for = set(range(len(parcels)))
    with warnings.catch_warnings(), closing(parallel(tasks)) as finished:
        # After an error it would count the tasks that nobody waits for any more.
        warnings.filterwarnings("ignore", message=".*tasks.*", module="joblib")
        try:
            for number, outcome in finished:
                waited_for.remove(number)
                if not isinstance(outcome, Exception):
                    outcome, files = outcome
                    RunFolder(parcels[number].plan.directory).receive(files)
                yield parcels[number], outcome
        except TerminatedWorkerError as error:
            raise WorkersLost from error
    if waited_for:  # joblib at times ends without the error that ended it
        raise WorkersLost


class WorkersLost(RuntimeError):
    """Processes ended in the middle of their work."""


def _numbered(number: int, task: Callable, sent: tuple) -> tuple:
    """An error comes home as a result: joblib, given one, may lose it."""
    outcome = _caught(task, sent)
    if isinstance(outcome, Exception):
        trace = "".join(traceback.format_exception(outcome))
        try:
            pickle.loads(pickle.dumps(outcome))
        except Exception:  # of a class that came by value, or with arguments of its own
            outcome = RuntimeError(f"{type(outcome).__name__}: {outcome}")
        outcome.add_note(f"in a worker:\n{trace}")
    return number, outcome


def _train_alone(train: Train, file: Path, sent: tuple) -> tuple[object, dict]:
    with quiet():
        data = _open(file)
        return train(unpack(sent, data), data), {}


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, for good, and inside the block no warnings, which would appear in no order."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _end_with_parent(parent: int, _: Path) -> None:
    """Ends this process when its parent is killed: whoever resumes the run must be alone in it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _open(file: Path) -> Dataset:
    return Dataset.open(file)


class _Watch:
    """Shows the histories of several runs as they grow."""

    def __init__(self, plans: Sequence[Planned], *, show: bool) -> None:
        self._stop = threading.Event()
        self._stack = ExitStack()
        self._shown: list[tuple[RunFolder, Progress]] = []
        for plan in plans:
            bar = self._stack.enter_context(Progress(plan.label, plan.epochs, 1, show=show))
            self._shown.append((RunFolder(plan.directory), bar))
            bar.start_at(len(RunFolder(plan.directory).history_so_far()))
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._stack.close()

    def _watch(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        for folder, bar in self._shown:
            for row in folder.history_so_far()[bar.done :]:
                bar.step()
                bar.finish_epoch(row)
