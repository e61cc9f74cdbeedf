"""Keeps torch's compiler out of processes that compile nothing.

The methods of torch's optimisers ask the compiler to leave them alone, and import it to do so: that
is 2 to 3 s in every process, as long as importing torch itself.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
_EXEMPT = "__dynamo_disable"  # where torch keeps the exempted method once it has it


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Inside the block optimisers do not import `torch._dynamo`, if nothing else has.

    SGD and AdamW import it with their first step all the same; `Muon` does not. Does nothing with a
    torch that keeps the methods elsewhere.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    wrapped = [getattr(getattr(Optimizer, name), "__wrapped__", None) for name in _METHODS]
    methods = [method for method in wrapped if method and not hasattr(method, _EXEMPT)]
    for method in methods:
        setattr(method, _EXEMPT, method)
    try:
        yield
    finally:
        for method in methods:
            vars(method).pop(_EXEMPT, None)
