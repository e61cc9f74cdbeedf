"""Runs side by side on a CPU: single-threaded processes, started through joblib.

For networks as small as these two processes of one thread each get through more images than one
process of two threads. A process tells of itself through its run's folder alone: the parent reads
the histories there for its display, and afterwards finds the runs finished.
"""

import functools
import os
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from normlab.checks import warn
from normlab.data import Dataset
from normlab.progress import Progress, make_progress
from normlab.runs import RunFolder

# Starting processes that import torch takes as long as some 3·10¹¹ multiply-adds on two cores: with
# less to do they do not repay it (measured: tests/benchmarks/RESULTS.md).
WORTHWHILE = 3e11

SECONDS_BETWEEN_LOOKS = 0.5


class Planned(Protocol):
    """A run to be done: a picklable object with these."""

    label: str
    directory: Path
    epochs: int


AfterEach = Callable[[Planned, object], None]


def nothing_more(job: Planned, result: object) -> None:
    """What there is to do after a job if nobody waits for it."""


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
    train: Callable[[Planned, Dataset], object],
    jobs: Sequence[Planned],
    data: Dataset,
    *,
    progress: bool = True,
    after_each: AfterEach = nothing_more,
    to_the_end: bool = True,
) -> None:
    """Calls `train(job, data)`, which fills the job's folder, in processes of one thread each.

    The images are in one file that all processes map. When a process is killed, joblib ends them
    all: the jobs that were under way are then taken up from their checkpoints, one after another,
    so that one whose process is killed again takes no other with it, and the rest goes on as ever.

    Raises the first error of a job once the others are done, or at once without `to_the_end`, and
    `RuntimeError` that names the jobs whose processes were killed again.
    """
    left, errors, killed = list(jobs), [], []

    def done(job: Planned, outcome: object) -> None:
        left.remove(job)
        if not isinstance(outcome, Exception):
            after_each(job, outcome)
        elif to_the_end:
            errors.append(outcome)
            say_others_go_on(outcome, bool(left))
        else:
            raise outcome

    with tempfile.TemporaryDirectory(prefix="normlab-") as folder, _Watch(left, show=progress):
        file = Path(folder) / "data.safetensors"
        data.save(file)
        task = functools.partial(_train_alone, train, file)
        while left:
            for job in _interrupted(task, *rounds(tuple(left))[0], done, left):
                if _interrupted(task, [job], 1, done, left):
                    left.remove(job)
                    killed.append(job.label)
    if killed:
        errors.append(_killed(killed))
    if errors:
        raise errors[0]


def _interrupted(
    task: Callable, jobs: Sequence[Planned], workers: int, done: AfterEach, left: Sequence[Planned]
) -> Sequence[Planned]:
    """Does the jobs in so many processes; those under way when one was killed, which ends all.

    Jobs are begun in their order, so that these are the first of those that are left.
    """
    try:
        # For a single process joblib would take this one, and change it.
        work_off(task, jobs, done, n_jobs=max(workers, 2), backend="loky")
    except WorkersLost:
        return [job for job in jobs if job in left][:workers]
    return []


def _killed(labels: Sequence[str]) -> RuntimeError:
    return RuntimeError(
        f"the process that trained {', and that of '.join(labels)} was killed, and again when no "
        "other ran, for want of memory perhaps; the same call goes on from the last finished epoch"
    )


def say_others_go_on(error: Exception, others: bool) -> None:
    """Warns of an error that will be raised when the others are done, if there are others."""
    if others:
        warn(f"{error}; the others go on")


def work_off(
    task: Callable[[Planned], tuple[object, dict[str, bytes]]],
    jobs: Sequence[Planned],
    done: AfterEach,
    **pool: object,
) -> None:
    """Has joblib's workers do the task for every job, and hears of each as it is finished.

    Args:
        task: returns a result, and the files of the job's folder if they must be brought here.
        done: called here with the job and that result, once its files are in its folder; or with
            the error that the task raised.
        pool: for `joblib.Parallel`.

    Raises `WorkersLost` if not all tasks came to an end.
    """
    parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, **pool)
    tasks = (joblib.delayed(_numbered)(number, task, job) for number, job in enumerate(jobs))
    waited_for = set(range(len(jobs)))
    with warnings.catch_warnings(), closing(parallel(tasks)) as finished:
        # After an error it would count the tasks that nobody waits for any more.
        warnings.filterwarnings("ignore", message=".*tasks.*", module="joblib")
        try:
            for number, outcome in finished:
                waited_for.remove(number)
                if isinstance(outcome, Exception):
                    done(jobs[number], outcome)
                    continue
                result, files = outcome
                RunFolder(jobs[number].directory).receive(files)
                done(jobs[number], result)
        except TerminatedWorkerError as error:
            raise WorkersLost from error
    if waited_for:  # joblib at times ends without the error that ended it
        raise WorkersLost


class WorkersLost(RuntimeError):
    """Processes ended in the middle of their work."""


def _numbered(number: int, task: Callable, job: Planned) -> tuple:
    """An error comes home as a result: joblib, given one, may lose it."""
    try:
        return number, task(job)
    except Exception as error:
        error.add_note(f"in a worker:\n{traceback.format_exc()}")
        return number, error


def _train_alone(
    train: Callable[[Planned, Dataset], object], file: Path, job: Planned
) -> tuple[object, dict]:
    _end_with_parent()
    return train_quietly(train, job, _open(file)), {}


def train_quietly(
    train: Callable[[Planned, Dataset], object], job: Planned, data: Dataset
) -> object:
    """`train(job, data)` in one thread, without warnings, which would appear in no order."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(job, data)


@functools.cache
def _end_with_parent() -> None:
    """Ends this process when its parent is killed: whoever resumes the run must be alone in it."""
    parent = os.getppid()

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

    def __init__(self, jobs: Sequence[Planned], *, show: bool) -> None:
        self._stop = threading.Event()
        self._stack = ExitStack()
        self._shown: list[tuple[RunFolder, Progress]] = []
        for job in jobs:
            bar = self._stack.enter_context(make_progress(job.label, job.epochs, 1, show=show))
            self._shown.append((RunFolder(job.directory), bar))
            bar.start_at(len(RunFolder(job.directory).history_so_far()))
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
                bar.done += 1
                bar.step()
                bar.finish_epoch(row)
