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
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import joblib

import normlab
from normlab.data import Dataset
from normlab.datasets.cache import cache_folder
from normlab.runs.folder import RunFolder, remove_run
from normlab.runs.identity import digest_of
from normlab.runs.plans import Plan
from normlab.runs.processes import (
    AfterEach,
    Outcomes,
    Train,
    WorkersLost,
    quiet,
    run_tasks,
    train_all,
)
from normlab.runs.transfer import Parcel, unpack
from normlab.support.checks import warn
from normlab.support.locks import InUse, locked

if TYPE_CHECKING:
    from distributed import Client, Worker

SECONDS_TO_ANSWER = 10
MOST_BYTES = 100_000  # of the function that loads the images, which goes with each run

# The threads of one worker would share torch's random states: they train one after another.
_one_at_a_time = threading.Lock()
_images: dict[str, Dataset] = {}  # in a worker: its images by their fingerprint
_loading = threading.Lock()  # of what changes them


class Cluster:
    """The Dask cluster at an address, checked: its workers can train what is sent to them.

    Raises `ConnectionError` or `RuntimeError` of one sentence if it does not answer, has no
    workers, or has some that cannot.
    """

    def __init__(self, address: str) -> None:
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

    def check_size(self, load: Callable[[], Dataset]) -> None:
        """Raises `ValueError` if `load`, sent with each run, holds the images."""
        from distributed.protocol import pickle

        size = len(pickle.dumps(load))
        if size > MOST_BYTES:
            raise ValueError(
                f"each run would be sent with {size:,} bytes: data must be a function that loads "
                "the images, not one that holds them"
            )

    def check_images(self, load: Callable[[], Dataset], data: Dataset) -> None:
        """Raises `RuntimeError` that names a worker whose `load()` does not give these images."""
        self.client.run(_load_there, load, data.fingerprint)

    def forget(self, digests: Iterable[str]) -> None:
        """Removes what the workers' machines have of the runs with these digests.

        A run that is just being trained, for another client, stays.
        """
        self.client.run(_forget, list(digests), on_error="ignore")  # a worker may just be dying

    def train(
        self,
        train: Train,
        plans: Sequence[Plan],
        load: Callable[[], Dataset],
        data: Dataset,
        after_each: AfterEach,
    ) -> None:
        """Calls `train(job, load())` on the workers, as `train_all` does.

        A plan whose worker dies is given to another one, which goes on from the last finished
        epoch if it is on the same machine.

        Args:
            load: returns the images, on the worker; a partial of `load_dataset`, say.
            data: the images here; those of a worker must be the same.

        Raises `ConnectionError` or `RuntimeError` if the cluster fails.
        """
        task = partial(_train_away, train, load, data.fingerprint, normlab.__version__)
        train_all(partial(self._by_workers, task), train, plans, data, after_each)

    def _by_workers(self, task: Callable, parcels: Sequence[Parcel]) -> Outcomes:
        results: SimpleQueue = SimpleQueue()
        arguments = (self.client, task, parcels, results)
        threading.Thread(target=_run_tasks, args=arguments, daemon=True).start()
        while (result := _next(results, self.client)) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result


# --- the client -------------------------------------------------------------------------------


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
    versions = client.run(_version_asker())
    idle = sum(client.nthreads().values()) - len(versions)
    versions["the scheduler"] = client.run_on_scheduler(_version_asker())  # it reads the tasks too
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


def _version_asker() -> Callable[[], str | None]:
    """A function that says which normlab is installed where it is called.

    It is sent as code rather than by its name, which a worker without normlab would not find.
    """

    def version() -> str | None:
        try:
            from normlab import __version__
        except ImportError:
            return None
        return __version__

    return version


def _run_tasks(
    client: Client, task: Callable, parcels: Sequence[Parcel], results: SimpleQueue
) -> None:
    """Puts what the workers return into `results`, at last None or the error that ended it.

    In a thread of its own, because joblib waits forever for a task whose workers all died.
    """
    try:
        with joblib.parallel_config(backend="dask", client=client) as config:
            threads = config["backend"].effective_n_jobs
            # With a single thread joblib would not use the cluster at all, but train here.
            config["backend"].effective_n_jobs = lambda n_jobs: max(threads(n_jobs), 2)
            # All at once, so that workers that join later find something to do.
            for result in run_tasks(task, parcels, n_jobs=-1, pre_dispatch="all"):
                results.put(result)
        results.put(None)
    except CancelledError:
        results.put(_gone())
    except Exception as error:
        results.put(error)


