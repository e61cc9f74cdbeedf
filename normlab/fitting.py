"""`fit`: trains a network by a recipe, keeps what it finished, and resumes what was interrupted."""

import gc
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from normlab.analysis import check_network, class_and_probability, predict
from normlab.data import BatchLoader, Dataset
from normlab.engines.choice import ENGINES, make_engine
from normlab.engines.cuda_graph import can_overlap
from normlab.engines.plain import PlainEngine
from normlab.history import Run
from normlab.penalties import l1_penalty
from normlab.recipes import DTYPES, Recipe, trained_parameters, training_batches
from normlab.runs.folder import RunFolder
from normlab.runs.identity import earlier_computations, identity, provenance, trained_identity
from normlab.support.checks import check_instance, one_of, warn
from normlab.support.devices import check_dtype, exact_float32, pick_device
from normlab.support.files import user_path
from normlab.support.locks import locked
from normlab.support.module_state import modes_kept
from normlab.support.progress import Progress
from normlab.support.seeding import seeded
from normlab.training import device_of, evaluating, gradients

TEST_BATCH = 512  # images; the results do not depend on it, the speed hardly

# How far apart the mean probability of the predicted classes may be where the same network with the
# same weights predicts on another processor, after a training that a GPU may have done.
PROBABILITIES_APART = 1e-3

CHANCE_EPOCHS = 5  # after so many a network that has learned nothing is worth a warning


def fit(
    network: nn.Module,
    data: Dataset,
    recipe: Recipe | None = None,
    *,
    directory: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    label: str | None = None,
    engine: str = "auto",
) -> Run:
    """Trains `network` in place, tests it after every epoch, and returns the `Run`.

    The network comes back in evaluation mode, also from a folder: call `network.train()` before a
    loop of your own. All layers are trained in training mode, but for those that were frozen by
    `layer.eval().requires_grad_(False)` before: they keep their running statistics.

    Args:
        network: maps images (B, C, H, W) to logits (B, classes); any `nn.Module`.
        data: what to train and test on.
        recipe: how; without it, `Recipe()`.
        directory: where to keep the run. The same call finds it there again: a finished run is
            loaded, an interrupted one goes on after its last finished epoch, to the same result.
            On a CPU with as many threads that is so bit for bit. On a GPU it is up to rounding
            errors, which grow: cuDNN picks the algorithms of each process by timing them.
            Another run there is refused, also one whose network differs in its logits alone.
        device: "cpu", "cuda", "cuda:1", "mps"; without it, the fastest there is.
        progress: whether to say how far it is.
        label: what the progress calls the run.
        engine: "auto" for the fastest way through an epoch, "plain" for the loop of `train_epoch`.

    Raises:
        ValueError: the network does not fit the data, or `directory` holds another run.
        FloatingPointError: the loss became infinite or no number; finished epochs are kept.
    """
    recipe = Recipe() if recipe is None else recipe
    job = Job(network, recipe, user_path(directory) if directory else None, label)
    return fit_together([job], data, device=device, progress=progress, engine=engine)[0]


@dataclass
class Job:
    """What `fit_together` trains: a network, how, where to keep it, and what to call it.

    `what` is its `identity`, where that is known: a process that a network was sent to could not
    tell from what source it comes. A directory that is `only_read` holds the finished run.
    """

    network: nn.Module
    recipe: Recipe
    directory: Path | None = None
    label: str | None = None
    what: dict | None = None
    only_read: bool = False


def identified(job: Job, data: Dataset) -> Job:
    """The job with its identity; the network is moved to the CPU."""
    move(job.network, torch.device("cpu"), job.recipe)
    return replace(job, what=identity(job.network, data, job.recipe))


