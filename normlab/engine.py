"""The fast ways through an epoch. They compute what the plain loop computes; `fit` chooses one.

`PlainEngine` is the loop of `training.py`. `CpuEngine` is the same loop with the tensors laid out
channels last, a dropout that draws its mask from random bits by the word, and memory that stays
with the process. `GraphEngine` puts a
whole step (picking the images, augmentation, network, loss, optimiser, the sums) into one CUDA
graph, so that an epoch is a few hundred replays without a word from the host.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.allocator import kept_memory
from normlab.checks import one_of
from normlab.data import Batches
from normlab.dropout import quick_dropout
from normlab.penalties import l1_penalty
from normlab.recipes import Recipe, make_optimizer, make_scheduler, schedule_factor
from normlab.seeding import fork_random_state, seeded
from normlab.training import EpochResult, test_epoch, train_epoch

ENGINES = ("auto", "plain")

Counted = Callable[[Iterable], Iterator]
"""Hands on the batches of an epoch and counts them for a display."""


class PlainEngine:
    """The loops of `training.py`, as a student would call them."""

    name = "plain"

    def __init__(self, network: nn.Module, recipe: Recipe, train: Batches, test: Batches) -> None:
        self.network, self.recipe, self.batches, self.tests = network, recipe, train, test
        self.device = train.images.device
        self.steps = len(train)
        self.optimizer = self.make_optimizer()
        self.loss = functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
        self.epoch = 0

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, whose state is kept in checkpoints."""
        return make_optimizer(self.network, self.recipe)

    def prepare(self) -> str:
        """Gets ready for the first epoch; says what is in the way, if anything."""
        return ""

    def launch(self, epoch: int) -> None:
        """Starts an epoch, where the device works on its own; otherwise only notes its number."""
        self.epoch = epoch

    def collect(self, counted: Counted) -> tuple[EpochResult, EpochResult]:
        """The results of training and testing in the epoch that was launched."""
        self.batches.epoch = self.epoch
        scheduler = make_scheduler(
            self.optimizer,
            self.recipe,
            self.recipe.epochs * self.steps,
            done=self.epoch * self.steps,
        )
        with self.around(), self.random_state():
            train = train_epoch(
                self.network,
                counted(self.batches),
                self.optimizer,
                loss=self.loss,
                scheduler=scheduler,
                l1=self.recipe.l1,
            )
            return train, test_epoch(self.network, self.tests)

    def last_rate(self, epoch: int) -> float:
        """The learning rate of the last step of an epoch."""
        factor = schedule_factor(self.recipe.schedule, self.recipe.epochs * self.steps)
        return self.recipe.lr * factor((epoch + 1) * self.steps - 1)

    def random_state(self) -> AbstractContextManager[None]:
        """The state from which this epoch's dropout is drawn."""
        return seeded(self.recipe.seed, "dropout", self.epoch, device=self.device)

    def around(self) -> AbstractContextManager[None]:
        """What holds while an epoch runs."""
        return nullcontext()


class CpuEngine(PlainEngine):
    """The plain loop, channels last, with quicker dropout, its memory kept from step to step."""

    name = "cpu-channels-last"

    @contextmanager
    def around(self) -> Iterator[None]:
        self.network.to(memory_format=torch.channels_last)
        self.batches.memory_format = self.tests.memory_format = torch.channels_last
        try:
            with quick_dropout(self.network), kept_memory():
                yield
        finally:
            self.network.to(memory_format=torch.contiguous_format)


# --- CUDA graphs -----------------------------------------------------------------------------


