"""Does jobs, epoch by epoch: several at once on a GPU, resumed from what their folders hold."""

import gc
import math
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch

from normlab.analysis import class_and_probability, predict
from normlab.data import Dataset
from normlab.engines.choice import ENGINES, disagreement_of, make_engine
from normlab.engines.plain import PlainEngine, training_batches
from normlab.history import History, Run
from normlab.runs.folder import RunFolder, another_run
from normlab.runs.identity import provenance, weights_digest
from normlab.runs.jobs import CHANCE_EPOCHS, Job, Outcomes, find_runs, warn_if_at_chance
from normlab.runs.probe import LOGITS_APART
from normlab.support.checks import check_instance, one_of, warn
from normlab.support.devices import exact_float32, is_out_of_memory, pick_device
from normlab.support.locks import locked
from normlab.support.module_state import TRAINED, modes_kept, was_trained
from normlab.support.progress import Progress, Show
from normlab.support.seeding import seeded
from normlab.training import test_epoch, train_epochs

TEST_BATCH = 512  # images; the results do not depend on it, the speed hardly

# Trainings at once on a GPU, each of which holds the memory of its own captured steps.
TOGETHER = 8


def fit_job(job: Job, data: Dataset, **options: object) -> Run:
    """The run of a single job, by `fit_each` with these options; raises the error that ended it."""
    ((_, outcome),) = fit_each([job], data, **options)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def fit_each(
    jobs: Sequence[Job],
    data: Dataset,
    *,
    device: str | torch.device | None = None,
    progress: Show = True,
    engine: str = "auto",
    at_once: int | None = None,
    processes: int = 1,
) -> Outcomes:
    """Does jobs in this process; yields each with its run, or with the error that ended it.

    On a GPU the epochs of several overlap: of `at_once`, or of fewer where memory is short.
    `processes` says how many do so side by side, for the record. `progress` is as
    `show` of `Progress`.
    """
    device = pick_device(device)
    one_of(engine, ENGINES, "engine")
    check_instance(data, Dataset, "data", "nl.load_dataset(…) gives one")
    at_once = at_once or (TOGETHER if device.type == "cuda" else 1)
    left = list(jobs)
    while left:
        now, left = left[:at_once], left[at_once:]
        with exact_float32(), torch.inference_mode(False), torch.enable_grad():
            outcomes = _fit_together(now, data, device, engine, progress, processes)
        if without_room := [job for job in outcomes if outcomes[job] is None]:
            at_once, left = max(1, at_once // 2), without_room + left
            gc.collect()  # engines that are in cycles hold memory, too
        yield from ((job, outcome) for job, outcome in outcomes.items() if outcome is not None)


def _fit_together(
    jobs: Sequence[Job],
    data: Dataset,
    device: torch.device,
    engine: str,
    progress: Show,
    processes: int,
) -> dict[Job, Run | Exception | None]:
    """The runs of jobs that are done at once, or errors; None for want of memory beside others."""
    jobs = [_prepared(job, data, device) for job in jobs]
    outcomes = find_runs(jobs, data, device)
    left = [job for job in jobs if job not in outcomes]
    folders = [os.path.realpath(job.directory) for job in left if job.directory is not None]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"two networks would be kept in {folder}: give each its directory")
    with locked(*folders):
        outcomes |= find_runs(left, data, device)  # by whoever had the folder before
        left = [job for job in left if job not in outcomes]
        at_once = len(left) * processes
        outcomes |= _take_turns(
            [_Training(job, data, device, engine, progress, at_once) for job in left]
        )
    return outcomes


def _prepared(job: Job, data: Dataset, device: torch.device) -> Job:
    with _explaining(job, device):
        return job.prepared(data, device)


def _take_turns(trainings: Sequence["_Training"]) -> dict[Job, Run | Exception | None]:
    """All epochs of all of them, by turns."""
    outcomes: dict[Job, Run | Exception | None] = {}
    with ExitStack() as stack:
        turns = {each.job: stack.enter_context(closing(each.turns())) for each in trainings}
        while going := [job for job in turns if job not in outcomes]:
            for job in going:
                try:
                    next(turns[job])
                except StopIteration as end:
                    outcomes[job] = end.value
                except Exception as error:
                    final = len(trainings) == 1 or not isinstance(error, _NoRoom)
                    outcomes[job] = error if final else None  # the error would hold the memory
    return outcomes


