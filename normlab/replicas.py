"""One training over several processes: who is here, and what they tell each other.

`torchrun` starts the processes and says in the environment how they find each other; torch's own
`torch.distributed` carries the messages, with gloo between CPUs and NCCL between GPUs.
"""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from normlab.checks import one_of

T = TypeVar("T")

PATIENCE = timedelta(minutes=5)  # for the slowest thing that others wait for: decoding images


@dataclass(frozen=True)
class Replicas:
    """The processes that train one network together.

    Args:
        rank: which of them this is, from 0 on; the first one writes and prints.
        count: how many there are.
        sync_batch_norm: whether batch normalization takes its statistics over all of them.
        device: the kind that they train on, "cpu" or "cuda"; None where one process is free to
            pick.
    """

    rank: int = 0
    count: int = 1
    sync_batch_norm: bool = False
    device: str | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0


_here = Replicas()


def replicas() -> Replicas:
    """The processes that this one belongs to: itself alone outside `data_parallel`."""
    return _here


@contextmanager
def data_parallel(
    *, sync_batch_norm: bool = False, device: str | None = None
) -> Iterator[Replicas]:
    """Inside the block every training is shared by the processes that `torchrun` started.

    Each process holds its share of every batch. Started without `torchrun`, or by it as the only
    process, nothing changes. Dropout by `nn.Dropout` and `nn.Dropout2d` is drawn for the whole
    batch; any other randomness of a network is the same in every share.

    Args:
        sync_batch_norm: whether batch normalization takes its statistics over the whole batch
            rather than over each process's share.
        device: "cpu" or "cuda"; without it, CUDA where there is a GPU for each process.

    Raises `RuntimeError` of one sentence when the processes do not find each other, or when one
    of them ends or does not answer; `ValueError` for another device, and for fewer GPUs than
    processes. Told to end by `torchrun`, the process does so with one sentence.
    """
    global _here
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield _here
        return
    device = _device_for_all(device)
    with _told_to_end():
        _join(device)
        _here = Replicas(dist.get_rank(), count, sync_batch_norm, device)
        try:
            yield _here
        except RuntimeError as error:
            if not _is_of_the_connection(error):
                raise
            raise RuntimeError(
                f"process {_here.rank} lost another of the {count}, which ended or did not answer "
                f"for {PATIENCE.seconds // 60} minutes; the same command goes on after the last "
                "epoch that was kept"
            ) from error
        finally:
            _here = Replicas()
            _part()


def _device_for_all(device: str | None) -> str:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    gpus = torch.cuda.device_count()  # this machine's, as are the processes counted
    if device is None:
        return "cuda" if gpus >= here else "cpu"
    one_of(device, ("cpu", "cuda"), "device of several processes")
    if device == "cuda" and gpus < here:
        raise ValueError(
            f"each of the {here} processes on this machine needs a GPU of its own, and torch sees "
            f"{gpus}: start fewer, or take the cpu"
        )
    return device


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Turns SIGTERM, by which torchrun ends the processes that are left, into one sentence.

    It comes a tenth of a second after another process died: often before that is noticed here.
    """
    if threading.current_thread() is not threading.main_thread():  # Python has it there alone
        yield
        return

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(
            f"normlab: process {os.environ['RANK']} was told to end, as torchrun tells the others "
            "when one ends; what was kept is kept, and the same command takes it up"
        )

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _join(device: str) -> None:
    # torch imports this with the first DistributedDataParallel, and its functions then hold the
    # group of that moment for good (`group=group.WORLD`): imported before, there is none to hold.
    import torch.distributed.nn.functional

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"the processes of this training did not find each other at {where}: is the address "
            f"right, and the port free? ({' '.join(str(error).split())[:200]})"
        ) from error


def _part() -> None:
    """Ends the group and its threads: one that outlives the interpreter aborts the process."""
    gc.collect()  # a DistributedDataParallel is a cycle and holds the group
    dist.destroy_process_group()


def _is_of_the_connection(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in words)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them.

    The others do not call it. An error there is raised in all.
    """
    if _here.count == 1:
        return make()
    told: list = [None, None]
    if _here.is_first:
        try:
            told[0] = make()
        except Exception as error:  # whatever it is, the others wait to hear of it
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def gathered(what: T) -> list[T]:
    """What each process says, in the order of their ranks."""
    if _here.count == 1:
        return [what]
    told: list = [None] * _here.count
    dist.all_gather_object(told, what)
    return told


def first_before_others(make: Callable[[], T]) -> T:
    """What `make` returns, called here; by the others when the first one is done.

    So a download or a cache is made once. An error in the first process is raised in all.
    """
    made: list[T] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else make()


def summed(*values: float) -> list[float]:
    """The sums of each value over all processes, in double precision."""
    if _here.count == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    if _here.device == "cuda":
        total = total.cuda()
    dist.all_reduce(total)
    return total.tolist()
