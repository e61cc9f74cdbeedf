"""Jobs: what is to be trained, how, and where it is kept; whether that is done already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from normlab.assignments import Assignment, Variant
from normlab.data import Dataset
from normlab.history import Run
from normlab.model import build_network
from normlab.penalties import l1_penalty
from normlab.recipes import DTYPES, Recipe, make_optimizer
from normlab.runs.folder import RunFolder, another_run
from normlab.runs.identity import LOGITS, identity, weights_digest
from normlab.support.checks import check_instance, plain, warn, whole_number
from normlab.support.devices import check_dtype
from normlab.support.files import user_path
from normlab.support.module_state import device_of, evaluating, was_trained
from normlab.support.seeding import seeded
from normlab.support.tensor_checks import check_network

# How far apart the mean probability of the predicted classes may be where the same network with the
# same weights predicts on another processor, after a training that a GPU may have done.
PROBABILITIES_APART = 1e-3
COMPARED_IMAGES = 512

CHANCE_EPOCHS = 5  # after so many a network that has learned nothing is worth a warning

Outcomes = Iterator[tuple["Job", Run | Exception]]
"""Jobs as they end, each with its run, or with the error that ended it."""


@dataclass(frozen=True, eq=False)
class Job:
    """A training to be done.

    Args:
        build: returns the untrained network.
        recipe: how it is trained.
        directory: where the run is kept, if anywhere.
        label: what progress and warnings call it.
        variant: of which variant of an assignment the network is, if of any.
        kept: a folder that is only read, where a finished run of it may lie.
        identity: the run's `identity`, once `identified` has told it: a process that the network
            was sent to could not, since the source is not there.
    """

    build: Callable[[], nn.Module]
    recipe: Recipe
    directory: Path | None = None
    label: str = ""
    variant: Variant | None = None
    kept: Path | None = None
    identity: dict | None = None

    def identified(self, data: Dataset, device: torch.device) -> Job:
        """The job with its identity; raises an error of one sentence if it cannot be done.

        To be called before any job is done or run removed; it touches no file.
        """
        network = self.build()
        check_trainable(network, data, self.recipe)
        check_dtype(device, self.recipe.dtype)
        return replace(self, identity=self.identity or identity(network, data, self.recipe))

    def prepared(self, data: Dataset, device: torch.device) -> Job:
        """The same with a network that is built, and on the device."""
        network = self.build()
        job = replace(self, build=lambda: network).identified(data, device)
        move(network, device, self.recipe)
        return job

    def may_begin_otherwise(self) -> bool:
        """Whether the network may have other initial weights than a kept run of it: if not seeded.

        Those of an assignment are, and a trained network is no beginning.
        """
        return self.variant is None and not was_trained(self.build())

    def find(self, data: Dataset, device: torch.device, *, kept: bool = False) -> Run | None:
        """The finished run that lies in its directory, in evaluation mode; None if there is none.

        With `kept` it is the one that lies in that folder.
        A network of one's own, or a trained one, must predict what the run keeps: it may depend on
        more than its identity tells, such as a number that it counted up while it was trained.
        Raises `ValueError` if it does not, or if the directory holds another run or a damaged one;
        then the network has its own weights.
        """
        directory = self.kept if kept else self.directory
        folder = None if directory is None else RunFolder(directory)
        if folder is None or not folder.open(self.identity, any_weights=self.may_begin_otherwise()):
            return None
        if not kept:
            folder.tidy()
        network = self.build()
        move(network, device, self.recipe)
        initial = {name: value.clone() for name, value in network.state_dict().items()}
        run = folder.load(network)
        trained = weights_digest(initial) == run.config["final_weights"]
        told = LOGITS in run.identity and "class" not in run.identity["network"]
        ask = trained or not told
        if ask and not _predicts_what_is_kept(run, data):
            network.load_state_dict(initial)
            raise another_run(directory, "its network predicted otherwise, with its weights")
        network.eval()
        return run


def _predicts_what_is_kept(run: Run, data: Dataset) -> bool:
    """Whether the run's network predicts what the run keeps, but for rounding errors."""
    device, dtype = device_of(run.network), DTYPES[run.recipe.dtype]
    images, _ = next(iter(data.loader(False, COMPARED_IMAGES, device=device, dtype=dtype)))
    random = seeded(run.recipe.seed, "predictions", device=device)
    with torch.no_grad(), evaluating(run.network), random:
        given = run.network(images).float().softmax(1).cpu()
    there = given.gather(1, run.predicted[: len(images), None])[:, 0]
    apart = (there - run.probability[: len(images)]).abs().mean().item()
    return apart <= PROBABILITIES_APART  # as NaN is not


def check_trainable(network: nn.Module, data: Dataset, recipe: Recipe) -> None:
    """Raises an error of one sentence if the recipe cannot train the network on the data."""
    check_instance(network, nn.Module, "a network", "nl.build_network(…) gives one")
    make_optimizer(network, recipe)
    check_network(network, data.input_shape, len(data.classes))
    if recipe.l1:
        with evaluating(network):  # where a spectral norm takes no step
            l1_penalty(network, over=recipe.l1_over)


