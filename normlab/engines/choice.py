"""Which way through an epoch: the fastest that the device, the network and the data allow."""

import torch
from torch import nn

from normlab.data import BatchLoader
from normlab.engines.agreement import disagreement
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine, layout_for
from normlab.engines.plain import PlainEngine
from normlab.recipes import Recipe
from normlab.support.checks import one_of
from normlab.support.module_state import copied, has_hooks, set_training
from normlab.support.seeding import fork_random_state

ENGINES = ("auto", "plain", "untried")

TRIED_ON = ("cuda",)  # where a quick engine must agree with the plain loop before it is used


def make_engine(
    choice: str, network: nn.Module, recipe: Recipe, train: BatchLoader, test: BatchLoader
) -> tuple[PlainEngine, str]:
    """The engine for a network on its device, and in a few words why this one.

    `choice` is "auto", or "plain" for the loop of `training.py` whatever the device.
    """
    one_of(choice, ENGINES, "engine")
    kind, why = PlainEngine, f"asked for by engine={choice!r}"
    if choice != "plain":
        kind, why = _fastest(network, recipe, train, train.images.device)
    return kind(network, recipe, train, test), why


def disagreement_of(engine: PlainEngine, choice: str) -> str:
    """What an engine computes otherwise than the plain loop; it is tried on a GPU only.

    The choice "untried" leaves that out.
    """
    if engine.device.type not in TRIED_ON or choice == "untried" or type(engine) is PlainEngine:
        return ""
    return disagreement(engine)


def _fastest(
    network: nn.Module, recipe: Recipe, train: BatchLoader, device: torch.device
) -> tuple[type[PlainEngine], str]:
    if device.type not in ("cpu", "cuda"):
        return PlainEngine, f"there is no faster way on {device.type}"
    if device.type == "cuda" and train.dtype == torch.float64:
        return PlainEngine, "float64 is for exact comparisons, and a GPU's fused optimiser is not"
    if device.type == "cuda" and has_hooks(network):
        return PlainEngine, "a CUDA graph calls no hooks, and there are some (a watch has them)"
    channels_last = device.type == "cpu" or layout_for(recipe) == torch.channels_last
    if channels_last and (problem := _channels_last_problem(network, train)):
        return PlainEngine, f"the network does not run channels last: {problem}"
    if device.type == "cpu":
        return CpuEngine, "channels last, quick dropout, kept memory: the fastest measured"
    return GraphEngine, "a step replayed as one CUDA graph does not wait for Python"


def _channels_last_problem(network: nn.Module, train: BatchLoader) -> str:
    """What a copy of the network raises on channels-last images; `.view` in its forward, say."""
    device = train.images.device
    images = torch.zeros(2, *train.images.shape[1:], dtype=train.dtype, device=device)
    try:
        twin = copied(network).to(memory_format=torch.channels_last)
        set_training(twin)
        with fork_random_state(device):
            twin(images.contiguous(memory_format=torch.channels_last)).sum().backward()
    except torch.OutOfMemoryError:
        raise  # the plain path would not fit either
    except (RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""
