"""Which places of an image speak for a class (Grad-CAM)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.support.checks import one_of
from normlab.support.module_state import evaluating


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor, *, layer: str) -> Tensor:
    """Where a layer's outputs speak for a class: (K, H, W) in [0, 1], the most at each image's 1.

    The outputs are weighted by the mean gradients of the class's logit; what speaks against it is
    0. Source: Selvaraju et al., "Grad-CAM", 2017.

    Args:
        images: (K, C, H, W) as the network gets them.
        classes: (K,) int64.
        layer: a name among `network.named_modules()`, of a layer whose outputs are images.
    """
    layers, kept = dict(network.named_modules()), []

    def keep(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # a ReLU may work in place

    hook = layers[one_of(layer, layers, "layer")].register_forward_hook(keep)
    try:
        with evaluating(network), torch.inference_mode(False), torch.enable_grad():
            example = next(network.parameters())
            logits = network(images.clone().to(example).requires_grad_())
            chosen = logits.gather(1, classes.to(example.device).view(-1, 1)).sum()
            (gradients,) = torch.autograd.grad(chosen, kept[-1])
    finally:
        hook.remove()
    if gradients.dim() != 4:
        raise ValueError(f"layer {layer!r} makes no images, but {tuple(gradients.shape)}")
    heat = (gradients.mean((2, 3), keepdim=True) * kept[-1]).sum(1, keepdim=True).relu().detach()
    heat = heat / heat.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return F.interpolate(heat, images.shape[2:], mode="bilinear").squeeze(1).cpu()