@dataclass(eq=False)
class _Training:
    """A job that is being done, epoch by epoch."""

    job: Job
    data: Dataset
    device: torch.device
    choice: str  # of an engine
    progress: Show
    at_once: int  # how many trainings share the machine

    def __post_init__(self) -> None:
        self.recipe, self.network = self.job.recipe, self.job.build()
        self.identity, directory = self.job.identity, self.job.directory
        self.folder = None if directory is None else RunFolder(directory)
        self.engine: PlainEngine | None = None
        self.history = History()

    def turns(self) -> Generator[None, None, Run]:
        """Resumes or begins, and trains a part of an epoch at each `next`; returns the run.

        If an exception ends it, layers are in the modes they were in, so that the same call trains
        the same again. The network then gets its initial weights back where a folder keeps the
        trained ones, and where memory was wanting, since it may be tried again.
        """
        initial = {name: value.clone() for name, value in self.network.state_dict().items()}
        try:
            with (
                _explaining(self.job, self.device),
                modes_kept(self.network),
                ExitStack() as stack,
            ):
                stack.callback(self._close_engine)
                self._start()
                shown = Progress(
                    self.job.label, self.recipe.epochs, self.engine.steps, show=self.progress
                )
                stack.enter_context(shown).start_at(len(self.history))
                yield  # when it is ready, as those beside it shall be before its first epoch
                for row in train_epochs(self.engine, self.history, shown.counted):
                    if row is None:
                        yield
                    else:
                        self._keep(row, shown)
                self._close_engine()  # predictions are those of the network as a student gets it
                run = self._finish()
        except BaseException as error:
            if self.folder is not None or isinstance(error, _NoRoom):
                self.network.load_state_dict(initial)
            raise
        self.network.eval()
        TRAINED.add(self.network)
        return run

    def _start(self) -> None:
        """Makes everything ready for the next epoch, on the plain path if need be."""
        started = time.perf_counter()
        why = self._open_engine(self.choice)
        if problem := disagreement_of(self.engine, self.choice) or self._resume():
            warn(f"{self.job.label} takes the plain path: {problem}")
            why = problem
            self._close_engine()
            self._open_engine("plain")  # with new batches: the first engine has changed its own
            self._resume()
        if self.progress is True and not self.history and was_trained(self.network):
            print(f"{self.job.label}: the network was trained before, and starts from its weights")
        self.provenance = provenance(self.data, self.device) | {
            "engine": self.engine.name,
            "because": why,
            "computes_in": self.recipe.dtype,
            "threads": torch.get_num_threads(),
            "at_once": self.at_once,
        }
        if self.folder is not None:
            self.folder.start(self.identity, self.provenance, len(self.history))
        self.preparation = time.perf_counter() - started  # of steps that are captured, above all

    def _open_engine(self, choice: str) -> str:
        """Makes the engine; says why this one."""
        train = training_batches(self.data, self.recipe, self.device)
        test = self.data.loader(False, TEST_BATCH, device=self.device, dtype=train.dtype)
        self.engine, why = make_engine(choice, self.network, self.recipe, train, test)
        return why

    def _resume(self) -> str:
        """Has the engine go on after the epochs that are kept; says what is in its way, if so."""
        if self.folder is not None:
            any_weights = self.job.may_begin_otherwise()
            self.identity = self.folder.identity_of(self.job.identity, any_weights=any_weights)
            about = (self.network, self.engine.optimizer, self.identity)
            self.history[:] = self.folder.load_epoch(*about)
            if self.identity is not self.job.identity:
                self._check_kept_weights()
        return self.engine.prepare()

    def _check_kept_weights(self) -> None:
        """Raises `ValueError` unless the network tests as it did with the weights that are kept."""
        kept = self.history[-1]["test_loss"]
        loss = test_epoch(self.network, self.engine.tests).loss
        if not math.isclose(loss, kept, rel_tol=LOGITS_APART):
            what = f"with the weights kept there the test loss is {loss:.4g}, not {kept:.4g}"
            raise another_run(self.job.directory, what)

    def _close_engine(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None  # and with it the memory of its captured steps

    def _keep(self, row: dict, shown: Progress) -> None:
        """Checks, keeps and shows an epoch."""
        minimised = row["train_loss"] + row["penalty"]
        for which, loss in (("training", minimised), ("test", row["test_loss"])):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"{self.job.label}: the {which} loss became {loss} in epoch {row['epoch']}: "
                    f"try a lower learning rate than {self.recipe.lr:g}, the one-cycle schedule, "
                    "or a normalization if there is none"
                    f"{', in another directory' if self.folder else ''}"
                )
        row["seconds"] += self.preparation
        self.preparation = 0.0
        if self.folder is not None:
            self.folder.save_epoch(self.network, self.engine.optimizer, self.history)
        shown.finish_epoch(row)
        if row["epoch"] == CHANCE_EPOCHS:
            warn_if_at_chance(self.job, self.history, self.data)

    def _finish(self) -> Run:
        with seeded(self.recipe.seed, "predictions", device=self.device):
            predicted, probability = class_and_probability(predict(self.network, self.data))
        config = {"is": self.identity, "from": self.provenance}
        config["final_weights"] = weights_digest(self.network.state_dict())
        about = (self.network, self.recipe, self.history, predicted, probability, config)
        run = Run(*about, self.job.directory)
        if self.folder is not None:
            self.folder.finish(run)
        return run


@contextmanager
def _explaining(job: Job, device: torch.device) -> Iterator[None]:
    """Says what some errors of torch mean, and what to do about them."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "batch normalization met a batch of one image with one pixel a channel, which has no "
            f"variance: use a batch_size other than {job.recipe.batch_size}"
        ) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _NoRoom(
            f"the memory of {device} is too small for {job.label} in batches of "
            f"{job.recipe.batch_size}: use a smaller batch_size, or device='cpu'"
        ) from error


class _NoRoom(RuntimeError):
    """The memory of a device is too small."""
