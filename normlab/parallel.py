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
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

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
) -> None:
    """Calls `train(job, data)`, which fills the job's folder, in processes of one thread each.

    The images are in one file that all processes map. When a process is killed, joblib ends them
    all: the unfinished jobs are then started once more, from their checkpoints.

    Raises `RuntimeError` that names the unfinished runs if a process is killed again.
    """
    with tempfile.TemporaryDirectory(prefix="normlab-") as folder:
        file = Path(folder) / "data.safetensors"
        data.save(file)
        for _ in range(2):
            left = [job for job in jobs if not RunFolder(job.directory).is_finished()]
            try:
                with _Watch(left, show=progress):
                    for some, workers in rounds(left):
                        # For a single process joblib would take this one, and change it.
                        pool = joblib.Parallel(n_jobs=max(workers, 2), backend="loky")
                        pool(joblib.delayed(_train_alone)(train, job, file) for job in some)
                return
            except TerminatedWorkerError:
                continue
    names = [job.label for job in jobs if not RunFolder(job.directory).is_finished()]
    raise RuntimeError(
        f"processes were killed twice, for want of memory perhaps; not finished: {', '.join(names)}"
        "; the same call goes on from their last epochs"
    )


def _train_alone(train: Callable[[Planned, Dataset], object], job: Planned, file: Path) -> None:
    _end_with_parent()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parent repeats those that matter
        train(job, _open(file))


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