def move(network: nn.Module, device: torch.device, recipe: Recipe) -> None:
    """Moves the network to the device, in the recipe's dtype."""
    check_dtype(device, recipe.dtype)
    network.to(device=device, dtype=DTYPES[recipe.dtype])


# --- those of an assignment ------------------------------------------------------------------


def make_jobs(
    assignment: Assignment,
    data: Dataset,
    seeds: list[int],
    epochs: int | None,
    place: Path,
    kept: str | Path | None = None,
) -> list[Job]:
    """A job for each variant and seed; a first seed of everything before the second of anything."""
    return [
        Job(
            partial(build_variant, assignment, variant, data, seed=seed),
            assignment.recipe_for(variant, seed=seed, epochs=epochs),
            place / variant.folder / f"seed-{seed}",
            f"{variant.label}, seed {seed}",
            variant,
            None if kept is None else user_path(kept) / variant.folder / f"seed-{seed}",
        )
        for seed in seeds
        for variant in assignment.variants
    ]


@torch.inference_mode(False)  # what is built in inference mode could not be trained
def build_variant(
    assignment: Assignment, variant: Variant, data: Dataset, *, seed: int
) -> nn.Module:
    """The untrained network of one variant, with the same initial weights for the same seed."""
    if assignment.build is not None:
        with seeded(seed, "weights"):
            network = assignment.build(variant.norm)
        check_instance(network, nn.Module, f"what build returns for {variant.norm!r}", "return it")
        return network
    return build_network(
        assignment.network,
        variant.norm,
        groups=variant.groups,
        dropout=assignment.dropout,
        skip=variant.skip,
        classes=len(data.classes),
        input_shape=data.input_shape,
        seed=seed,
    )


def say_limits(assignment: Assignment, jobs: Iterable[Job]) -> None:
    """Says which variants have more parameters or epochs than the assignment allows."""
    for job in {job.variant.label: job for job in jobs}.values():
        counts = {"parameters": job.identity["parameters"], "epochs": job.recipe.epochs}
        for what, limit in assignment.limits.items():
            if counts[what] > limit:
                said = f"{job.variant.label} has {counts[what]:,} {what}"
                print(f"{said}, more than the {limit:,} that are allowed")


# --- those that are done ---------------------------------------------------------------------


def find_runs(jobs: Iterable[Job], data: Dataset, device: torch.device) -> dict[Job, Run]:
    """The runs of the jobs that are done; raises `ValueError` as `Job.find`."""
    return {job: run for job in jobs if (run := job.find(data, device))}


def find_all(jobs: Iterable[Job], data: Dataset, device: torch.device) -> dict[Path, Run]:
    """The runs of the jobs that are done, by their directories: those that are kept, or their own.

    Says why kept runs are not taken, if there are any.
    """
    found, problem = {}, ""
    for job in jobs:
        try:
            run = job.find(data, device, kept=True)
        except ValueError as error:
            run, problem = None, problem or str(error).partition(": choose another")[0]
        if run := run or job.find(data, device):
            found[job.directory] = run
    if problem:
        print(f"Not taken from the kept runs: {problem}")
    return found


# --- what becomes of jobs ---------------------------------------------------------------------


def results_of(
    outcomes: Outcomes, count: int, *, keep_going: bool = True, results: type | tuple = Run
) -> Outcomes:
    """Hands on those of `count` outcomes that are results; raises the first of the others.

    At the end, or without `keep_going` at once.
    """
    errors = []
    with closing(outcomes):
        for number, (job, outcome) in enumerate(outcomes, 1):
            if isinstance(outcome, results):
                yield job, outcome
                continue
            if not keep_going:
                raise outcome
            errors.append(outcome)
            if number < count:
                warn(f"{outcome}; the others go on")
    if errors:
        raise errors[0]


def warn_if_at_chance(job: Job, history: list[dict], data: Dataset) -> None:
    """Says so if a network has learned nothing in its first epochs."""
    if len(history) < CHANCE_EPOCHS:
        return
    accuracy = history[CHANCE_EPOCHS - 1]["train_accuracy"]
    chance = data.train_labels.bincount().max().item() / len(data.train_labels)
    if chance == 1:
        only = data.classes[data.train_labels[0]]
        warn(f"{job.label}: all training images have the label {only!r}: there is nothing to learn")
    elif accuracy < chance + min(0.02, (1 - chance) / 5):  # of what is left above chance
        warn(
            f"{job.label}: after {CHANCE_EPOCHS} epochs the training accuracy is {accuracy:.1%}, "
            "no better than always guessing one class: try another learning rate than "
            f"{job.recipe.lr:g}, less L1, or check the labels"
        )


def seed_numbers(seeds: int | Iterable[int]) -> list[int]:
    """3 is [0, 1, 2]; a list is itself. Raises `ValueError` for none, twice the same or below 0."""
    seeds = plain(seeds)
    if isinstance(seeds, Iterable) and not isinstance(seeds, str):
        numbers = [whole_number(seed, "each of seeds", least=0) for seed in seeds]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"seeds must name at least one seed, each once, not {numbers}")
        return numbers
    return list(range(whole_number(seeds, "seeds")))
