"""The optimisers, and gradient centralization: the table below names those of a `Recipe`.

Batch normalization centres every channel. Group and layer normalization share a mean among
channels: a filter whose weights do not sum to 0 gives its channel an offset that stays, and a few
large singular values of the gradients dominate each step. `centralize_gradients` removes the
offset, `Muon` makes all singular values about equal.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from normlab.penalties import WEIGHT_LAYERS
from normlab.support.filter_banks import by_matrix, centre
from normlab.support.tensor_checks import own_weight

PLAIN_FACTOR = 5.0  # times the rate, for the parameters that Muon does not orthogonalise

# Coefficients of Jordan et al. for the polynomial that brings singular values near 1 in few steps.
_NEWTON_SCHULZ, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def filters(network: nn.Module) -> list[Tensor]:
    """The weights of convolutions and linear layers that are trained; a shared one is counted once.

    The last layer is left out, since it makes the logits, and so are transposed convolutions, whose
    weights are (in, out, …). Raises `ValueError` for a layer whose weight is computed from others,
    as by `weight_norm`: no optimiser holds it.
    """
    # By the class of layer: the scale of an element-wise LayerNorm has many axes but no filters.
    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, WEIGHT_LAYERS)]
    transposed = nn.modules.conv._ConvTransposeNd
    weights = [own_weight(*each) for each in layers[:-1] if not isinstance(each[1], transposed)]
    last = layers[-1][1].weight if layers else None
    found = {id(weight): weight for weight in weights if weight is not None and weight is not last}
    return [weight for weight in found.values() if weight.requires_grad]


def centralize_gradients(optimizer: Optimizer, weights: list[Tensor]) -> None:
    """From its next step on, `optimizer` keeps the mean of each filter of `weights` at 0.

    A filter is the part of a weight (out, in, …) that makes one output. Means are subtracted from
    the gradients before each step, and from the weights after it, which matters in the first only.
    Source: Yong et al., "Gradient Centralization", 2020.
    """
    optimizer.register_step_pre_hook(
        lambda *_: centre([weight.grad for weight in weights if weight.grad is not None])
    )
    optimizer.register_step_post_hook(lambda *_: centre(weights))


class Muon(Optimizer):
    """SGD with Nesterov momentum whose steps are orthogonalised, for the `filters` of a network.

    A filter bank's step, as a matrix (out, in · kernel), is replaced by one with the same singular
    vectors whose singular values are all about 1: no direction is learned slower than another.
    All other parameters take the plain SGD step at `PLAIN_FACTOR` times the rate, without decay.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024;
    `torch.optim.Muon` is the same for matrices alone.

    Args:
        orthogonal: the filters, each (out, in, …); `plain` are the other parameters.
        lr: learning rate of the filters, a number or a tensor of one.
        momentum: factor of the earlier gradients in the running mean.
        weight_decay: of the filters, in units of the rate (Loshchilov & Hutter 2019).
    """

    def __init__(
        self,
        orthogonal: Iterable[Tensor],
        plain: Iterable[Tensor],
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        kinds = {True: list(orthogonal), False: list(plain)}
        groups = [{"params": each, "orthogonal": kind} for kind, each in kinds.items() if each]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step by the gradients that are there."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                move = self._move_filters if group["orthogonal"] else self._move_plain
                move(weights, [weight.grad for weight in weights], group)

    # Lists at a time: with filters as small as ours a call costs more than what it computes. torch
    # has no other functions of lists than these, which its own optimisers use.

    def _move_filters(self, weights: list[Tensor], gradients: list[Tensor], group: dict) -> None:
        buffers, momentum, rate = self._buffers(weights), group["momentum"], group["lr"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = by_matrix(orthogonalized, torch._foreach_lerp(gradients, buffers, momentum))
        # Larger where there are more filters than inputs.
        torch._foreach_mul_(updates, [max(1.0, len(w) / w[0].numel()) ** 0.5 for w in weights])
        torch._foreach_mul_(updates, rate)
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(weights, updates)

    def _move_plain(self, weights: list[Tensor], gradients: list[Tensor], group: dict) -> None:
        buffers, momentum = self._buffers(weights), group["momentum"]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        updates = torch._foreach_add(gradients, buffers, alpha=momentum)
        torch._foreach_mul_(updates, PLAIN_FACTOR * group["lr"])
        torch._foreach_sub_(weights, updates)

    def _buffers(self, weights: list[Tensor]) -> list[Tensor]:
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return [self.state[weight]["momentum_buffer"] for weight in weights]


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` (rows, columns) and singular values near 1.

    Or a batch of such matrices (B, rows, columns), in which rows and columns of zeros stay such.
    Five Newton–Schulz iterations leave the values between 0.7 and 1.2, close enough for a step, at
    a fraction of the cost of a decomposition. Source: as for `Muon`.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    # No singular value above 1, where the iteration converges.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    add_product = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        polynomial = add_product(square, square, square, beta=b, alpha=c)
        x = add_product(x, polynomial, x, beta=a)
    return x.mT if tall else x


def _sgd(weights: list[Tensor], banks: list[Tensor], lr: float | Tensor, recipe) -> SGD:
    options = {"weight_decay": recipe.weight_decay, "fused": isinstance(lr, Tensor) or None}
    nesterov = recipe.nesterov and recipe.momentum > 0
    return SGD(weights, lr, recipe.momentum, nesterov=nesterov, **options)


def _adam(weights: list[Tensor], banks: list[Tensor], lr: float | Tensor, recipe) -> Adam:
    kind = AdamW if recipe.optimizer == "adamw" else Adam
    options = {"weight_decay": recipe.weight_decay, "fused": isinstance(lr, Tensor) or None}
    return kind(weights, lr, capturable=isinstance(lr, Tensor) and lr.is_cuda, **options)


def _muon(weights: list[Tensor], banks: list[Tensor], lr: float | Tensor, recipe) -> Muon:
    chosen = set(map(id, banks))
    others = [weight for weight in weights if id(weight) not in chosen]
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    return Muon(banks, others, lr=lr, **options)


# Each makes an optimiser from the weights to train, the learning rate and the rest of the recipe;
# those in BY_FILTER also get the `filters` among the weights. On a GPU a step is replayed as a CUDA
# graph, without Python: take the rate as a tensor (torch's own do if they are fused), and keep all
# state in tensors.
OPTIMIZERS = {"sgd": _sgd, "adam": _adam, "adamw": _adam, "muon": _muon}
BY_FILTER = {"muon"}
