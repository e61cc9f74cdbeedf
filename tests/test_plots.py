"""Figures hold exactly the data they are given, say what they show, and can be read."""

import itertools
import statistics

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

import normlab as nl
from normlab.history import COLUMNS, QUANTITIES
from normlab.support.figures import drawn

FALLING = [2.1, 0.9, 0.45, 0.31, 0.305]
RISING = [0.62, 0.85, 0.905, 0.93, 0.9375]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    pyplot.close("all")


def run_with(source: str = "toy images", **quantities: list[float]) -> nl.Run:
    """A run with a history written by hand; what is not given is 0.5 throughout."""
    epochs = len(next(iter(quantities.values())))
    columns = {name: [0.5] * epochs for name in COLUMNS} | quantities
    columns["epoch"] = list(range(1, epochs + 1))
    history = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    nothing = torch.empty(0)
    origin = {"is": {"data": {"test_images": 100}}, "from": {"data_source": source}}
    return nl.Run(nn.Identity(), nl.Recipe(), history, nothing, nothing, origin)


def boxes(figure) -> list:
    """Where the values at the ends of the curves stand, in pixels, without what points to them."""
    figure.canvas.draw()
    return [Text.get_window_extent(text) for ax in figure.axes for text in ax.texts]


def make_mistakes(count: int, total: int | None = None, channels: int = 1) -> nl.Mistakes:
    random = torch.Generator().manual_seed(count)
    return nl.Mistakes(
        images=torch.randint(90, 200, (count, channels, 6, 6), generator=random).to(torch.uint8),
        true=torch.arange(count) % 3,
        predicted=(torch.arange(count) + 1) % 3,
        probability=torch.linspace(0.97, 0.41, count),
        index=torch.arange(count),
        classes=("cat", "dog", "emu"),
        total=count if total is None else total,
        tested=1200,
        source="toy images",
    )


# --- curves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_curve_is_the_history(quantity):
    figure = nl.plot_curves({"GN": run_with(**{quantity: RISING})}, quantity)
    (line,) = figure.axes[0].lines
    factor = 100 if quantity in ("train_accuracy", "test_accuracy") else 1
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(line.get_ydata(), [factor * value for value in RISING])


def test_several_seeds_become_their_mean_and_standard_deviation():
    seeds = [[2.0, 1.0, 0.5], [2.4, 1.1, 0.3], [1.9, 0.9, 0.7]]
    ax = nl.plot_curves({"GN": [run_with(test_loss=losses) for losses in seeds]}).axes[0]
    (line,), (band,) = ax.lines, ax.collections
    corners = band.get_paths()[0].vertices
    for epoch, losses in enumerate(zip(*seeds, strict=True), start=1):
        mean, sd = statistics.mean(losses), statistics.stdev(losses)
        assert line.get_ydata()[epoch - 1] == pytest.approx(mean)
        heights = corners[corners[:, 0] == epoch, 1]
        assert (heights.min(), heights.max()) == pytest.approx((mean - sd, mean + sd))
    assert ax.get_legend().get_title().get_text() == "mean ± sd of 3 seeds"


def test_unequal_numbers_of_seeds_stand_with_the_names():
    one, three = run_with(lr=[0.1, 0.2]), [run_with(lr=[0.2, 0.1])] * 3
    ax = nl.plot_curves({"before": one, "now": three}, "lr").axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "before, 1 seed",
        "now, 3 seeds",
    ]
    assert ax.get_legend().get_title().get_text() == "mean ± sd"


def test_a_single_run_needs_no_legend():
    assert nl.plot_curves({"GN": run_with(lr=[0.1, 0.2])}, "lr").axes[0].get_legend() is None


