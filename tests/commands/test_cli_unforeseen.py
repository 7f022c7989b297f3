"""What nobody foresaw is one line too, and a file with the traceback beside the output."""

import json

import jax
import pytest

FAST = ("--method", "sum")


@pytest.fixture
def failing(monkeypatch):
    """Lets every merge fail in its first cell, as it is told."""

    def arm(error):
        from nufilt_jax.engine import walk

        def fails(*_):
            raise error

        monkeypatch.setattr(walk, "update", fails)

    return arm


def nested(depth):
    return nested(depth + 1) + 1


def deeply_nested():
    try:
        nested(0)
    except RecursionError as error:
        return error


NO_ROOM = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore lines\n"
FAILURES = {
    "memory": (MemoryError(), "memory: is exhausted (close other programs, or use a larger machine; "),
    "device": (
        jax.errors.JaxRuntimeError(NO_ROOM),
        "device memory: is exhausted: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes. (give a smaller "
        "--max-memory, or use a larger device; ",
    ),
    "fault": (KeyError("x\ny"), "engine/walk.py:{line}: failed unforeseen: KeyError: 'x\\ny' ("),
    "recursion": (
        deeply_nested(),
        "engine/walk.py:{line}: failed unforeseen: RecursionError: maximum recursion depth exceeded (",
    ),
    "text": (
        UnicodeEncodeError("ascii", "é", 0, 1, "no"),
        "engine/walk.py:{line}: failed unforeseen: UnicodeEncodeError: 'ascii' codec can't encode character "
        "'\\xe9' in position 0: no (",
    ),
}


OF_THE_SYSTEM = OSError(5, "Input/output error", "/x/y")


@pytest.mark.parametrize("what", ["merge", "extract", "push"])
def test_an_error_of_the_system_that_nobody_foresaw(shared_models, tmp_path, nufilt, command, monkeypatch, what):
    from nufilt_jax.commands import extract, push

    out, log = tmp_path / "out", tmp_path / "out.traceback"

    def fails(*_, **__):
        raise OF_THE_SYSTEM

    argv = command(shared_models, out, *FAST)
    if what == "push":
        assert nufilt(*argv).code == 0
        argv = ["push", out, "me/merged"]
    if what == "extract":
        argv = ["extract", shared_models / "alpha", "--base", shared_models / "base", "--rank", "1", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(extract, "run", fails)
        patch.setattr(push, "upload_folder", fails)
        patch.setattr("nufilt_jax.engine.walk.update", fails)
        (line,) = nufilt(*argv).lines
    assert line == f"nufilt: /x/y: Input/output error (the traceback is in {log})"
    assert "OSError: [Errno 5] Input/output error: '/x/y'" in log.read_text()


@pytest.mark.parametrize("name", FAILURES)
def test_a_traceback_is_kept_and_not_shown(shared_models, tmp_path, nufilt, command, failing, name, monkeypatch):
    out, log = tmp_path / "out", tmp_path / "out.traceback"
    error, told = FAILURES[name]
    argv = command(shared_models, out, *FAST)
    with monkeypatch.context():
        failing(error)
        result = nufilt(*argv)
    (line,) = result.lines
    begin, _, rest = told.partition("{line}")
    assert (result.code, result.out) == (1, "")
    assert line.startswith(f"nufilt: {begin}") and rest in line and f"the traceback is in {log}" in line
    text = log.read_text()
    assert "Traceback (most recent call last)" in text and "nufilt_jax 0." in text and type(error).__name__ in text
    monkeypatch.undo()
    assert nufilt(*argv).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_without_an_output_the_place_is_told(shared_models, nufilt, command, tmp_path, monkeypatch):
    from nufilt_jax.commands import merge

    def fails(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(merge, "make_plan", fails)
    (line,) = nufilt(*command(shared_models, tmp_path / "out", *FAST, "--plan")).lines
    assert line.startswith("nufilt: commands/merge.py:") and line.endswith(
        ": failed unforeseen: RuntimeError: two (please report it)"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_that_cannot_be_kept(shared_models, tmp_path, nufilt, command, failing):
    (tmp_path / "out.traceback").mkdir()
    failing(RuntimeError("broken"))
    (line,) = nufilt(*command(shared_models, tmp_path / "out", *FAST)).lines
    assert line.endswith("failed unforeseen: RuntimeError: broken (please report it)")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--xla_no_such_flag=1", "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1"),
        ("--xla_cpu_enable_fast_math=perhaps", "Couldn't interpret value perhaps for flag xla_cpu_enable_fast_math"),
    ],
)
def test_flags_that_xla_refuses(shared_models, tmp_path, nufilt, command, monkeypatch, flags, what):
    monkeypatch.setenv("XLA_FLAGS", flags)
    result = nufilt(*command(shared_models, tmp_path / "out", *FAST))
    assert (result.code, result.err) == (1, f"nufilt: XLA_FLAGS: {what} (correct or unset it)\n")
    assert not list(tmp_path.iterdir())


def test_names_from_files_are_escaped_in_lists(models, tmp_path, nufilt):
    import model_builders as build

    odd = "vision_model.encoder.layers.0.\x1b[31m\u202e.weight"
    for name in ("base", "alpha"):
        tensors = build.weights(models / name)
        path = models / name / "model.safetensors"
        build.save_file(tensors | {odd: tensors[build.Q0]}, path)
    argv = ["--base", models / "base", "--task", f"a={models / 'alpha'}", "--layers", ".", *FAST]
    for result in (nufilt("plan", *argv), nufilt("merge", *argv, "--out", tmp_path / "out")):
        assert result.code == 0 and "\x1b" not in result.out + result.err and "\u202e" not in result.out
        assert "\\x1b[31m\\u202e" in result.out
    recipe = json.loads((tmp_path / "out" / "nufilt.json").read_text())
    assert any("\x1b" in row["pattern"] for row in recipe["selected"])


def test_a_working_directory_that_was_deleted_is_told(shared_models, tmp_path, nufilt, command, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = nufilt(*command(shared_models, "out", *FAST))
    assert result.code == 1
    assert result.err == "nufilt: the working directory: was deleted (change to one that is there)\n"
