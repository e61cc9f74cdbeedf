"""What the tests of the checks share."""

import pytest

from normlab.lessons import checking


@pytest.fixture
def enough_time(monkeypatch):
    """No test depends on how fast the machine is."""
    monkeypatch.setattr(checking, "SECONDS", 60)
