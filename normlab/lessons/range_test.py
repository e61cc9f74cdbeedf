"""Finding a learning rate: the range test, which trains a moment at rates that grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from normlab import training
from normlab.data import Dataset
from normlab.engines.plain import step_options, training_batches
from normlab.recipes import Recipe, make_optimizer
from normlab.runs.jobs import check_trainable, move
from normlab.support.checks import check_instance, number, warn, whole_number
from normlab.support.colours import curve_styles
from normlab.support.devices import exact_float32, pick_device
from normlab.support.figures import drawn, label_axes, new_axes, place_legend, shortened
from normlab.support.module_state import copied, set_training
from normlab.support.seeding import seeded
from normlab.support.tensor_checks import check_weights
from normlab.support.type_hints import Axes, Figure

WINDOW = 9  # steps over which the median smooths the loss
MOST = 0.9  # of the fall of the loss: where it is made, the loss begins to slow down
LEAST_FALL = 0.05  # of the first loss; less is no fall but noise


@dataclass(frozen=True)
class RateTest:
    """What `find_rate` found.

    `rates` and `losses` have an entry for each step: its rate, and the mean cross-entropy of its
    batch in nats before the step; `smoothed` is the running median of the losses. `suggestion` is a
    rate for the recipe, None if the loss never fell. `diverged_at` is the rate at which the loss
    had risen to twice the first one or was no number any more, None if that did not happen.
    """

    recipe: Recipe
    rates: tuple[float, ...] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    smoothed: tuple[float, ...] = field(repr=False)
    suggestion: float | None
    diverged_at: float | None

    def plot(self, *, ax: Axes | None = None, title: str | None = None) -> Figure:
        """The losses over the rates, with the suggestion marked."""
        return plot_rates({self.recipe.optimizer: self}, ax=ax, title=title)


@torch.inference_mode(False)
@torch.enable_grad()
def find_rate(
    network: nn.Module,
    data: Dataset,
    recipe: Recipe | None = None,
    *,
    lowest: float = 1e-4,
    highest: float = 10.0,
    steps: int = 150,
    device: str | torch.device | None = None,
) -> RateTest:
    """Trains a copy of the network for some steps, each at a higher rate, and suggests one.

    The suggestion is the rate at which the smoothed loss has made nine tenths of its fall: the
    place "when the accuracy slows, becomes ragged, or starts to fall" that Smith takes for the
    highest rate of a cycle, which is what `Recipe.lr` is in the one-cycle schedule. It depends on
    the order of the images and on the number of steps, and is a rate to begin with, not the best:
    with Muon it trained to within a point of the tuned rate. With SGD (notebook 07) it was as good
    as the best of nine rates for BN and too high for LN, which it cost 12.6 ± 12.1 points.

    Args:
        network: maps images (B, C, H, W) to logits (B, classes); it is left as it is.
        data: its training images are used, augmented as the recipe says.
        recipe: how to train, but for its rate and schedule. Without it, `Recipe()`.
        lowest, highest: the first and the last rate; those between grow by the same factor.
        steps: how many rates, at least 20; the test ends earlier where the loss diverges.
        device: as for `fit`.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3.
    Raises `ValueError` if the network cannot be trained on the data, for rates that do not grow,
    and for a loss that is no number before the first step.
    """
    check_instance(network, nn.Module, "a network", "nl.build_network(…) gives one")
    check_instance(data, Dataset, "data", "nl.load_dataset(…) gives one")
    recipe = recipe if recipe is not None else Recipe()
    check_instance(recipe, Recipe, "a recipe", "nl.Recipe(…) makes one")
    lowest = number(lowest, "lowest", positive=True)
    highest = number(highest, "highest", positive=True)
    if lowest >= highest:
        raise ValueError(
            f"lowest must be below highest, so that the rates grow: not {lowest:g} and {highest:g}"
        )
    rates = np.geomspace(lowest, highest, whole_number(steps, "steps", least=20)).tolist()
    check_weights(network)
    twin, device = copied(network), pick_device(device)
    move(twin, device, recipe)
    check_trainable(twin, data, recipe)
    with exact_float32(), seeded(recipe.seed, "rates", device=device):
        losses = _losses(twin, data, recipe, rates, device)
    return _judged(recipe, rates, losses)


def _losses(
    network: nn.Module, data: Dataset, recipe: Recipe, rates: list[float], device: torch.device
) -> list[float]:
    """Trains until the loss has diverged; the loss of each batch before its step."""
    loader = training_batches(data, recipe, device)
    size = min(recipe.batch_size, len(data.train_images))
    batches = (batch for _ in rates for batch in loader if len(batch[1]) == size)  # none is short
    optimizer, options, losses = make_optimizer(network, recipe), step_options(recipe), []
    set_training(network)
    for rate, (images, labels) in zip(rates, batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits, _ = training.train_step(network, images, labels, optimizer, **options)
        losses.append(float(training.batch_sums(logits, labels)[0]) / size)
        if _has_diverged(losses):
            break
    return losses


def _has_diverged(losses: list[float]) -> bool:
    """Whether the last loss is no number, or the last five are mostly twice the first."""
    return not math.isfinite(losses[-1]) or float(np.median(losses[-5:])) > 2 * losses[0]


def _judged(recipe: Recipe, rates: list[float], losses: list[float]) -> RateTest:
    """The result of a test that gave these losses at the first of these rates."""
    import pandas

    if not math.isfinite(losses[0]):
        raise ValueError(
            f"the loss is {losses[0]} before the first step, whatever the rate: check the weights "
            "of the network"
        )
    diverged_at = rates[len(losses) - 1] if _has_diverged(losses) else None
    finite = [loss for loss in losses if math.isfinite(loss)]
    rates = rates[: len(finite)]
    # A median has no lag, and a lone spike leaves no trace in it.
    smoothed = pandas.Series(finite).rolling(WINDOW, center=True, min_periods=1).median()
    fallen, suggestion = smoothed[0] - smoothed, None
    if fallen.max() >= LEAST_FALL * smoothed[0]:
        suggestion = float(f"{rates[(fallen >= MOST * fallen.max()).argmax()]:.2g}")
    else:
        warn(
            f"the loss never fell from {finite[0]:.3g} at the rates from {rates[0]:.2g} to "
            f"{rates[-1]:.2g}: there is no rate to suggest; try another `lowest`, or more `steps`"
        )
    smoothed = tuple(smoothed.tolist())
    return RateTest(recipe, tuple(rates), tuple(finite), smoothed, suggestion, diverged_at)


@drawn
def plot_rates(
    results: Mapping[str, RateTest], *, ax: Axes | None = None, title: str | None = None
) -> Figure:
    """The range tests of several networks in one figure: smoothed losses over the rates.

    The losses of the single batches lie pale behind them. A marker shows each suggestion, which
    the legend names. Raises `ValueError` if there are no results.
    """
    if not results:
        raise ValueError("there are no range tests to plot")
    ax = ax if ax is not None else new_axes(6.8, 4.2, names=len(results))
    lines, styles = [], curve_styles(results)
    for label, found in results.items():
        rate, style = found.suggestion, styles[label]
        marked = [] if rate is None else [int(np.argmin(abs(np.log(found.rates) - math.log(rate))))]
        style |= {"markersize": 8, "markevery": marked} if marked else {"marker": None}
        name = f"{label}: {'none' if rate is None else f'{rate:g}'}"
        ax.plot(found.rates, found.losses, color=style["color"], alpha=0.2, linewidth=0.8)
        lines += ax.plot(found.rates, found.smoothed, label=name, **style)
    ax.set_ylim(0, 1.6 * max(found.smoothed[0] for found in results.values()))  # not what diverges
    ax.set_xscale("log")
    heading = title if title is not None else "Learning-rate range test"
    label_axes(ax, heading, "learning rate", "cross-entropy of a batch (nats per image)")
    labels = [shortened(line.get_label()) for line in lines]
    place_legend(ax, "upper left", labels, handles=lines, title="suggested rate")
    return ax.figure
