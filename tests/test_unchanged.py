"""What two epochs of every assignment gave when this was written is what they give now.

`python -m tests.test_unchanged` writes the numbers anew: after a change that is meant to change
them, never to make the test pass. Processors add in other orders, so that bits repeat only on one
like the first; elsewhere the first epoch's loss must come close.
"""

import json
import platform
from pathlib import Path

import pytest
import torch

import normlab as nl
from normlab.datasets.loading import load_assignment_data

KEPT = Path(__file__).with_name("two_epochs.json")
QUANTITIES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "penalty", "lr")


def two_epochs(name: str) -> dict[str, dict]:
    """Two epochs of each variant on the digits, on one thread: histories and final weights."""
    data, found = load_assignment_data(nl.ASSIGNMENTS[name], "digits"), {}
    results = nl.run_assignment(name, data=data, epochs=2, device="cpu", progress=False)
    for label, (run,) in results.items():
        history = [[row[quantity] for quantity in QUANTITIES] for row in run.history]
        found[label] = {"history": history, "weights": run.config["final_weights"]}
    return found


def machine() -> dict[str, str]:
    """What the bits depend on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    models = {line.partition(": ")[2] for line in lines if line.startswith(("model name", "flags"))}
    return {
        "processor": " ".join(sorted(models)) or platform.processor(),
        "torch": torch.__version__,
    }


# Six networks are worth processes of their own.
MARKED = [
    pytest.param(name, marks=[pytest.mark.process] if name == "cifar10-skip" else [])
    for name in nl.ASSIGNMENTS
]


@pytest.mark.parametrize("name", MARKED)
def test_two_epochs_give_what_they_gave(name, one_thread):
    kept = json.loads(KEPT.read_text())
    there, here = kept["runs"][name], two_epochs(name)
    if kept["machine"] == machine():
        assert here == there
    assert here.keys() == there.keys()
    for label, run in here.items():
        first, before = (each["history"][0][0] for each in (run, there[label]))
        assert first == pytest.approx(before, rel=0.03), label  # up to 2.3 % were seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"machine": machine(), "runs": {name: two_epochs(name) for name in nl.ASSIGNMENTS}}
    KEPT.write_text(json.dumps(found, indent=1) + "\n")
