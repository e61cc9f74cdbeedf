"""Correct normalizations of any style pass, and wrong ones hear the name of their mistake."""

import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from normlab.lessons import checking
from normlab.lessons.norm_checks import check_norm
from tests.lessons.right_norms import RIGHT
from tests.lessons.wrong_norms import WRONG

pytestmark = pytest.mark.usefixtures("enough_time")


def name_of(candidate: object) -> str:
    return getattr(candidate, "__name__", type(candidate).__name__)


def test_correct_code_of_any_style_is_never_called_wrong():
    wrong = {}
    for kind, candidate, options in RIGHT:
        result = check_norm(candidate, kind, **options)
        if not result or result.fraction != 1:
            wrong[kind, name_of(candidate)] = result
    assert not wrong


def test_every_mistake_is_named(monkeypatch):
    unnamed = {}
    for kind, names, candidate, options in WRONG:
        with monkeypatch.context() as patched:
            if names == ("too slow",):
                patched.setattr(checking, "SECONDS", 0.5)
            result = check_norm(candidate, kind, **options)
        if {*result.mistakes} != {*names} or result or not 0 <= result.fraction < 1:
            unnamed[kind, name_of(candidate)] = names, result
    assert not unnamed


def wrong_of(name: str) -> tuple[str, object]:
    return next((kind, candidate) for kind, _, candidate, _ in WRONG if name_of(candidate) == name)


def test_the_result_prints_the_mistake_with_numbers_of_a_small_example():
    kind, candidate = wrong_of("bn_var_of_torch")
    result = check_norm(candidate, kind)
    assert str(result).splitlines() == [
        "batch normalization: 5 of 6 parts are right",
        "  ✗ forward in training",
        "      unbiased variance – the variance is divided by n − 1; a normalization divides it by "
        "n. It gives 1 where 1.22 is right for the number 3 of the channel 1, 2, 3.",
        *(f"  ✓ {name}" for name in ("scale and shift", "input unchanged", "gradients")),
        "  ✓ other shapes",
        "  ✓ dtype",
    ]
    assert repr(result) == str(result)
    assert result.fraction == pytest.approx(5 / 6)


def test_what_the_code_raises_is_told_with_its_line():
    kind, candidate = wrong_of("bn_typo")
    (text,) = check_norm(candidate, kind).mistakes.values()
    assert "has no attribute 'squareroot'" in text
    assert re.search(r"in line \d+ of bn_typo: return \(x - x\.mean", text)


def test_endless_code_is_ended_and_its_line_told(monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0.3)
    kind, candidate = wrong_of("bn_endless")
    result = check_norm(candidate, kind)
    assert "took more than 0.3 seconds and was ended (in line" in result.mistakes["too slow"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_in_another_thread_code_is_checked_without_a_limit():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(check_norm, nn.BatchNorm2d, "bn").result()


def test_a_module_is_not_changed():
    module = nn.BatchNorm2d(6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    check_norm(module.eval(), "BatchNorm2d")
    assert not module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown norm 'bnn'"):
        check_norm(nn.BatchNorm2d, "bnn")
    with pytest.raises(ValueError, match="unknown norm to check 'none'"):
        check_norm(nn.Identity(), "none")
    with pytest.raises(TypeError, match="a function, a class or a module is checked, not 3"):
        check_norm(3, "bn")
    with pytest.raises(TypeError, match="does not tell its arguments: wrap it in a function"):
        check_norm(max, "bn")
