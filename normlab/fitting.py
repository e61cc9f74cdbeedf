"""`fit`: trains a network by a recipe, keeps what it finished, and resumes what was interrupted."""

import functools
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from normlab.analysis import class_and_probability, predict
from normlab.data import Batches, Dataset
from normlab.devices import pick_device
from normlab.progress import Progress, make_progress
from normlab.recipes import DTYPES, Recipe, make_optimizer, make_scheduler
from normlab.runs import Run, RunFolder, identity, provenance, weights_digest
from normlab.seeding import fork_random_state, seeded
from normlab.training import EpochResult, test_epoch, train_epoch

TEST_BATCH = 512  # images; the results do not depend on it, the speed hardly

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
) -> Run:
    """Trains `network` in place, tests it after every epoch, and returns the `Run`.

    Args:
        network: maps images (B, C, H, W) to logits (B, classes); any `nn.Module`.
        data: what to train and test on.
        recipe: how; without it, `Recipe()`.
        directory: where to keep the run. The same call finds it there again: a finished run is
            loaded, an interrupted one goes on after its last finished epoch, to the same result.
        device: "cpu", "cuda", "cuda:1", "mps"; without it, the fastest there is.
        progress: whether to say how far it is.
        label: what the progress calls the run.

    Raises:
        ValueError: the network does not fit the data, or `directory` holds another run.
        FloatingPointError: the loss became infinite or no number; finished epochs are kept.
    """
    recipe = recipe or Recipe()
    device = pick_device(device)
    what = identity(network, data, recipe)
    folder = RunFolder(Path(directory)) if directory is not None else None
    finished = folder is not None and folder.open(what)
    _move(network, device, recipe)
    if finished:
        return folder.load(network)
    _check_network(network, data)
    training = _Training(network, data, recipe, device, folder)
    label = label or (Path(directory).name if directory else type(network).__name__)
    config = {"is": what, "from": provenance(data, device)}
    with make_progress(label, recipe.epochs, len(training.batches), show=progress) as shown:
        history = training.run(config, shown)
    predicted, probability = class_and_probability(predict(network, data))
    config["final_weights"] = weights_digest(network)
    run = Run(
        network, recipe, history, predicted, probability, config, directory and folder.directory
    )
    if folder is not None:
        folder.finish(run)
    return run


def _move(network: nn.Module, device: torch.device, recipe: Recipe) -> None:
    if device.type == "mps" and recipe.dtype == "float64":
        raise ValueError("dtype 'float64' is not available on device 'mps': use device='cpu'")
    network.to(device=device, dtype=DTYPES[recipe.dtype])


def _check_network(network: nn.Module, data: Dataset) -> None:
    """Tries two images, so that a misfit is said at once and before anything is written."""
    example = next(iter(network.parameters()), None)
    if example is None:
        raise ValueError(f"{type(network).__name__} has no parameters to train")
    images = torch.zeros(2, *data.input_shape, dtype=example.dtype, device=example.device)
    was_training = network.training
    try:
        with torch.no_grad(), fork_random_state(example.device):
            logits = network.eval()(images)
    except RuntimeError as error:
        raise ValueError(
            f"{type(network).__name__} cannot take images of shape {data.input_shape}: {error}"
        ) from error
    finally:
        network.train(was_training)
    classes = len(data.classes)
    if not isinstance(logits, torch.Tensor):
        kind = type(logits).__name__
        raise TypeError(f"{type(network).__name__} must return a tensor of logits, not a {kind}")
    if logits.shape != (2, classes):
        raise ValueError(
            f"{type(network).__name__} must return logits of shape (B, {classes}) for "
            f"{classes} classes, not {tuple(logits.shape)} for B = 2"
        )


class _Training:
    """Network, optimiser, batches and folder of one training, epoch by epoch."""

    def __init__(
        self,
        network: nn.Module,
        data: Dataset,
        recipe: Recipe,
        device: torch.device,
        folder: RunFolder | None,
    ) -> None:
        self.network, self.recipe, self.device, self.folder = network, recipe, device, folder
        self.optimizer = make_optimizer(network, recipe)
        dtype = DTYPES[recipe.dtype]
        self.batches: Batches = data.loader(
            batch_size=recipe.batch_size,
            augment=recipe.augment,
            seed=recipe.seed,
            device=device,
            dtype=dtype,
        )
        self.tests = data.loader(False, TEST_BATCH, device=device, dtype=dtype)
        self.loss = functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
        self.chance = data.train_labels.bincount().max().item() / len(data.train_labels)

    def run(self, config: dict, shown: Progress) -> list[dict]:
        """All epochs that are not done yet; returns the history of all."""
        initial = {name: value.clone() for name, value in self.network.state_dict().items()}
        try:
            history = self._resume(config)
            shown.start_at(len(history))
            for epoch in range(len(history), self.recipe.epochs):
                history.append(self._epoch(epoch, shown))
                self._keep(history)
                shown.finish_epoch(history[-1])
                self._warn_at_chance(history)
            return history
        except BaseException:
            if self.folder is not None:  # so that the same call, with this network, resumes
                self.network.load_state_dict(initial)
            raise

    def _resume(self, config: dict) -> list[dict]:
        if self.folder is None:
            return []
        history = self.folder.load_epoch(self.network, self.optimizer)
        self.folder.start(config["is"], config["from"])
        return history

    def _keep(self, history: list[dict]) -> None:
        if self.folder is not None:
            self.folder.save_epoch(self.network, self.optimizer, history)

    def _epoch(self, epoch: int, shown: Progress) -> dict:
        self.batches.epoch = epoch
        steps = len(self.batches)
        scheduler = make_scheduler(
            self.optimizer, self.recipe, self.recipe.epochs * steps, done=epoch * steps
        )
        with seeded(self.recipe.seed, "dropout", epoch, device=self.device):
            train = self._train(shown.counted(self.batches), scheduler)
        self._check_finite(train.loss + train.penalty, "training", epoch)
        test = test_epoch(self.network, self.tests)
        self._check_finite(test.loss, "test", epoch)
        return {
            "epoch": epoch + 1,
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "penalty": train.penalty,
            "lr": scheduler.lr_lambdas[0]((epoch + 1) * steps - 1) * self.recipe.lr,
            "seconds": train.seconds + test.seconds,
        }

    def _train(self, batches, scheduler) -> EpochResult:
        try:
            return train_epoch(
                self.network,
                batches,
                self.optimizer,
                loss=self.loss,
                scheduler=scheduler,
                l1=self.recipe.l1,
            )
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "batch normalization met a batch of one image with one pixel a channel, which has "
                f"no variance: use a batch_size other than {self.recipe.batch_size}"
            ) from error

    def _check_finite(self, loss: float, which: str, epoch: int) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the {which} loss became {loss} in epoch {epoch + 1}: try a lower learning rate "
                f"than {self.recipe.lr:g}, the one-cycle schedule, or a normalization if there is "
                "none"
            )

    def _warn_at_chance(self, history: list[dict]) -> None:
        if len(history) != CHANCE_EPOCHS:
            return
        accuracy = history[-1]["train_accuracy"]
        if accuracy < self.chance + 0.02:
            warnings.warn(
                f"after {CHANCE_EPOCHS} epochs the training accuracy is {accuracy:.1%}, no better "
                f"than always guessing one class: try another learning rate than "
                f"{self.recipe.lr:g}, less L1, or check the labels",
                stacklevel=4,
            )
