"""Freed memory stays with the process inside the block, and goes back at its end."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from normlab.engines.cpu import kept_memory

def faults(n=20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.ones(8 * 2**20 // 4)  # 8 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

faults()  # the C library gets to know blocks of this size
before = faults()
with kept_memory():
    faults()  # the first few blocks are laid out
    inside = faults()
    held = [torch.ones(8 * 2**20 // 4) for _ in range(20)]
    del held
    much = resident()
returned = much - resident()
faults()
print(inside, returned, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_pages_are_not_asked_for_again_inside_and_are_returned_at_the_end():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
    )
    inside, returned, more_afterwards = map(int, done.stdout.split())
    assert inside < 200  # one allocation alone has 2,048 pages
    assert returned > 100 * 2**20
    assert more_afterwards < 200  # a loop of one's own is no slower for having called `fit`


def test_other_c_libraries_are_left_alone(monkeypatch):
    from normlab.engines import cpu

    monkeypatch.setattr(cpu, "_glibc", lambda: None)
    with cpu.kept_memory():
        done = True
    assert done
