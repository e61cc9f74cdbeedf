"""The augmentations against plain loops over images, and what their names mean."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as torchvision

from normlab.augment import (
    AUGMENTATIONS,
    affine,
    cutout,
    flip,
    jitter,
    parse_augmentation,
    rotate,
    shift,
)

SIDES = [(6, 6), (5, 8), (9, 4)]


def images(height: int, width: int, *, dtype=torch.float64, batch: int = 6) -> torch.Tensor:
    """Random images (batch, 3, height, width) of values from 1 to 255: none is black inside."""
    generator = torch.Generator().manual_seed(height)
    return torch.randint(1, 256, (batch, 3, height, width), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_shift_moves_pixels_down_and_right_as_a_loop_does(sides, dtype):
    batch = images(*sides, dtype=dtype)
    offsets = [(0, 0), (1, 0), (0, -2), (3, 2), (-4, 1), (9, -9)]  # the last leaves the picture
    expected = torch.zeros_like(batch)
    for image, (down, right) in enumerate(offsets):
        for row in range(sides[0]):
            for column in range(sides[1]):
                y, x = row + down, column + right
                if 0 <= y < sides[0] and 0 <= x < sides[1]:
                    expected[image, :, y, x] = batch[image, :, row, column]
    assert torch.equal(shift(batch, torch.tensor(offsets), 9), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_flip_mirrors_the_chosen_images_alone(sides, dtype):
    batch = images(*sides, dtype=dtype, batch=4)
    flipped = flip(batch, torch.tensor([True, False, True, False]))
    for before, after, chosen in zip(batch, flipped, [1, 0, 1, 0], strict=True):
        rows = [row[::-1] if chosen else row for plane in before.tolist() for row in plane]
        assert after.flatten(0, 1).tolist() == rows
    assert flipped.dtype == dtype


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_rotate_equals_torchvision_image_by_image(sides):
    batch = images(*sides)
    degrees = torch.tensor([0.0, 7.0, -7.0, 33.3, 120.0, -170.0])
    expected = [
        torchvision.rotate(image, angle, InterpolationMode.BILINEAR)
        for image, angle in zip(batch, degrees.tolist(), strict=True)
    ]
    torch.testing.assert_close(rotate(batch, degrees), torch.stack(expected), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("sides", "degrees", "turned"),
    [
        ((6, 6), 90, lambda batch: batch.rot90(1, (2, 3))),  # counter-clockwise
        ((6, 6), -90, lambda batch: batch.rot90(-1, (2, 3))),
        ((5, 8), 180, lambda batch: batch.flip(2, 3)),
    ],
)
def test_quarter_and_half_turns_only_move_pixels(sides, degrees, turned):
    batch = images(*sides)
    rotated = rotate(batch, torch.full((6,), float(degrees)))
    torch.testing.assert_close(rotated, turned(batch), rtol=0, atol=0.01)


def test_rotated_bytes_are_the_same_as_rotated_floats():
    degrees = torch.linspace(-40, 40, 6)
    of_bytes = rotate(images(5, 8, dtype=torch.uint8), degrees)
    assert of_bytes.dtype == torch.float32
    assert torch.equal(of_bytes, rotate(images(5, 8, dtype=torch.float32), degrees))


@pytest.mark.parametrize("text", ["shift:3", "flip:0.3", "rotate:20"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_named_augmentation_applies_what_it_drew(text, dtype):
    augmentation = parse_augmentation(text)
    drawn = augmentation.draw(6, torch.Generator().manual_seed(5))
    batch = images(9, 4, dtype=dtype)
    functions = {"shift": lambda *both: shift(*both, 3), "flip": flip, "rotate": rotate}
    assert torch.equal(augmentation.apply(batch, drawn), functions[augmentation.name](batch, drawn))
    assert not torch.equal(augmentation.apply(batch, drawn), batch.float())


def draw(text: str, *, count: int = 4000, seed: int = 0) -> torch.Tensor:
    return parse_augmentation(text).draw(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("text", "most"), [("shift", 4), ("shift:1", 1), ("shift:7", 7)])
def test_shift_draws_every_offset_equally_often_both_ways(text, most):
    offsets = draw(text)
    assert offsets.shape == (4000, 2)
    values, counts = offsets.unique(return_counts=True)
    assert values.tolist() == list(range(-most, most + 1))
    expected = 8000 / (2 * most + 1)
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert torch.corrcoef(offsets.T.float())[0, 1].abs() < 0.08


@pytest.mark.parametrize(
    ("text", "share"), [("flip", 0.5), ("flip:0.1", 0.1), ("flip:0", 0), ("flip:1", 1)]
)
def test_flip_chooses_the_share_asked_for(text, share):
    chosen = draw(text)
    assert chosen.shape == (4000,)
    spread = (share * (1 - share) / 4000) ** 0.5
    assert abs(chosen.float().mean().item() - share) <= 5 * spread


@pytest.mark.parametrize(("text", "most"), [("rotate", 7), ("rotate:90", 90), ("rotate:0", 0)])
def test_rotate_draws_angles_over_the_whole_range(text, most):
    degrees = draw(text)
    assert degrees.shape == (4000,)
    assert degrees.abs().max() <= most
    quantiles = torch.quantile(degrees, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    expected = most * torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.05 * most)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_draws_come_from_the_generator_alone(name):
    before = torch.get_rng_state()
    assert torch.equal(draw(name, seed=1), draw(name, seed=1))
    assert not torch.equal(draw(name, seed=1), draw(name, seed=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("typed", "meant"), [("rotte", "rotate"), ("Flip", "flip"), ("shifts:2", "shift")]
)
def test_unknown_augmentation_suggests_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"shift, flip, rotate, .*; did you mean '{meant}'"):
        parse_augmentation(typed)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("shift:0", "a whole number from 1 to 64"),
        ("shift:65", "a whole number from 1 to 64"),
        ("shift:1.5", "a whole number from 1 to 64"),
        ("shift:nan", "a whole number from 1 to 64"),
        ("flip:1.01", "a number from 0 to 1"),
        ("rotate:inf", "a number from 0 to 180"),
        ("rotate:much", "a number from 0 to 180"),
        ("shift:2:3", "a whole number from 1 to 64"),
    ],
)
def test_amount_out_of_range_is_refused_with_the_range(text, wanted):
    with pytest.raises(ValueError, match=f"^augmentation '{text}': the amount must be {wanted}$"):
        parse_augmentation(text)


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_affine_equals_torchvision_image_by_image(sides):
    batch = images(*sides)
    moves = torch.tensor(
        [[0, 1, 0, 0], [7, 1, 0, 0], [-20, 1.1, 1, 0], [33, 0.9, 0, -2], [90, 1, 1, 2]]
    )
    expected = []
    for image, (degrees, scale, down, right) in zip(batch, moves.tolist(), strict=False):
        place = {"angle": -degrees, "scale": scale, "translate": [right, down], "shear": [0.0]}
        bilinear = InterpolationMode.BILINEAR
        expected.append(torchvision.affine(image, **place, interpolation=bilinear))
    moves[:, 1] = moves[:, 1].log()
    moves[:, 2:] /= torch.tensor(sides)  # pixels as parts of the sides
    found = affine(batch[: len(moves)], moves.double())
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cutout_covers_a_square_by_the_mean(dtype):
    batch = images(6, 8, dtype=dtype, batch=3)
    found = cutout(batch, torch.tensor([[0.5, 0.5], [0.0, 0.99], [0.99, 0.0]]), 4)
    squares = [(1, 5, 2, 6), (0, 2, 5, 8), (3, 6, 0, 2)]  # rows and columns; parts lie outside
    for before, after, (top, bottom, left, right) in zip(batch, found, squares, strict=True):
        expected = before.clone()
        mean = before.float().mean((1, 2)).to(dtype)
        expected[:, top:bottom, left:right] = mean[:, None, None]
        assert torch.equal(after, expected)


def test_jitter_changes_brightness_contrast_and_saturation():
    batch = images(5, 4, dtype=torch.float32, batch=4)
    factors = torch.tensor([[1.0, 1, 1], [1.2, 1, 1], [1, 0, 1], [1, 1, 0]])
    same, brighter, flat, grey = jitter(batch, factors)
    torch.testing.assert_close(same, batch[0])
    torch.testing.assert_close(brighter, (batch[1] * 1.2).clamp(max=255))
    torch.testing.assert_close(flat, batch[2].mean().expand(3, 5, 4))
    torch.testing.assert_close(grey, batch[3].mean(0).expand(3, 5, 4))
