"""A run: a network's training in memory and, where wanted, on disk."""

import hashlib
import inspect
import json
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import CodeType

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from normlab.data import Dataset
from normlab.model import Network, build_network
from normlab.norms import NORMS
from normlab.recipes import DTYPES, Recipe
from normlab.runs.probe import are_apart, probe
from normlab.support.files import (
    LOCK,
    InUse,
    owned,
    read_json,
    remove_leftovers,
    write_bytes,
    write_json,
    write_text,
)
from normlab.support.summaries import count_parameters

COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "penalty",
    "lr",
    "seconds",
)
QUANTITIES = COLUMNS[1:]


@dataclass(repr=False)
class Run:
    """A finished training.

    Args:
        network: with its final weights.
        recipe: how it was trained.
        history: a dict for each epoch with the keys of `COLUMNS`: losses in nats, accuracies as
            fractions, the last learning rate of the epoch, wall seconds.
        predicted: class given to each test image, int64 (N,).
        probability: softmax probability of that class, float32 (N,).
        config: what the run is and where it came from, as in `config.json`. What "from" says of
            the computation holds for the last epochs, and for those before with "before".
        directory: where it is kept, if anywhere.
    """

    network: nn.Module = field(repr=False)
    recipe: Recipe
    history: list[dict] = field(repr=False)
    predicted: Tensor = field(repr=False)
    probability: Tensor = field(repr=False)
    config: dict = field(repr=False)
    directory: Path | None = None

    def __repr__(self) -> str:
        accuracy = f"{self.last['test_accuracy']:.4f}"
        return f"Run({type(self.network).__name__}, {self.recipe}, test_accuracy={accuracy})"

    @property
    def last(self) -> dict:
        """The last epoch: the one to quote."""
        return self.history[-1]

    @property
    def best(self) -> dict:
        """The epoch of the highest test accuracy: optimistic, since the test set picked it."""
        return max(self.history, key=lambda row: row["test_accuracy"])

    @property
    def parameters(self) -> int:
        """How many numbers the network learned."""
        return self.config["is"]["parameters"]

    @property
    def seconds(self) -> float:
        """Wall time of all epochs, tests included."""
        return sum(row["seconds"] for row in self.history)

    def frame(self):
        """The history as a pandas DataFrame, a row for each epoch."""
        import pandas

        return pandas.DataFrame(self.history, columns=list(COLUMNS))


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes and values of a state dict, wherever its tensors are."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# What a run's identity has named from the beginning. What came later is named only where it is not
# at its default, so that kept runs, and the digests of runs in tables, stay what they are.
RECIPE_FIELDS = (
    *("epochs", "batch_size", "optimizer", "lr", "momentum", "nesterov", "weight_decay"),
    *("centred", "schedule", "l1", "label_smoothing", "augment", "dtype", "seed"),
)
LATER = {"frozen", "logits"}  # what kept runs of earlier versions do not tell
NETWORK_ARGUMENTS = ("name", "norm", "groups", "dropout", "skip", "classes", "input_shape")


def identity(network: nn.Module, data: Dataset, recipe: Recipe) -> dict:
    """What a run *is*: two runs without `differences` in it compute the same thing."""
    logits = probe(network, data.input_shape, DTYPES[recipe.dtype])
    return described(network, data, recipe) | {"logits": logits}


def described(network: nn.Module, data: Dataset, recipe: Recipe) -> dict:
    """What there is to tell of a run without computing anything."""
    weights = network.named_parameters()
    return {
        "recipe": _named(recipe.as_dict(), RECIPE_FIELDS, lambda **_: type(recipe)().as_dict()),
        "network": _describe(network),
        "parameters": count_parameters(network),
        "initial_weights": weights_digest(_in_dtype(network.state_dict(), DTYPES[recipe.dtype])),
        "frozen": [name for name, weight in weights if not weight.requires_grad],
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "train_images": len(data.train_images),
            f"{data.test_name}_images": len(data.test_images),
        },
    }