def test_panels_have_one_scale_and_end_where_the_curves_end():
    panels = {
        label: {
            "before": run_with(test_accuracy=[0.2, 0.7, top]),
            "now": run_with(test_accuracy=[0.6, 0.7, top]),
        }
        for label, top in (("BN", 0.8), ("GN", 0.75), ("LN", 0.7), ("IN", 0.9))
    }
    figure = nl.plot_panels(panels)
    assert figure.get_suptitle() == "Test accuracy, toy images"
    assert [ax.get_title() for ax in figure.axes] == list(panels)
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    to_axes = figure.axes[0].transScale + figure.axes[0].transLimits
    assert figure.axes[0].texts[0].xyann[1] == pytest.approx(
        to_axes.transform((3, 80))[1], abs=0.06
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["before", "now"]
    for wrong in ({}, panels | {"XN": {"now": run_with(test_accuracy=[0.5])}}):
        with pytest.raises(ValueError, match="no panels to plot, or not all have the same labels"):
            nl.plot_panels(wrong)


def test_a_single_run_has_no_band():
    ax = nl.plot_curves({"GN": [run_with(test_loss=FALLING)]}).axes[0]
    assert len(ax.lines) == 1
    assert not ax.collections


def test_runs_of_different_length_are_averaged_over_the_epochs_they_share():
    some = [run_with(test_loss=[3, 2, 1]), run_with(test_loss=[1, 1, 1, 9])]
    (line,) = nl.plot_curves({"GN": some}).axes[0].lines
    assert line.get_ydata().tolist() == [2, 1.5, 1]


@pytest.mark.parametrize(
    ("quantity", "name", "unit", "scale"),
    [
        ("train_loss", "Training loss", "(nats per image)", "log"),
        ("test_loss", "Test loss", "(nats per image)", "log"),
        ("train_accuracy", "Training accuracy", "(%)", "linear"),
        ("test_accuracy", "Test accuracy", "(%)", "linear"),
        ("penalty", "L1 penalty", "(nats)", "linear"),
        ("lr", "Learning rate", "rate", "linear"),
        ("seconds", "Time of an epoch", "(s)", "linear"),
    ],
)
def test_curves_say_what_they_show(quantity, name, unit, scale):
    runs = {"BN + L1": run_with(test_loss=FALLING), "GN": run_with(test_loss=FALLING)}
    ax = nl.plot_curves(runs, quantity).axes[0]
    assert ax.get_title() == f"{name}, toy images"
    assert ax.get_xlabel().startswith("epoch")
    assert unit in ax.get_ylabel()
    assert ax.get_yscale() == scale
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["BN + L1", "GN"]


def test_a_title_of_ones_own_replaces_the_usual_one():
    figure = nl.plot_curves({"GN": run_with(test_loss=FALLING)}, title="Groups of 2")
    assert figure.axes[0].get_title() == "Groups of 2"


def test_the_title_names_all_data_sets():
    runs = {"a": run_with("MNIST", lr=[1.0]), "b": run_with("digits", lr=[1.0])}
    assert nl.plot_curves(runs, "lr").axes[0].get_title() == "Learning rate, MNIST, digits"


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 20, 150])
def test_epochs_have_whole_ticks(epochs):
    figure = nl.plot_curves({"GN": run_with(test_loss=[1.0] * epochs)})
    figure.canvas.draw()
    (ax,) = figure.axes
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("quantity", "values", "ends"),
    [
        ("test_loss", ([2.0, 0.5], [2.0, 0.0123]), ("0.500 run 0", "0.0123 run 1")),
        ("test_accuracy", ([0.9, 0.98765], [0.8, 0.91]), ("98.77 % run 0", "91.00 % run 1")),
    ],
)
def test_the_last_value_stands_beside_the_end_of_its_curve(quantity, values, ends):
    runs = {f"run {n}": run_with(**{quantity: one}) for n, one in enumerate(values)}
    figure = nl.plot_curves(runs, quantity)
    figure.canvas.draw()
    (ax,) = figure.axes
    texts = {text.get_text(): text for text in ax.texts}
    for line, end in zip(ax.lines, ends, strict=True):
        text = texts[end]
        box = Text.get_window_extent(text)
        x, y = ax.transData.transform(line.get_xydata()[-1])
        assert box.x0 > x
        assert abs((box.y0 + box.y1) / 2 - y) < box.height / 2


