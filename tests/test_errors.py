"""What messages look like, whatever names and numbers they carry."""

import pytest

from nufilt_jax.errors import (
    CheckpointError,
    ConfigError,
    NufiltError,
    OutputError,
    Problem,
    error_of,
    gathering,
    of_kind,
    printable,
    summarised,
)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("w\x1b[31m", "w\\x1b[31m"),
        ("two\nlines\r\tand", "two\\nlines\\r\\tand"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\u2028b\u2066c\u200f", "a\\u2028b\\u2066c\\u200f"),
        ("\x9b2J\x07", "\\x9b2J\\x07"),
        ("模型 é ~x", "模型 é ~x"),
    ],
)
def test_names_give_no_orders_to_a_terminal(name, shown):
    assert printable(name) == shown
    assert str(Problem(name, "is odd", tensor=name)) == f"{shown}: {shown}: is odd"
    assert str(Problem("f", f"is {name!r}", f"rename {name}")).count("\n") == 0


def test_a_name_without_end_is_cut():
    line = str(Problem("f", "is odd", tensor="n" * 65536))
    assert line == f"f: {'n' * 200}...{'n' * 200}: is odd"


def test_one_cause_is_told_once_with_the_count():
    files = [Problem(f"m/model-{n}.safetensors", f"is missing; the index puts {n} tensors there") for n in range(30)]
    cut = [Problem("f", f"takes {n} bytes, but F32 of shape {[1] * n} needs 4", "get it", f"w{n}") for n in range(13)]
    few = [Problem("g", "has NaN", tensor=f"w{n}") for n in range(3)]
    options = [Problem("--task", f"{name} is odd") for name in "abcde"]
    told = list(map(str, summarised([*files, *cut, *few, *options])))
    assert told == [
        "m/model-0.safetensors and 29 more: is missing; the index puts 0 tensors there",
        "f: w0 and 12 more: takes 0 bytes, but F32 of shape [] needs 4 (get it)",
        *(f"g: w{n}: has NaN" for n in range(3)),
        *(f"--task: {name} is odd" for name in "abcde"),
    ]
    error = NufiltError(*cut)
    assert len(error.problems) == 13 and str(error) == told[1]


class _OwnError(CheckpointError):
    """A class that users do not know."""


def test_gathered_problems_of_one_kind_are_told_by_its_error():
    problems: list[Problem] = []
    for name in "aab":
        with gathering(problems):
            raise _OwnError(Problem(name, "is odd"))
    error = error_of(problems)
    assert type(error) is CheckpointError and error.problems == (Problem("a", "is odd"), Problem("b", "is odd"))
    inner = [*problems]
    with gathering(inner):  # a second search, which the first is a part of
        raise error_of([*problems, *of_kind(OutputError, [Problem("out", "is full")])])
    assert type(error_of(inner)) is NufiltError
    assert type(error_of(inner[-1:])) is OutputError
    assert type(error_of([Problem("--layers", "is odd")])) is ConfigError
    assert type(error_of([Problem("--layers", "is odd"), *problems])) is NufiltError
