"""What a student would run instead, written as its users write it.

Each function trains the network for some epochs with a test after each; the caller takes the time.
All get the same images, network and optimiser.
"""

from collections.abc import Iterator
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import normlab as nl

BATCH = 128
RATE = 0.01
# What they import, to be done before their time is taken.
MODULES = {
    "Lightning": ("lightning",),
    "fastai": ("fastai.callback.progress", "fastai.learner", "fastai.metrics", "fastai.optimizer"),
}


def recipe(augment: tuple[str, ...]) -> nl.Recipe:
    """What all of them train by, as normlab says it."""
    return nl.Recipe(batch_size=BATCH, lr=RATE, schedule="constant", augment=augment)


class Pictures(torch.utils.data.Dataset):
    """Images as torchvision's data sets hand them out: a PIL picture, then transforms."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform) -> None:
        self.pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        pixels = self.pixels[index]
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return self.transform(picture), self.labels[index]


def loaders(
    data: nl.Dataset, workers: int, *, augmented: bool = True
) -> tuple[DataLoader, DataLoader]:
    """Training images cropped and flipped (colour) or turned (grey), test images as they are."""
    plain = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    if not augmented:
        changed = []
    elif data.input_shape[0] == 3:
        side = data.input_shape[-1]
        changed = [transforms.RandomCrop(side, padding=4), transforms.RandomHorizontalFlip()]
    else:
        changed = [transforms.RandomRotation(7)]
    train = Pictures(data.train_images, data.train_labels, transforms.Compose(changed + plain))
    test = Pictures(data.test_images, data.test_labels, transforms.Compose(plain))
    options = {"batch_size": BATCH, "num_workers": workers}
    return DataLoader(train, shuffle=True, **options), DataLoader(test, **options)


def students_loop(
    network,
    data,
    epochs: int,
    device: str,
    *,
    workers: int,
    l1: float = 0.0,
    augmented: bool = True,
) -> Iterator[float]:
    """The loop of the submissions: a DataLoader, and the loss read back at every step.

    Yields the test accuracy of every epoch.
    """
    train, test = loaders(data, workers, augmented=augmented)
    network = network.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9)
    for _ in range(epochs):
        network.train()
        right = total = 0
        losses = []
        for images, labels in train:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            if l1:
                loss = loss + l1 * sum(weight.abs().sum() for weight in network.parameters())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            right += (logits.argmax(1) == labels).sum().item()
            total += len(labels)
        network.eval()
        test_loss = test_right = 0
        with torch.no_grad():
            for images, labels in test:
                images, labels = images.to(device), labels.to(device)
                logits = network(images)
                test_loss += F.cross_entropy(logits, labels, reduction="sum").item()
                test_right += (logits.argmax(1) == labels).sum().item()
        yield test_right / len(test.dataset)


def lightning(network, data, epochs: int, device: str, *, workers: int, l1: float = 0.0) -> None:
    """PyTorch Lightning with its ordinary settings."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch, _):
            images, labels = batch
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels)
            if l1:
                loss = loss + l1 * nl.l1_penalty(self.network)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, _):
            images, labels = batch
            logits = self.network(images)
            self.log("test_loss", F.cross_entropy(logits, labels))
            self.log("test_accuracy", (logits.argmax(1) == labels).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)

    train, test = loaders(data, workers)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="gpu" if device == "cuda" else "cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), train, test)


def fastai(network, data, epochs: int, device: str, *, workers: int, l1: float = 0.0) -> None:
    """fastai's Learner with its ordinary settings."""
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.metrics import accuracy

    import_module("fastai.callback.progress")  # gives Learner its no_bar

    class Penalty(Callback):
        def after_loss(self) -> None:
            if self.training:
                self.learn.loss_grad = self.learn.loss_grad + l1 * nl.l1_penalty(self.model)

    train, test = loaders(data, workers)
    both = DataLoaders(train, test, device=torch.device(device))
    learner = Learner(
        both,
        network,
        loss_func=F.cross_entropy,
        opt_func=lambda parameters, lr: _fastai_sgd(parameters, lr),
        metrics=accuracy,
        cbs=[Penalty()] if l1 else [],
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(epochs, lr=RATE)


def _fastai_sgd(parameters, lr: float):
    from fastai.optimizer import SGD

    return SGD(parameters, lr=lr, mom=0.9)
