"""The table of layers: what torchsummary prints, what it counts wrongly, how far layers see."""

import re

import pytest
import torch
from torch import nn

from normlab import NETWORKS, build_network, make_norm, summary
from tests.test_model import LETTERS, PARAMETERS, ROWS, lines


def rows_of_table(printed: str) -> list[str]:
    """The rows of torchsummary's table, written as in `ROWS`."""
    rows = []
    for kind, shape, count in re.findall(r"(\w+)-\d+ +\[-1, ([\d, ]+)\] +([\d,]+)\n", printed):
        letter = LETTERS.get(kind)
        if letter and letter in "CMG":
            rows.append(shape.replace(", ", "x"))
        if letter:
            rows[-1] += f" {letter}{count.replace(',', '').lstrip('0')}"
    return rows


@pytest.mark.parametrize("name", ROWS)
def test_summary_prints_the_assignments_table(name, capsys):
    parameters = summary(build_network(name, seed=0), NETWORKS[name].input_shape)
    printed = capsys.readouterr().out
    assert rows_of_table(printed) == lines(ROWS[name])
    assert f"Total params: {PARAMETERS[name]['bn']:,}\n" in printed
    assert parameters == PARAMETERS[name]["bn"]
    assert "wrongly" not in printed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_summary_leaves_no_trace(dtype, training):
    network = build_network("mnist-l1", dropout=0.5, seed=0).to(dtype).train(training)
    network[0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [layer.training for layer in network.modules()]
    random_state = torch.get_rng_state()
    assert summary(network, (1, 28, 28)) == 7_750
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [layer.training for layer in network.modules()] == modes
    assert not any(layer._forward_hooks for layer in network.modules())
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert "0.2.num_batches_tracked" in before
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value)


class Scaled(nn.Module):
    """A parameter of its own name, which torchsummary does not see, before other layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x * self.scale.sum())


SHARED = nn.Conv2d(1, 1, 3, padding=1)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (nn.Sequential(SHARED, SHARED), 10),
        (Scaled(nn.Conv2d(1, 2, 3)), 5 + 20),
        (Scaled(nn.ReLU()), 5),
    ],
    ids=["shared", "bare", "bare alone"],
)
def test_summary_says_where_torchsummary_counts_wrongly(network, parameters, capsys):
    assert summary(network, (1, 6, 6)) == parameters
    assert f"wrongly: it is {parameters}" in capsys.readouterr().out


def test_summary_is_called_as_torchsummary_is(capsys):
    network = build_network("mnist-l1", seed=0)
    for call in (
        lambda: summary(network, input_size=(1, 28, 28)),
        lambda: summary(network, (1, 28, 28), device="cpu"),
        lambda: summary(network, input_shape=(1, 28, 28)),
    ):
        assert call() == summary(network, (1, 28, 28))
    with pytest.raises(ValueError, match="input_shape must be"):
        summary(network)


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "none"])
def test_summary_says_how_far_each_layer_sees(norm, capsys):
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),  # 3 rows
        make_norm(norm, 4, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),  # 3 + 2
        nn.MaxPool2d(2),  # 5 + 2, since a step is two rows by now
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),  # all that the last outputs see
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    summary(network, (1, 20, 16), receptive_field=True)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "-" in line[:27]]
    seen = {row[0].split("-")[0]: row[-1] for row in rows if row[0][-1].isdigit()}
    assert (seen["Conv2d"], seen["MaxPool2d"], seen["AdaptiveAvgPool2d"]) == ("7", "7", "19")
    assert seen["Flatten"] == seen["Linear"].replace("50", "0")  # no images: their last is Param #
