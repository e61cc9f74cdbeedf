"""Grad-CAM against maps that are known by the network's weights."""

import torch
from torch import nn

import normlab as nl


class Bright(nn.Module):
    """Class 1 where the right half is bright, class 0 where the left one is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)  # channel 0 is the image, channel 1 its double
        nn.init.constant_(self.conv.weight[0], 1.0)
        nn.init.constant_(self.conv.weight[1], 2.0)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        left, right = self.relu(self.conv(x)).mean(1).chunk(2, dim=2)
        return torch.stack([left.mean((1, 2)), right.mean((1, 2))], 1)


def test_grad_cam_weighs_a_layers_outputs_by_their_mean_gradients():
    network, images = Bright().train(), torch.rand(3, 1, 4, 6)
    found = nl.grad_cam(network, images, torch.tensor([0, 1, 0]), layer="conv")
    # Half of the pixels have a gradient, the same for both channels: the map is the image.
    torch.testing.assert_close(found, (images / images.amax((1, 2, 3), keepdim=True))[:, 0])
    assert network.training
    assert not network.conv._forward_hooks
    assert network.conv.weight.grad is None


def test_grad_cam_is_enlarged_and_nothing_where_all_speaks_against_the_class():
    network = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        network[1].weight.fill_(1.0)
        network[1].bias.zero_()
        network[3].weight[0], network[3].weight[1] = 1.0, -1.0
    both = nl.grad_cam(network, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), layer="1")
    assert both.shape == (2, 4, 4)
    assert both[0].max() == 1
    assert not both[1].any()
