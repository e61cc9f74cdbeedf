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
from joblib.externals.loky import FIRST_COMPLETED, ProcessPoolExecutor, wait
from joblib.externals.loky.process_executor import BrokenProcessPool
from tqdm import tqdm

from normlab.data import Dataset
from normlab.runs.folder import RunFolder
from normlab.runs.jobs import Job, Outcomes
from normlab.runs.trainer import fit_each, fit_job
from normlab.runs.transfer import NotSendable, attempt, load_home, pack_all, unpack
from normlab.support.checks import warn
from normlab.support.locks import scratch_folder
from normlab.support.progress import Progress
from normlab.support.summaries import multiply_adds

# Starting processes that import torch takes as long as some 3·10¹¹ multiply-adds on two cores: with
# less to do they do not repay it (measured: tests/benchmarks/RESULTS.md).
WORTHWHILE = 3e11

SECONDS_BETWEEN_LOOKS = 0.5

Ended = Iterator[tuple[Job, Exception | None]]
"""Jobs that other processes have done, or the errors that ended them."""


def are_worthwhile(jobs: Sequence[Job], data: Dataset) -> bool:
    """Whether these jobs end sooner side by side.

    To be asked about all that there is to do, not about what of it is left: so a resumed run has
    as many threads as before, and ends bit for bit alike.
    """
    if min(len(jobs), joblib.cpu_count()) < 2:
        return False
    images = sum(job.recipe.epochs for job in jobs) * len(data.train_images)
    return 3 * multiply_adds(jobs[0].build(), data.input_shape) * images >= WORTHWHILE


def train(
    left: Sequence[Job],
    jobs: Sequence[Job],
    data: Dataset,
    *,
    device: torch.device,
    progress: bool = True,
    engine: str = "auto",
    apart: Callable[[dict[Job, bytes]], Ended] | None = None,
) -> Outcomes:
    """Does the jobs that are left, side by side if all jobs together are worth it.

    What cannot be sent to other processes is done in this one afterwards.

    Args:
        apart: has workers do jobs, whatever they are worth, instead of processes of this machine.
    """
    if apart is None and device.type == "cpu" and engine != "plain" and are_worthwhile(jobs, data):
        apart = functools.partial(in_processes, data, progress=progress)
    if apart is not None:
        sent, stay = pack_all(left, data)
        for job, error in apart(sent) if sent else ():
            outcome = error or load_home(job, data)
            if isinstance(outcome, NotSendable):
                stay[job] = outcome
            else:
                yield job, outcome
        left = [job for job in left if job in stay]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            reason = stay[left[0]]
            warn(f"{left[0].label}{more}: trained in this process, not beside it: {reason}")
    yield from fit_each(left, data, device=device, progress=progress, engine=engine)


def in_processes(data: Dataset, sent: dict[Job, bytes], *, progress: bool = True) -> Ended:
    """Does jobs in processes of one thread each, which end with this one.

    The images are in one file that all processes map. As many processes as cores, and where the
    jobs do not divide evenly a few more: rather than one having the cores to itself at the end.
    When one is killed, the pool ends the others: the jobs that were under way are then taken up
    from their checkpoints, one after another, so that one whose process is killed again takes no
    other with it.
    """
    left, cores = dict(sent), joblib.cpu_count()
    with scratch_folder() as folder, _Watch(sent, show=progress) as watch:
        file = folder / "data.safetensors"
        data.save(file)
        task = functools.partial(_train_alone, file)
        while left:
            workers = min(len(left), cores + len(left) % cores)
            for job in (yield from _in_pool(task, left, list(left), workers, watch)):
                if (yield from _in_pool(task, left, [job], 1, watch)):
                    del left[job]
                    error = RuntimeError(
                        f"the process that trained {job.label} was killed, and again when no other "
                        "ran, for want of memory perhaps; the same call goes on from the last "
                        "finished epoch"
                    )
                    yield job, error


def _in_pool(
    task: Callable, left: dict[Job, bytes], jobs: Sequence[Job], workers: int, watch: "_Watch"
) -> Generator[tuple[Job, Exception | None], None, list[Job]]:
    """Does the jobs in so many processes, and takes those that are done from `left`.

    Returns those under way when a process was killed, which ends all: they are begun in their
    order, so that these are the first of those that are left.
    """
    options = {"initializer": _begin, "initargs": (os.getpid(),)}
    pool, futures = ProcessPoolExecutor(workers, env={"OMP_NUM_THREADS": "1"}, **options), {}
    try:
        futures |= {pool.submit(attempt, task, left[job]): job for job in jobs}
        while futures:
            done, _ = wait(futures, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
            watch.look()
            for future in done:
                job, outcome = futures.pop(future), future.result()
                del left[job]
                yield job, outcome
    except BrokenProcessPool:
        return [job for job in jobs if job in left][:workers]
    finally:
        pool.shutdown(kill_workers=bool(futures))
    return []


# --- in the processes -------------------------------------------------------------------------


def _begin(parent: int) -> None:
    """Has this process end when its parent is killed: who resumes the run must be alone in it."""
    tqdm.set_lock(threading.RLock())  # its own one would be left behind by a kill

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train_alone(file: Path, sent: bytes) -> None:
    with quiet():
        data = _open(file)
        fit_job(unpack(sent, data), data, device="cpu", progress=False)


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


class _Watch(ExitStack):
    """Shows the histories of several runs as they grow."""

    def __init__(self, jobs: Iterable[Job], *, show: bool) -> None:
        super().__init__()
        self._shown: list[tuple[RunFolder, Progress]] = []
        for job in jobs:
            shown = Progress(job.label, job.recipe.epochs, 1, show=show)
            self._shown.append((RunFolder(job.directory), self.enter_context(shown)))
            shown.start_at(len(RunFolder(job.directory).history_so_far()))

    def look(self) -> None:
        """Shows the epochs that are done since the last look."""
        for folder, shown in self._shown:
            for row in folder.history_so_far()[shown.done :]:
                shown.step()
                shown.finish_epoch(row)
