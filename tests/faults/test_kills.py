"""Merges ended by signals: the same command then gives the bits of an undisturbed one."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from merge_fixtures import REPOSITORY

from benchmarks.faults import kills

N = 12


def test_merges_survive_signals(tmp_path):
    # In a process that has started no backend: it forks.
    command = [sys.executable, "-m", "benchmarks.faults.kills", tmp_path, N, 0]
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [outcome["finding"] for outcome in outcomes if outcome["finding"]] == []
    assert Counter(outcome["kind"] for outcome in outcomes) == dict.fromkeys(kills.KINDS, N // len(kills.KINDS))
    assert {outcome["work"] for outcome in outcomes} == set(kills.WORKS)
    assert sum(bool(outcome["where"]) for outcome in outcomes) >= N // 2


@pytest.mark.parametrize(
    ("path", "phase"),
    [
        ("out.lock", "taking the place"),
        ("out.partial/.nufilt.json.ab", "recording"),
        ("out.partial/state/.window-0000-1/arrays.safetensors", "writing the state"),
        ("out.partial/output/model.safetensors", "writing the model"),
        ("out.partial/output/state/window-0000", "publishing"),
    ],
)
def test_phases(path, phase):
    assert kills.phase_of(f"/x/disk/{path}") == phase
