"""The way through an epoch on an NVIDIA GPU: a whole step in one CUDA graph.

Picking the images, augmentation, `train_step` and the sums are captured once, so that an epoch is a
few hundred replays without a word from the host.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from normlab import training
from normlab.data import BatchLoader
from normlab.engines.plain import Counted, PlainEngine
from normlab.recipes import Recipe, make_optimizer
from normlab.support.module_state import Attributes, evaluating, set_training
from normlab.support.seeding import derive_seed
from normlab.training import EpochResult, batch_sums, epoch_result


class GraphEngine(PlainEngine):
    """A whole step captured once and replayed for every batch; several engines overlap.

    What changes from step to step lies on the device: the epoch's order and augmentation draws,
    the place in them, the table of learning rates, and the sums of the results. The short last
    batch has a graph of its own, and so has the test. `launch` enqueues an epoch on the engine's
    stream, a few steps before each turn of the others; `collect` waits for it.
    """

    name = "cuda-graph"
    failed = ""  # why the last capture of this process failed, if one did
    WARM_UPS = 3  # steps before the capture, which PyTorch's allocator and cuDNN need
    # Steps in a row. The driver takes only so many: whoever enqueues more waits for the device, and
    # the streams of the others are empty meanwhile.
    IN_A_ROW = 8

    def __init__(
        self, network: nn.Module, recipe: Recipe, train: BatchLoader, test: BatchLoader
    ) -> None:
        super().__init__(network, recipe, train, test)
        rates = [recipe.rate_at(step, self.all_steps) for step in range(self.all_steps)]
        self.schedule = torch.tensor(rates, dtype=train.dtype, device=self.device)
        self.rates = self.schedule.clone()
        self.step_number = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.row = torch.zeros((), dtype=torch.int64, device=self.device)
        largest = max(train.batch_size, test.batch_size)
        self.places = torch.arange(largest, device=self.device)  # in a batch
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=self.device)
        self.order, self.draws = train.draw_epoch()
        self.layout = layout_for(recipe)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.random = _generator_of(self.device).clone_state()  # for dropout
        self._replays: tuple[list[Callable[[], None]], ...] = ([], [])  # to train, to test

    def make_optimizer(self) -> torch.optim.Optimizer:
        """With a learning rate that is a tensor: a number would be baked into the graph."""
        rate = torch.tensor(self.recipe.lr, dtype=self.batches.dtype, device=self.device)
        return make_optimizer(self.network, self.recipe, rate=rate)

    def prepare(self) -> str:
        """Captures the steps, then puts back what the warm-ups changed."""
        if not all(isinstance(group["lr"], Tensor) for group in self.optimizer.param_groups):
            return "its optimiser takes no learning rate from the device"
        if GraphEngine.failed and torch.__version__ < (2, 12):
            return (
                f"an earlier CUDA graph could not be captured ({GraphEngine.failed}), and torch "
                "before 2.12 can make no other one in the same process"
            )
        if name := _held_by_others(self.network):
            return (
                f"the gradient of {name} is part of another computation, which a CUDA graph cannot "
                "contain: forget what a loop by hand has left, as by `del loss`"
            )
        self.lay_out()
        self._lay_out_state()
        with self._restored() as attributes:
            try:
                with self._apart(), _warming_up():
                    self._capture_all()
            except RuntimeError as error:
                GraphEngine.failed = _cause(error)
                return f"its step cannot be captured in a CUDA graph: {GraphEngine.failed}"
            changed = attributes.changed()
        if changed:
            return (
                f"its steps give {changed[0]} a new value in Python, which a CUDA graph would not "
                "repeat (change a tensor in place, as by copy_)"
            )
        return ""

    def launch(self, epoch: int, scale: float = 1.0) -> Iterator[None]:
        self._set_epoch(epoch, scale)
        self._started = time.perf_counter()
        self.random.manual_seed(derive_seed(self.recipe.seed, "dropout", epoch))
        with self._apart():
            order, draws = self.batches.draw_epoch()
            for mine, drawn in zip((self.order, *self.draws), (order, *draws), strict=True):
                mine.copy_(drawn)
            self.step_number.fill_(epoch * self.steps)
            torch.mul(self.schedule, scale, out=self.rates)
            self.sums.zero_()
        for replays in self._replays:
            for start in range(0, len(replays), self.IN_A_ROW):
                with self._apart():
                    if start == 0:
                        self.row.zero_()
                    for replay in replays[start : start + self.IN_A_ROW]:
                        replay()
                yield

    def collect(self, counted: Counted) -> tuple[EpochResult, EpochResult]:
        with self._apart():
            sums = self.sums.cpu()  # waits for the device
        for _ in counted(range(self.steps)):
            pass
        train, test = (epoch_result([part], self._started) for part in sums)
        return train, replace(test, seconds=0.0)  # training's are those of both, done in one go

    def close(self) -> None:
        self._settle()
        self.optimizer.zero_grad()  # gradients lie in the memory of the graphs, and would keep it
        self.network.to(memory_format=torch.contiguous_format)

    def _settle(self) -> None:
        """Waits for the engine's stream, which others do not wait for by themselves."""
        if self.stream is not None:
            self.stream.synchronize()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """On a stream and with a random state of the engine's own, so that several are in flight.

        Graphs that were captured with one state between them would read it while another moves it.
        """
        device, random = _generator_of(self.device), self.random
        if self.stream is None:
            with torch.random.fork_rng([]):
                device.set_state(random.get_state())
                yield
                random.set_state(device.get_state())
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        before = device.graphsafe_get_state()
        device.graphsafe_set_state(random)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            device.graphsafe_set_state(before)

    def _capture_all(self) -> None:
        """One graph for each size of batch, in the order in which an epoch replays them."""
        steps = ((self._train_step, self.batches), (self._test_step, self.tests))
        for (step, batches), replays in zip(steps, self._replays, strict=True):
            whole, rest = divmod(len(batches.images), batches.batch_size)
            for count, size in ((whole, batches.batch_size), (1, rest)):
                if count and size:
                    replays += [self.capture(functools.partial(step, size))] * count

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
        set_training(self.network)
        rows = self.row + self.places[:size]
        draws = [drawn[rows] for drawn in self.draws]
        images, labels = self.batches.batch(self.order[rows], draws)
        rate = self.rates[self.step_number].squeeze()
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate)
        logits, penalty = training.train_step(
            self.network, images, labels, self.optimizer, **self.step_options
        )
        self._add(0, logits, labels, penalty)
        self.step_number.add_(1)

    @torch.no_grad()
    def _test_step(self, size: int) -> None:
        rows = self.row + self.places[:size]
        images, labels = self.tests.batch(rows, [])
        with evaluating(self.network):
            self._add(1, self.network(images), labels, 0.0)

    def _add(self, part: int, logits: Tensor, labels: Tensor, penalty: Tensor | float) -> None:
        for total, value in zip(self.sums[part], batch_sums(logits, labels, penalty), strict=True):
            total.add_(value)
        self.row.add_(len(labels))

    def _lay_out_state(self) -> None:
        """Gives a loaded optimiser state the layout of its weights, which fused kernels assume."""
        for weight, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    state[name] = torch.empty_like(weight, requires_grad=False).copy_(value)

    @contextmanager
    def _restored(self) -> Iterator[Attributes]:
        """Afterwards all values are as before, in place, where the graphs find them.

        The state that the optimiser has only since then, such as momentum, is 0.
        """
        attributes = Attributes(self.network)
        known = [*self.network.parameters(), *attributes.tensors(), *self._optimizer_state()]
        before = {id(tensor): tensor.detach().clone() for tensor in known}
        try:
            yield attributes
        finally:
            self._settle()
            attributes.put_back()
            new = [tensor for tensor in self._optimizer_state() if id(tensor) not in before]
            with torch.no_grad():
                for tensor in known:
                    tensor.copy_(before[id(tensor)])
                for tensor in new:
                    tensor.zero_()

    def _optimizer_state(self) -> list[Tensor]:
        states = [state.values() for state in self.optimizer.state.values()]
        return [value for state in states for value in state if isinstance(value, Tensor)]


