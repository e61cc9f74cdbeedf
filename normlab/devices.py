"""Which device to compute on."""

import torch

from normlab.checks import one_of


def available_devices() -> list[str]:
    """The kinds of device that this torch sees here, fastest first."""
    kinds = []
    if torch.cuda.is_available():
        kinds.append("cuda")
    if torch.backends.mps.is_available():
        kinds.append("mps")
    return [*kinds, "cpu"]


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device to use: the one asked for, else CUDA, then MPS, then the CPU.

    Raises `ValueError` for an unknown name and for a device that is not here.
    """
    if device is None:
        return torch.device(available_devices()[0])
    kind, _, index = str(device).partition(":")
    one_of(kind, ("cpu", "cuda", "mps"), "device")
    if kind not in available_devices():
        raise ValueError(
            f"device {str(device)!r} is not available to torch {torch.__version__} on this "
            f"machine, which has {', '.join(available_devices())}"
        )
    if index and not (
        index.isdigit() and (kind != "cuda" or int(index) < torch.cuda.device_count())
    ):
        count = torch.cuda.device_count() if kind == "cuda" else 1
        raise ValueError(f"device {str(device)!r} does not exist: there are {count} of that kind")
    return torch.device(device)
