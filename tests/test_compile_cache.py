"""Compiled programs on disk: of the library, where the caller wants it, and of the command line."""

import os

import pytest

from nufilt_jax.compile_cache import default_folder, enable_compile_cache
from nufilt_jax.errors import ConfigError

COMPILES = """
import sys, jax, nufilt_jax as nj
from jax import monitoring
hits = []
monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
jax.jit(lambda x: x - 1)(1.0)  # before anybody asked for a cache
hits.clear()  # the environment may name one
print(nj.enable_compile_cache(*sys.argv[1:]))
jax.jit(lambda x: x + 1)(1.0)
print(len(hits))
"""


def test_a_second_process_finds_what_the_first_has_compiled(tmp_path, finish):
    folder = tmp_path / "deep" / "programs"
    first, second = (finish("-c", COMPILES, str(folder)) for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    (told, none), (_, some) = first.out.split(), second.out.split()
    assert (told, none) == (str(folder), "0") and int(some) > 0
    assert len(list(folder.glob("*-cache"))) == int(some)


def test_by_default_it_is_the_command_lines(tmp_path, finish):
    result = finish("-c", COMPILES, env={"NUFILT_CACHE": str(tmp_path)})
    assert result.out.split()[0] == str(tmp_path / "xla") and os.listdir(tmp_path / "xla")


def test_no_home_folder(monkeypatch):
    for name in ("NUFILT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert default_folder() is None
    with pytest.raises(ConfigError, match="this user has no home folder"):
        enable_compile_cache()


def test_the_folder_is_known_without_jax(finish):
    code = "import sys, nufilt_jax.compile_cache as c; c.default_folder(); sys.exit('jax' in sys.modules)"
    assert finish("-c", code).code == 0
