"""Which device to compute on, and how exactly it computes."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

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


def check_dtype(device: torch.device, dtype: str) -> None:
    """Raises `ValueError` of one sentence where a device cannot compute in a recipe's dtype."""
    lacks = device.type == "mps" and dtype in ("float64", "bfloat16")
    if device.type == "cuda" and dtype == "bfloat16":  # before Ampere it would be emulated
        lacks = not torch.cuda.is_bf16_supported(including_emulation=False)
    if lacks:
        raise ValueError(
            f"dtype {dtype!r} is not available on device '{device}': use dtype='float32', or "
            "device='cpu'"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left; Apple's GPUs have no class of error for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "MPS backend out of memory" in str(error)
    )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside the block float32 is computed as such, not in TF32 with its 11 bits of precision.

    GPUs from 2020 on have convolutions in TF32 unless told otherwise. torch has older and newer
    names for the settings, and does not tell the older ones where only the newer were used. All are
    put back afterwards.
    """
    b = torch.backends
    parts = [b.cuda.matmul]
    parts += [getattr(b.cudnn, name, None) for name in ("conv", "rnn")]
    parts += [getattr(b.mkldnn, name, None) for name in ("conv", "matmul")]
    exact = [(b.cudnn, "allow_tf32", False)]
    exact += [(part, "fp32_precision", "ieee") for part in parts if hasattr(part, "fp32_precision")]
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Please use the new API")
            for part, name, _ in reversed(exact):  # what is kept last is put back first
                with suppress(RuntimeError):
                    stack.callback(setattr, part, name, getattr(part, name))
            with suppress(RuntimeError):
                precision = torch.get_float32_matmul_precision()
                stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
            for part, name, value in exact:
                setattr(part, name, value)
        yield
