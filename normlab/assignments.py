"""The five assignments as data: network, data set, variants, recipe, and what was reported."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from normlab.model import NETWORKS
from normlab.norms import norm_name
from normlab.recipes import Recipe
from normlab.support.checks import as_list, check_instance, one_of


def folder_name(label: str) -> str:
    """A label as the name of a folder or file: "BN + L1" is `bn-l1`."""
    words = "".join(c if c.isalnum() else " " for c in label.lower()).split()
    return "-".join(words)


@dataclass(frozen=True)
class Variant:
    """One network of a comparison, and how it differs from the others."""

    label: str  # how tables and figures call it
    norm: str  # as for `make_norm`
    groups: int | None = None  # of "gn"; None takes the network's own
    skip: bool = True  # whether skip connections are there, where the network has some
    changes: dict = field(default_factory=dict)  # fields of the recipe that differ
    reported: float | None = None  # test accuracy of the student's submission, a fraction
    declares: tuple[str, ...] = ()  # what else `check_fair` shall expect to differ: "class", …

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return folder_name(self.label)


@dataclass(frozen=True)
class Assignment:
    """A comparison of variants of one network; a variant may be given by the name of its norm."""

    name: str  # a short one; any for an assignment of one's own
    title: str  # what reports call it
    dataset: str  # name of its data set
    variants: tuple[Variant, ...]  # what is compared
    recipe: Recipe = field(default_factory=Recipe)  # how all are trained, but for their changes
    network: str | None = None  # a name in `NETWORKS`; give this, or
    build: Callable[[str], nn.Module] | None = None  # what makes your network of a norm's name
    dropout: float | None = None  # for `build_network`; None takes the network's own
    parameter_limit: int | None = None  # what the assignment allows at most, if anything
    epoch_limit: int | None = None

    def __post_init__(self) -> None:
        if (self.network is None) == (self.build is None):
            raise ValueError(
                f"assignment {self.name!r} needs either network=, a name, or build=, a function"
            )
        variants = as_list(self.variants)
        object.__setattr__(self, "variants", tuple(map(self.variant_of, variants)))
        if not self.variants:
            raise ValueError(f"assignment {self.name!r} has no variants to compare")
        if self.network is not None:
            one_of(self.network, NETWORKS, "network")
        for variant in self.variants:
            self.recipe.replace(**variant.changes)
            if self.build is None:
                norm_name(variant.norm)
            elif variant.groups is not None or not variant.skip:
                raise ValueError(
                    f"variant {variant.label!r}: build= gets the norm alone, so groups and skip "
                    "are for the function itself to set"
                )
        folders = [variant.folder for variant in self.variants]
        for twice in (name for name in folders if folders.count(name) > 1):
            raise ValueError(f"assignment {self.name!r} has two variants with the folder {twice!r}")

    def variant_of(self, norm: str | Variant) -> Variant:
        """A variant that differs in its norm alone; a `Variant` is returned as it is."""
        if not isinstance(norm, str):
            hint = "nl.Variant('GN', 'gn') makes one, or give 'gn'"
            check_instance(norm, Variant, "a variant", hint)
            return norm
        norm = norm_name(norm) if self.build is None else norm
        return Variant(norm.upper() if len(norm) < 4 else norm, norm)

    @property
    def limits(self) -> dict[str, int]:
        """What the assignment allows at most of "parameters" and "epochs", if anything."""
        both = {"parameters": self.parameter_limit, "epochs": self.epoch_limit}
        return {what: limit for what, limit in both.items() if limit}

    def recipe_for(self, variant: Variant, *, seed: int, epochs: int | None = None) -> Recipe:
        """The recipe of one variant: the shared one with the variant's changes."""
        changes = dict(variant.changes) | {"seed": seed}
        return self.recipe.replace(**changes | ({} if epochs is None else {"epochs": epochs}))


# Chosen by short trials on a validation part, which `tests/search.py` repeats. Networks this small
# hardly over-fit, so the assignments leave out the dropout of `build_network`. The L1 of
# "mnist-eva6" is that of "mnist-l1": the submission's 5e-4 multiplies a sum of means over tensors.
_MUON = Recipe(batch_size=64, optimizer="muon", lr=0.05, weight_decay=0.01, centred=True)
_MNIST = _MUON.replace(augment=("rotate:10", "shift:2"), schedule="warm-up")
_CIFAR10 = _MUON.replace(augment=("shift:2", "flip"))


def _course(name: str, title: str, *variants: Variant) -> Assignment:
    """An assignment with the network of its name; those on MNIST have no limit of parameters."""
    dataset = name.partition("-")[0]
    recipe, limit = {"mnist": (_MNIST, None), "cifar10": (_CIFAR10, 50_000)}[dataset]
    options = {"dropout": 0.0, "parameter_limit": limit, "epoch_limit": 20}
    return Assignment(name, title, dataset, variants, recipe, network=name, **options)


ASSIGNMENTS = {
    assignment.name: assignment
    for assignment in (
        _course(
            "mnist-l1",
            "BN with L1, GN and LN",
            Variant("BN + L1", "bn", changes={"l1": 1e-5}, reported=0.9946),
            Variant("GN", "gn", reported=0.9929),
            Variant("LN", "ln", reported=0.9953),
        ),
        _course(
            "mnist-eva6",
            "BN with L1, GN and two kinds of LN",
            Variant("BN + L1", "bn", changes={"l1": 1e-5}, reported=0.9946),
            Variant("GN", "gn", reported=0.9948),
            Variant("LN", "ln"),
            Variant("LN element-wise", "ln-elementwise", reported=0.9929),
        ),
        _course(
            "cifar10-norms",
            "BN, GN and two kinds of LN",
            Variant("BN", "bn", reported=0.7342),
            Variant("GN", "gn", reported=0.7036),
            Variant("LN", "ln"),
            Variant("LN element-wise", "ln-elementwise", reported=0.6766),
        ),
        _course(
            "cifar10-add",
            "BN, GN and LN in a residual network",
            Variant("BN", "bn", reported=0.7624),
            Variant("GN", "gn", reported=0.7526),
            Variant("LN", "ln", reported=0.7204),
        ),
        _course(
            "cifar10-skip",
            "BN, GN and LN with and without skip connections",
            Variant("BN", "bn", skip=False, reported=0.7435),
            Variant("GN", "gn", skip=False, reported=0.7435),
            Variant("LN", "ln", skip=False, reported=0.7456),
            Variant("BN + skip", "bn", reported=0.7642),
            Variant("GN + skip", "gn", reported=0.7486),
            Variant("LN + skip", "ln", reported=0.7325),
        ),
    )
}


def find_assignment(name: str | Assignment) -> Assignment:
    """The assignment of that name; an `Assignment` is returned as it is."""
    if isinstance(name, Assignment):
        return name
    return ASSIGNMENTS[one_of(name, ASSIGNMENTS, "assignment")]
