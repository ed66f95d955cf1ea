"""Freed memory stays with the process."""

import ctypes
from types import SimpleNamespace

from train.memory import keep_freed_memory

# of malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def test_glibc_is_told_to_map_no_block_by_itself_and_to_give_none_back(monkeypatch):
    """What that does to page faults depends on where the kernel put the heap, so the calls are the test."""
    asked = []
    libc = SimpleNamespace(mallopt=lambda parameter, value: asked.append((parameter, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: libc)
    keep_freed_memory()
    assert dict(asked) == {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}


def test_another_c_library_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace())
    keep_freed_memory()
