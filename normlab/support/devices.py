"""Which device to compute on."""

import torch

from normlab.support.checks import one_of


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
    kind, colon, index = str(device).partition(":")
    if kind.lower() == "gpu":
        raise ValueError(f"unknown device {str(device)!r}: a GPU is called cuda, or mps on a Mac")
    one_of(kind, ("cpu", "cuda", "mps"), "device")
    if kind not in available_devices():
        raise ValueError(
            f"device {str(device)!r} is not available to torch {torch.__version__} on this "
            f"machine, which has {', '.join(available_devices())}"
        )
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if colon and not (index.isdecimal() and int(index) < count):
        numbers = "0" if count == 1 else f"0 to {count - 1}"
        raise ValueError(f"device {str(device)!r} does not exist: {kind} has the number {numbers}")
    return torch.device(device)
