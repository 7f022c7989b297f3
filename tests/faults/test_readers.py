"""What a fuzzer found to reach the readers of weight files, read again; benchmarks/faults/fuzz.py finds more."""

import pytest

from benchmarks.faults import readers
from nufilt_jax.errors import NufiltError


@pytest.mark.parametrize("target", readers.TARGETS.values(), ids=readers.TARGETS)
def test_the_corpus_is_read_or_refused_in_words(target, tmp_path):
    reader = readers.Reader(target, tmp_path / "model")
    are_models = [reader.read(path.read_bytes()) for path in readers.corpus(target)]
    assert {*are_models} == {True, False}


class Bare(str):
    """A problem that nobody made fit for a terminal."""


def fails(error):
    def open_checkpoint(*_, **__):
        raise error

    return open_checkpoint


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        (RecursionError("deep"), "deep"),
        (NufiltError(), "a refusal without words"),
        (NufiltError(Bare("\x1b[2J")), "a refusal with orders to a terminal"),
        (KeyError("x"), "x"),
    ],
    ids=["recursion", "no words", "orders", "key"],
)
def test_what_is_no_refusal_is_a_finding(tmp_path, monkeypatch, fault, finding):
    reader = readers.Reader(readers.TARGETS["index"], tmp_path / "model")
    monkeypatch.setattr(readers, "open_checkpoint", fails(fault))
    with pytest.raises((RecursionError, ValueError, KeyError), match=finding):
        reader.read(b"{}")


def test_an_input_that_takes_long_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MOST_SECONDS", -1)
    with pytest.raises(TimeoutError, match="one input took"):
        readers.Reader(readers.TARGETS["msgpack"], tmp_path / "model").read(b"")
