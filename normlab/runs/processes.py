"""Jobs side by side on a CPU, in processes of one thread each.

For networks as small as these two processes of one thread each get through more images than one
process of two threads. A process tells of itself through its run's folder alone: the parent reads
the histories there for its display, and afterwards finds the runs finished.
"""

import functools
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import joblib
import torch
from joblib.externals.loky import ProcessPoolExecutor, as_completed
from joblib.externals.loky.process_executor import BrokenProcessPool
from tqdm import tqdm

from normlab.data import Dataset
from normlab.runs.folder import RunFolder
from normlab.runs.jobs import Job, Outcomes
from normlab.runs.trainer import fit_each, fit_job, warn_if_at_chance
from normlab.runs.transfer import Sent, attempt, outcomes_of, unpack
from normlab.support.locks import scratch_folder
from normlab.support.progress import Progress
from normlab.support.summaries import multiply_adds

# Starting processes that import torch takes as long as some 3·10¹¹ multiply-adds on two cores: with
# less to do they do not repay it (measured: tests/benchmarks/RESULTS.md).
WORTHWHILE = 3e11

SECONDS_BETWEEN_LOOKS = 0.5

Train = Callable[[Job, Dataset], object]
"""Does a job in this process and leaves the run in its directory."""


def are_worthwhile(jobs: Sequence[Job], data: Dataset) -> bool:
    """Whether these jobs end sooner side by side.

    To be asked about all that there is to do, not about what of it is left: so a resumed run has
    as many threads as before, and ends bit for bit alike.
    """
    if min(len(jobs), joblib.cpu_count()) < 2:
        return False
    images = sum(job.recipe.epochs for job in jobs) * len(data.train_images)
    return 3 * multiply_adds(jobs[0].build(), data.input_shape) * images >= WORTHWHILE


def in_processes(
    train: Train, data: Dataset, sent: dict[Job, Sent], *, progress: bool = True
) -> Outcomes:
    """Calls `train(job, data)` in processes of one thread each, which end with this one.

    The images are in one file that all processes map. When a process is killed, the pool ends the
    others: the jobs that were under way are then taken up from their checkpoints, one after
    another, so that one whose process is killed again takes no other with it.
    """
    left = dict(sent)
    with scratch_folder() as folder, _Watch(sent, show=progress):
        file = folder / "data.safetensors"
        data.save(file)
        task = functools.partial(_train_alone, train, file)
        while left:
            for job in (yield from _in_pool(task, left, *first_portion(list(left)))):
                if (yield from _in_pool(task, left, [job], 1)):
                    del left[job]
                    yield job, _killed(job.label)


def first_portion(jobs: Sequence) -> tuple[Sequence, int]:
    """The jobs to begin with such that all cores are busy to the end, and their processes.

    As many processes as cores; where the jobs do not divide evenly, the last ones share the cores
    among a few processes more, rather than one job having them to itself at the end.
    """
    cores = joblib.cpu_count()
    odd = len(jobs) % cores
    last = min(len(jobs), cores + odd if odd else 0)
    return (jobs[:-last], cores) if last < len(jobs) and last else (jobs, last or cores)


def _in_pool(
    task: Callable, left: dict[Job, Sent], jobs: Sequence[Job], workers: int
) -> Generator[tuple[Job, object], None, list[Job]]:
    """Does the jobs in so many processes, and takes those that are done from `left`.

    Returns those under way when a process was killed, which ends all: they are begun in their
    order, so that these are the first of those that are left.
    """
    options = {"initializer": _begin, "initargs": (os.getpid(),)}
    pool = ProcessPoolExecutor(workers, env={"OMP_NUM_THREADS": "1"}, **options)
    try:
        futures = {pool.submit(attempt, task, left[job]): job for job in jobs}
        for future in as_completed(futures):
            outcome = future.result()
            del left[futures[future]]
            yield futures[future], outcome
    except BrokenProcessPool:
        return [job for job in jobs if job in left][:workers]
    finally:
        pool.shutdown(kill_workers=any(job in left for job in jobs))
    return []


def _killed(label: str) -> RuntimeError:
    return RuntimeError(
        f"the process that trained {label} was killed, and again when no other ran, for want of "
        "memory perhaps; the same call goes on from the last finished epoch"
    )


# --- in the processes -------------------------------------------------------------------------


def _begin(parent: int) -> None:
    """Has this process end when its parent is killed: who resumes the run must be alone in it."""
    tqdm.set_lock(threading.RLock())  # its own one would be left behind by a kill

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train_alone(train: Train, file: Path, sent: Sent) -> object:
    with quiet():
        data = _open(file)
        return train(unpack(sent, data), data)


@functools.lru_cache(maxsize=1)
def _open(file: Path) -> Dataset:
    return Dataset.open(file)


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, for good, and inside the block no warnings, which would appear in no order."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- in the parent ----------------------------------------------------------------------------


class _Watch:
    """Shows the histories of several runs as they grow."""

    def __init__(self, jobs: Iterable[Job], *, show: bool) -> None:
        self._stop = threading.Event()
        self._stack = ExitStack()
        self._shown: list[tuple[RunFolder, Progress]] = []
        for job in jobs:
            shown = Progress(job.label, job.recipe.epochs, 1, show=show)
            folder, bar = RunFolder(job.directory), self._stack.enter_context(shown)
            self._shown.append((folder, bar))
            bar.start_at(len(folder.history_so_far()))
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


def train(
    left: list[Job],
    jobs: list[Job],
    data: Dataset,
    *,
    device: torch.device,
    progress: bool = True,
    engine: str = "auto",
) -> Outcomes:
    """Does the jobs that are left, in processes side by side if all jobs together are worth it."""
    here = functools.partial(fit_each, data=data, device=device, progress=progress, engine=engine)
    if device.type != "cpu" or engine != "auto" or not left or not are_worthwhile(jobs, data):
        return here(left)
    apart = functools.partial(
        in_processes, functools.partial(fit_job, device="cpu"), data, progress=progress
    )
    return outcomes_of(left, data, apart, here)


def warn_after(data: Dataset, job: Job, run: object) -> None:
    """Says here what a process that trains beside others keeps to itself."""
    if run is None:
        history = RunFolder(job.directory).history_so_far()
        warn_if_at_chance(job.label, history, job.recipe, data)