def _cause(error: RuntimeError) -> str:
    """What went wrong, in a line; raises it if it was that the memory is full.

    The end of a capture raises an error of its own after one inside, which says less.
    """
    cause = error.__context__ or error
    for each in (cause, error):
        if isinstance(each, torch.OutOfMemoryError):
            raise each
    return next(iter(str(cause).splitlines()), type(cause).__name__)


def layout_for(recipe: Recipe) -> torch.memory_format:
    """The quicker layout of images: on an H200 it makes a sixth for GN in float32."""
    half = recipe.dtype == "bfloat16"
    return torch.channels_last if half else torch.contiguous_format


def _generator_of(device: torch.device) -> torch.Generator:
    """The one from which a device draws by itself."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _held_by_others(network: nn.Module) -> str:
    """A weight whose node for adding up gradients is still part of an earlier graph, if any.

    Such a node works on the stream on which it was made, where no capture sees it. It lives as long
    as a loss, or something else that was computed from the weight.
    """
    with torch.enable_grad():
        for name, weight in network.named_parameters():
            if weight.requires_grad:
                _node_of(weight).metadata["seen"] = True  # kept if anything else keeps the node
                node = _node_of(weight)
                if node.metadata.pop("seen", False):
                    return name
    return ""


def _node_of(weight: Tensor) -> torch.autograd.graph.Node:
    return weight.view_as(weight).grad_fn.next_functions[0][0]


@contextmanager
def _warming_up() -> Iterator[None]:
    """Lets cuDNN try its algorithms out, once for every shape, and AdamW run without a graph."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* constructed with capturable=True")
            yield
    finally:
        torch.backends.cudnn.benchmark = before
