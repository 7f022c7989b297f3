"""The command line in this process."""

import json
import types

import pytest

from nufilt_jax.cli import main


class Result(types.SimpleNamespace):
    """Exit status, stdout and stderr of a command."""

    @property
    def lines(self):
        return self.err.splitlines()

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def nufilt(capfd, monkeypatch):
    """Runs `nufilt ...` in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*argv):
        capfd.readouterr()
        code = main([str(part) for part in argv])
        return Result(code=code, **capfd.readouterr()._asdict())

    return run
