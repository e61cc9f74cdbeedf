"""The workers of a Dask cluster, which Dask's own commands start, as the ones who train.

A worker is sent what to train and how to come by the images, never the images; it sends the
finished run's files home.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import normlab
from normlab.data import Dataset
from normlab.runs.folder import RunFolder
from normlab.runs.jobs import Job
from normlab.runs.trainer import fit_job
from normlab.runs.transfer import Ended, as_they_end, attempt, quiet, unpack
from normlab.support.checks import warn
from normlab.support.locks import scratch_folder

if TYPE_CHECKING:
    import torch
    from distributed import Client

SECONDS_TO_ANSWER = 10


class Cluster:
    """A Dask cluster whose workers train; `connected` makes one."""

    def __init__(self, client: Client, load: Callable[[], Dataset], fingerprint: str) -> None:
        self.client, self.load, self.fingerprint = client, load, fingerprint
        self._said_alone = False

    def train(self, device: str | torch.device | None, sent: dict[Job, bytes]) -> Ended:
        """Has the workers do jobs, each on the device, or the fastest that it has.

        Dask gives a job whose worker dies to another one.
        Raises `ConnectionError` or `RuntimeError` if the cluster fails.
        """
        executor = self.client.get_executor(pure=False)
        task = partial(attempt, partial(_train_away, device, self.load, self.fingerprint))
        futures = {executor.submit(task, each): job for job, each in sent.items()}
        for job, future in as_they_end(futures, self._warn_if_alone):
            yield job, _outcome(future, job)

    def check_images(self) -> None:
        """Raises `RuntimeError` that names a worker which does not come by these images."""
        found = self.client.run(_load_there, self.load, self.fingerprint, on_error="return")
        for worker, error in found.items():
            if isinstance(error, Exception):
                raise RuntimeError(f"worker {worker}: {error}") from error

    def _warn_if_alone(self) -> None:
        if not self._said_alone and not self.client.scheduler_info()["workers"]:
            self._said_alone = True
            warn(
                "no workers are left, this waits for one: start it with `dask worker "
                f"{self.client.scheduler.address} --nthreads 1`"
            )


# --- the client -------------------------------------------------------------------------------


@contextmanager
def connected(address: str, load: Callable[[], Dataset], data: Dataset) -> Iterator[Cluster]:
    """The cluster whose scheduler is at an address, checked: it can train what is sent to it.

    Args:
        load: returns the images, on a worker; a partial of `load_dataset`, say.
        data: the images here; those of a worker must be the same.

    Raises `ConnectionError` or `RuntimeError` of one sentence if it does not answer, has no
    workers, or has some with another normlab.
    """
    with _connect(address) as client:
        _check_workers(client)
        yield Cluster(client, load, data.fingerprint)


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
    """That there are workers, and that everyone has this normlab."""
    try:
        client.wait_for_workers(1, timeout=SECONDS_TO_ANSWER)
    except TimeoutError as error:
        address = client.scheduler.address
        raise RuntimeError(
            f"the cluster at {address} has no workers: start some with `dask worker {address} "
            "--nworkers 2 --nthreads 1`"
        ) from error
    found = client.get_versions(packages=["normlab"])
    everyone = found["workers"] | {"the scheduler": found["scheduler"]}  # it reads the tasks too
    here = normlab.__version__
    versions = {name: about["packages"].get("normlab") for name, about in everyone.items()}
    other = [f"{name} has {has or 'none'}" for name, has in versions.items() if has != here]
    if other:
        raise RuntimeError(
            f"this is normlab {here}, but {', '.join(other)}: install the same version there"
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
        raise ConnectionError("the Dask scheduler went away; what was finished is kept") from error
    except Exception as error:  # what a task raises itself comes home as its result
        raise RuntimeError(f"the cluster cannot do a run: {error}") from error
    if isinstance(outcome, Exception):
        return outcome
    RunFolder(job.directory).receive(outcome)
    return None


# --- the workers ------------------------------------------------------------------------------

# The threads of one worker would share torch's random states: they train one after another.
_one_at_a_time = threading.Lock()
_images: dict[str, Dataset] = {}  # in a worker: its images by their fingerprint


def _train_away(
    device: str | torch.device | None, load: Callable[[], Dataset], fingerprint: str, sent: bytes
) -> dict[str, bytes]:
    """Trains on a worker; returns the files of the finished run."""
    with _one_at_a_time, quiet(), scratch_folder() as folder:
        try:
            data = _images_here(load, fingerprint)
        except (OSError, ValueError) as error:
            from distributed import get_worker

            raise RuntimeError(f"worker {get_worker().address}: {error}") from error
        job = replace(unpack(sent, data), directory=folder / "run")  # beside the folder's lock
        fit_job(job, data, device=device, progress=False)
        return RunFolder(job.directory).pack()


async def _load_there(load: Callable[[], Dataset], fingerprint: str) -> None:
    """In a thread: the worker must go on telling the scheduler that it lives."""
    await asyncio.to_thread(_images_here, load, fingerprint)


def _images_here(load: Callable[[], Dataset], fingerprint: str) -> Dataset:
    """This worker's images, loaded once."""
    data = _images.get(fingerprint)
    if data is None:
        data = load()
        if data.fingerprint != fingerprint:
            raise ValueError(f"it has other images of {data.name} than the client")
        _images.clear()
        _images[fingerprint] = data
    return data
