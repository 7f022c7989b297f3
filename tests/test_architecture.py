"""The picture of DESIGN.md §2, read from the imports themselves, and what no module of the package may do."""

import ast
import importlib
import re
import subprocess
import sys
import traceback
from pathlib import Path

import jax
import pytest

import nufilt_jax
from nufilt_jax.commands import settings
from nufilt_jax.linalg import subspace

ROOT = Path(nufilt_jax.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
MODULES = sorted(ROOT.rglob("*.py"))

# What each room may see of the package, besides itself and what is open to all. Shells see all.
ROOMS = {
    "linalg": set(),
    "core": {"linalg"},
    "methods": {"core", "linalg"},
    "checkpoints": set(),
    "models": set(),
    "evaluation": {"models"},
    "analysis": {"evaluation"},
    "zoo": {"evaluation", "checkpoints", "models"},  # training needs the forward pass
    "output": {"checkpoints", "linalg"},
    "engine": {
        "analysis",
        "checkpoints",
        "core",
        "evaluation",
        "linalg",
        "methods",
        "models",
        "output",
        "presets",
        "zoo",
    },
    "compile_cache": set(),
    "config": set(),
    "durable": set(),
    "errors": set(),
    "presets": set(),
    "strict_json": set(),
    "anatomy": set(),
    "patterns": set(),
    "user_cache": set(),
    "values": set(),
}
SHELLS = {"api", "commands", "cli", "merge", "__init__", "__main__"}
OPEN_TO_ALL = {
    "__version__",
    "anatomy",
    "config",
    "durable",
    "errors",
    "patterns",
    "strict_json",
    "user_cache",
    "values",
}
CORE_LIBRARIES = {"jax", "optax", "chex", "jaxtyping", "numpy", "scipy", "threadpoolctl"}


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path):
    """Absolute dotted names of everything that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_seen(path):
    """The package's rooms that a module imports from."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("nufilt_jax.")}


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.relative_to(ROOT).as_posix())


def test_every_room_is_on_the_plan():
    assert {room_of(path) for path in MODULES} <= ROOMS.keys() | SHELLS


@named([path for path in MODULES if room_of(path) in ROOMS])
def test_imports_point_inward(path):
    room = room_of(path)
    assert rooms_seen(path) - OPEN_TO_ALL - {room} <= ROOMS[room]


@named([path for path in MODULES if room_of(path) in ("core", "linalg")])
def test_core_imports_numerics_alone(path):
    libraries = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names - {"nufilt_jax"}
    assert libraries <= CORE_LIBRARIES


@named(MODULES)
def test_nothing_is_unpickled(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & {"pickle", "cloudpickle", "dill", "joblib", "torch"}
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if re.search(r"\ballow_pickle\s*=\s*True|\b(pickle|torch)\.loads?\(", call)]


@named([path for path in ROOT.rglob("*") if path.suffix in (".py", ".json", ".md", ".txt", ".toml")])
def test_no_path_of_one_machine(path):
    # `/home/`, `/tmp/` and the like mean something on the machine where they were written alone.
    found = re.findall(r"(?<![\w.}/])/(?:home|root|work|tmp|Users|mnt|opt|usr|var|data)/[\w.-]+", path.read_text())
    assert found == []


@pytest.mark.parametrize("module", ["nufilt_jax", "nufilt_jax.checkpoints", "nufilt_jax.config"])
def test_what_must_start_fast_does(module):
    """--help, --plan and a refusal of bad input answer before any framework is loaded."""
    slow = {"jax", "flax", "optax", "orbax", "torch", "transformers", "huggingface_hub", "sklearn", "matplotlib"}
    code = f"import sys, {module}; print(*({slow} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == []


def lazy_names():
    """Public name and home of each import under TYPE_CHECKING in `__init__`."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for block in blocks:
        for node in block.body:
            assert isinstance(node, ast.ImportFrom), ast.unparse(node)
            for alias in node.names:
                assert alias.name == alias.asname, f"{alias.name}: re-export as itself"
                whole_module = node.module == "nufilt_jax"
                yield alias.name, f"nufilt_jax.{alias.name}" if whole_module else node.module


def test_type_checkers_and_python_see_the_same_public_names():
    assert dict(lazy_names()) == nufilt_jax._HOMES
    assert sorted(nufilt_jax.__all__) == sorted(nufilt_jax._HOMES)


@pytest.mark.parametrize("name", nufilt_jax.__all__)
def test_public_names_resolve(name):
    home = importlib.import_module(nufilt_jax._HOMES[name])
    value = getattr(nufilt_jax, name)
    if (
        name == "merge"
    ):  # once nufilt_jax.merge is imported, for its command, the module has this name, and is called alike
        assert callable(value)
        return
    assert value is (home if home.__name__ == f"nufilt_jax.{name}" else getattr(home, name))
    assert value.__doc__


def test_completion_shows_the_public_names_and_no_others():
    assert sorted(dir(nufilt_jax)) == sorted([*nufilt_jax.__all__, "__version__"])
    from nufilt_jax.methods import RULES

    configs = {rule.config.__name__ for rule in RULES.values()}
    assert configs == {name for name in nufilt_jax.__all__ if name.endswith("Config")}


@pytest.mark.parametrize("room", ["methods", "models", "errors"])
def test_completion_shows_what_a_public_module_is_for(room):
    module = getattr(nufilt_jax, room)
    assert dir(module) == sorted(module.__all__)
    told = set(re.findall(rf"auto\w+:: nufilt_jax\.{room}\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert told <= set(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        assert getattr(value, "__module__", "nufilt_jax").startswith("nufilt_jax"), name


# Names that several modules give to the same thing of theirs: every rule's parts, both formats' ways in and out, what
# `app` declares as a command and a file of that name does, what is run as a program, type variables.
ALIKE = {"RULE", "first", "advance", "prepare", "read_header", "write_file", "main", "merge", "T", "R"}


def defined_by(path):
    """What a module defines for others to import."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_a_name_has_one_home():
    homes = {}
    for path in MODULES:
        for name in set(defined_by(path)):
            homes.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    commands = {path.stem for path in MODULES if path.parent.name == "commands"}
    several = {name: found for name, found in homes.items() if len(found) > 1 and not name.startswith("_")}
    assert {name: found for name, found in several.items() if name not in ALIKE | commands} == {}


@named(MODULES)
def test_a_module_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'nufilt_jax' has no attribute 'nothing'"):
        _ = nufilt_jax.nothing


def test_the_walk_of_a_setting_is_short(shared_models, tmp_path, nufilt, command, monkeypatch):
    """From --filter-rank to what finds so many directions: the files that take it in, and those that it is used in."""
    walked = {"commands/arguments.py", "engine/plan.py"}  # the option, and the plan that holds what was read

    def noting(function):
        def noted(*args, **kwargs):
            stack = (Path(frame.filename) for frame in traceback.extract_stack())
            walked.update(str(path.relative_to(ROOT)) for path in stack if path.is_relative_to(ROOT))
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(settings, "_config", noting(settings._config))
    monkeypatch.setattr(subspace, "leading", noting(subspace.leading))
    jax.clear_caches()  # a program that an earlier test has traced is not traced again
    assert nufilt(*command(shared_models, tmp_path / "out", n=2)).code == 0
    walked -= {"cli.py", "merge.py"}  # before any option is read
    assert {"commands/settings.py", "methods/nufilt.py", "linalg/subspace.py"} < walked
    assert len(walked) <= 14, sorted(walked)
