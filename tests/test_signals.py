"""Signals are noted once, and have their usual effect the second time and afterwards."""

import os
import signal

import pytest

from train.signals import RunStopped, signals_noted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with signals_noted() as caught:
        os.kill(os.getpid(), number)
        assert caught == [number]
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_the_first_signal_says_what_happens_next(capsys):
    with signals_noted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert "finishing this step and saving; once more to stop at once" in capsys.readouterr().err


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal; a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_interrupts(interruptible):
    with signals_noted() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT]


def test_exit_codes_are_those_of_the_shell():
    assert RunStopped(signal.SIGINT, 5).exit_code == 130
    assert RunStopped(signal.SIGTERM, 5).exit_code == 143
    assert "SIGTERM after step 1,234" in str(RunStopped(signal.SIGTERM, 1234))