@pytest.mark.parametrize("labels", [2, 3, 6])
@pytest.mark.parametrize("gap", [0, 1e-4, 0.03])
@pytest.mark.parametrize(
    ("quantity", "values"), [("test_loss", FALLING), ("test_accuracy", RISING)]
)
def test_last_values_neither_overlap_nor_leave_the_figure(labels, gap, quantity, values):
    runs = {
        f"run {n}": run_with(**{quantity: [value - n * gap for value in values]})
        for n in range(labels)
    }
    figure = nl.plot_curves(runs, quantity)
    places = boxes(figure)
    assert len(places) == labels
    for one, other in itertools.combinations(places, 2):
        assert not one.overlaps(other)
    for box in places:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_low_first_epochs_are_cut_off_and_the_axis_says_so():
    accuracies = [0.11, 0.9, 0.95, 0.951, 0.952, 0.953, 0.954, 0.955]
    ax = nl.plot_curves({"GN": run_with(test_accuracy=accuracies)}, "test_accuracy").axes[0]
    bottom, top = ax.get_ylim()
    assert 11 < bottom < 95 < 95.5 < top <= 100
    assert "first values lie below" in ax.get_xlabel()
    assert ax.lines[0].get_ydata()[0] == pytest.approx(11)


def test_a_loss_of_zero_leaves_a_readable_figure():
    figure = nl.plot_curves({"GN": run_with(train_loss=[0.5, 0.1, 0.0])}, "train_loss")
    (box,) = boxes(figure)  # a network that has learned tiny data by heart gets there
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_an_unknown_quantity_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'test_accuracy'"):
        nl.plot_curves({"GN": run_with(lr=[1.0])}, "test_acuracy")


@pytest.mark.parametrize("runs", [{}, {"GN": []}, {"GN": [], "LN": ()}])
def test_no_runs_are_refused(runs):
    with pytest.raises(ValueError, match="there are no runs to plot"):
        nl.plot_curves(runs)
    assert not pyplot.get_fignums()


def test_a_label_without_runs_is_named():
    with pytest.raises(ValueError, match="GN"):
        nl.plot_curves({"BN": run_with(test_loss=FALLING), "GN": []})


def test_curves_go_into_the_axes_given():
    figure, axes = pyplot.subplots(1, 2)
    returned = nl.plot_curves({"GN": run_with(test_loss=FALLING)}, ax=axes[1])
    assert returned is figure
    assert len(pyplot.get_fignums()) == 1
    assert [len(ax.lines) for ax in axes] == [0, 1]


def test_curves_go_beside_a_line_that_is_already_there():
    ax = pyplot.subplots()[1]
    ax.axhline(99.4, label="a goal")
    nl.plot_curves({"GN": run_with(test_accuracy=RISING)}, "test_accuracy", ax=ax)
    assert [line.get_label() for line in ax.lines] == ["a goal", "GN"]


@pytest.mark.parametrize("count", [6, 8, 15])
@pytest.mark.parametrize("own", [True, False])
def test_a_legend_of_many_names_does_not_cover_the_curves(count, own):
    runs = {f"number {n}": run_with(test_loss=FALLING) for n in range(count)}
    ax = None if own else pyplot.subplots(layout="constrained", figsize=(7, 7))[1]
    figure = nl.plot_curves(runs, ax=ax)
    figure.canvas.draw()
    (ax,) = figure.axes
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.bbox)
    assert not legend.overlaps(ax.xaxis.label.get_window_extent())
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= legend.y0 < legend.y1 <= figure.bbox.y1
    assert ax.bbox.height > 2 * figure.dpi


