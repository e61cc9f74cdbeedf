"""The assignments as students submitted them: the recipes of their notebooks."""

from dataclasses import replace

from normlab.assignments import Assignment
from normlab.recipes import Recipe
from normlab.support.checks import one_of

# What is known of the submissions' own training; where they do not say, SGD at a constant rate of
# 0.01, momentum 0.9, batches of 128 and the network's dropout stand in. The L1 of "mnist-eva6" is
# left out, since a sum of means over tensors is no factor of a sum of |w|.
_USUAL = Recipe(lr=0.01, schedule="constant")
_RECIPES = {
    "mnist-l1": _USUAL.replace(augment=("rotate:7",)),
    "mnist-eva6": _USUAL.replace(augment=("rotate:7",)),
    "cifar10-norms": _USUAL,
    "cifar10-add": _USUAL.replace(batch_size=32, augment=("shift:4", "flip:0.1")),
    "cifar10-skip": _USUAL,
}


def as_submitted(assignment: Assignment) -> Assignment:
    """The variants that a submission reports on, trained in its manner as far as it is known.

    `mnist-eva6` goes without its L1, which was another penalty than normlab's and a tiny one: 5e-4
    times a mean of |w| for each tensor of parameters. So that variant is called BN.

    Raises `ValueError` for an assignment that replaces no submission.
    """
    recipe = _RECIPES[one_of(assignment.name, _RECIPES, "submission")]
    variants = [variant for variant in assignment.variants if variant.reported is not None]
    if assignment.name == "mnist-eva6":
        variants = [replace(v, label=v.label.removesuffix(" + L1"), changes={}) for v in variants]
    return replace(
        assignment,
        name=f"{assignment.name}-as-submitted",
        title=f"{assignment.title}, trained in the submission's manner",
        variants=tuple(variants),
        recipe=recipe,
        dropout=None,
    )
