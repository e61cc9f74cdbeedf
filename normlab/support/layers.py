"""Layers made one after another, each for the shape that the one before leaves."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from normlab.support.seeding import seeded

NormMaker = Callable[[int, tuple[int, int]], nn.Module]
"""Makes the normalization for (channels, (H, W))."""


class Residual(nn.Module):
    """body(x) + shortcut(x): He et al., "Deep Residual Learning", 2016."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


@dataclass
class LayerBuilder:
    """Makes layers one after another and keeps track of the shape (C, H, W) of their output."""

    network: str
    input_shape: tuple[int, int, int]
    norm: NormMaker
    dropout: Callable[[], nn.Module] | None
    skip: bool

    def __post_init__(self) -> None:
        self.shape = self.input_shape

    def conv(
        self, channels: int, then: str = "", *, kernel: int = 3, valid: bool = False
    ) -> nn.Module:
        """A convolution without bias, then layers by letters: N norm, R ReLU, D dropout.

        It is padded to keep height and width; `valid` means without padding.
        """
        before, height, width = self.shape
        lost = kernel - 1 if valid else 0
        self._move_to(channels, height - lost, width - lost)
        padding = 0 if valid else kernel // 2
        convolution = nn.Conv2d(before, channels, kernel, padding=padding, bias=False)
        return nn.Sequential(convolution, *self.after(then))

    def after(self, letters: str) -> list[nn.Module]:
        """Norm (N), ReLU (R) and dropout (D) for the current shape, in the order of the letters."""
        channels, *size = self.shape
        norm = functools.partial(self.norm, channels, tuple(size))
        makers = {"N": norm, "R": nn.ReLU, "D": self.dropout}
        return [makers[letter]() for letter in letters if makers[letter] is not None]

    def pool(self) -> nn.Module:
        """2×2 max pooling."""
        channels, height, width = self.shape
        self._move_to(channels, height // 2, width // 2)
        return nn.MaxPool2d(2)

    def head(self, classes: int) -> nn.Module:
        """Global average pooling, then a 1×1 convolution to the logits (B, classes)."""
        self.shape = (self.shape[0], 1, 1)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), self.conv(classes, kernel=1), nn.Flatten())

    def _move_to(self, channels: int, height: int, width: int) -> None:
        if min(height, width) < 1:
            raise ValueError(f"input_shape={self.input_shape} is too small for {self.network}")
        self.shape = (channels, height, width)


def draw_weights(network: nn.Module, seed: int) -> None:
    """Draws each convolution's weights from its own random stream, the same for every norm.

    Shortcuts are numbered last, so that the other weights are the same without them.
    """
    layers = [pair for pair in network.named_modules() if isinstance(pair[1], nn.Conv2d)]
    layers.sort(key=lambda pair: "shortcut" in pair[0])
    for index, (_, layer) in enumerate(layers):
        with seeded(seed, "weights", index):
            layer.reset_parameters()
