"""What there is to train: a variant, a seed and a folder for each run, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from normlab.assignments import Assignment, Variant, build_variant
from normlab.data import Dataset
from normlab.fitting import Job, check_trainable, is_done, load_run
from normlab.recipes import Recipe
from normlab.runs.identity import description, digest_of
from normlab.runs.processes import is_worthwhile
from normlab.support.checks import check_instance, plain, whole_number
from normlab.support.summaries import multiply_adds

# Trainings in flight at once on a GPU, each of which holds the memory of its own captured steps.
TOGETHER = 8


@dataclass(frozen=True)
class Plan:
    """One run of an assignment: a variant and a seed, and the folder for it, or a kept one."""

    assignment: Assignment
    variant: Variant
    recipe: Recipe
    directory: Path
    kept: bool = False

    @property
    def label(self) -> str:
        return f"{self.variant.label}, seed {self.recipe.seed}"

    @property
    def epochs(self) -> int:
        return self.recipe.epochs

    def job(self, data: Dataset) -> Job:
        """The untrained network, ready for `fit_together`."""
        network = build_variant(
            self.assignment,
            self.variant,
            seed=self.recipe.seed,
            classes=len(data.classes),
            input_shape=data.input_shape,
        )
        check_instance(
            network, nn.Module, f"what build returns for {self.variant.norm!r}", "return it"
        )
        return Job(network, self.recipe, self.directory, self.label, only_read=self.kept)

    def digest(self, data: Dataset) -> str:
        """The run's `digest_of`."""
        return digest_of(description(self.job(data).network, data, self.recipe))


def plan_runs(
    assignment: Assignment, seeds: list[int], epochs: int | None, place: Path
) -> list[Plan]:
    """All runs; a first seed of everything before the second of anything."""
    return [
        Plan(
            replace(assignment, variants=(variant,)),  # to be sent without the others
            variant,
            assignment.recipe_for(variant, seed=seed, epochs=epochs),
            place / variant.folder / f"seed-{seed}",
        )
        for seed in seeds
        for variant in assignment.variants
    ]


def with_kept(
    plans: list[Plan], place: Path, kept: Path, data: Dataset, device: torch.device
) -> list[Plan]:
    """The plans, those whose finished run lies in `kept` with its folder there for their own."""
    there = [
        replace(plan, directory=kept / plan.directory.relative_to(place), kept=True)
        for plan in plans
    ]
    found = _are_done(there, data, device)
    return [one if done else plan for one, plan, done in zip(there, plans, found, strict=True)]


def _are_done(plans: list[Plan], data: Dataset, device: torch.device) -> list[bool]:
    found, problem = [], ""
    for plan in plans:
        try:
            found.append(_is_done(plan, data, device))
        except ValueError as error:
            found.append(False)
            problem = problem or str(error)
    if problem:
        print(f"Not taken from the kept runs: {problem.partition(': choose another')[0]}")
    return found


def check_plans(plans: list[Plan], data: Dataset, device: torch.device) -> None:
    """Raises an error of one sentence unless every run can be trained; touches no file.

    To be called before the first run is trained, and before any is removed.
    """
    for plan in plans:
        job = replace(plan.job(data), directory=None)
        check_trainable(job.network, data, plan.recipe)
        is_done(job, data, device)  # without a folder: whether the device has the recipe's dtype


def left_to_do(plans: list[Plan], data: Dataset, device: torch.device) -> list[Plan]:
    """Those that are not finished. Raises `ValueError` if a folder holds another run."""
    return [plan for plan in plans if not _is_done(plan, data, device)]


def _is_done(plan: Plan, data: Dataset, device: torch.device) -> bool:
    """Whether it is finished; what cannot be loaded is told before others are trained."""
    done = is_done(plan.job(data), data, device)
    if done:
        load_run(plan.job(data), data, device)
    return done


def in_flight(plans: Sequence[Plan], device: torch.device) -> list[Sequence[Plan]]:
    """The plans in portions that are trained at once: several on a GPU, else one."""
    size = TOGETHER if device.type == "cuda" else 1
    return [plans[start : start + size] for start in range(0, len(plans), size)]


def say_what_is_left(left: int, plans: int) -> None:
    """Says that some runs are there already."""
    print(f"{plans - left} of {plans} runs are loaded, {left} trained")


def are_worth_processes(plans: list[Plan], data: Dataset) -> bool:
    """Whether the plans, done or not, end sooner side by side in processes of one thread."""
    forward = multiply_adds(plans[0].job(data).network, data.input_shape)
    work = 3 * forward * len(data.train_images) * sum(plan.epochs for plan in plans)
    return is_worthwhile(plans, work)


def seed_numbers(seeds: int | Iterable[int]) -> list[int]:
    """3 is [0, 1, 2]; a list is itself. Raises `ValueError` for none, twice the same or below 0."""
    seeds = plain(seeds)
    if isinstance(seeds, Iterable) and not isinstance(seeds, str):
        numbers = [whole_number(seed, "each of seeds", least=0) for seed in seeds]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"seeds must name at least one seed, each once, not {numbers}")
        return numbers
    return list(range(whole_number(seeds, "seeds")))
