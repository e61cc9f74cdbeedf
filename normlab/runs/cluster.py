"""The workers of a Dask cluster, which Dask's own commands start, as the ones who train.

A worker is sent what to train and how to come by the images, never the images; it trains in a
cache folder of its own machine, and sends the finished run's files home.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle

import normlab
from normlab.data import Dataset
from normlab.datasets.cache import cache_folder
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.identity import digest_of
from normlab.runs.jobs import Job
from normlab.runs.processes import quiet
from normlab.runs.trainer import fit_job
from normlab.runs.transfer import Ended, attempt, unpack
from normlab.support.checks import warn
from normlab.support.locks import InUse, locked

if TYPE_CHECKING:
    import torch
    from distributed import Client, Future

SECONDS_TO_ANSWER = 10
MOST_BYTES = 100_000  # of the function that loads the images, which goes with each job


class Cluster:
    """The Dask cluster at an address, checked: its workers can train what is sent to them.

    Args:
        address: of the scheduler.
        load: returns the images, on a worker; a partial of `load_dataset`, say.
        data: the images here; those of a worker must be the same.

    Raises `ConnectionError` or `RuntimeError` of one sentence if it does not answer, has no
    workers, or has some that cannot; `ValueError` if `load`, sent with each job, is large.
    """

    def __init__(self, address: str, load: Callable[[], Dataset], data: Dataset) -> None:
        self.load, self.fingerprint = load, data.fingerprint
        check_size(load)
        self.client = _connect(address)
        try:
            _check_workers(self.client)
        except BaseException:
            self.client.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def check_images(self) -> None:
        """Raises `RuntimeError` that names a worker whose `load()` does not give these images."""
        found = self.client.run(_load_there, self.load, self.fingerprint, on_error="return")
        for address, error in found.items():
            if isinstance(error, Exception):
                raise RuntimeError(f"worker {address}: {error}") from error

    def forget(self, digests: Iterable[str]) -> None:
        """Removes what the workers' machines have of the runs with these digests.

        A run that is just being trained, for another client, stays.
        """
        self.client.run(_forget, list(digests), on_error="ignore")  # a worker may just be dying

    def train(self, device: str | torch.device | None, sent: dict[Job, bytes]) -> Ended:
        """Has the workers do jobs, each on the device, or the fastest that it has.

        A job whose worker dies is given to another one, which goes on from the last finished epoch
        if it is on the same machine.
        Raises `ConnectionError` or `RuntimeError` if the cluster fails.
        """
        known = (self.load, self.fingerprint, normlab.__version__)
        task = partial(_train_away, device, *known)
        submit = partial(self.client.submit, attempt, task, pure=False)
        left = {submit(each): job for job, each in sent.items()}
        while left:
            for future in self._next_done(left):
                job = left[future]
                outcome = _outcome(future, job)
                del left[future]
                yield job, outcome

    def _next_done(self, futures: Iterable[Future]) -> set[Future]:
        """Those that are done, once there are some; warns if no worker is left to do them."""
        from distributed import wait

        said = False
        while True:
            try:
                with self.client.as_current():
                    return wait(list(futures), timeout=1, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                address = self.client.scheduler.address
                if not said and not self.client.scheduler_info()["workers"]:
                    said = True
                    warn(
                        "no workers are left, this waits for one: start it with `dask worker "
                        f"{address} --nthreads 1`"
                    )
            except CancelledError as error:
                raise _gone() from error


# --- the client -------------------------------------------------------------------------------


def check_size(load: Callable[[], Dataset]) -> None:
    """Raises `ValueError` if `load`, sent with each job, holds the images."""
    size = len(cloudpickle.dumps(load))
    if size > MOST_BYTES:
        raise ValueError(
            f"each run would be sent with {size:,} bytes: data must be a function that loads "
            "the images, not one that holds them"
        )


def _connect(address: str) -> Client:
    try:
        from distributed import Client
    except ImportError as error:
        raise RuntimeError(
            "a cluster needs Dask: pip install dask distributed, here and on its workers"
        ) from error
    try:
        return Client(address, timeout=SECONDS_TO_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {address} within {SECONDS_TO_ANSWER} seconds: start one "
            "with `dask scheduler`, and give the address that it prints"
        ) from error


def _check_workers(client: Client) -> None:
    """That there are workers, that everyone has this normlab; warns of threads without use."""
    try:
        client.wait_for_workers(1, timeout=SECONDS_TO_ANSWER)
    except TimeoutError as error:
        address = client.scheduler.address
        raise RuntimeError(
            f"the cluster at {address} has no workers: start some with `dask worker {address} "
            "--nworkers 2 --nthreads 1`"
        ) from error

    def version() -> str | None:  # goes as code: a worker without normlab would not find its name
        with suppress(ImportError):
            from normlab import __version__

            return __version__

    versions = client.run(version)
    idle = sum(client.nthreads().values()) - len(versions)
    versions["the scheduler"] = client.run_on_scheduler(version)  # it reads the tasks too
    other = {worker: has for worker, has in versions.items() if has != normlab.__version__}
    if other:
        names = ", ".join(f"{worker} has {has or 'none'}" for worker, has in other.items())
        raise RuntimeError(
            f"this is normlab {normlab.__version__}, but {names}: install the same version there"
        )
    if idle:
        warn(
            f"{idle} threads will only wait, since a worker trains one run at a time: start "
            "workers with `--nworkers N --nthreads 1`"
        )


def _outcome(future: Future, job: Job) -> Exception | None:
    """The error that ended a training; without one, the run's files are here afterwards."""
    from distributed import KilledWorker

    try:
        outcome = future.result()
    except KilledWorker:
        return RuntimeError(
            f"{job.label} ended the process of every worker that tried it, for want of memory "
            "perhaps; what was finished is kept"
        )
    except CancelledError as error:
        raise _gone() from error
    except Exception as error:  # what a task raises itself comes home as its result
        raise RuntimeError(f"the cluster cannot do a run: {error}") from error
    if isinstance(outcome, Exception):
        return outcome
    RunFolder(job.directory).receive(outcome)
    return None