def _in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as they are when the network is trained; whole numbers stay such."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def finally_is(network: nn.Module, data: Dataset, recipe: Recipe) -> dict:
    """By what the trained network is known when it comes back to the folder of its run.

    Then all its layers are in evaluation mode: which were frozen, there is no telling.
    """
    logits = probe(network, data.input_shape, DTYPES[recipe.dtype])
    logits.pop("training", None)
    weights = weights_digest(network.state_dict())
    return {"final_weights": weights, "final_logits": logits}


def digest_of(what: dict) -> str:
    """Twelve hexadecimal digits for a run that is `what`; runs that differ have others.

    But for what logits alone tell: they are compared with a tolerance. Of two such runs the second
    is refused in the folder of the first.
    """
    told = {key: value for key, value in what.items() if key != "logits" and value != []}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _recipe(named: dict) -> Recipe:
    """The recipe with these fields, without those that this version does not know."""
    return Recipe(**{k: v for k, v in named.items() if k in Recipe.__dataclass_fields__})


def _recipe_fields(**named: object) -> dict:
    return named | _recipe(named).as_dict()


def _network_arguments(**named: object) -> dict:
    """All arguments of `build_network`, as JSON has them."""
    return json.loads(json.dumps(build_network(**named, seed=0).description))


def _named(values: dict, always: tuple[str, ...], complete: Callable[..., dict]) -> dict:
    """The values that are always named, and of the others those that are not their defaults."""
    named = {name: values[name] for name in always}
    if len(named) == len(values):
        return named
    usual = complete(**named)
    return named | {k: v for k, v in values.items() if k in named or v != usual[k]}


def _describe(network: nn.Module) -> dict:
    """The arguments that build the network, or what there is to know of one of one's own."""
    arguments = network.description if isinstance(network, Network) else {}
    if arguments and _builds(arguments, network):
        arguments = json.loads(json.dumps(arguments))
        return _named(arguments, NETWORK_ARGUMENTS, _network_arguments)
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(network))
    kinds = {type(layer) for layer in network.modules()}
    own = [kind for kind in kinds if kind.__module__.split(".")[0] not in ("torch", "normlab")]
    code = "".join(sorted(map(_code, own)))
    digests = (hashlib.sha256(text.encode()).hexdigest() for text in (layers, code))
    return {"class": type(network).__name__} | dict(zip(("layers", "code"), digests, strict=True))


def _builds(arguments: Mapping, network: nn.Module) -> bool:
    """Whether `build_network` makes this network, with a norm of its own and no layer changed."""
    return arguments["norm"] in NORMS and repr(build_network(**arguments, seed=0)) == repr(network)


