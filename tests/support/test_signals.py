"""A request to end is heard once, and again if it got lost."""

import signal
import sys

import pytest

from normlab.support.signals import ended_by_signals


def test_signals_that_are_to_be_ignored_are():
    """As after `nohup`; and what was usual before is usual again."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ended_by_signals():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with ended_by_signals():
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with ended_by_signals(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # once more, while it ends
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_gets_lost_in_a_destructor_may_come_again(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # that of pytest would keep it

    class Deaf:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with ended_by_signals():
            Deaf()
            with pytest.raises(KeyboardInterrupt) as caught:
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # while the other one is on its way
            assert caught.value.number == signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