def _gone() -> ConnectionError:
    return ConnectionError("the Dask scheduler went away; what was finished is kept")


# --- the workers ------------------------------------------------------------------------------

# The threads of one worker would share torch's random states: they train one after another.
_one_at_a_time = threading.Lock()
_images: dict[str, Dataset] = {}  # in a worker: its images by their fingerprint
_loading = threading.Lock()  # of what changes them


def _train_away(
    device: str | torch.device | None,
    load: Callable[[], Dataset],
    fingerprint: str,
    version: str,
    sent: bytes,
) -> dict[str, bytes]:
    """Trains on a worker; returns the files of the finished run.

    They stay there until the client has all: what could not be delivered is not trained again.
    """
    with _one_at_a_time, quiet():
        try:
            if version != normlab.__version__:  # a worker that joined after the check
                raise ValueError(
                    f"it has normlab {normlab.__version__}, the client {version}: install the "
                    "same version there"
                )
            data = _images_here(load, fingerprint)
        except (OSError, ValueError) as error:
            from distributed import get_worker

            raise RuntimeError(f"worker {get_worker().address}: {error}") from error
        job = unpack(sent, data)
        place = _place(digest_of(job.identity))
        with locked(place):  # which another process may train in that Dask took for dead
            fit_job(replace(job, directory=place), data, device=device, progress=False)
            return RunFolder(place).pack()


def _place(digest: str) -> Path:
    """The same for every worker on a machine, so that another one can go on there.

    But not for another version of normlab, which may compute something else.
    """
    return cache_folder() / "sweeps" / normlab.__version__ / digest


def _forget(digests: Sequence[str]) -> None:
    """Removes runs from a worker's machine, but for one that is just being trained there."""
    for digest in digests:
        with suppress(InUse):
            remove_runs(_place(digest))


async def _load_there(load: Callable[[], Dataset], fingerprint: str) -> None:
    """In a thread: the worker must go on telling the scheduler that it lives."""
    await asyncio.to_thread(_images_here, load, fingerprint)


def _images_here(load: Callable[[], Dataset], fingerprint: str) -> Dataset:
    """This worker's images, loaded once."""
    with _loading:
        if fingerprint not in _images:
            data = load()
            if data.fingerprint != fingerprint:
                raise ValueError(f"it has other images of {data.name} than the client")
            _images.clear()
            _images[fingerprint] = data
        return _images[fingerprint]
