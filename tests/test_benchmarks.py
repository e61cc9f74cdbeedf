"""The benchmarks measure what they say."""

import pytest

import normlab as nl
from tests.benchmarks import peers
from tests.benchmarks.__main__ import table


def measured(*seconds):
    return [{"images": 100, "seconds": each, "peak_mib": 10 * each} for each in seconds]


def test_the_table_has_medians_and_ratios_to_the_quicker_students_loop():
    paths = {
        "students' loop, 0 workers": measured(1, 2, 10),
        "students' loop, 2 workers": measured(4, 5, 4),
        "normlab": measured(0.5, 1, 0.25),
    }
    *_, slower, ours = table({"measured": paths}).splitlines()
    assert slower == "| students' loop, 2 workers | 4.0 | 25 (20 to 25) | 0.50 | 50 |"
    assert ours == "| normlab | 0.5 | 200 (100 to 400) | 4.00 | 10 |"


def test_without_the_students_loop_there_is_no_ratio():
    *_, ours = table({"measured": {"normlab": measured(1.0)}}).splitlines()
    assert ours == "| normlab | 1.0 | 100 (100 to 100) | – | 10 |"


def test_the_students_loop_tests_as_normlab_does(digits):
    """PIL images, transforms and a DataLoader give the accuracy that one tensor gives."""
    data = digits.subset(train=300, test=100)
    network = nl.build_network("mnist-l1", dropout=0.05, seed=0)
    (accuracy,) = peers.students_loop(network, data, 1, "cpu", workers=0, l1=1e-5)
    ours = nl.test_epoch(network, data.loader(train=False, batch_size=100)).accuracy
    assert accuracy == pytest.approx(ours)
