"""What goes on inside a network while it trains: `watch` records a few numbers of each layer.

The network itself is not touched: the hooks are torch's global ones, which see every module and
every optimiser and pick out what belongs to the network. Closing the watch removes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from normlab.optimizers import PLAIN_FACTOR
from normlab.penalties import small_share
from normlab.support.checks import instance, whole_number

if TYPE_CHECKING:
    from pandas import DataFrame

CONVOLUTION, LINEAR, NORM = "convolution", "linear", "norm"
KINDS = {
    CONVOLUTION: (nn.modules.conv._ConvNd,),
    LINEAR: (nn.Linear,),
    NORM: (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm),
}

PERCENTILES = (5, 25, 50, 75, 95)
# How many values the percentiles are estimated from, of how many images: sorting all takes long.
_SAMPLE, _SAMPLE_IMAGES = 8192, 16

WATCHED = (
    *("mean", "std", *(f"percentile_{share}" for share in PERCENTILES), "dead"),
    *("weight_norm", "gradient_norm", "small_weights", "rate", "effective_rate"),
    *("running_mean", "running_variance"),
)

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


def watch(network: nn.Module, *, every: int = 20) -> Watch:
    """Records what happens in the network's layers while it trains, until it is closed.

        with nl.watch(network) as inside:
            nl.fit(network, data, recipe)
        inside.frame()

    Args:
        network: with convolutions or linear layers; it is left as it is, and trains to the same
            weights.
        every: records the steps 0, `every`, 2 · `every`, …, where step n is the one that n changes
            of the weights came before.

    A step is seen where the network, in training mode, is called and an optimiser of `torch.optim`
    then changes its weights: by `train_epoch`, a loop of one's own, or `fit`, which leaves CUDA
    graphs aside for a network that is watched. Recorded are, for the layers of `KINDS`:

    - "mean", "std", "percentile_5", …, "percentile_95" of the layer's output over the whole batch,
      the percentiles from a sample of some 8,000 values;
    - "dead", for a convolution or linear layer that a ReLU follows, directly or after other layers:
      the share of its channels that the ReLU makes 0 for all images of the batch at all positions;
    - "weight_norm" and "gradient_norm", Euclidean, of the layer's `weight` before the step; the
      gradient is that of the whole loss, with its penalty, before the optimiser changes it;
    - "small_weights", of convolutions and linear layers: the share of weights with |w| < 10⁻³;
    - "rate" and "effective_rate", of the same: the learning rate of the step, and rate / ‖w‖²,
      which is what counts for SGD where a norm makes the weights' length meaningless (van
      Laarhoven, "L2 Regularization versus Batch and Weight Normalization", 2017). It is recorded
      for every optimiser; but the steps of Muon and AdamW do not depend on the gradient's size, so
      that with them rate / ‖w‖ would count, "rate" / "weight_norm";
    - "running_mean" and "running_variance" of BN: means over its channels, after the batch.

    Raises `ValueError` for a network without parameters, without convolutions and linear layers,
    and for `every` below 1.
    """
    instance(network, nn.Module, "a network", "nl.build_network(…) gives one")
    return Watch(network, every=whole_number(every, "every"))


class Watch:
    """What `watch` returns: a context manager that closes at the end of its block.

    `network` and `every` are what it was given; `steps` counts the training steps seen so far.
    """

    def __init__(self, network: nn.Module, *, every: int) -> None:
        self.network, self.every, self.steps = network, every, 0
        self._layers = _layers_of(network)
        self._rows: dict[tuple[int, str, str], float] = {}
        self._step: int | None = None  # the number of the step to record, if it is one
        self._counted = True
        self._values: dict[tuple[str, str], Tensor] = {}  # of the forward pass, until a step
        self._last: nn.Module | None = None  # the layer with channels that ran last
        self._relus: _Relus | None = None  # there only while a pass is being recorded
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
            register_optimizer_step_pre_hook(self._at_step),
        ]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops recording and removes every hook; what was recorded stays."""
        self._end_pass()
        while self._handles:
            self._handles.pop().remove()

    def frame(self) -> DataFrame:
        """A row for each number: step, layer, kind (of `KINDS`), quantity (of `WATCHED`), value.

        The layers of a step stand in the order in which they ran. Raises `ValueError` if no
        training step was seen.
        """
        import pandas as pd

        if not self._rows:
            raise ValueError(
                "nothing was recorded: a watch sees steps in which the network itself is called in "
                "training mode and a torch.optim optimiser then changes its weights"
            )
        kinds = dict(self._layers.values())
        rows = [(*key[:2], kinds[key[1]], key[2], value) for key, value in self._rows.items()]
        return pd.DataFrame(rows, columns=["step", "layer", "kind", "quantity", "value"])

    # --- the forward pass ---------------------------------------------------------------------

    def _before(self, module: nn.Module, _: object) -> None:
        if module is not self.network or not (module.training and torch.is_grad_enabled()):
            return
        self._end_pass()  # one that was interrupted
        self._counted = False
        self._step = self.steps if self.steps % self.every == 0 else None
        if self._step is None:
            return
        _refuse_capture()
        self._values, self._last = {}, None
        self._relus = _Relus(self._add_dead)
        self._relus.__enter__()

    def _after(self, module: nn.Module, _: object, output: object) -> None:
        if self._relus is not None and module in self._layers and isinstance(output, Tensor):
            name, kind = self._layers[module]
            self._last = module if kind != NORM else self._last
            self._add(name, _distribution(output))
        if module is self.network:
            self._end_pass()

    def _end_pass(self) -> None:
        if self._relus is not None:
            self._relus.__exit__(None, None, None)
            self._relus = None

    def _add_dead(self, output: Tensor) -> None:
        """Of a ReLU's output, for the layer before it, if none came between."""
        if self._last is None:
            return
        name, kind = self._layers[self._last]
        axis, channels = _channels_of(self._last, kind)
        if output.dim() > (2 if kind == CONVOLUTION else 1) and output.shape[axis] == channels:
            self._add(name, {"dead": _dead_share(output, axis)})
            self._last = None

    def _add(self, layer: str, values: dict[str, Tensor]) -> None:
        self._values |= {(layer, quantity): value for quantity, value in values.items()}

    # --- the step -----------------------------------------------------------------------------

    def _at_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Before an optimiser's step; where several share the network, each adds its part."""
        if self._step is None and self._counted:
            return
        held = dict(_rates(optimizer))
        if not any(id(weight) in held for weight in self.network.parameters()):
            return
        if self._step is not None:
            for layer, (name, kind) in self._layers.items():
                self._add(name, _weights(layer, kind, held.get(id(layer.weight))))
            self._keep(self._step)
        if not self._counted:
            self.steps, self._counted = self.steps + 1, True

    def _keep(self, step: int) -> None:
        """Moves the numbers from the device, all at once.

        Those that are there stay: a second optimiser comes when the first has changed its weights.
        """
        numbers = torch.stack([value.double() for value in self._values.values()]).tolist()
        for (layer, quantity), value in zip(self._values, numbers, strict=True):
            self._rows.setdefault((step, layer, quantity), value)
        self._values = {}


