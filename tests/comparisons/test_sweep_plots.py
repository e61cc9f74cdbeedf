"""The figure of a sweep shows what its table holds, and what diverged."""

import math

import pandas
import pytest
from matplotlib import pyplot

import normlab as nl


def table_of(rows):
    names = ("variant", "batch_size", "base_lr", "seed", "test_accuracy")
    return pandas.DataFrame(rows, columns=names)


def test_the_plot_shows_means_and_spreads_of_seeds():
    rows = [
        ("GN", size, 0.1, seed, 0.9 + 0.01 * seed + size / 1000)
        for size in (2, 8, 32)
        for seed in range(3)
    ]
    ax = nl.plot_sweep(table_of(rows)).axes[0]
    (container,) = ax.containers
    line, _, (bars,) = container
    assert line.get_xdata().tolist() == [2, 8, 32]
    assert line.get_ydata() == pytest.approx([91.2, 91.8, 94.2])
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    assert lengths == pytest.approx([2, 2, 2])  # one standard deviation to both sides
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "8", "32"]
    assert ax.get_title() == "Test accuracy, last epoch, mean ± sd of 3 seeds"


def test_the_bars_stay_where_accuracies_can_lie():
    rows = [("BN", size, 0.1, seed, value) for size in (2, 8) for seed, value in ((0, 0), (1, 1))]
    (container,) = nl.plot_sweep(table_of(rows)).axes[0].containers
    _, _, (bars,) = container
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[0, 100], [0, 100]]  # 50 ± 71


def test_the_plot_marks_what_diverged_and_tells_rates_apart():
    rows = [
        (variant, size, rate, 0, math.nan if rate == 1 and size == 8 else 0.5)
        for variant in ("BN", "GN")
        for size in (2, 4, 8)
        for rate in (0.1, 1)
    ]
    ax = nl.plot_sweep(table_of(rows)).axes[0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["BN, rate 0.1", "BN, rate 1", "GN, rate 0.1", "GN, rate 1"]
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[8], [8]]
    heights = [line.get_transform().transform((8, 1.0))[1] for line in crosses]
    frame, title = ax.get_window_extent(), ax.title.get_window_extent()
    assert frame.y1 < heights[0] < heights[1] < title.y0  # no accuracies, and each is seen
    with pytest.raises(ValueError, match="no runs to plot"):
        nl.plot_sweep(table_of([]))


@pytest.mark.filterwarnings("error")
def test_two_sweeps_fit_beside_each_other():
    rows = [("BN", size, 0.1, seed, 0.5 + seed / 10) for size in (2, 4) for seed in (0, 1)]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for ax in axes:
        nl.plot_sweep(table_of(rows), ax=ax)
    axes[1].set_ylim(52, 56)
    figure.canvas.draw()
    assert axes[0].get_position().width > 0.3
