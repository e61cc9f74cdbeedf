"""Checks of images, labels and networks: a failure is one sentence."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normlab.support.checks import check_instance, warn
from normlab.support.module_state import copied, evaluating
from normlab.support.seeding import fork_random_state


def check_weights(network: nn.Module) -> None:
    """Raises `ValueError` for a lazy layer, which makes its weights when it first sees images."""
    for name, layer in network.named_modules():
        if any(map(is_lazy, (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))):
            raise ValueError(
                f"layer {name!r} ({type(layer).__name__}) of {type(network).__name__} has no "
                "weights yet: call the network once on images of the right shape, as in "
                "network(torch.zeros(2, 1, 28, 28)), where it is built"
            )


def trained_parameters(network: nn.Module) -> list[Tensor]:
    """The parameters to be trained; `ValueError` if there are none, or none can have gradients."""
    check_weights(network)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError(f"{type(network).__name__} has no parameters to train")
    if any(weight.is_inference() for weight in weights):
        raise ValueError(
            f"{type(network).__name__} was built under torch.inference_mode(), whose tensors have "
            "no gradients: build it outside"
        )
    return weights


def check_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises `ValueError` for an optimiser of another network; warns of weights it leaves out."""
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    weights = [(name, w) for name, w in network.named_parameters() if w.requires_grad]
    left = [name for name, weight in weights if id(weight) not in held]
    kind = type(network).__name__
    if weights and len(left) == len(weights):
        raise ValueError(
            f"the optimiser holds none of the parameters of this {kind}, so it would learn nothing:"
            f" make it from this network, {type(optimizer).__name__}(network.parameters(), …)"
        )
    if left:
        warn(
            f"the optimiser leaves out {len(left)} of the {len(weights)} parameters of this {kind},"
            f" {left[0]!r} first; requires_grad_(False) on them says that this is meant"
        )


def own_weight(name: str, layer: nn.Module) -> Tensor | None:
    """The layer's weight if an optimiser can hold it; None if it is not to be trained."""
    own = dict(layer.named_parameters())
    if "weight" in own:
        return own["weight"]
    if any(weight.requires_grad for part, weight in own.items() if part != "bias"):
        raise ValueError(
            f"the weight of layer {name!r} ({type(layer).__name__}) is computed from "
            f"{' and '.join(part for part in own if part != 'bias')}, but Muon and centred=True "
            "change weights themselves: use optimizer='sgd' or 'adamw', with centred=False"
        )
    return None


