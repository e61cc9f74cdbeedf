"""Which engine is taken, and why."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module

import normlab as nl
from normlab.engines import choice
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine
from normlab.engines.plain import PlainEngine

CUDA = torch.device("cuda")


class Viewing(nn.Module):
    """As students write it: `.view` does not work on channels-last tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(4 * 26 * 26, 10)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.linear(x.view(x.size(0), -1))


def test_a_network_that_cannot_run_channels_last_takes_the_plain_path(few_digits):
    recipe = nl.Recipe(epochs=1)
    run = nl.fit(Viewing(), few_digits, recipe, device="cpu", progress=False)
    assert run.config["from"]["engine"] == "plain"
    assert "view" in run.config["from"]["because"]


def test_apple_s_gpus_take_the_plain_path(few_digits):
    train = few_digits.loader(batch_size=32)
    kind, why = choice._fastest(Viewing(), nl.Recipe(), train, torch.device("mps"))
    assert kind is PlainEngine
    assert why == "there is no faster way on mps"


class TooLarge(Viewing):
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


def test_a_network_too_large_for_the_trial_is_not_sent_down_the_plain_path(few_digits):
    batches = few_digits.loader(batch_size=32)
    with pytest.raises(torch.OutOfMemoryError):
        choice.make_engine("auto", TooLarge(), nl.Recipe(), batches, batches)


def test_the_path_is_recorded_and_can_be_chosen(few_digits, tmp_path):
    network = nl.build_network("mnist-l1", seed=0)
    recipe = nl.Recipe(epochs=1)
    fast = nl.fit(network, few_digits, recipe, device="cpu", progress=False)
    assert fast.config["from"]["engine"] == "cpu-channels-last"
    assert fast.config["from"]["computes_in"] == "float32"
    plain = nl.fit(network, few_digits, recipe, device="cpu", progress=False, engine="plain")
    assert plain.config["from"]["engine"] == "plain"
    with pytest.raises(ValueError, match=r"unknown engine 'plane'.*did you mean 'plain'"):
        nl.fit(network, few_digits, recipe, device="cpu", progress=False, engine="plane")


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("owner", ["a layer", "all layers"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_network_with_hooks_is_not_put_into_a_cuda_graph(owner, register, tiny, tiny_network):
    network, train = tiny_network(), tiny.loader(batch_size=32)
    if owner == "a layer":
        handle = getattr(network.conv, f"register_{register}")(lambda *_: None)
    else:
        handle = getattr(module, f"register_module_{register}")(lambda *_: None)
    with handle:
        assert choice._fastest(network, nl.Recipe(), train, CUDA)[0] is PlainEngine
        assert choice._fastest(network, nl.Recipe(), train, torch.device("cpu"))[0] is CpuEngine
    assert choice._fastest(network, nl.Recipe(), train, CUDA)[0] is GraphEngine
