"""Signals wait for the end of a context, and a scheduler's second SIGTERM is no second wish."""

import signal

import pytest

from nufilt_jax.engine import uninterrupted as module
from nufilt_jax.engine.uninterrupted import uninterrupted


class StruckError(Exception):
    pass


def strike(number, frame):
    raise StruckError(signal.Signals(number).name)


@pytest.fixture(autouse=True)
def handled():
    before = {number: signal.signal(number, strike) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def struck(*signals):
    """At which signal the context ended, None for its end, and by which one."""
    at = None
    with pytest.raises(StruckError) as caught, uninterrupted():
        for i, number in enumerate(signals):
            at = i
            signal.raise_signal(number)
        at = None
    return at, str(caught.value)


def test_one_waits_for_the_end():
    assert struck(signal.SIGINT) == (None, "SIGINT")
    assert struck(signal.SIGTERM) == (None, "SIGTERM")


def test_a_second_one_does_not():
    assert struck(signal.SIGINT, signal.SIGINT) == (1, "SIGINT")
    assert struck(signal.SIGTERM, signal.SIGINT) == (1, "SIGINT")


def test_an_echo_of_the_first_waits_too(monkeypatch):
    assert struck(signal.SIGTERM, signal.SIGTERM) == (None, "SIGTERM")
    monkeypatch.setattr(module, "_ECHO", 0.0)
    assert struck(signal.SIGTERM, signal.SIGTERM) == (1, "SIGTERM")


def test_nothing_is_raised_where_nothing_struck():
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is strike
