"""Correct normalizations of any style pass, and wrong ones hear the name of their mistake."""

import pytest

from normlab.lessons import checking
from normlab.lessons.norm_checks import check_norm
from tests.lessons.right_norms import RIGHT
from tests.lessons.wrong_norms import WRONG


def name_of(candidate: object) -> str:
    return getattr(candidate, "__name__", type(candidate).__name__)


@pytest.mark.parametrize(
    ("kind", "candidate", "options"), RIGHT, ids=[f"{k}-{name_of(c)}" for k, c, _ in RIGHT]
)
def test_correct_code_of_any_style_is_never_called_wrong(kind, candidate, options):
    result = check_norm(candidate, kind, **options)
    assert result, str(result)
    assert result.fraction == 1


@pytest.mark.parametrize(
    ("kind", "names", "candidate", "options"),
    WRONG,
    ids=[f"{kind}-{name_of(candidate)}" for kind, _, candidate, _ in WRONG],
)
def test_a_mistake_is_named(kind, names, candidate, options, monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0.5 if names == ("too slow",) else 60)
    result = check_norm(candidate, kind, **options)
    assert {*result.mistakes} == {*names}, str(result)
    assert not result
    assert 0 <= result.fraction < 1
