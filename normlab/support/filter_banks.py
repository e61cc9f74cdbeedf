"""Weights as small as ours, many at a time: on a GPU a call costs more than what it computes.

A filter bank is the weight (out, in, …) of a convolution or linear layer, seen as a matrix (out,
in · kernel): one row for each filter.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

ONE_BY_ONE = ("cpu",)  # where tensors as small as ours are quicker one by one
LARGEST_BATCH = 2**20  # elements of all filter banks, filled up to the size of the largest


def are_taken_together(weights: Sequence[Tensor]) -> bool:
    """Whether that is quicker on the device where they are."""
    return weights[0].device.type not in ONE_BY_ONE


def in_memory_order(weight: Tensor) -> Tensor:
    """The weight (out, in, …) as it lies in memory, which is (out, …, in) if channels are last."""
    as_it_is = weight.is_contiguous() or weight.dim() < 3
    return weight if as_it_is else weight.movedim(1, -1)


@torch.no_grad()
def centre(banks: list[Tensor]) -> None:
    """Subtracts from each filter of the banks its mean."""
    if batch := batch_of(banks):
        centred = batch.centred(batch.gather(banks))
        torch._foreach_copy_(banks, batch.apart(centred, banks))
        return
    for bank in banks:
        bank.sub_(bank.mean(dim=tuple(range(1, bank.dim())), keepdim=True))


def by_matrix(change: Callable[[Tensor], Tensor], banks: list[Tensor]) -> list[Tensor]:
    """Banks whose matrices `change` has changed: one, or a batch of them filled up with zeros."""
    if batch := batch_of(banks):
        return batch.apart(change(batch.gather(banks)), banks)
    return [change(bank.flatten(1)).view_as(bank) for bank in banks]


class FilterBatch:
    """Filter banks of several sizes as one batch of matrices, and apart again.

    The matrices are filled up with zeros to the largest height and width. Their columns are in the
    order in which they lie in memory, so that banks that are laid out channels last need no copy.
    A look-up moves all elements at once.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sizes = [rows * columns for rows, columns in shapes]
        height, width = map(max, zip(*shapes, strict=True))
        starts = [end - size for size, end in zip(self.sizes, accumulate(self.sizes), strict=True)]
        self.zero = torch.zeros(1, dtype=dtype, device=device)
        nothing, places = sum(self.sizes), []
        for (rows, columns), start in zip(shapes, starts, strict=True):
            place = torch.arange(start, start + rows * columns, device=device)
            padding = (0, width - columns, 0, height - rows)
            places.append(F.pad(place.view(rows, columns), padding, value=nothing))
        self.places = torch.stack(places)  # (B, height, width), in all banks one after another
        self.back = self.places.flatten().argsort()[:nothing]
        shares = [self.zero.new_full((1, 1), -1 / columns) for _, columns in shapes]
        self.shares = torch.stack(shares)  # (B, 1, 1)

    def gather(self, banks: Sequence[Tensor]) -> Tensor:
        """The banks as matrices (B, height, width)."""
        elements = [in_memory_order(bank).flatten() for bank in banks]
        return torch.cat([*elements, self.zero])[self.places]

    def apart(self, matrices: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The matrices as banks, each of the shape and layout of its like."""
        parts = matrices.flatten()[self.back].split(self.sizes)
        return [_as(bank, part) for bank, part in zip(like, parts, strict=True)]

    def centred(self, matrices: Tensor) -> Tensor:
        """The matrices, from each row its mean subtracted; what fills them up is no longer 0."""
        return torch.addcmul(matrices, matrices.sum(-1, keepdim=True), self.shares)


def _as(bank: Tensor, elements: Tensor) -> Tensor:
    """Elements (N,) in the order of another bank's memory, in its shape and layout."""
    there = in_memory_order(bank)
    return elements.view_as(there) if there is bank else elements.view_as(there).movedim(-1, 1)


def batch_of(banks: Sequence[Tensor]) -> FilterBatch | None:
    """The batch that the banks make, where that is quicker than one after another."""
    kinds = {(bank.dtype, bank.device) for bank in banks}
    if len(kinds) != 1 or not are_taken_together(banks):
        return None
    shapes = tuple((len(bank), bank[0].numel()) for bank in banks)
    height, width = map(max, zip(*shapes, strict=True))
    if len(banks) * height * width > LARGEST_BATCH:
        return None
    return cached_batch(shapes, *kinds.pop())


# For good: a captured graph refers to the places in memory.
cached_batch = functools.cache(FilterBatch)
