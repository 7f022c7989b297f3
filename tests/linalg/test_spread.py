"""Layers divided among devices: in a process with eight simulated ones, which must not hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CALLER = Path(__file__).with_name("spread_caller.py")
WATCHDOG_SECONDS = 480


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, str(CALLER)]
    how = {"capture_output": True, "text": True, "env": environment, "check": False}
    result = subprocess.run(command, timeout=WATCHDOG_SECONDS, **how)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_no_device_asks_another(found):
    assert found["summed"]
    assert found["collectives"] == [[], []]


def test_weights_are_those_of_one_device(found):
    assert found["differences"].keys() >= {"nufilt", "wudi"}
    assert {method: far for method, far in found["differences"].items() if far > 2e-5} == {}
