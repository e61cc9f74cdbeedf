"""The README's worked example is what the layers compute."""

import math
import re
from pathlib import Path

import pytest
import torch

import normlab as nl

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NORMS = {
    "BN": (nl.batch_norm, (0, 2, 3)),
    "LN": (nl.layer_norm, (1, 2, 3)),
    "GN, 2 groups": (lambda x: nl.group_norm(x, 2), (2, 3, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_worked_example_is_right(name):
    (row,) = re.findall(rf"^\| {re.escape(name)} \| .*: .*$", README, re.M)
    cells = [cell.strip().replace("−", "-") for cell in row.strip("|").split("|")]
    mean, variance, deviation, becomes = map(float, cells[2:6])
    x = torch.arange(16.0).reshape(2, 4, 1, 2)
    norm, axes = NORMS[name]
    blocks = x.view(2, 2, 2, 1, 2) if "groups" in name else x
    assert blocks.mean(axes).flatten()[0].item() == mean
    assert blocks.var(axes, correction=0).flatten()[0].item() == variance
    assert deviation == pytest.approx(math.sqrt(variance), abs=5e-4)
    assert becomes == pytest.approx(norm(x)[0, 0, 0, 0].item(), abs=5e-4)
    shared = set(map(int, re.findall(r"\d+", cells[1].partition(":")[2])))
    if "to" in cells[1].partition(":")[2]:
        shared = set(range(min(shared), max(shared) + 1))
    assert sum(shared) / len(shared) == mean
