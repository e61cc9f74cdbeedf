"""Many jobs: on a CPU side by side, in processes of one thread each, where that is quicker.

For networks as small as these two processes of one thread each get through more images than one
process of two threads. A process tells of itself through its run's folder: the parent reads the
histories there for its display, and afterwards finds the runs finished. How far an epoch has come
is a number in a file beside the images, for the display alone.
"""

import functools
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import joblib
import torch
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor
from tqdm import tqdm

from normlab.data import Dataset
from normlab.runs.folder import RunFolder
from normlab.runs.jobs import Job, Outcomes
from normlab.runs.trainer import fit_each, fit_job
from normlab.runs.transfer import (
    SECONDS_BETWEEN_LOOKS,
    Ended,
    NotSendable,
    as_they_end,
    attempt,
    quiet,
    train_apart,
    unpack,
)
from normlab.support.locks import scratch_folder
from normlab.support.progress import Progress
from normlab.support.summaries import multiply_adds

# Starting processes that import torch takes as long as some 3·10¹¹ multiply-adds on two cores: with
# less to do they do not repay it (measured: tests/benchmarks/RESULTS.md).
WORTHWHILE = 3e11

PARTS = 100  # of an epoch that the display tells apart


def train(
    left: Sequence[Job],
    jobs: Sequence[Job],
    data: Dataset,
    *,
    device: torch.device,
    progress: bool = True,
    engine: str = "auto",
    workers: Callable[[dict[Job, bytes]], Ended] | None = None,
) -> Outcomes:
    """Does the jobs that are left, side by side if all jobs together are worth it.

    Args:
        workers: do the jobs, whatever they are worth, instead of processes of this machine.
    """
    if workers is None and device.type == "cpu" and engine != "plain":
        apart = functools.partial(in_processes, data, progress=progress)
        workers = apart if are_worthwhile(jobs, data) else None
    if workers is not None:
        left = yield from train_apart(left, data, workers)
    yield from fit_each(left, data, device=device, progress=progress, engine=engine)


def are_worthwhile(jobs: Sequence[Job], data: Dataset) -> bool:
    """Whether these jobs end sooner side by side.

    To be asked about all that there is to do, not about what of it is left: so a resumed run has
    as many threads as before, and ends bit for bit alike.
    """
    if min(len(jobs), joblib.cpu_count()) < 2:
        return False
    images = sum(job.recipe.epochs for job in jobs) * len(data.train_images)
    return 3 * multiply_adds(jobs[0].build(), data.input_shape) * images >= WORTHWHILE


def in_processes(data: Dataset, sent: dict[Job, bytes], *, progress: bool = True) -> Ended:
    """Does jobs in processes of one thread each, which end with this one.

    The images are in one file that all processes map. As many processes as cores, and where the
    jobs do not divide evenly a few more: rather than one having the cores to itself at the end.
    When one is killed, the pool ends the others: the jobs that were under way are then taken up
    from their checkpoints, one after another, so that one whose process is killed again takes no
    other with it.
    """
    left, cores = dict(sent), joblib.cpu_count()
    with scratch_folder() as folder, ExitStack() as stack:
        look = functools.partial(_show_all, folder, _displays(sent, stack, show=progress))
        file = folder / "data.safetensors"
        data.save(file)
        while left:
            workers = min(len(left), cores + len(left) % cores)
            task = functools.partial(attempt, functools.partial(_train_alone, file, workers))
            for job in (yield from _in_pool(task, left, list(left), workers, look)):
                if (yield from _in_pool(task, left, [job], 1, look)):
                    del left[job]
                    error = RuntimeError(
                        f"the process that trained {job.label} was killed, and again when no other "
                        "ran, for want of memory perhaps; the same call goes on from the last "
                        "finished epoch"
                    )
                    yield job, error


def _in_pool(
    task: Callable, left: dict[Job, bytes], jobs: Sequence[Job], workers: int, look: Callable
) -> Generator[tuple[Job, Exception | None], None, list[Job]]:
    """Does the jobs in so many processes, and takes those that are done from `left`.

    Returns those under way when a process was killed, which ends all: they are begun in their
    order, so that these are the first of those that are left.
    """
    options = {"initializer": _begin, "initargs": (os.getpid(),)}
    try:
        pool, futures = ProcessPoolExecutor(workers, env={"OMP_NUM_THREADS": "1"}, **options), {}
    except OSError as error:  # which names no place
        reason = f"no process can be started ({error.strerror}): make room for semaphores in"
        yield from ((job, NotSendable(f"{reason} /dev/shm")) for job in left)
        left.clear()
        return []
    try:
        futures |= {pool.submit(task, left[job]): job for job in jobs}
        for job, future in as_they_end(futures, look):
            outcome = future.result()
            del left[job]
            yield job, outcome
    except BrokenProcessPool:
        return [job for job in jobs if job in left][:workers]
    finally:
        pool.shutdown(kill_workers=bool(futures))
    return []


def _displays(jobs: Iterable[Job], stack: ExitStack, *, show: bool) -> dict[RunFolder, Progress]:
    shown = {}
    for job in jobs:
        folder = RunFolder(job.directory)
        progress = Progress(job.label, job.recipe.epochs, PARTS, show=show)
        shown[folder] = stack.enter_context(progress)
        progress.start_at(len(folder.history_so_far()))
        progress.say("waits")
    return shown


def _show_all(scratch: Path, shown: dict[RunFolder, Progress]) -> None:
    """Shows what is done since the last look."""
    for folder, progress in shown.items():
        for row in folder.history_so_far()[progress.finished :]:
            progress.finish_epoch(row)
        counter = _counter(scratch, folder.directory)
        done = float(counter.read_text() or 0) if counter.exists() else 0.0
        if done and not progress.finished:
            progress.say("")  # it waits no longer
        if (parts := int(PARTS * max(done, progress.finished))) > progress.done:
            progress.step(parts - progress.done)


def _counter(scratch: Path, directory: Path) -> Path:
    """The file with the number of epochs that the run in this directory has done."""
    return scratch / hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()


# --- in the processes -------------------------------------------------------------------------


def _begin(parent: int) -> None:
    """Has this process end when its parent is killed: who resumes the run must be alone in it."""
    tqdm.set_lock(threading.RLock())  # its own one would be left behind by a kill

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train_alone(file: Path, processes: int, sent: bytes) -> None:
    with quiet():
        data = _open(file)
        job = unpack(sent, data)
        tell = _teller(_counter(file.parent, job.directory))
        fit_job(job, data, device="cpu", progress=tell, processes=processes)


def _teller(counter: Path) -> Callable[[float], None]:
    """A function that keeps a number in a file, as often as somebody looks there."""
    last = -math.inf

    def tell(epochs: float) -> None:
        nonlocal last
        if time.monotonic() - last < SECONDS_BETWEEN_LOOKS:
            return
        last = time.monotonic()
        with suppress(OSError):  # a full disk: without the display the training goes on
            counter.write_text(f"{epochs:.4f}")

    return tell


@functools.lru_cache(maxsize=1)
def _open(file: Path) -> Dataset:
    return Dataset.open(file)
