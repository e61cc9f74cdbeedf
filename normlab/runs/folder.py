"""The folder of a run: how it is written, resumed, loaded and removed."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from normlab.history import COLUMNS, Run
from normlab.recipes import OPEN_ENDED
from normlab.runs.identity import (
    LOGITS,
    differences,
    is_beginning,
    recipe_in,
    weights_digest,
)
from normlab.support.checks import warn
from normlab.support.files import read_json, remove_leftovers, write_bytes, write_json, write_text
from normlab.support.locks import LOCK, InUse, locked

FILES = (
    *("config.json", "checkpoint.safetensors"),
    *("history.csv", "weights.safetensors", "predictions.safetensors"),  # the results
)


class RunFolder:
    """The folder of one run: every file in it is whole, and `config.json` says if it is finished.

    There are `FILES`, the checkpoint until the run is done and the results from then on. Digests
    cover all that is resumed or reported; what is damaged, missing or of another run is named, and
    nothing is trained over it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._files = [self.directory / name for name in FILES]
        self._config, self._checkpoint, *self._results = self._files
        self._history, self._weights, self._predictions = self._results
        self._identity: dict = {}

    def open(self, identity: dict, *, any_weights: bool = False) -> bool:
        """Whether the finished run with this identity lies here; nothing is changed.

        A finished run with fewer epochs goes on, if its rates do not depend on their number.
        With `any_weights` a network of one's own may have begun from other weights, as one does
        that was not seeded: a warning says so.
        Raises `ValueError`, naming the difference, if epochs of another run lie here.
        """
        if self.is_empty():
            return False
        config = self._read_config()
        kept, finished = config["is"], "final_weights" in config
        begun = finished or self._checkpoint.is_file()
        as_begun = _as_begun(config, identity, any_weights)
        goes_on = self._checkpoint.is_file() and is_beginning(as_begun, identity)
        found = [] if goes_on or not begun else differences(as_begun, identity)
        if found:
            if is_beginning(as_begun, identity):
                found.append("more epochs need its checkpoint, which is missing")
            elif found[-1].startswith("recipe.epochs"):
                found.append("for more epochs only a run at a constant rate goes on")
            raise another_run(self.directory, "; ".join(found))
        own = identity["initial_weights"] == config.get("final_weights")
        if begun and not own and as_begun.get("initial_weights") != kept.get("initial_weights"):
            warn(
                f"{self.directory} holds this training, begun from other initial weights: those "
                "kept there are taken (seed the network, as by torch.manual_seed, to have the same)"
            )
        return finished and not goes_on

    def identity_of(self, wanted: dict, *, any_weights: bool) -> dict:
        """The wanted identity with the initial weights from which the run that lies here began."""
        if not (self._config.is_file() and self._checkpoint.is_file()):
            return wanted
        config = self._read_config()
        kept, as_begun = config["is"], _as_begun(config, wanted, any_weights)
        same = is_beginning(as_begun, wanted) or not differences(as_begun, wanted)
        if not same or kept["initial_weights"] == wanted["initial_weights"]:
            return wanted
        return wanted | {"initial_weights": kept["initial_weights"]}

    def _read_config(self) -> dict:
        config = read_json(self._config) if self._config.is_file() else None
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
        return not any(file.exists() for file in self._files)

    def holds_no_other(self, identity: dict) -> bool:
        """Whether nothing lies here but, perhaps, the beginning of the run with this identity."""
        return self.is_empty() or not differences(self._read_config()["is"], identity)

    def is_finished(self) -> bool:
        """Whether the run that lies here is done."""
        return self._config.is_file() and "final_weights" in self._read_config()

    def history_so_far(self) -> list[dict]:
        """The epochs that `history.csv` tells, for a display: none if it is missing or damaged."""
        with suppress(ValueError):  # a run that was interrupted has them in its checkpoint too
            return self._read_history()
        return []

    def pack(self) -> dict[str, bytes]:
        """The files of a finished run by their names, for `receive` elsewhere."""
        return {file.name: file.read_bytes() for file in (*self._results, self._config)}

    def receive(self, files: Mapping[str, bytes]) -> None:
        """Writes the files of a run that was finished elsewhere, last the one that says so.

        If somebody else has finished the run here in the meantime, that one stays.
        """
        with locked(self.directory):
            if not self.is_finished():
                config = json.loads(files[self._config.name])  # without it files are damage
                self._write_config({"is": config["is"], "from": config["from"]})
                for name, content in files.items():
                    write_bytes(self.directory / name, content)

    def tidy(self) -> None:
        """Removes what is left by a process that was killed at the very end of the run."""
        left = (self._checkpoint.name, LOCK, ".*.part")
        if any(any(self.directory.glob(name)) for name in left):
            # Not where it is in use, or only to be read.
            with suppress(InUse, OSError), locked(self.directory, wait=False):
                if self.is_finished():
                    self._remove_checkpoint(self._read_config())
                    remove_leftovers(self.directory)

    def start(self, identity: dict, provenance: dict, epochs: int) -> None:
        """Writes down what the run is before its next epoch; removes what no run can use.

        Args:
            provenance: of what goes on with the run; those of the epochs so far are added.
            epochs: how many are finished.
        """
        if epochs:
            last = self._read_config().get("from", {}) | {"until_epoch": epochs}
            provenance |= {"before": [*last.pop("before", []), last]}
        remove_leftovers(self.directory)
        self._identity = identity
        self._write_config({"is": identity, "from": provenance})

    def save_epoch(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict]
    ) -> None:
        """Keeps everything that the next epoch needs; random states follow from its number."""
        tensors = _prefixed("network", network.state_dict())
        for index, state in optimizer.state_dict()["state"].items():
            _check_kept_whole(state)
            tensors |= _prefixed(f"optimizer.{index}", state)
        about = {"history": json.dumps(history), "is": json.dumps(self._identity)}
        about["digest"] = _json_digest(about | {"tensors": weights_digest(tensors)})
        write_bytes(self._checkpoint, tensors_to_bytes(tensors, metadata=about))
        self._write_history(history)

    def load_epoch(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, identity: dict
    ) -> list[dict]:
        """Puts network and optimiser into their state after the last finished epoch of a run.

        Returns the history up to it, empty if there is none.
        """
        if not (self._config.is_file() and self._checkpoint.is_file()):
            return []
        tensors, about = self._read(self._checkpoint)
        if about.get("digest") != _json_digest(about | {"tensors": weights_digest(tensors)}):
            raise self._damaged(self._checkpoint)
        kept = json.loads(about["is"])
        if (found := differences(kept, identity)) and not is_beginning(kept, identity):
            raise self._damaged(self._checkpoint, f"of another run ({'; '.join(found)})")
        states, weights = {}, {}
        try:
            for key, value in tensors.items():
                part, _, name = key.partition(".")
                index, _, quantity = name.partition(".")
                if part == "network":
                    weights[name] = value
                else:
                    states.setdefault(int(index), {})[quantity] = value
            history, groups = json.loads(about["history"]), optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})
            network.load_state_dict(weights)
        except (RuntimeError, KeyError, ValueError) as error:
            raise self._damaged(self._checkpoint) from error
        return history

    def finish(self, run: Run) -> None:
        """Writes the results; the run counts as finished once `config.json` names its weights."""
        self._write_history(run.history)
        write_bytes(self._weights, tensors_to_bytes(_prefixed("", run.network.state_dict())))
        guesses = {"predicted": run.predicted.to(torch.int16), "probability": run.probability}
        write_bytes(self._predictions, tensors_to_bytes(guesses))
        run.config["digests"] = {file.name: _file_digest(file) for file in self._results}
        self._write_config(run.config)
        self._remove_checkpoint(run.config)

    def _remove_checkpoint(self, config: dict) -> None:
        """If no more epochs can follow."""
        if config["is"]["recipe"]["schedule"] not in OPEN_ENDED:
            self._checkpoint.unlink(missing_ok=True)

    def read_finished(self) -> tuple[dict, list[dict]]:
        """What `config.json` says of a finished run, and its history; no network is needed.

        Raises `ValueError` if it is not finished, or a file is damaged or missing.
        """
        config = self._read_config()
        if "final_weights" not in config:
            epochs, due = len(self.history_so_far()), config["is"]["recipe"]["epochs"]
            raise ValueError(f"{self.directory} is not finished: {epochs} of {due} epochs are")
        for file in self._results:
            if not file.is_file() or _file_digest(file) != config.get("digests", {}).get(file.name):
                raise self._damaged(file)
        return config, self._read_history()

    def load(self, network: nn.Module) -> Run:
        """The finished run that lies here, its weights put into `network`."""
        config, history = self.read_finished()
        weights, _ = self._read(self._weights)
        guesses, _ = self._read(self._predictions)
        try:
            recipe = recipe_in(config["is"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(self._config) from error
        network.load_state_dict(weights)
        predicted, probability = guesses["predicted"].long(), guesses["probability"]
        return Run(network, recipe, history, predicted, probability, config, self.directory)

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


def _as_begun(config: dict, wanted: dict, any_weights: bool) -> dict:
    """What the run is that lies here, in so far as the wanted one may have other weights."""
    kept, weights = config["is"], {"initial_weights": wanted["initial_weights"]}
    if wanted["initial_weights"] == config.get("final_weights"):  # the run's own network
        return kept | weights | {LOGITS: {}, "numbers": {}}
    if any_weights and "class" in wanted["network"]:  # of one's own, which may not have been seeded
        return kept | weights
    return kept


def another_run(directory: Path, differences: str) -> ValueError:
    """The error for a directory with a run that differs from the one that is asked for."""
    return ValueError(
        f"{directory} holds a run that is something else ({differences}): choose another "
        "directory, or delete this one (--fresh on the command line)"
    )


def _is_config(value: object) -> bool:
    """Whether it has the parts of a `config.json`."""
    if not isinstance(value, dict) or not isinstance(value.get("is"), dict):
        return False
    origin, digests = value.get("from", {}), value.get("digests", {})
    whole = isinstance(origin, dict) and isinstance(digests, dict)
    return whole and isinstance(origin.get("before", []), list)


def _json_digest(value: dict) -> str:
    """SHA-256 over all of it but its "digest"."""
    covered = {name: each for name, each in value.items() if name != "digest"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def remove_runs(*directories: Path) -> None:
    """Removes the runs in these folders, and the folders in which there is nothing else.

    Raises `InUse` if one of them is in use; then nothing is removed.
    """
    there = [directory for directory in map(Path, directories) if directory.is_dir()]
    with locked(*there, wait=False):
        for directory in there:
            remove_leftovers(directory)
            for name in FILES:
                (directory / name).unlink(missing_ok=True)
    for directory in there:
        with suppress(OSError):  # there is something else
            directory.rmdir()


def _check_kept_whole(state: Mapping[str, object]) -> None:
    """Raises `TypeError` unless a checkpoint keeps all of an optimiser's state."""
    for name, value in state.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"the optimiser keeps {name!r} as a {type(value).__name__}, which a checkpoint "
                "does not hold: keep it as a tensor, or train without a directory"
            )


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each in memory of its own, as safetensors wants them."""
    return {
        f"{prefix}.{name}".lstrip("."): value.detach().cpu().clone().contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
