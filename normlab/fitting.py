"""`fit`: a network, images and a recipe become a `Run`, kept and resumed where wanted."""

from pathlib import Path

import torch
from torch import nn

from normlab.data import Dataset
from normlab.history import Run
from normlab.recipes import Recipe
from normlab.runs.jobs import Job
from normlab.runs.trainer import fit_job
from normlab.support.checks import check_instance
from normlab.support.files import user_path


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
            A folder that holds another run is refused; so is one whose network, with equal
            weights, gives other logits.
        device: "cpu", "cuda", "cuda:1", "mps"; without it, the fastest there is.
        progress: whether to say how far it is.
        label: what the progress calls the run.
        engine: "auto" for the fastest way through an epoch, "plain" for the loop of `train_epoch`.
            On a GPU the fastest first takes a few steps beside the plain loop, which trains if they
            differ, with a warning; "untried" leaves that out.

    Raises:
        ValueError: the network does not fit the data, or `directory` holds another run.
        FloatingPointError: the loss became infinite or no number; finished epochs are kept.
    """
    recipe = Recipe() if recipe is None else recipe
    check_instance(recipe, Recipe, "a recipe", "nl.Recipe(…) makes one")
    place = user_path(directory) if directory else None
    label = label or (place and place.name) or type(network).__name__
    job = Job(lambda: network, recipe, place, label)
    return fit_job(job, data, device=device, progress=progress, engine=engine)