def test_training_and_test_have_the_same_axes():
    runs = {
        "GN": run_with(train_accuracy=[0.1, 0.8, 0.9, 0.99], test_accuracy=[0.7, 0.7, 0.7, 0.75])
    }
    figure = nl.plot_loss_and_accuracy(runs, training=True)
    (_, training, _, test) = figure.axes
    figure.canvas.draw()
    assert training.get_ylim() == test.get_ylim()
    assert test.get_ylim()[0] < 70 < 99 < test.get_ylim()[1]
    assert "below the frame" in training.get_xlabel()
    assert test.get_xlabel() == "epoch"
    for ax, value in ((training, 99), (test, 75)):
        _, height = ax.transData.transform((1, value))
        box = Text.get_window_extent(ax.texts[0])
        assert box.y0 < height < box.y1


@pytest.mark.parametrize(
    ("training", "titles"),
    [
        (False, ["Test loss", "Test accuracy"]),
        (True, ["Training loss", "Training accuracy", "Test loss", "Test accuracy"]),
    ],
)
def test_loss_and_accuracy_stand_side_by_side(training, titles):
    runs = {"GN": run_with(test_loss=FALLING, test_accuracy=RISING, train_loss=[0.2] * 5)}
    figure = nl.plot_loss_and_accuracy(runs, training=training)
    assert [ax.get_title() for ax in figure.axes] == [f"{title}, toy images" for title in titles]
    loss, accuracy = (ax.lines[0].get_ydata() for ax in figure.axes[-2:])
    np.testing.assert_allclose(loss, FALLING)
    np.testing.assert_allclose(accuracy, [100 * value for value in RISING])
    for one, other in itertools.combinations(boxes(figure), 2):
        assert not one.overlaps(other)


def test_loss_and_accuracy_take_the_results_of_an_assignment(tiny, tiny_assignment):
    runs = {"GN": [run_with(test_loss=FALLING)], "LN": [run_with(test_loss=FALLING)]}
    results = nl.Results(tiny_assignment, tiny, runs)
    labels = [line.get_label() for line in nl.plot_loss_and_accuracy(results).axes[0].lines]
    assert labels == ["GN", "LN"]


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_ten_mistakes_are_five_rows_of_two(channels):
    mistakes = make_mistakes(10, total=37, channels=channels)
    figure = nl.plot_mistakes(mistakes, title="GN")
    grids = {ax.get_subplotspec().get_gridspec().get_geometry() for ax in figure.axes}
    assert grids == {(5, 2)}
    for place, ax in enumerate(figure.axes):
        (picture,) = ax.images
        shown = np.atleast_3d(picture.get_array())
        np.testing.assert_array_equal(shown, mistakes.images[place].permute(1, 2, 0))
        # 0 is black and 255 white: a stretched contrast would show another image.
        assert channels == 3 or picture.get_clim() == (0, 255)
    head = figure.get_suptitle()
    assert head == "GN: misclassified test images\ntoy images: 37 of 1,200"


def test_each_mistake_names_its_classes_and_the_probability():
    titles = [ax.get_title() for ax in nl.plot_mistakes(make_mistakes(2)).axes]
    assert titles == [
        "true: cat\npredicted: dog (97.0\xa0%)",
        "true: dog\npredicted: emu (41.0\xa0%)",
    ]


@pytest.mark.parametrize(
    ("count", "total", "words"),
    [
        (10, 10, ": 10 of 1,200"),
        (4, 300, ": 300 of 1,200"),  # four were asked for, more there are
        (3, 3, ": only 3 of 1,200"),
        (1, 1, ": only 1 of 1,200"),
    ],
)
def test_the_title_counts_the_mistakes(count, total, words):
    figure = nl.plot_mistakes(make_mistakes(count, total))
    assert figure.get_suptitle().endswith(words)
    assert sum(len(ax.images) for ax in figure.axes) == count
    assert all(not ax.axison for ax in figure.axes)  # nor do empty places show a frame


def test_no_mistakes_at_all_are_a_sentence_instead_of_an_empty_matrix():
    figure = nl.plot_mistakes(make_mistakes(0, 0), title="BN")
    (text,) = figure.texts
    assert text.get_text() == "BN: misclassified test images\ntoy images: none of 1,200"
    assert not figure.axes
    assert figure.get_figheight() < 1.5


