"""The pictures of a watch: what they draw, by reading the figure back."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

import normlab as nl


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def made_up(layers: tuple[str, ...] = ("a", "b", "c"), steps: tuple[int, ...] = (0, 20, 40)):
    """A frame such as `Watch.frame` returns: every value tells its layer, step and percentile."""
    rows = []
    for step in steps:
        for depth, layer in enumerate(layers):
            rows.append((step, layer, "convolution", "std", 10.0**depth + step))
            rows.append((step, layer, "convolution", "mean", -1.0 - depth))
            for share in (5, 25, 50, 75, 95):
                value = (share - 50) / 10 + depth + step / 10
                rows.append((step, layer, "convolution", f"percentile_{share}", value))
            rows.append((step, f"{layer}.norm", "norm", "running_mean", 0.1 * depth))
        rows.append((step, layers[1], "convolution", "dead", 0.25))
    return pd.DataFrame(rows, columns=["step", "layer", "kind", "quantity", "value"])


def lines_of(ax) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in ax.lines}


def test_a_panel_for_each_label_and_a_line_for_each_layer():
    figure = nl.plot_watch({"BN": made_up(), "no norm": made_up(("x", "y"))}, "std")
    left, right, bar = figure.axes
    assert (left.get_title(), right.get_title()) == ("BN", "no norm")
    assert list(lines_of(left)) == ["a", "b", "c"]
    assert lines_of(right)["y"].tolist() == [[0, 10], [20, 30], [40, 50]]
    assert left.get_yscale() == "log"
    assert left.get_ylim() == right.get_ylim()
    assert bar.get_ylabel() == "number of the convolution"
    assert bar.get_yticks().tolist() == [1, 2, 3]
    many = nl.plot_watch({"BN": made_up(tuple("abcdefghijkl"))}, "std").axes[-1]
    assert many.get_yticks().tolist() == [1, 3, 5, 7, 9, 11]  # every second, to be legible


def test_a_layer_has_the_colour_of_its_depth_in_every_picture():
    of_all = nl.plot_watch({"BN": made_up()}, "std").axes[0]
    of_one = nl.plot_watch({"BN": made_up()}, "dead").axes[0]
    assert list(lines_of(of_one)) == ["b"]
    assert of_one.lines[0].get_color() == pytest.approx(of_all.lines[1].get_color())
    assert lines_of(of_one)["b"][:, 1].tolist() == [25, 25, 25]  # in percent


def test_what_may_be_negative_has_a_linear_axis():
    assert nl.plot_watch({"BN": made_up()}, "mean").axes[0].get_yscale() == "linear"
    figure = nl.plot_watch({"BN": made_up()}, "running_mean", kind="norm")
    assert list(lines_of(figure.axes[0])) == ["a.norm", "b.norm", "c.norm"]


def test_sizes_within_a_decade_have_a_linear_axis():
    frame = made_up(("a", "b"))
    frame.loc[frame["quantity"] == "std", "value"] = 2.0
    assert nl.plot_watch({"BN": frame}, "std").axes[0].get_yscale() == "linear"


def test_title_and_axis_say_whose_outputs_they_are_and_do_not_repeat_each_other():
    frame = made_up()
    norms = frame[frame["quantity"] == "std"].assign(kind="norm")
    figure = nl.plot_watch({"BN": norms}, "std", kind="norm")
    assert figure.get_suptitle() == "Standard deviation of the norms' outputs"
    assert figure.axes[0].get_ylabel() == "standard deviation"
    figure = nl.plot_watch({"BN": frame}, "running_mean", kind="norm")
    assert figure.get_suptitle() != figure.axes[0].get_ylabel()
    figure.canvas.draw()
    assert figure._suptitle.get_window_extent().width < figure.bbox.width


def test_activations_that_would_be_flat_beside_others_have_a_compressed_axis():
    wide = made_up()
    wide.loc[wide["step"] == 40, "value"] *= 20
    figure = nl.plot_activations({"BN": made_up(), "none": wide}, times=2)
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "linear", "symlog", "symlog"]
    assert len(figure.axes[2].lines) == 3  # the median, and where the scale changes


def test_a_single_record_is_visible():
    figure = nl.plot_watch({"BN": made_up(steps=(0,))}, "std", title="Once")
    assert all(line.get_marker() == "o" for line in figure.axes[0].lines)
    assert figure.get_suptitle() == "Once"


def test_activations_have_a_row_for_each_time_and_their_bands():
    figure = nl.plot_activations({"BN": made_up(), "GN": made_up()}, times=2)
    assert len(figure.axes) == 4
    assert [ax.texts[0].get_text() for ax in figure.axes] == [
        *("step 0", "step 0", "step 40", "step 40")
    ]
    late = figure.axes[2]
    assert late.lines[0].get_xydata().tolist() == [[1, 4], [2, 5], [3, 6]]  # the median
    wide, middle = (
        np.concatenate([path.vertices for path in each.get_paths()]) for each in late.collections
    )
    assert (wide[:, 1].min(), wide[:, 1].max()) == pytest.approx((4 - 4.5, 6 + 4.5))
    assert (middle[:, 1].min(), middle[:, 1].max()) == pytest.approx((4 - 2.5, 6 + 2.5))


def test_fewer_records_than_times_are_drawn_once_each():
    figure = nl.plot_activations({"BN": made_up(steps=(0, 20))}, times=5)
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["step 0", "step 20"]


def test_a_watch_is_drawn_as_well_as_its_frame(tiny, tiny_network):
    network = tiny_network()
    with nl.watch(network, every=2) as watched:
        nl.fit(network, tiny, nl.Recipe(epochs=2, batch_size=32), device="cpu", progress=False)
    drawn = lines_of(nl.plot_watch({"BN": watched}, "weight_norm").axes[0])["conv"]
    frame = watched.frame()
    chosen = frame[(frame["layer"] == "conv") & (frame["quantity"] == "weight_norm")]
    assert drawn[:, 1] == pytest.approx(chosen["value"].to_numpy())
    assert nl.plot_activations({"BN": watched}).axes


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: nl.plot_watch({"BN": made_up()}, "stdd"), "did you mean 'std'?"),
        (lambda: nl.plot_watch({"BN": made_up()}, "std", kind="conv"), "unknown kind of layer"),
        (lambda: nl.plot_watch({"BN": made_up()}, "rate"), "BN: no 'rate' of a convolution layer"),
        (lambda: nl.plot_watch({}), "needs watches by label"),
        (lambda: nl.plot_activations(made_up()), "needs watches by label"),
        (lambda: nl.plot_activations({"BN": made_up()}, times=0), "times must be at least 1"),
        (lambda: nl.plot_activations({"BN": made_up()}, kind="norm"), "no 'percentile_5' of a"),
    ],
)
def test_bad_input_gets_one_sentence(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