class GraphEngine(PlainEngine):
    """A whole step captured once and replayed for every batch; several engines overlap.

    What changes from step to step lies on the device: the epoch's order and augmentation draws,
    the place in them, the table of learning rates, and the sums of the results. The short last
    batch has a graph of its own, and so has the test, which is in full precision. `launch` enqueues
    a whole epoch on the engine's stream and returns; `collect` waits for it.
    """

    name = "cuda-graph"
    WARM_UPS = 3  # steps before the capture, which PyTorch's allocator and cuDNN need

    def __init__(self, network: nn.Module, recipe: Recipe, train: Batches, test: Batches) -> None:
        super().__init__(network, recipe, train, test)
        network.to(memory_format=torch.channels_last)
        train.memory_format = test.memory_format = torch.channels_last
        factor = schedule_factor(recipe.schedule, recipe.epochs * self.steps)
        rates = [recipe.lr * factor(step) for step in range(recipe.epochs * self.steps)]
        self.rates = torch.tensor(rates, dtype=train.dtype, device=self.device)
        self.step_number = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.row = torch.zeros((), dtype=torch.int64, device=self.device)
        self.sums = torch.zeros(2, 3, dtype=torch.float64, device=self.device)
        self.order, self.draws = train.draw_epoch()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.precision, self.loss_scale = _precision(self.device, recipe)
        self._train_replays: list[Callable[[], None]] = []
        self._test_replays: list[Callable[[], None]] = []
        self._started = 0.0

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Fused, with a learning rate that is a tensor: a number would be baked into the graph."""
        rate = torch.tensor(self.recipe.lr, dtype=self.batches.dtype, device=self.device)
        return make_optimizer(self.network, self.recipe, rate=rate)

    def prepare(self) -> str:
        """Captures the steps, then puts back what the warm-ups changed."""
        self._lay_out_state()
        state = self._tensors_of_state()
        before = [tensor.clone() for tensor in state]
        try:
            with self._on_stream(), self.random_state(), _quickest_convolutions():
                self._capture_all()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.network.to(memory_format=torch.contiguous_format)
            return f"its step cannot be captured in a CUDA graph: {' '.join(str(error).split())}"
        finally:
            self._restore(state, before)
        return ""

    def launch(self, epoch: int) -> None:
        super().launch(epoch)
        self._started = time.perf_counter()
        self.batches.epoch = epoch
        with self._on_stream(), self.random_state():
            order, draws = self.batches.draw_epoch()
            self.order.copy_(order)
            for mine, drawn in zip(self.draws, draws, strict=True):
                mine.copy_(drawn)
            self.step_number.fill_(epoch * self.steps)
            self.sums.zero_()
            for replays in (self._train_replays, self._test_replays):
                self.row.zero_()
                for replay in replays:
                    replay()

    def collect(self, counted: Counted) -> tuple[EpochResult, EpochResult]:
        with self._on_stream():
            train, test = self.sums.tolist()  # waits for the device
        for _ in counted(range(self.steps)):
            pass
        seconds = time.perf_counter() - self._started  # of both: they ran in one go
        return (
            _means(train, len(self.order), seconds),
            _means(test, len(self.tests.images), seconds=0.0),
        )

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def _capture_all(self) -> None:
        """One graph for each size of batch, in the order in which an epoch replays them."""
        for count, size in _sizes(len(self.order), self.batches.batch_size):
            replay = self.capture(functools.partial(self._train_step, size))
            self._train_replays += [replay] * count
        for count, size in _sizes(len(self.tests.images), self.tests.batch_size):
            replay = self.capture(functools.partial(self._test_step, size))
            self._test_replays += [replay] * count

    def _lay_out_state(self) -> None:
        """Gives a loaded optimiser state the layout of its weights, which fused kernels assume."""
        for weight, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    state[name] = torch.empty_like(weight, requires_grad=False).copy_(value)

    @torch.no_grad()
    def _restore(self, state: list[Tensor], before: list[Tensor]) -> None:
        """Puts values back in place, where the graphs find them; an optimiser begins at nothing."""
        for tensor, saved in zip(state, before, strict=True):
            tensor.copy_(saved)
        known = {id(tensor) for tensor in state}
        for tensor in self._tensors_of_state():
            if id(tensor) not in known:
                tensor.zero_()

    def _tensors_of_state(self) -> list[Tensor]:
        """Everything that a step changes in place."""
        states = [state.values() for state in self.optimizer.state.values()]
        tensors = [value for state in states for value in state if isinstance(value, Tensor)]
        return [*self.network.parameters(), *self.network.buffers(), *tensors]

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats `step` on the device without the host's work."""
        for _ in range(self.WARM_UPS):
            self.row.zero_()
            self.step_number.zero_()
            step()
        if self.stream is None:
            return step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def _train_step(self, size: int) -> None:
        self.network.train()
        rows = self.row + torch.arange(size, device=self.device)
        draws = [drawn[rows] for drawn in self.draws]
        images, labels = self.batches.batch(self.order[rows], draws)
        with self.precision():
            logits = self.network(images)
        penalty = self.recipe.l1 * l1_penalty(self.network) if self.recipe.l1 else 0.0
        objective = self.loss(self._full(logits), labels) + penalty
        self.optimizer.zero_grad(set_to_none=True)
        (objective * self.loss_scale).backward()
        self._unscale()
        for group in self.optimizer.param_groups:
            group["lr"].copy_(self.rates[self.step_number].squeeze())
        self.optimizer.step()
        self._add(0, logits, labels, penalty)
        self.row.add_(size)
        self.step_number.add_(1)

    @torch.no_grad()
    def _test_step(self, size: int) -> None:
        self.network.eval()
        rows = self.row + torch.arange(size, device=self.device)
        images, labels = self.tests.batch(rows, [])
        # In full precision, as `predict` will be: what is called a mistake must be one in both.
        self._add(1, self.network(images), labels, 0.0)
        self.row.add_(size)

    def _full(self, logits: Tensor) -> Tensor:
        """Logits in the precision in which losses are computed."""
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _unscale(self) -> None:
        if self.loss_scale != 1.0:
            gradients = [w.grad for w in self.network.parameters() if w.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.loss_scale)

    @torch.no_grad()
    def _add(self, part: int, logits: Tensor, labels: Tensor, penalty: Tensor | float) -> None:
        loss = F.cross_entropy(self._full(logits), labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        self.sums[part, 0].add_(loss)
        self.sums[part, 1].add_(right)
        self.sums[part, 2].add_(penalty * len(labels))


def _quickest_convolutions() -> AbstractContextManager[None]:
    """Lets cuDNN try its algorithms out in the warm-ups, once for every shape."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)


def can_overlap(networks: Iterable[nn.Module]) -> bool:
    """Whether several networks may be in flight at once: not where they draw random numbers.

    CUDA graphs on different streams would read one generator's state while another moves it.
    """
    drop = nn.modules.dropout._DropoutNd
    layers = [layer for network in networks for layer in network.modules()]
    return not any(isinstance(layer, drop) and layer.p for layer in layers)


def _means(sums: list[float], images: int, seconds: float) -> EpochResult:
    """Means over images from the sums of losses, right images and penalties."""
    return EpochResult(*(value / images for value in sums), images=images, seconds=seconds)


def _sizes(images: int, batch_size: int) -> list[tuple[int, int]]:
    """How many batches of which size an epoch has: whole ones, and perhaps a shorter last."""
    sizes = [(images // batch_size, batch_size), (1, images % batch_size)]
    return [(count, size) for count, size in sizes if count and size]


def _precision(
    device: torch.device, recipe: Recipe
) -> tuple[Callable[[], AbstractContextManager], float]:
    """Half precision where the GPU computes in it: bf16 from Ampere on, before that fp16.

    fp16's smallest gradients would be 0, so the loss is multiplied by a factor (Micikevicius et
    al., "Mixed Precision Training", 2018); a fixed one, since a graph cannot take back a step.
    """
    if device.type != "cuda" or recipe.dtype == "float64":
        return nullcontext, 1.0
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = torch.bfloat16 if ampere else torch.float16
    # Weights that autocast caches outside the graph would be those of the first step for ever.
    context = functools.partial(
        torch.autocast, device_type="cuda", dtype=dtype, cache_enabled=False
    )
    return context, 1.0 if ampere else 1024.0


# --- the choice ------------------------------------------------------------------------------


def make_engine(
    choice: str, network: nn.Module, recipe: Recipe, train: Batches, test: Batches
) -> tuple[PlainEngine, str]:
    """The engine for a network on its device, and in a few words why this one.

    `choice` is "auto", or "plain" for the loop of `training.py` whatever the device.
    """
    one_of(choice, ENGINES, "engine")
    device = train.images.device
    kind, why = PlainEngine, f"asked for by engine={choice!r}"
    if choice == "auto":
        kind, why = _fastest(network, train, device)
    return kind(network, recipe, train, test), why


def _fastest(
    network: nn.Module, train: Batches, device: torch.device
) -> tuple[type[PlainEngine], str]:
    kinds = {"cpu": CpuEngine, "cuda": GraphEngine}
    if device.type == "cuda" and train.dtype == torch.float64:
        return PlainEngine, "float64 is for exact comparisons, and a GPU's fused optimiser is not"
    if device.type not in kinds:
        return PlainEngine, f"there is no faster way on {device.type}"
    problem = _channels_last_problem(network, train)
    if problem:
        return PlainEngine, f"the network does not run channels last: {problem}"
    return kinds[device.type], f"the fastest way on {device.type}"


def _channels_last_problem(network: nn.Module, train: Batches) -> str:
    """What a copy of the network raises on channels-last images; `.view` in its forward, say."""
    device = train.images.device
    images = torch.zeros(2, *train.images.shape[1:], dtype=train.dtype, device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    try:
        twin = copy.deepcopy(network).to(memory_format=torch.channels_last).train()
        with fork_random_state(device):
            logits = twin(images.contiguous(memory_format=torch.channels_last))
            F.cross_entropy(logits, labels).backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""
