"""Rows in order, whatever decodes them."""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train.decoding
from perceiver.scene import RowError, encode_scene
from train.decoding import MANY, decode
from train.sources import open_rows

ROOT = Path(__file__).resolve().parent.parent
URI = "roofs:real?points=32&scenes=90"


def unusable(order_id):
    raise RowError(order_id, "data", "is damaged")


def broken():
    raise ZeroDivisionError("not the row's fault")


def slowly(task):
    time.sleep(0.3)
    return task()


def tasks():
    """90 roofs, with a row that cannot be used among them."""
    rows = open_rows(URI)
    made = [rows.task(i, True) for i in range(90)]
    made[70] = functools.partial(unusable, "seventy")
    return made


def as_bytes(outcomes):
    return [str(x) if isinstance(x, RowError) else encode_scene(x) for x in outcomes]


# a script without a guard for its main module; the second piece is ready before the first
SCRIPT = """
import functools
import hashlib
from tests.test_decoding import as_bytes, broken, slowly, tasks
import train.decoding

train.decoding._PIECE = 10
taken, found = [], []

def watched():
    for i, task in enumerate(tasks()):
        taken.append(i)
        yield functools.partial(slowly, task) if i == 0 else task
    yield broken

try:
    for i, outcome in enumerate(train.decoding.decode(watched(), 91, workers=2)):
        found.append(outcome)
        # no more are taken than two workers have in hand
        assert len(taken) <= i + 31
except ZeroDivisionError as error:
    print(len(found), error)
print(hashlib.sha256(repr(as_bytes(found)).encode()).hexdigest())
"""


def test_rows_and_their_order_do_not_depend_on_the_number_of_workers():
    alone = as_bytes(decode(tasks(), 90, workers=1))
    assert alone[70] == "row 'seventy': field 'data' is damaged"
    done = subprocess.run([sys.executable, "-"], check=False, input=SCRIPT, capture_output=True, text=True, cwd=ROOT)
    digest = hashlib.sha256(repr(alone).encode()).hexdigest()
    assert done.stdout.split("\n") == ["90 not the row's fault", digest, ""], done.stderr


def test_an_error_that_is_no_row_error_is_raised():
    with pytest.raises(ZeroDivisionError, match="not the row's fault"):
        list(decode([*tasks()[:4], broken], 5, workers=1))


def test_a_process_that_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="a process that decodes rows ended with exit code 1"):
        list(decode([functools.partial(unusable, "x" * 100_000)] * 64, 64, workers=2))


def test_few_rows_are_decoded_here_and_many_by_one_process_a_processor(monkeypatch):
    started = []

    class Worker(contextlib.nullcontext):
        def __init__(self):
            super().__init__(self)
            started.append(self)

        def send(self, piece):
            self.piece = piece

        def receive(self):
            return [task() for task in self.piece]

    monkeypatch.setattr(train.decoding, "_Worker", Worker)
    for processors, count, expected in ((5, MANY - 1, 0), (5, MANY, 5), (200, MANY, 16)):
        started.clear()
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process, n=processors: range(n))
        assert len(list(decode(tasks()[:40], count))) == 40
        assert len(started) == expected
