"""What goes on inside a network while it trains: `watch` records a few numbers of each layer.

The network itself is not touched: the hooks are torch's global ones, which see every module and
every optimiser and pick out what belongs to the network. Closing the watch removes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from normlab.lessons.sparsity import small_share
from normlab.norms import is_norm
from normlab.optimizers import PLAIN_FACTOR
from normlab.support.checks import check_instance, whole_number
from normlab.support.type_hints import DataFrame

CONVOLUTION, LINEAR, NORM = KINDS = ("convolution", "linear", "norm")

PERCENTILES = (5, 25, 50, 75, 95)
SAMPLE = 8192  # how many values they are estimated from: sorting all takes long
QUANTITIES = (
    *("mean", "std", *(f"percentile_{share}" for share in PERCENTILES), "dead"),
    *("weight_norm", "gradient_norm", "small_weights", "rate", "effective_rate"),
    *("running_mean", "running_variance"),
)


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
    graphs aside for a network that is watched. Recorded are, for convolutions, linear layers and
    norms:

    - "mean", "std", "percentile_5", …, "percentile_95" of the layer's output over the whole batch,
      the percentiles from a sample of some 8,000 values;
    - "dead", for a convolution or linear layer that an `nn.ReLU` follows, directly or after other
      layers: the share of its channels that it makes 0 for all images of the batch everywhere;
    - "weight_norm" and "gradient_norm", Euclidean, of the layer's `weight` before the step; the
      gradient is that of the whole loss, with its penalty, before the optimiser changes it;
    - "small_weights", of convolutions and linear layers: the share of weights with |w| < 10⁻³;
    - "rate" and "effective_rate", of the same: the learning rate of the step, and rate / ‖w‖²,
      which is what counts for SGD where a norm makes the weights' length meaningless (van
      Laarhoven, "L2 Regularization versus Batch and Weight Normalization", 2017). The steps of Muon
      and AdamW do not depend on the gradient's size, so that with them rate / ‖w‖ counts;
    - "running_mean" and "running_variance" of BN: means over its channels, after the batch.

    Raises `ValueError` for a network without parameters, without convolutions and linear layers,
    and for `every` below 1.
    """
    check_instance(network, nn.Module, "a network", "nl.build_network(…) gives one")
    return Watch(network, every=whole_number(every, "every"))


class Watch:
    """What `watch` returns: a context manager that closes at the end of its block.

    `network` and `every` are what it was given; `steps` counts the training steps seen so far.
    """

    def __init__(self, network: nn.Module, *, every: int) -> None:
        self.network, self.every, self.steps = network, every, 0
        self._layers = _layers_of(network)
        self._rows: dict[tuple[int, str, str], Tensor] = {}  # by step, layer and quantity
        self._awaited = False  # whether a pass has been, and its step is yet to come
        self._recording = False  # whether this pass is one to record
        self._last: nn.Module | None = None  # the layer with channels that ran last
        self._hooks = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after),
            register_optimizer_step_pre_hook(self._at_step),
        ]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops recording and removes every hook; what was recorded stays."""
        while self._hooks:
            self._hooks.pop().remove()

    def frame(self) -> DataFrame:
        """A row for each number: step, layer, kind (of `KINDS`), quantity (of `QUANTITIES`), value.

        The layers of a step stand in the order in which they ran. Raises `ValueError` if no
        training step was seen.
        """
        import pandas as pd

        kinds = dict(self._layers.values())
        rows = [
            (step, layer, kinds[layer], quantity, float(value))
            for (step, layer, quantity), value in self._rows.items()
            if step < self.steps  # and not what was computed since the last one
        ]
        if not rows:
            raise ValueError(
                "nothing was recorded: a watch sees steps in which the network itself is called in "
                "training mode and a torch.optim optimiser then changes its weights"
            )
        return pd.DataFrame(rows, columns=["step", "layer", "kind", "quantity", "value"])

    def _before(self, module: nn.Module, _: object) -> None:
        if module is not self.network:
            return
        trains = module.training and torch.is_grad_enabled()
        self._awaited, self._last = self._awaited or trains, None
        self._recording = trains and self.steps % self.every == 0
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._recording and capturing:
            raise RuntimeError(
                "watch cannot record inside a CUDA graph, whose steps are replayed without Python: "
                "take the steps one by one, or call fit after watch, which then does"
            )

    def _after(self, module: nn.Module, _: object, output: object) -> None:
        if self._recording and isinstance(output, Tensor):
            if isinstance(module, nn.ReLU):
                self._add_dead(output)
            elif module in self._layers:
                name, kind = self._layers[module]
                self._last = module if kind != NORM else self._last
                for quantity, value in _distribution(output).items():
                    self._rows[self.steps, name, quantity] = value
        self._recording = self._recording and module is not self.network

    def _add_dead(self, output: Tensor) -> None:
        """Of a ReLU's output, for the layer before it, if none came between."""
        if self._last is None:
            return
        (name, kind), layer = self._layers[self._last], self._last
        axis, least = (1, 3) if kind == CONVOLUTION else (-1, 2)
        channels = layer.out_channels if kind == CONVOLUTION else layer.out_features
        if output.dim() >= least and output.shape[axis] == channels:
            highest = output.detach().movedim(axis, 0).flatten(1).amax(dim=1)
            self._rows[self.steps, name, "dead"] = (highest == 0).double().mean()
            self._last = None

    def _at_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Before an optimiser's step; where several share the network, each adds its part."""
        rates = _rates(optimizer)
        if not any(id(weight) in rates for weight in self.network.parameters()):
            return
        self.steps += self._awaited
        self._awaited, step = False, self.steps - 1
        if step >= 0 and step % self.every == 0:
            for layer, (name, kind) in self._layers.items():
                for quantity, value in _weights(layer, kind, rates).items():
                    # What is there stays: a second optimiser comes after the first one's changes.
                    self._rows.setdefault((step, name, quantity), value)