@pytest.mark.parametrize("grid", [{"rows": 0}, {"cols": -1}])
def test_a_matrix_of_mistakes_needs_rows_and_columns(grid):
    with pytest.raises(ValueError, match=f"{next(iter(grid))} must be at least 1"):
        nl.plot_mistakes(make_mistakes(3), **grid)


# --- confusion --------------------------------------------------------------------------------


def test_a_confusion_table_shows_the_counts():
    counts = [[31, 2, 0], [0, 1250, 7], [0, 0, 0]]  # no image of the last class
    figure = nl.plot_confusion(torch.tensor(counts), ("cat", "dog", "emu"), title="GN")
    (ax,) = figure.axes
    shown = {text.get_position(): text.get_text() for text in ax.texts}
    wanted = {(x, y): str(n) for y, row in enumerate(counts) for x, n in enumerate(row) if n}
    assert shown == wanted
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "emu"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert ax.get_title() == "GN"


def test_a_confusion_table_goes_into_the_axes_given():
    figure, ax = pyplot.subplots()
    assert nl.plot_confusion(torch.eye(2, dtype=torch.int64), "ab", ax=ax) is figure
    assert len(pyplot.get_fignums()) == 1


def test_a_hundred_classes_are_drawn_without_measuring_each_number():
    """Which took the longest."""
    counts = torch.eye(100, dtype=torch.int64) * 50
    counts[:, ::4] += 1
    (ax,) = nl.plot_confusion(counts, [f"class {n}" for n in range(100)]).axes
    assert len(ax.texts) == 100 * 25 + 75
    assert not any(text.get_in_layout() for text in ax.texts)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3), (4,)])
def test_a_confusion_matrix_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match="does not fit 2 classes") as caught:
        nl.plot_confusion(torch.zeros(shape, dtype=torch.int64), "ab")
    assert str(shape) in str(caught.value)


# --- files and windows ------------------------------------------------------------------------


def test_save_figure_writes_a_whole_png_and_closes_the_figure(tmp_path):
    figure = nl.plot_curves({"GN": run_with(test_loss=FALLING)})
    width, height = figure.get_size_inches()
    path = nl.save_figure(figure, tmp_path / "new" / "loss.png", dpi=50)
    assert path == tmp_path / "new" / "loss.png"
    image = matplotlib.image.imread(path, format="png")
    assert image.shape[:2] == (round(50 * height), round(50 * width))
    assert list(path.parent.iterdir()) == [path]
    assert not pyplot.fignum_exists(figure.number)


def test_a_failed_save_leaves_the_former_picture(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"the former picture")
    figure = nl.plot_curves({"GN": run_with(test_loss=FALLING)})

    def disk_full(target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", disk_full)
    with pytest.raises(OSError, match=r"loss\.png: No space left"):
        nl.save_figure(figure, path)
    assert path.read_bytes() == b"the former picture"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_opens_a_window(monkeypatch, tmp_path):
    def show(*arguments, **options):
        raise AssertionError("a figure was shown")

    monkeypatch.setattr(pyplot, "show", show)
    monkeypatch.setattr(pyplot.Figure, "show", show)
    runs = {"GN": run_with(test_loss=FALLING)}
    nl.plot_curves(runs)
    nl.plot_loss_and_accuracy(runs)
    nl.plot_mistakes(make_mistakes(3))
    nl.save_figure(nl.plot_confusion(torch.eye(2, dtype=torch.int64), "ab"), tmp_path / "a.png")


def test_the_first_figure_leaves_on_what_a_notebook_switches_on_with_it(monkeypatch):
    """There matplotlib is imported with the first figure, and shows all while it is interactive."""
    monkeypatch.setitem(matplotlib.rcParams, "interactive", False)
    monkeypatch.setitem(matplotlib.rcParams, "axes.grid", True)

    @drawn
    def plot():
        assert not matplotlib.rcParams["axes.grid"]
        matplotlib.interactive(True)
        return Figure()

    plot()
    assert matplotlib.is_interactive()
    assert matplotlib.rcParams["axes.grid"]