def _code(kind: type) -> str:
    """The source of a class; of its methods where it has no file, as in a notebook."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        methods = filter(inspect.isfunction, vars(kind).values())
        return "".join([kind.__qualname__, *map(_code_of_function, methods)])


def _code_of_function(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except OSError:
        return _compiled(function.__code__)


def _compiled(code: CodeType) -> str:
    """What the code does, without the file and the addresses that its text would name."""
    constants = [_compiled(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_name} {code.co_code.hex()} {constants} {code.co_names}"


def provenance(data: Dataset, device: torch.device) -> dict:
    """Where a run came from: nothing here changes what it is."""
    from normlab import __version__

    return {
        "normlab": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "data_source": data.source,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


WAY = ("engine", "because", "computes_in", "device", "threads", "torch", "normlab")


def stretches(there: dict, here: dict, epochs: int) -> list[dict]:
    """How the first `epochs` of a run were computed where that is not how the next ones will be.

    A dict for each stretch, with `until_epoch` and what is known of `WAY`.

    Args:
        there: where the run came from so far, as `config.json` has it under "from".
        here: the same of what goes on with it.
    """
    before = list(there.get("before", []))
    way = {key: there[key] for key in WAY if key in there}
    done = before[-1]["until_epoch"] if before else 0
    if epochs > done and way != {key: here[key] for key in WAY if key in here}:
        before.append({"until_epoch": epochs, **way})
    return before if epochs else []


class RunFolder:
    """The folder of one run: every file in it is whole, and `config.json` says if it is finished.

    `config.json`, `history.csv`, `weights.safetensors`, `predictions.safetensors` and, until the
    run is done, `checkpoint.safetensors`. Digests cover all that is resumed or reported; what is
    damaged, missing or of another run is named, and nothing is trained over it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._what: dict = {}
        self._config = self.directory / "config.json"
        self._checkpoint = self.directory / "checkpoint.safetensors"
        self._history = self.directory / "history.csv"
        self._weights = self.directory / "weights.safetensors"
        self._predictions = self.directory / "predictions.safetensors"

    def open(self, what: dict) -> bool:
        """Whether a finished run that is `what` lies here; nothing is changed.

        Raises `ValueError`, naming the difference, if epochs of a run that is something else lie
        here.
        """
        if self.is_empty():
            return False
        config = self._read_config()
        here = dict(config["is"])
        if what["initial_weights"] == config.get("final_weights"):  # the run's own network
            here["initial_weights"] = what["initial_weights"]
            here["logits"] = config.get("final_logits", {})
        differing = differences(here, what)
        finished = "final_weights" in config
        if differing and (finished or self._checkpoint.is_file()):
            raise ValueError(
                f"{self.directory} holds a run that is something else ({'; '.join(differing)}): "
                "choose another directory, or delete this one (--fresh on the command line)"
            )
        return finished

    def _read_config(self) -> dict:
        if not self._config.is_file():
            raise self._damaged(self._config)
        config = read_json(self._config)
        whole = _is_config(config) and config.get("digest", "") in ("", _json_digest(config))
        if whole and "digest" not in config and "final_weights" not in config:
            # As earlier versions wrote it: then only a checkpoint comes before the weights.
            whole = self._checkpoint.is_file() or not self._weights.is_file()
        if not whole:
            raise self._damaged(self._config)
        return config

    def _write_config(self, config: dict) -> None:
        config["digest"] = _json_digest(config)
        write_json(self._config, config)

    def is_empty(self) -> bool:
        """Whether nothing of a run lies here."""
        return not any(file.exists() for file in self._files())

    def holds_no_other(self, what: dict) -> bool:
        """Whether nothing lies here but, perhaps, the beginning of a run that is `what`."""
        return self.is_empty() or not differences(self._read_config()["is"], what)

    def origin(self) -> dict:
        """Where the run that lies here came from so far; empty if there is none."""
        return self._read_config().get("from", {}) if self._config.is_file() else {}

    def is_finished(self) -> bool:
        """Whether the run that lies here is done."""
        return self._config.is_file() and "final_weights" in self._read_config()

    def history_so_far(self) -> list[dict]:
        """The epochs that are done, none if there is no run; the file is taken as it is."""
        return self._read_history() if self._history.is_file() else []

    def finished_history(self) -> list[dict]:
        """All epochs of the finished run; raises `ValueError` if any of its files is damaged."""
        self._check_results(self._read_config())
        return self._read_history()

    def pack(self) -> dict[str, bytes]:
        """The files of a finished run by their names, for `receive` elsewhere."""
        if not self.is_finished():
            return {}
        return {file.name: file.read_bytes() for file in (*self._results(), self._config)}

    def receive(self, files: Mapping[str, bytes]) -> None:
        """Writes the files of a run that was finished elsewhere, last the one that says so.

        If somebody else has finished the run here in the meantime, that one stays.
        """
        if files:
            with owned(self.directory):
                if not self.is_finished():
                    self._receive(files)

    def _receive(self, files: Mapping[str, bytes]) -> None:
        config = json.loads(files[self._config.name])
        self._write_config({"is": config["is"], "from": config["from"]})  # files alone were damage
        for name, content in files.items():
            write_bytes(self.directory / name, content)

    def tidy(self) -> None:
        """Removes what is left by a process that was killed at the very end of the run."""
        left = (self._checkpoint.name, LOCK, ".*.part")
        if any(any(self.directory.glob(name)) for name in left):
            # Not where it is in use, or only to be read.
            with suppress(InUse, OSError), owned(self.directory, wait=False):
                if self.is_finished():
                    self._checkpoint.unlink(missing_ok=True)
                    remove_leftovers(self.directory)

    def start(self, what: dict, origin: dict) -> None:
        """Writes down what the run is before its first epoch; removes what no run can use."""
        remove_leftovers(self.directory)
        self._what = what
        self._write_config({"is": what, "from": origin})

    def clear(self) -> None:
        """Removes a run, if there is one: its files, and nothing else that lies here."""
        remove_leftovers(self.directory)
        for file in self._files():
            file.unlink(missing_ok=True)

    def save_epoch(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict]
    ) -> None:
        """Keeps everything that the next epoch needs; random states follow from its number."""
        tensors = _prefixed("network", network.state_dict())
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= _prefixed(f"optimizer.{index}", state)
        about = {"history": json.dumps(history), "is": json.dumps(self._what)}
        about["digest"] = _json_digest(about | {"tensors": weights_digest(tensors)})
        write_bytes(self._checkpoint, tensors_to_bytes(tensors, metadata=about))
        self._write_history(history)

    def load_epoch(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, what: dict
    ) -> list[dict]:
        """Puts network and optimiser into the state of the last finished epoch of `what`.

        Returns the history up to it, empty if there is none.
        """
        if not (self._config.is_file() and self._checkpoint.is_file()):
            return []
        tensors, about = self._read(self._checkpoint)
        if about.get("digest") != _json_digest(about | {"tensors": weights_digest(tensors)}):
            raise self._damaged(self._checkpoint)
        differing = differences(json.loads(about["is"]), what)
        if differing:
            raise self._damaged(self._checkpoint, f"of another run ({'; '.join(differing)})")
        states: dict[int, dict] = {}
        for key, value in _unprefixed("optimizer", tensors).items():
            index, _, name = key.partition(".")
            states.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        try:
            history = json.loads(about["history"])
            optimizer.load_state_dict({"state": states, "param_groups": groups})
            network.load_state_dict(_unprefixed("network", tensors))
        except (RuntimeError, KeyError, ValueError) as error:
            raise self._damaged(self._checkpoint) from error
        return history

    def finish(self, run: Run) -> None:
        """Writes the results; the run counts as finished once `config.json` names its weights."""
        self._write_history(run.history)
        write_bytes(self._weights, tensors_to_bytes(_prefixed("", run.network.state_dict())))
        guesses = {"predicted": run.predicted.to(torch.int16), "probability": run.probability}
        write_bytes(self._predictions, tensors_to_bytes(guesses))
        run.config["digests"] = {file.name: _file_digest(file) for file in self._results()}
        self._write_config(run.config)
        self._checkpoint.unlink(missing_ok=True)

    def load(self, network: nn.Module) -> Run:
        """The finished run that lies here, its weights put into `network`."""
        config = self._read_config()
        self._check_results(config)
        weights, _ = self._read(self._weights)
        guesses, _ = self._read(self._predictions)
        network.load_state_dict(weights)
        return Run(
            network=network,
            recipe=self._recipe_in(config),
            history=self._read_history(),
            predicted=guesses["predicted"].long(),
            probability=guesses["probability"],
            config=config,
            directory=self.directory,
        )

    def _recipe_in(self, config: dict) -> Recipe:
        try:
            return _recipe(config["is"]["recipe"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(self._config) from error

    def _results(self) -> tuple[Path, ...]:
        return self._history, self._weights, self._predictions

    def _files(self) -> tuple[Path, ...]:
        return self._config, self._checkpoint, *self._results()

    def _check_results(self, config: dict) -> None:
        digests = config.get("digests", {})
        for file in self._results():
            if not file.is_file() or _file_digest(file) != digests.get(file.name):
                raise self._damaged(file)

    def _write_history(self, history: list[dict]) -> None:
        lines = [",".join(COLUMNS)]
        lines += [",".join(repr(row[column]) for column in COLUMNS) for row in history]
        write_text(self._history, "\n".join(lines) + "\n")

    def _read_history(self) -> list[dict]:
        try:
            header, *lines = self._history.read_text().splitlines()
            rows = [
                dict(zip(header.split(","), map(float, line.split(",")), strict=True))
                for line in lines
            ]
            return [row | {"epoch": int(row["epoch"])} for row in rows]
        except (FileNotFoundError, ValueError, KeyError, OverflowError) as error:
            raise self._damaged(self._history) from error

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict]:
        """The tensors and the metadata of a safetensors file."""
        try:
            content = path.read_bytes()
            tensors = load_tensors(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        except (FileNotFoundError, SafetensorError, ValueError) as error:
            raise self._damaged(path) from error
        return tensors, header.get("__metadata__", {})

    def _damaged(self, path: Path, how: str = "damaged") -> ValueError:
        how = how if path.exists() else "missing"
        return ValueError(
            f"{path} is {how}: delete the folder {self.directory} and run again (--fresh on the "
            "command line)"
        )


def _is_config(value: object) -> bool:
    """Whether it has the parts of a `config.json`."""
    if not isinstance(value, dict) or not isinstance(value.get("is"), dict):
        return False
    origin, digests = value.get("from", {}), value.get("digests", {})
    if not isinstance(origin, dict) or not isinstance(digests, dict):
        return False
    before = origin.get("before", [])
    return isinstance(before, list) and all(
        isinstance(each, dict) and isinstance(each.get("until_epoch"), int) for each in before
    )


def _json_digest(value: dict) -> str:
    """SHA-256 over all of it but its "digest"."""
    covered = {name: each for name, each in value.items() if name != "digest"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def remove_run(directory: Path) -> None:
    """Removes the run that lies in `directory`, and the folder if nothing else is in it."""
    remove_runs([directory])


def remove_runs(directories: Iterable[Path], first: Callable[[], None] = lambda: None) -> None:
    """Calls `first`, and removes the runs in these folders, but not if one of them is in use.

    Then it raises `InUse`. Folders in which there is nothing else are removed, too.
    """
    there = [directory for directory in map(Path, directories) if directory.is_dir()]
    with owned(*there, wait=False):
        first()
        for directory in there:
            RunFolder(directory).clear()
    for directory in there:
        with suppress(OSError):  # there is something else
            directory.rmdir()


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each in memory of its own, as safetensors wants them."""
    return {
        f"{prefix}.{name}".lstrip("."): value.detach().cpu().clone().contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {
        key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)
    }


def differences(there: dict, here: dict, where: str = "") -> list[str]:
    """What differs between two identities, one phrase each.

    A field of the recipe, or an argument of `build_network`, that only one of them names counts as
    its default in the other; what only one tells of a network of one's own, or of what a network
    computes, is no difference. Logits may differ by `LOGITS_APART`.

    Args:
        there: of a kept run.
        here: of what this version is about to train.
        where: the key under which both lie in larger dicts, with a dot.
    """
    found = []
    both = there.keys() & here.keys()
    for key in sorted((there.keys() | here.keys()) - (LATER - both)):
        one, other = there.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(*_with_the_same_fields(key, one, other), f"{where}{key}.")
        elif one != other and ("digest" in key or len(str(one)) > 60):
            found.append(f"{where}{key} differs")
        elif one != other:
            found.append(f"{where}{key} is {one!r} there and {other!r} here")
    return found


def _with_the_same_fields(key: str, there: dict, here: dict) -> tuple[dict, dict]:
    if key == "recipe":
        return _completed(there, here, _recipe_fields)
    if key == "logits":
        both = there.keys() & here.keys()
        modes = [mode for mode in both if are_apart(there[mode], here[mode])]
        return {mode: there[mode] for mode in modes}, {mode: here[mode] for mode in modes}
    if key == "network" and "name" in there and "name" in here:
        return _completed(there, here, _network_arguments)
    if key == "network" and "class" in there and "class" in here:
        both = there.keys() & here.keys()
        return {name: there[name] for name in both}, {name: here[name] for name in both}
    return there, here


def _completed(there: dict, here: dict, complete: Callable[..., dict]) -> tuple[dict, dict]:
    """Both with the values that they do not name, which are the defaults.

    `complete` never meets what is kept, since that may be unknown here or damaged. A field unknown
    here is left out where its value is nothing, which is the default of what can be switched on.
    """
    here = complete(**here)
    usual = complete(**{name: here[name] for name in here.keys() & there.keys()})
    return usual | {k: v for k, v in there.items() if k in here or v}, here