def warn_of_batch_statistics(network: nn.Module) -> None:
    """Warns of batch normalization whose predictions for an image depend on the others."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            warn(
                f"layer {name!r} ({type(layer).__name__}) keeps no running statistics "
                "(track_running_stats=False): what the network predicts for an image depends on "
                "the other images of its batch"
            )
            return


def check_network(network: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    """Tries two images (C, H, W); raises `ValueError` if they or the classes do not fit."""
    check_weights(network)
    example = next(network.parameters(), torch.zeros(()))
    images = torch.zeros(2, *shape, dtype=example.dtype, device=example.device)
    before = {name for name, _ in network.named_parameters()}
    try:
        with torch.no_grad(), evaluating(network), fork_random_state(example.device):
            logits = network(images)
    except RuntimeError as error:
        raise ValueError(
            f"{type(network).__name__} cannot take images of shape {shape}: {error}"
        ) from error
    check_logits(network, images, logits, classes)
    if classes > 1 and (logits >= 0).all() and torch.allclose(logits.sum(1), logits.new_ones(2)):
        warn(
            f"{type(network).__name__} seems to return probabilities, which add up to 1, but "
            "cross-entropy takes logits: leave out the softmax at its end"
        )
    if made := [name for name, _ in network.named_parameters() if name not in before]:
        raise ValueError(
            f"{type(network).__name__} makes {made[0]!r} only when it first sees images: "
            "make it in __init__, or call the network once on images where it is built"
        )


def images_and_labels(batch: object, network: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch, if it consists of these two: (B, …) and int64 (B,).

    numpy arrays become tensors, their images float32. Where a network is given, they are on its
    device, the images in the type of its weights.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        raise ValueError(
            f"a batch must be (images, labels), not a {type(batch).__name__}{size}: pick these two"
        )
    images, labels = batch
    if isinstance(images, np.ndarray):
        whole = images.dtype.kind in "iub"
        images = torch.from_numpy(images if whole else images.astype(np.float32))
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        labels = torch.from_numpy(labels.astype(np.int64))
    if isinstance(labels, Tensor) and labels.dtype in (torch.uint8, torch.int16, torch.int32):
        labels = labels.long()
    for each in (images, labels):
        check_instance(each, Tensor, "images and labels of a batch", "torch.as_tensor(…) makes one")
    shape = tuple(images.shape)
    if not images.is_floating_point():
        raise ValueError(
            f"the images of a batch must be floats, not {images.dtype}: images / 255 makes bytes so"
        )
    if len(shape) == 4 and shape[3] in (1, 3) and shape[1] > 4:
        raise ValueError(
            f"the images of a batch must be of shape (B, C, H, W), not {shape} with the channels "
            "last: images.permute(0, 3, 1, 2) moves them"
        )
    if labels.dtype != torch.int64 or labels.shape != shape[:1]:
        raise ValueError(
            f"the labels of a batch of {len(images)} images must be int64 of shape "
            f"({len(images)},), the numbers of their classes, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    weight = None if network is None else next(network.parameters(), None)
    return (images, labels) if weight is None else (images.to(weight), labels.to(weight.device))


def check_logits(
    network: nn.Module, images: Tensor, logits: object, classes: int | None = None
) -> None:
    """Raises an error of one sentence unless the network made logits (B, classes) of its images."""
    name, count = type(network).__name__, len(images)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must return a tensor of logits, not a {type(logits).__name__}")
    if logits.dim() == 2 and len(logits) == count and classes in (None, logits.shape[1]):
        return
    wanted = "(B, classes)" if classes is None else f"(B, {classes}) for {classes} classes"
    cut = logits.dim() == 2 and len(logits) != count
    raise ValueError(
        f"{name} must return logits of shape {wanted}, not {tuple(logits.shape)} for B = {count}"
        + (_where_cut(network, images, len(logits)) if cut else "")
    )


def _where_cut(network: nn.Module, images: Tensor, rows: int) -> str:
    """The last layer that leaves a row for each image, where the network returns other `rows`."""
    twin, calls = copied(network).eval(), []
    for name, layer in twin.named_modules():
        if next(layer.children(), None) is None:
            layer.register_forward_hook(lambda *call, name=name: calls.append((name, *call)))
    with torch.no_grad():
        twin(images)
    calls = [call for call in calls if getattr(call[-1], "shape", (0,))[0] == len(images)]
    if not calls:
        return ""
    name, layer, _, output = calls[-1]
    return (
        f": after layer {name!r} ({type(layer).__name__}), which leaves {tuple(output.shape)}, a "
        f"view or reshape makes {rows} rows: it expects another size there, such as 1×1 from the "
        "last pooling; x.flatten(1) keeps images apart"
    )


def as_images(images: object, what: str) -> Tensor:
    """uint8 images (N, C, H, W), of a tensor or of a numpy array, which is copied."""
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.from_numpy(np.array(images, order="C"))
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(
            f"{what} must be a uint8 tensor or numpy array with values from 0 to 255, not {kind}"
        )
    shape, hint = tuple(images.shape), ""
    if len(shape) == 4 and shape[3] in (1, 3) and shape[1] > 4:
        hint = " with the channels last: move them by images.transpose(0, 3, 1, 2), or permute"
    if len(shape) != 4 or 0 in shape or hint:
        raise ValueError(f"{what} must be of shape (N, C, H, W), not {shape}{hint}")
    return images


def as_labels(labels: object, what: str) -> Tensor:
    """int64 labels, of whole numbers in a tensor, an array, a Series or a list."""
    values = np.asarray(labels)
    if values.dtype.kind not in "iu":
        kind = getattr(labels, "dtype", f"{type(labels).__name__} of {values.dtype}")
        raise TypeError(f"{what} must be whole numbers, best an int64 tensor, not {kind}")
    return torch.from_numpy(values.astype(np.int64))


def check_labels(labels: Tensor, what: str, images: int, classes: int) -> None:
    if labels.shape != (images,):
        raise ValueError(f"{what} must be of shape ({images},), not {tuple(labels.shape)}")
    for extreme in (int(labels.min()), int(labels.max())):
        if not 0 <= extreme < classes:
            allowed = f"{classes} classes have labels 0 to {classes - 1}"
            raise ValueError(f"{what} holds {extreme}: {allowed}")
