"""What holds for every test: strict array arithmetic, no cache of the user's; and the command line in this process."""

import gc
import os
import pathlib
import shutil
import tempfile
from collections import Counter

import jax
import pytest
from command_result import Result
from jaxtyping import install_import_hook
from merge_fixtures import (  # noqa: F401  which pytest finds here
    command,
    finish,
    in_windows,
    models,
    refused,
    shared_models,
    spawn,
    stop_before,
)
from old_version import stub  # noqa: F401

# Shapes and dtypes of every annotated array are checked. Not in config, methods, engine and commands: they refuse
# wrong types themselves, in words a user can read, and the tests provoke that.
install_import_hook(
    [f"nufilt_jax.{part}" for part in ("analysis", "checkpoints", "core", "evaluation", "linalg", "models", "zoo")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
from nufilt_jax.compile_cache import enable_compile_cache  # noqa: E402  after the hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A process may hold so many mapped regions (Linux: 65530), and every compiled program takes some.
MOST_REGIONS = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of compiled programs between modules, before the system has no room for more."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_REGIONS:
        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what a second Python is asked for less by."""
    parser.addoption("--every-nth-case", type=int, default=1, metavar="N", help="of each test the 1st, N+1st, ... case")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the cases that were not asked for; a test keeps its first one."""
    n = config.getoption("--every-nth-case")
    seen, kept, left = Counter[str](), [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left if seen[test] % n else kept).append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    """Gives the run a cache folder of its own; xdist's workers share their parent's, and what each has compiled."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _make_caches(config)
    enable_compile_cache()


def _make_caches(config: pytest.Config) -> None:
    folder = tempfile.mkdtemp(prefix="nufilt-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["NUFILT_CACHE"] = os.path.join(folder, "nufilt")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(folder, "hypothesis")  # not the checkout
    os.environ["HF_HOME"] = os.path.join(folder, "huggingface")
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens: a test that asks the Hub fails at once


@pytest.fixture
def nufilt(capfd, monkeypatch):
    """Runs `nufilt ...` in this process; a plan does not measure the machine, which takes a second."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("nufilt_jax.engine.estimate.products_per_second", lambda: 1e11)

    from nufilt_jax.cli import main  # after the import hook above

    def run(*argv):
        capfd.readouterr()
        code = main([str(part) for part in argv])
        return Result(code=code, **capfd.readouterr()._asdict())

    return run
