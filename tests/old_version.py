"""A checkout of a version that merges nothing."""

import textwrap

import pytest

STUB = """
    import json, pathlib, sys

    arguments = sys.argv[1:]
    if "--help" in arguments:
        sys.exit(0)
    if arguments == ["--model"]:
        sys.exit(2)
    if "--fail" in arguments:
        sys.exit("nufilt: why")
    tasks = [word.split("=")[0] for before, word in zip(arguments, arguments[1:]) if before == "--task"] or ["a", "b"]
    if "--plan" in arguments:
        document = {}
    else:
        pathlib.Path(arguments[arguments.index("--out") + 1]).mkdir()
        document = {"steps": [{"task": name, "seconds": 3.0, "timings": {"solve": 2.0}} for name in tasks]}
    print(json.dumps(document))
"""


@pytest.fixture
def stub(tmp_path):
    """Its folder. What it tells of a merge has few keys, as that of an old version."""
    package = tmp_path / "stub" / "nufilt_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("solve_stack = None\n")
    (package / "merge.py").write_text(textwrap.dedent(STUB))
    return package.parent
