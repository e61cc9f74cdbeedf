"""The batch of small whole numbers on which everything is computed by hand."""

import torch
from torch import Tensor

# Chosen so that all means are whole, and so that the first number, 7, lies below the mean of its
# channel, on that of its group, and above those of its image and of its channel in all images. The
# standard deviations of these four are whole, too.
_CHANNELS = (
    ((7, 9, 7, 9), (7, 9, 5, 3), (6, 1, 0, 1), (9, 8, 7, 8)),  # image 1
    ((2, 4, 9, 5), (1, 5, 4, 2), (0, 3, 3, 2), (7, 7, 5, 5)),
    ((2, 8, 2, 8), (2, 0, 2, 0), (9, 8, 4, 3), (7, 9, 7, 9)),
    ((0, 3, 2, 3), (1, 1, 2, 4), (1, 2, 2, 3), (7, 4, 9, 4)),
)


def example_batch() -> Tensor:
    """Four images of four channels of 2×2 whole numbers from 0 to 9: float32 (4, 4, 2, 2).

    For each of BN, LN, IN and GN with two groups all means are whole numbers.
    """
    return torch.tensor(_CHANNELS, dtype=torch.float32).view(4, 4, 2, 2)
