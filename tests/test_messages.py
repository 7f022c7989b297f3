"""Every class of errors, and every sentence of a message, is met by some test."""

import ast
import io
import re
from pathlib import Path

import pytest

import nufilt_jax
from nufilt_jax.checkpoints import flax_files
from nufilt_jax.checkpoints.peft.expressions import EndlessError, matched
from nufilt_jax.commands.arguments import Arguments
from nufilt_jax.commands.failures import UnexpectedError, traceback_kept
from nufilt_jax.commands.interrupt import TerminatedError
from nufilt_jax.commands.request import check_usage
from nufilt_jax.commands.streams import Output, ReaderGoneError, ShowError
from nufilt_jax.errors import UsageError
from nufilt_jax.output.arrays import ArrayFile, DamagedError
from nufilt_jax.strict_json import JsonError, parse_object

ROOT = Path(nufilt_jax.__file__).parent
TESTS = Path(__file__).parent
HERE = Path(__file__).name
# Whose argument of that number says what is wrong.
SAYING = {"Problem": 1, "problem": 1, "JsonError": 0, "DamagedError": 0, "_Malformed": 0}
SHORTEST = 11  # characters of a part that tells a sentence from others
MOST = 25  # characters of a long part by which a test is taken to mean it; of a short one, all of it


def trees():
    for path in sorted(ROOT.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def texts_of_tests():
    """What the tests' own texts say: no comments, no docstrings, and no names."""
    return "\n".join(text for path in TESTS.rglob("*.py") if path.name != HERE for text in texts(path))


def texts(path):
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings among them
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone | parts:
            yield node.value


def sayings(node):
    """The constant parts of each text that an expression may give."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [[node.value]]
    if isinstance(node, ast.JoinedStr):
        return [[part.value for part in node.values if isinstance(part, ast.Constant)]]
    if isinstance(node, ast.BinOp):
        return [a + b for a in sayings(node.left) or [[]] for b in sayings(node.right) or [[]]]
    if isinstance(node, ast.IfExp):
        return sayings(node.body) + sayings(node.orelse)
    return []


def sentences():
    """What each problem says: the constant parts of it, by the place in the source."""
    for path, tree in trees():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            names = {}
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    names.setdefault(node.targets[0].id, []).extend((node.lineno, x) for x in sayings(node.value))
            for node in ast.walk(function):
                if not isinstance(node, ast.Call):
                    continue
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if called in SAYING and len(node.args) > SAYING[called]:
                    said = node.args[SAYING[called]]
                    found = [(node.lineno, parts) for parts in sayings(said)]
                    for line, parts in names.get(said.id, []) if isinstance(said, ast.Name) else found:
                        yield f"{path.relative_to(ROOT).as_posix()}:{line}", parts


def plain(text):
    """A text as a regular expression and as a message spell it alike."""
    return re.sub(r"\s+", " ", text.replace("\\", ""))


def is_met(part, tests):
    """Whether a test holds as much of a sentence as tells it from others."""
    text = plain(part).strip()
    least = min(len(text), MOST)
    return any(text[at : at + least] in tests for at in range(len(text) - least + 1))


def test_every_sentence_is_provoked():
    tests = plain(texts_of_tests())
    unmet = {}
    for place, parts in sentences():
        long = [text for part in parts if len(text := part.strip(" :;,.()")) >= SHORTEST]
        if long and not any(is_met(text, tests) for text in long):
            unmet[place] = max(long, key=len)
    assert unmet == {}


def by_signal():
    raise TerminatedError


def by_a_reader(error):
    def provoke():
        stream = io.StringIO()
        stream.write = lambda _: (_ for _ in ()).throw(error)
        Output(stream, is_result=True).write("x")

    return provoke


def by_a_state(tmp_path):
    (tmp_path / "arrays.safetensors").write_bytes(b"x")
    ArrayFile(tmp_path / "arrays.safetensors")


def by_a_fault(tmp_path):
    with traceback_kept(tmp_path / "log"):
        raise RuntimeError


def by_msgpack():
    flax_files._head(io.BufferedReader(io.BytesIO(b"")), 0)


# The classes that the other tests do not name: they see exit status and message, or what becomes of the error.
PROVOKED = {
    TerminatedError: lambda _: by_signal(),
    ShowError: lambda _: by_a_reader(OSError(28, "full"))(),
    ReaderGoneError: lambda _: by_a_reader(BrokenPipeError())(),
    UsageError: lambda _: check_usage(Arguments()),
    JsonError: lambda _: parse_object(b""),
    DamagedError: by_a_state,
    UnexpectedError: by_a_fault,
    EndlessError: lambda _: matched([r"(\w+)+!"], ["w" * 99]),
    flax_files._Malformed: lambda _: by_msgpack(),
}
# Provoked over the command line, in tests/commands; and in test_hub.py, where the Hub does not answer.
BY_COMMAND = {
    "StoppedError",
    "OtherDiedError",
    "VerificationError",
    "EvaluationError",
    "UnreachableError",
    "NotYetError",
}


@pytest.mark.parametrize("error", PROVOKED, ids=lambda error: error.__name__)
def test_errors_that_become_something_else(error, tmp_path):
    with pytest.raises(error) as caught:
        PROVOKED[error](tmp_path)
    assert caught.type is error


def test_every_class_of_errors_is_provoked():
    tests = "\n".join(path.read_text() for path in TESTS.rglob("*.py") if path.name != HERE)
    classes = {
        node.name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(re.search(r"Error$|^KeyboardInterrupt$", getattr(base, "id", "")) for base in node.bases)
    }
    known = {error.__name__ for error in PROVOKED} | BY_COMMAND
    assert known < classes
    assert {name for name in classes if not re.search(rf"raises\((\w+\.)?{name}\b", tests)} <= known
