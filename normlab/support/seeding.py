"""Random numbers that depend on a seed and a purpose, never on what ran before."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def derive_seed(seed: int, *purpose: object) -> int:
    """A seed of 63 bits for one purpose, such as `(seed, "order", epoch)`.

    Streams for different purposes are independent, so that drawing more numbers for one of them
    (dropout, say) leaves the others (the order of images) as they are. And since an epoch's
    numbers follow from its number, a resumed run needs no saved random state.
    """
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose: the same numbers whatever device the training runs on."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: object, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside the block the global generators of the CPU and of `device` start from a derived seed.

    Afterwards they are as they were, so that a library call never moves a student's own stream.
    """
    device = torch.device(device)
    with fork_random_state(device):
        derived = derive_seed(seed, *purpose)
        torch.default_generator.manual_seed(derived)  # torch.manual_seed would seed every device
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derived)
        elif device.type == "mps":
            torch.mps.manual_seed(derived)
        yield


def fork_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random state of the CPU and of `device` at the end of the block."""
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type)
