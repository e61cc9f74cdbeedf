"""Training by Muon does not import torch's compiler, and leaves torch as it was."""

import subprocess
import sys

import pytest
import torch

from normlab.engines.compiler import _EXEMPT, _METHODS, compiler_left_out

PROGRAM = """
import sys
import normlab as nl

recipe = nl.Recipe(epochs=1, optimizer=sys.argv[1], lr=0.01)
data = nl.load_dataset("digits").subset(train=64, test=10)
nl.fit(nl.build_network("mnist-l1"), data, recipe, progress=False)
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize(("optimizer", "imported"), [("muon", False), ("sgd", True)])
def test_a_training_by_muon_does_not_import_the_compiler(optimizer, imported):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, optimizer],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(imported)]


def test_afterwards_optimisers_are_as_they_were(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    methods = [getattr(torch.optim.Optimizer, name).__wrapped__ for name in _METHODS]
    before = [vars(method).copy() for method in methods]
    with compiler_left_out():
        assert all(hasattr(method, _EXEMPT) for method in methods)
    assert [vars(method) for method in methods] == before


def test_a_compiler_that_is_there_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo", object())
    method = torch.optim.Optimizer.zero_grad.__wrapped__
    before = vars(method).copy()
    with compiler_left_out():
        assert vars(method) == before
