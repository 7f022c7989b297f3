"""Disks that fail: one line, nothing lost, and the same command then gives the same bits."""

import errno
import fcntl
import os

import pytest

from benchmarks.faults import disks


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    return disks.Merges(tmp_path_factory.mktemp("disks"))


@pytest.fixture(scope="module")
def n_calls(merges):
    return merges.n_calls()


@pytest.mark.parametrize("part", range(8))
def test_full_from_a_call_on(merges, n_calls, part):
    for first in range(1 + part, n_calls + 1, n_calls // 2):
        outcome = merges.failing_at(first, disks.FULL)
        assert outcome.struck and outcome.finding == "" and "No space left on device" in outcome.line, first


@pytest.mark.parametrize("kind", disks.ERRORS)
def test_other_failures_in_the_middle(merges, n_calls, kind):
    outcome = merges.failing_at(n_calls // 2, disks.ERRORS[kind])
    assert outcome.struck and outcome.finding == "" and os.strerror(disks.ERRORS[kind]) in outcome.line


@pytest.mark.parametrize("part", range(4))
def test_a_task_is_added_on_a_disk_that_fails(merges, part):
    n_calls = merges.n_calls("add")
    outcome = merges.failing_at(1 + part * n_calls // 4, disks.FULL, "add")
    assert outcome.struck and outcome.finding == "" and "No space left on device" in outcome.line


def test_file_systems_that_lack_something(merges):
    outcome = merges.without(os, "link", errno.EPERM)
    assert (outcome.struck, outcome.finding) == (False, "")
    outcome = merges.without(fcntl, "flock", errno.EOPNOTSUPP)
    assert outcome.finding == "" and "its file system knows no locks" in outcome.line
    assert merges.with_clock_back() == (False, "", "")


def test_the_harness_sees_what_is_wrong(merges, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "left").write_text("")
    assert "left stay beside it" in merges.judged(tmp_path, 0, []).finding
    assert "status 1 and the lines" in merges.judged(tmp_path, 1, ["nufilt: a", "more"]).finding
    assert "not foreseen" in merges.judged(tmp_path, 1, ["nufilt: a: failed unforeseen: b"]).finding
    model = out / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    finding = merges.judged(tmp_path, 1, ["nufilt: a"]).finding
    assert "half a model under its name" in finding and "then gives other bits" in finding


def test_the_harness_sees_what_is_lost(merges, tmp_path):
    out = tmp_path / "out"
    assert disks.recorded(out) == 0 and merges.run(out) == (0, [])
    assert disks.recorded(out) == 2
    wanted = disks.content(out)
    assert disks.differences(out, wanted, 0) == []
    assert disks.differences(out, wanted, 1) == ["1 steps were recorded, and 0 resumed"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "nufilt.json").write_text('{"steps": [{}]}')
    assert disks.recorded(out) == 1
    assert "ended well without the model" in merges.judged(tmp_path / "none", 0, []).finding