def _layers_of(network: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """The layers to watch, with their name in the network and their kind."""
    what = type(network).__name__
    if next(network.parameters(), None) is None:
        raise ValueError(f"{what} has no parameters, so that there is no training to watch")
    layers = {
        layer: (name or what, kind)
        for name, layer in network.named_modules()
        if (kind := _kind_of(layer)) is not None
    }
    if all(kind == NORM for _, kind in layers.values()):
        raise ValueError(f"{what} has no convolution or linear layer to watch")
    return layers


def _kind_of(layer: nn.Module) -> str | None:
    """Which of `KINDS` a layer is."""
    for kind, classes in ((CONVOLUTION, nn.modules.conv._ConvNd), (LINEAR, nn.Linear)):
        if isinstance(layer, classes):
            return kind
    return NORM if is_norm(layer) else None


@torch.no_grad()
def _distribution(output: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation (over the count) and percentiles of all values."""
    output = output if output.dtype == torch.float64 else output.float()  # from half precision
    mean = output.mean()
    std = (output - mean).norm() / output.numel() ** 0.5  # torch.std takes seven times as long
    values = output.flatten()
    # A step without a common divisor meets all channels and places alike. It is not random, so that
    # the training draws the same numbers with and without a watch.
    step = max(1, len(values) // SAMPLE)
    while math.gcd(step, len(values)) > 1:
        step += 1
    shares = torch.tensor(PERCENTILES, dtype=output.dtype, device=output.device) / 100
    quantiles = torch.quantile(values[::step], shares)
    names = (f"percentile_{share}" for share in PERCENTILES)
    return {"mean": mean, "std": std, **dict(zip(names, quantiles, strict=True))}


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """The learning rate of each weight of the optimiser, by the weight's id."""
    return {
        # Muon trains the weights that it does not orthogonalise at another rate.
        id(weight): float(group["lr"]) * (1 if group.get("orthogonal", True) else PLAIN_FACTOR)
        for group in optimizer.param_groups
        for weight in group["params"]
    }


@torch.no_grad()
def _weights(layer: nn.Module, kind: str, rates: dict[int, float]) -> dict[str, Tensor]:
    """What the layer's weights say at a step of an optimiser with these rates."""
    values, weight = {}, getattr(layer, "weight", None)
    if getattr(layer, "running_mean", None) is not None:
        values["running_mean"] = layer.running_mean.mean()
        values["running_variance"] = layer.running_var.mean()
    if weight is None:
        return values
    values["weight_norm"] = length = weight.norm()
    if weight.grad is not None:
        values["gradient_norm"] = weight.grad.norm()
    if kind != NORM:
        values["small_weights"] = small_share(weight)
        if (rate := rates.get(id(weight))) is not None:
            values["rate"] = torch.full_like(length, rate)
            values["effective_rate"] = rate / length**2
    return values