def fit_together(
    jobs: Sequence[Job],
    data: Dataset,
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
    engine: str = "auto",
) -> list[Run]:
    """`fit` for several networks at once: on a GPU their epochs overlap.

    Where one of them fails, the others are trained to their end before its error is raised.
    """
    device = pick_device(device)
    one_of(engine, ENGINES, "engine")
    check_instance(data, Dataset, "data", "nl.load_dataset(…) gives one")
    for job in jobs:
        check_instance(job.network, nn.Module, "a network", "nl.build_network(…) gives one")
        check_instance(job.recipe, Recipe, "a recipe", "nl.Recipe(…) makes one")
    with exact_float32(), gradients():
        trainings = [_Training(job, data, device, engine, progress) for job in jobs]
        together = can_overlap(job.network for job in jobs)
        with _folders_of(trainings):
            errors = _train_all(trainings, len(jobs) if together else 1)
    if errors:
        raise errors[0]
    return [training.result for training in trainings]


@contextmanager
def _folders_of(trainings: Sequence["_Training"]) -> Iterator[None]:
    """Has the folders of all that are to be trained; some may be done when it gets them."""
    left = [each for each in trainings if each.folder is not None and not each.loaded]
    folders = [os.path.realpath(each.folder.directory) for each in left]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"two networks would be kept in {folder}: give each its directory")
    with locked(*folders):
        for each in left:
            each.look()
        yield


