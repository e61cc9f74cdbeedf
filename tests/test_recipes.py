"""What a recipe accepts, and its optimiser and schedule against torch and formulas."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from normlab import Recipe
from normlab.engines.plain import make_scheduler
from normlab.recipes import make_optimizer

BAD = {  # a type and a bound for each field; `tests/support/test_checks.py` tries the checks
    "epochs": [0, "20"],
    "batch_size": [0, 128.0],
    "optimizer": ["adagrad", None],
    "lr": [0, math.nan, "0.1"],
    "momentum": [-0.1, 1, "0.9"],
    "nesterov": ["no", None],
    "centred": ["no", 1],
    "weight_decay": [-1e-4, "0"],
    "schedule": ["one cycle", None],
    "l1": [-1e-5, math.inf, "1e-5"],
    "label_smoothing": [-0.1, 1, "0.1"],
    "augment": ["shfit", ("shift", "flip:2"), ("flip", "flip:0.1"), (3,), None],
    "dtype": ["float16", torch.float32],
    "seed": [-1, 0.0],
}


@pytest.mark.parametrize(("field", "value"), [(field, bad) for field in BAD for bad in BAD[field]])
def test_bad_value_is_refused_in_a_sentence_that_names_the_field(field, value):
    with pytest.raises((TypeError, ValueError)) as raised:
        Recipe(**{field: value})
    message = str(raised.value)
    assert field in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "typed", "meant"),
    [
        ("optimizer", "SGD", "sgd"),
        ("optimizer", "adamW", "adamw"),
        ("schedule", "onecycle", "one-cycle"),
        ("schedule", "cosinus", "cosine"),
        ("dtype", "flaot32", "float32"),
        ("dtype", "float16", "bfloat16"),
        ("augment", "rotation", "rotate"),
    ],
)
def test_unknown_name_suggests_the_nearest(field, typed, meant):
    with pytest.raises(ValueError, match=f"unknown {field}.* {typed!r}.* did you mean '{meant}"):
        Recipe(**{field: typed})


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": 0, "l1": 0, "weight_decay": 0, "label_smoothing": 0},
        {"lr": 1, "epochs": 1, "batch_size": 1, "seed": 2**63},
        {"momentum": 0.999, "label_smoothing": 0.999, "nesterov": True},
        {"augment": ("shift:2", "flip"), "optimizer": "muon", "centred": True, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_values_at_the_edge_are_accepted_and_fit_json(changes):
    recipe = Recipe(**changes)
    assert all(getattr(recipe, field) == value for field, value in changes.items())
    again = Recipe(**json.loads(json.dumps(recipe.as_dict())))
    assert again == recipe
    assert hash(again) == hash(recipe)


def test_one_augmentation_may_stand_without_a_tuple():
    assert Recipe(augment="flip:0.1") == Recipe(augment=("flip:0.1",))


def test_but_changes_those_fields_alone_and_checks_them():
    recipe = Recipe(epochs=3, augment=("flip",))
    changed = recipe.replace(lr=0.2, seed=4)
    assert changed.as_dict() == recipe.as_dict() | {"lr": 0.2, "seed": 4}
    assert recipe == Recipe(epochs=3, augment=("flip",))
    with pytest.raises(ValueError, match="lr must be greater than 0"):
        recipe.replace(lr=-1)
    with pytest.raises(ValueError, match=r"'epoch'.* did you mean 'epochs'"):
        recipe.replace(epoch=3)


def one_weight(start: float = 2.0) -> nn.Module:
    network = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(network.weight, start)
    return network


def after_steps(recipe: Recipe, gradients: list[float]) -> float:
    """The weight, 2 at first, after a step for each of the gradients."""
    network = one_weight()
    optimizer = make_optimizer(network, recipe)
    for gradient in gradients:
        network.weight.grad = torch.full_like(network.weight, gradient)
        optimizer.step()
    return network.weight.item()


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False), (0.0, True)]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_takes_the_steps_of_its_formula(momentum, nesterov, weight_decay):
    recipe = Recipe(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    weight, speed = 2.0, 0.0
    for gradient in (3.0, -1.0, 0.5):
        decayed = gradient + weight_decay * weight
        speed = momentum * speed + decayed
        weight -= 0.1 * (decayed + momentum * speed if nesterov else speed)
    assert after_steps(recipe, [3.0, -1.0, 0.5]) == pytest.approx(weight, rel=1e-12)


def test_adamw_takes_the_steps_of_its_formula():
    recipe = Recipe(optimizer="adamw", lr=0.1, weight_decay=0.02)
    weight, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0, 0.5), start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight *= 1 - 0.1 * 0.02
        size = first / (1 - 0.9**step)
        weight -= 0.1 * size / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
    assert after_steps(recipe, [3.0, -1.0, 0.5]) == pytest.approx(weight, rel=1e-12)


def test_frozen_parameters_are_left_to_themselves():
    network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    network[0].requires_grad_(False)
    (group,) = make_optimizer(network, Recipe()).param_groups
    assert {id(weight) for weight in group["params"]} == set(map(id, network[1].parameters()))


@pytest.mark.parametrize("network", [nn.Flatten(), nn.Linear(2, 2).requires_grad_(False)])
def test_nothing_to_train_is_an_error(network):
    with pytest.raises(ValueError, match=f"{type(network).__name__} has no parameters to train"):
        make_optimizer(network, Recipe())


def rates(optimizer, scheduler, steps: int) -> list[float]:
    """The learning rate of each of the next steps."""
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def rates_of_recipe(recipe: Recipe, steps: int, *, done: int = 0) -> list[float]:
    optimizer = make_optimizer(one_weight(), recipe)
    return rates(optimizer, make_scheduler(optimizer, recipe, steps, done=done), steps - done)


def rates_of_torch(kind, steps: int, **arguments) -> list[float]:
    optimizer = torch.optim.SGD(one_weight().parameters(), lr=0.3, momentum=0.9)
    first = rates(optimizer, kind(optimizer, **arguments), steps - 1)
    # The last rate is read without a step, since OneCycleLR refuses to move past it.
    return [*first, optimizer.param_groups[0]["lr"]]


# With fewer steps, torch's rise of 30 or 10 % is shorter than one step.
@pytest.mark.parametrize(
    ("schedule", "rise", "steps"),
    [*(("one-cycle", 0.3, n) for n in (4, 33, 469)), *(("warm-up", 0.1, n) for n in (11, 33, 469))],
)
def test_one_cycle_and_warm_up_are_those_of_torch(schedule, rise, steps):
    expected = rates_of_torch(
        torch.optim.lr_scheduler.OneCycleLR,
        steps,
        max_lr=0.3,
        total_steps=steps,
        pct_start=rise,
        cycle_momentum=False,
    )
    actual = rates_of_recipe(Recipe(lr=0.3, schedule=schedule), steps)
    assert actual == pytest.approx(expected, rel=0, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 469])
def test_cosine_is_that_of_torch(steps):
    expected = rates_of_torch(torch.optim.lr_scheduler.CosineAnnealingLR, steps, T_max=steps)
    actual = rates_of_recipe(Recipe(lr=0.3, schedule="cosine"), steps)
    assert actual == pytest.approx(expected, rel=0, abs=1e-9)


def test_constant_stays():
    assert rates_of_recipe(Recipe(lr=0.3, schedule="constant"), 5) == [0.3] * 5


@pytest.mark.parametrize("schedule", ["one-cycle", "warm-up", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_trainings_still_learn(schedule, steps):
    factors = [Recipe(lr=1, schedule=schedule).rate_at(step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) >= 1 / 25


@pytest.mark.parametrize("schedule", ["one-cycle", "warm-up", "cosine", "constant"])
@pytest.mark.parametrize("done", [1, 20, 39])
def test_resumed_schedule_goes_on_as_if_never_stopped(done, schedule):
    recipe = Recipe(lr=0.3, schedule=schedule)
    assert rates_of_recipe(recipe, 40, done=done) == rates_of_recipe(recipe, 40)[done:]


def test_numbers_of_any_library_make_the_same_recipe():
    lr, epochs = torch.tensor(0.125), np.int64(3)
    recipe = Recipe(lr=lr, epochs=epochs, batch_size=torch.tensor(16), l1=np.float32(0.5))
    assert recipe == Recipe(lr=0.125, epochs=3, batch_size=16, l1=0.5)
    assert json.loads(json.dumps(recipe.as_dict())) == recipe.as_dict()


def test_step_divides_by_ten_at_half_and_at_three_quarters():
    rates = rates_of_recipe(Recipe(lr=0.5, schedule="step"), 8)
    assert rates == pytest.approx([0.5] * 4 + [0.05] * 2 + [0.005] * 2)


@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_that_of_torch(seed):
    losses = torch.rand(40, generator=torch.Generator().manual_seed(seed)).tolist()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
    recipe = Recipe(lr=0.5, schedule="plateau")
    for count, loss in enumerate(losses, 1):
        scheduler.step(loss)
        rate = recipe.lr * recipe.plateau_factor(losses[:count])
        assert rate == pytest.approx(max(optimizer.param_groups[0]["lr"], 0.5e-8), rel=0.1) or (
            rate < 1e-7  # where torch leaves it, since it hardly changes
        )
    assert Recipe(lr=0.5, schedule="constant").plateau_factor(losses) == 1
