"""Filter banks in one batch: which make one, and that it is kept."""

import torch

from normlab.support import filter_banks


def test_banks_too_large_to_be_filled_up_go_one_by_one(monkeypatch):
    monkeypatch.setattr(filter_banks, "ONE_BY_ONE", ())
    banks = [torch.rand(4, 2, 3, 3), torch.rand(8, 4)]
    assert filter_banks.batch_of(banks) is not None
    monkeypatch.setattr(filter_banks, "LARGEST_BATCH", 2 * 8 * 18 - 1)
    assert filter_banks.batch_of(banks) is None
    assert filter_banks.batch_of([]) is None


def test_a_batch_is_kept_for_good():
    """A captured CUDA graph reads its look-ups where they lie, however many networks come after."""
    assert filter_banks.cached_batch.cache_parameters()["maxsize"] is None