def _next(results: SimpleQueue, client: Client) -> tuple | BaseException | None:
    """The next result; or the reason why there will be none. Warns if no worker is left."""
    patience, said = SECONDS_TO_ANSWER, False
    while patience:
        try:
            return results.get(timeout=1)
        except Empty:
            states = list(client.futures.values())
            failed = [state for state in states if state.status == "error"]
            if failed:
                return _why_it_failed(failed[0].exception)
            # joblib soon forgets a task that failed so; then there is nothing left to wait for.
            expected = any(state.status in ("pending", "lost") for state in states)
            alive = client.status == "running" and expected
            patience = SECONDS_TO_ANSWER if alive else patience - 1
            if alive and not said and not client.scheduler_info()["workers"]:
                said = True
                address = client.scheduler.address
                warn(
                    "no workers are left, this waits for one: start it with `dask worker "
                    f"{address} --nthreads 1`"
                )
    return _lost() if client.status == "running" else _gone()


def _why_it_failed(error: Exception) -> Exception:
    """What ended a task from outside; what it raises itself comes home as its result."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return _lost()
    return RuntimeError(f"the cluster cannot do a run: {error}")


def _lost() -> WorkersLost:
    return WorkersLost(
        "a run ended the process of every worker that tried it, for want of memory perhaps; "
        "what was finished is kept"
    )


def _gone() -> ConnectionError:
    return ConnectionError("the Dask scheduler went away; what was finished is kept")


# --- the workers ------------------------------------------------------------------------------


def _train_away(
    train: Train,
    load: Callable[[], Dataset],
    fingerprint: str,
    version: str,
    sent: tuple,
) -> tuple[object, dict[str, bytes]]:
    """Trains on a worker; returns what `train` does, and the files of the finished run.

    They stay there until the client has all: what could not be delivered is not trained again.
    """
    if version != normlab.__version__:  # a worker that joined after the check
        raise RuntimeError(
            f"worker {_own_address()} has normlab {normlab.__version__}, the client {version}: "
            "install the same version there"
        )
    with _one_at_a_time, quiet():
        data = _images_here(load, fingerprint, _own_address)
        job = unpack(sent, data)
        place = _place(digest_of(job.what))
        with locked(place):  # which another process may train in that Dask took for dead
            result = train(replace(job, directory=place), data)
            return result, RunFolder(place).pack()


def _place(digest: str) -> Path:
    """The same for every worker on a machine, so that another one can go on there.

    But not for another version of normlab, which may compute something else.
    """
    return cache_folder() / "sweeps" / normlab.__version__ / digest


def _forget(digests: Sequence[str]) -> None:
    """Removes runs from a worker's machine, but for one that is just being trained there."""
    for digest in digests:
        with suppress(InUse):
            remove_run(_place(digest))


async def _load_there(load: Callable[[], Dataset], fingerprint: str, dask_worker: Worker) -> None:
    """In a thread: the worker must go on telling the scheduler that it lives."""
    await asyncio.to_thread(_images_here, load, fingerprint, lambda: dask_worker.address)


def _images_here(
    load: Callable[[], Dataset], fingerprint: str, address: Callable[[], str]
) -> Dataset:
    """This worker's images, loaded once; an error names the worker by its address."""
    with _loading:
        if fingerprint not in _images:
            try:
                data = load()
            except (OSError, ValueError) as error:
                raise RuntimeError(f"worker {address()}: {error}") from error
            if data.fingerprint != fingerprint:
                raise RuntimeError(
                    f"worker {address()} has other images of {data.name} than the client"
                )
            _images.clear()
            _images[fingerprint] = data
        return _images[fingerprint]


def _own_address() -> str:
    from distributed import get_worker

    return get_worker().address