def _layers_of(network: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """The layers to watch, with their name in the network and their kind."""
    what = type(network).__name__
    if next(network.parameters(), None) is None:
        raise ValueError(f"{what} has no parameters, so that there is no training to watch")
    layers = {
        layer: (name or what, kind)
        for name, layer in network.named_modules()
        for kind, classes in KINDS.items()
        if isinstance(layer, classes)
    }
    if all(kind == NORM for _, kind in layers.values()):
        raise ValueError(f"{what} has no convolution or linear layer to watch")
    return layers


def _channels_of(layer: nn.Module, kind: str) -> tuple[int, int]:
    """On which axis of its output a layer has its channels, and how many."""
    return (1, layer.out_channels) if kind == CONVOLUTION else (-1, layer.out_features)


def _refuse_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "watch cannot record inside a CUDA graph, whose steps are replayed without Python: "
            "take the steps one by one, or call fit after watch, which then does"
        )


class _Relus(TorchFunctionMode):
    """While it is entered, hands on the output of every ReLU, be it a layer or a function."""

    def __init__(self, found: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        output = function(*args, **(kwargs or {}))
        if function in _RELUS:
            self._found(output)
        return output


# --- the numbers -----------------------------------------------------------------------------


@torch.no_grad()
def _distribution(output: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation (over the count) and percentiles of all values."""
    output = output if output.dtype == torch.float64 else output.float()  # from half precision
    mean = output.mean()
    std = (output - mean).norm() / output.numel() ** 0.5  # torch.std takes seven times as long
    shares = torch.tensor(PERCENTILES, dtype=output.dtype, device=output.device) / 100
    quantiles = torch.quantile(_sampled(output), shares)
    names = (f"percentile_{share}" for share in PERCENTILES)
    return {"mean": mean, "std": std, **dict(zip(names, quantiles, strict=True))}


def _sampled(output: Tensor) -> Tensor:
    """Some `_SAMPLE` values (count,): all channels, at places spread over images and positions.

    Without random numbers, so that the training draws the same ones with and without a watch.
    """
    values = output.flatten(2) if output.dim() > 2 else output.unsqueeze(-1)  # (N, C, positions)
    values = _spread(values, 0, _SAMPLE_IMAGES)
    return _spread(values, 2, max(1, _SAMPLE // values[..., 0].numel())).flatten()


def _spread(values: Tensor, axis: int, count: int) -> Tensor:
    """At most `count` places along an axis, at equal distances."""
    size = values.shape[axis]
    if size <= count:
        return values
    places = torch.arange(count, device=values.device) * size // count
    return values.index_select(axis, places)


@torch.no_grad()
def _dead_share(output: Tensor, axis: int) -> Tensor:
    """The share of the channels on an axis that are 0 everywhere in a ReLU's output."""
    highest = output.movedim(axis, 0).flatten(1).amax(dim=1)
    return (highest == 0).double().mean()


def _rates(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, float]]:
    """The learning rate of each weight of the optimiser, by the weight's id."""
    for group in optimizer.param_groups:
        plain = group.get("orthogonal") is False  # Muon's other weights
        rate = float(group["lr"]) * (PLAIN_FACTOR if plain else 1)
        for weight in group["params"]:
            yield id(weight), rate


@torch.no_grad()
def _weights(layer: nn.Module, kind: str, rate: float | None) -> dict[str, Tensor]:
    """What the layer's weights say at a step; `rate` is None if this optimiser has them not."""
    values = {}
    if getattr(layer, "running_mean", None) is not None:
        values["running_mean"] = layer.running_mean.mean()
        values["running_variance"] = layer.running_var.mean()
    if layer.weight is None:
        return values
    values["weight_norm"] = length = layer.weight.norm()
    if layer.weight.grad is not None:
        values["gradient_norm"] = layer.weight.grad.norm()
    if kind != NORM:
        values["small_weights"] = small_share(layer.weight)
        if rate is not None:
            values["rate"] = torch.full_like(length, rate)
            values["effective_rate"] = rate / length**2
    return values
