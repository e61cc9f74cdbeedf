"""Runs side by side on a CPU: single-threaded processes, started through joblib.

For networks as small as these two processes of one thread each get through more images than one
process of two threads. A process tells of itself through its run's folder alone: the parent reads
the histories there for its display, and afterwards finds the runs finished.
"""

import functools
import tempfile
import threading
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

# Starting processes that import torch takes as long as some 10¹² multiply-adds on two cores: with
# less to do they do not repay it (measured: tests/benchmarks/RESULTS.md).
WORTHWHILE = 1e12

SECONDS_BETWEEN_LOOKS = 0.5


class Planned(Protocol):
    """A run to be done: a picklable object with these."""

    label: str
    directory: Path
    epochs: int


def whole_rounds(jobs: Sequence, multiply_adds: float) -> tuple[int, int]:
    """How many of the jobs to run side by side, and in how many processes.

    As many as fill all cores a whole number of times; the others, which would leave cores idle,
    take all threads one after another. Without enough to do it is none. That depends only on what
    there is to do, so that a resumed run has as many threads as before and ends bit for bit alike.
    """
    cores = joblib.cpu_count()
    if cores < 2 or multiply_adds < WORTHWHILE:
        return 0, 1
    workers = min(cores, len(jobs))
    return len(jobs) - len(jobs) % workers if workers > 1 else 0, workers


def side_by_side(
    train: Callable[[Planned, Dataset], object],
    jobs: Sequence[Planned],
    data: Dataset,
    *,
    workers: int,
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
            if not left:
                return
            try:
                with _Watch(left, show=progress):
                    pool = joblib.Parallel(n_jobs=workers, backend="loky")
                    pool(joblib.delayed(_train_alone)(train, job, file) for job in left)
                return
            except TerminatedWorkerError:
                continue
    names = [job.label for job in jobs if not RunFolder(job.directory).is_finished()]
    raise RuntimeError(
        f"processes were killed twice, for want of memory perhaps; not finished: {', '.join(names)}"
        "; the same call goes on from their last epochs"
    )


def _train_alone(train: Callable[[Planned, Dataset], object], job: Planned, file: Path) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parent repeats those that matter
        train(job, _open(file))


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