def _train_all(trainings: Sequence["_Training"], at_once: int) -> list[Exception]:
    """Trains all of them, so many at once, and returns the errors of those that failed.

    Those that find no memory beside the others are tried again after these, half as many at once.
    """
    left, errors = list(trainings), []
    while left:
        now, later = left[:at_once], left[at_once:]
        without_room = _train(now, errors)
        if without_room:
            at_once = max(1, at_once // 2)
            gc.collect()  # engines that are in cycles hold memory, too
        left = without_room + later
    return errors


def _train(trainings: Sequence["_Training"], errors: list[Exception]) -> list["_Training"]:
    """All epochs of all of them, an epoch of each at a time; adds to `errors` what ended some.

    Returns those for which there was no memory, but might be without the others.
    """
    without_room = []
    with ExitStack() as stack:
        going = {each: stack.enter_context(closing(each.turns())) for each in trainings}
        while going:
            for training, turns in list(going.items()):
                try:
                    goes_on = next(turns, False)
                except Exception as error:
                    goes_on = False
                    if isinstance(error, _NoRoom) and len(trainings) > 1:
                        without_room.append(training)  # the error itself would hold the memory
                    else:
                        errors.append(error)
                if not goes_on:
                    del going[training]
    return without_room


def is_done(job: Job, data: Dataset, device: torch.device) -> bool:
    """Whether the job's folder holds its finished run; the network stays as and where it is.

    Raises `ValueError` if the folder holds another run, or the device lacks the recipe's dtype.
    """
    check_dtype(device, job.recipe.dtype)
    if job.directory is None or RunFolder(job.directory).is_empty():
        return False
    folder = RunFolder(job.directory)
    done = folder.open(job.what or identity(job.network, data, job.recipe))
    if done and not job.only_read:
        folder.tidy()
    return done


def load_run(job: Job, data: Dataset, device: torch.device) -> Run:
    """The finished run that lies in the job's folder, its weights put into the network there.

    A network of one's own must predict with them what the run keeps. Its identity holds the source
    of its classes, but not what they refer to: functions, numbers that it was built with.
    Raises `ValueError` if it does not; then the network has its own weights again.
    """
    move(job.network, device, job.recipe)
    initial = {name: value.clone() for name, value in job.network.state_dict().items()}
    run = RunFolder(job.directory).load(job.network)
    if "class" in run.identity["network"] and not agrees(run, data):
        job.network.load_state_dict(initial)
        raise ValueError(
            f"{job.directory} holds a run that is something else (its network predicted otherwise, "
            "with the same weights): choose another directory, or delete this one (--fresh on the "
            "command line)"
        )
    return run


def agrees(run: Run, data: Dataset) -> bool:
    """Whether the run's network predicts what the run keeps, but for rounding errors."""
    device, dtype = device_of(run.network), DTYPES[run.recipe.dtype]
    images, _ = next(iter(data.loader(False, TEST_BATCH, device=device, dtype=dtype)))
    random = seeded(run.recipe.seed, "predictions", device=device)
    with torch.no_grad(), evaluating(run.network), random:
        given = run.network(images).float().softmax(1).cpu()
    there = given.gather(1, run.predicted[: len(images), None])[:, 0]
    apart = (there - run.probability[: len(images)]).abs().mean().item()
    return apart <= PROBABILITIES_APART  # as NaN is not


class _Training:
    """One job from its folder, epoch by epoch, to its `Run`."""

    def __init__(
        self, job: Job, data: Dataset, device: torch.device, engine: str, progress: bool
    ) -> None:
        self.job, self.network, self.recipe, self.data = job, job.network, job.recipe, data
        self.device, self.choice, self.progress = device, engine, progress
        self.label = job.label or (job.directory.name if job.directory else None)
        self.label = self.label or type(job.network).__name__
        self.folder = None if job.directory is None else RunFolder(job.directory)
        self.engine: PlainEngine | None = None
        check_trainable(job.network, data, job.recipe)
        with self._explaining():
            move(job.network, device, job.recipe)
        self.what = job.what or identity(job.network, data, job.recipe)
        self.look()

    def look(self) -> None:
        """Finds out whether the folder holds the finished run."""
        self.loaded = is_done(replace(self.job, what=self.what), self.data, self.device)

    def turns(self) -> Iterator[bool]:
        """Trains, from each `next` to another for an epoch; at its end there is the `result`."""
        with self._explaining(), nullcontext() if self.loaded else self._open():
            yield True  # when it is ready, as those beside it shall be before its first epoch
            while not self.finished:
                self.launch()
                yield True
                self.collect()
            self._close_engine()  # predictions are those of the network as a student gets it
            self.result = self.run()
        self.network.eval()

    def _ingredients(self) -> tuple[nn.Module, Recipe, BatchLoader, BatchLoader]:
        """What an engine is made of: network, recipe, and the batches to train and test on."""
        dtype = DTYPES[self.recipe.dtype]
        train = training_batches(self.data, self.recipe, self.device)
        test = self.data.loader(False, TEST_BATCH, device=self.device, dtype=dtype)
        return self.network, self.recipe, train, test

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Resumes what the folder holds; leaving the context closes engine and display.

        Layers then are in the modes they were in, so that the same call trains the same again. If
        an exception leaves it, the network gets its initial weights back where a folder keeps
        the trained ones, so that the same call with the same network resumes; and where memory was
        wanting, since it may be tried again.
        """
        initial = {name: value.clone() for name, value in self.network.state_dict().items()}
        with modes_kept(self.network), ExitStack() as stack:
            stack.push(lambda _, error, *__: self._put_back(initial, error))
            stack.callback(self._close_engine)
            self._start()
            shown = Progress(self.label, self.recipe.epochs, self.engine.steps, show=self.progress)
            self.shown: Progress = stack.enter_context(shown)
            self.shown.start_at(len(self.history))
            yield

    def _start(self) -> None:
        """Makes everything ready for the next epoch, on the plain path if need be."""
        self.config = {"is": self.what, "from": provenance(self.data, self.device)}
        self.engine, why = make_engine(self.choice, *self._ingredients())
        self._resume()
        problem = self.engine.prepare()
        if problem:
            warn(f"{self.label} takes the plain path: {problem}")
            self.engine.close()
            self.engine, why = PlainEngine(*self._ingredients()), problem
            self._resume()
        self.config["from"] |= {
            "engine": self.engine.name,
            "because": why,
            "computes_in": self.recipe.dtype,
            "threads": torch.get_num_threads(),
        }
        if self.folder is not None:
            before = earlier_computations(
                self.folder.origin(), self.config["from"], len(self.history)
            )
            self.config["from"] |= {"before": before} if before else {}
            self.folder.start(self.config["is"], self.config["from"])

    def _close_engine(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None  # and with it the memory of its captured steps

    def _resume(self) -> None:
        """The history so far; network and optimiser get the states after it."""
        self.history = []
        if self.folder is not None:
            self.history = self.folder.load_epoch(self.network, self.engine.optimizer, self.what)

    def _put_back(self, initial: dict[str, torch.Tensor], error: BaseException | None) -> None:
        if error is not None and (self.folder is not None or _is_out_of_memory(error)):
            self.network.load_state_dict(initial)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Says what some errors of torch mean, and what to do about them."""
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "batch normalization met a batch of one image with one pixel a channel, which has "
                f"no variance: use a batch_size other than {self.recipe.batch_size}"
            ) from error
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise _NoRoom(
                f"the memory of {self.device} is too small for {self.label} in batches of "
                f"{self.recipe.batch_size}: use a smaller batch_size, or device='cpu'"
            ) from error

    @property
    def finished(self) -> bool:
        """Whether no epoch is left to do."""
        return self.loaded or len(self.history) == self.recipe.epochs

    def launch(self) -> None:
        """Starts the next epoch."""
        self.engine.launch(len(self.history))

    def collect(self) -> None:
        """Waits for the epoch, checks and keeps it."""
        epoch = len(self.history)
        train, test = self.engine.collect(self.shown.counted)
        self._check_finite(train.loss + train.penalty, "training", epoch)
        self._check_finite(test.loss, "test", epoch)
        row = {
            "epoch": epoch + 1,
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "penalty": train.penalty,
            "lr": self.engine.last_rate(epoch),
            "seconds": train.seconds + test.seconds,
        }
        self.history.append(row)
        if self.folder is not None:
            self.folder.save_epoch(self.network, self.engine.optimizer, self.history)
        self.shown.finish_epoch(row)
        if len(self.history) == CHANCE_EPOCHS:
            warn_if_at_chance(self.label, self.history, self.recipe, self.data)

    def run(self) -> Run:
        """The finished run, which its folder then holds."""
        return load_run(self.job, self.data, self.device) if self.loaded else self._keep()

    def _keep(self) -> Run:
        with seeded(self.recipe.seed, "predictions", device=self.device):
            predicted, probability = class_and_probability(predict(self.network, self.data))
        self.config |= trained_identity(self.network, self.data, self.recipe)
        run = Run(
            self.network,
            self.recipe,
            self.history,
            predicted,
            probability,
            self.config,
            self.folder and self.folder.directory,
        )
        if self.folder is not None:
            self.folder.finish(run)
        return run

    def _check_finite(self, loss: float, which: str, epoch: int) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{self.label}: the {which} loss became {loss} in epoch {epoch + 1}: try a lower "
                f"learning rate than {self.recipe.lr:g}, the one-cycle schedule, or a "
                f"normalization if there is none{', in another directory' if self.folder else ''}"
            )


def warn_if_at_chance(label: str, history: list[dict], recipe: Recipe, data: Dataset) -> None:
    """Says so if a network has learned nothing in its first epochs."""
    if len(history) < CHANCE_EPOCHS:
        return
    accuracy = history[CHANCE_EPOCHS - 1]["train_accuracy"]
    chance = data.train_labels.bincount().max().item() / len(data.train_labels)
    if chance == 1:
        only = data.classes[data.train_labels[0]]
        warn(f"{label}: all training images have the label {only!r}: there is nothing to learn")
    elif accuracy < chance + min(0.02, (1 - chance) / 5):  # of what is left above chance
        warn(
            f"{label}: after {CHANCE_EPOCHS} epochs the training accuracy is {accuracy:.1%}, no "
            "better than always guessing one class: try another learning rate than "
            f"{recipe.lr:g}, less L1, or check the labels"
        )


def move(network: nn.Module, device: torch.device, recipe: Recipe) -> None:
    """Moves the network to the device, in the recipe's dtype."""
    check_dtype(device, recipe.dtype)
    network.to(device=device, dtype=DTYPES[recipe.dtype])


def check_trainable(network: nn.Module, data: Dataset, recipe: Recipe) -> None:
    """Raises an error of one sentence if the recipe cannot train the network on the data."""
    trained_parameters(network, recipe)
    check_network(network, data)
    if recipe.l1:
        with evaluating(network):  # where a spectral norm takes no step
            l1_penalty(network)


class _NoRoom(RuntimeError):
    """The memory of a device is too small."""


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left; Apple's GPUs have no class of error for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "MPS backend out of memory" in str(error)
    )
