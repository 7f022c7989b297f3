"""The script that counts what a merge survives, at its smallest; tests/faults has the harnesses themselves."""

import json
import subprocess
import sys

import pytest

from benchmarks.common import measure, records
from benchmarks.faults import disks, fuzz, hostile, kills
from benchmarks.study import faults


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["faults.py", *map(str, arguments)])
    faults.main()


BY_SIGNAL = [["SIGKILL", 3, 3, 1, 2], ["SIGINT", 2, 2, 2, 0]]
BY_PHASE = [["reading", 4, 4, 2], ["solving", 1, 1, 1]]


@pytest.fixture
def few(monkeypatch):
    """Without kills, which test_kills.py has, and with two disks."""
    found = [("no links", disks.Outcome(False, "", "")), ("a disk of 0.3 models", disks.Outcome(True, "nufilt: x", ""))]
    monkeypatch.setattr(faults, "killed", lambda *_: (BY_SIGNAL, BY_PHASE, []))
    monkeypatch.setattr(disks, "study", lambda *_: found)
    monkeypatch.setattr(fuzz, "is_installed", lambda: False)
    monkeypatch.setattr(hostile, "measured", lambda *_: (0.5, 90_000_000))
    return found


def test_counts(monkeypatch, capsys, tmp_path, few):
    out = tmp_path / "faults.json"
    call(monkeypatch, "--files", 2 * len(hostile.TARGETS), "--json", out)
    document = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(document)
    assert document["findings"] == []
    assert document["fuzz"] == "not run: atheris is not installed"
    kills, fallen, files = (records.rows(document, title)[-1] for title in faults.TITLES)
    assert (kills["tried"], kills["survived"]) == (5, 5)
    assert records.rows(document, faults.STRUCK)[-1] == dict(zip(faults.PHASES, ("all", 5, 5, 3), strict=True))
    assert (fallen["tried"], fallen["handled"], fallen["of these refused in one line"]) == (2, 2, 1)
    assert files["distinct"] == files["handled"] == 2 * len(hostile.TARGETS)
    assert 0 < files["of these in one line"] <= files["of these refused"]
    *alone, usual = records.rows(document, faults.REFUSED)
    assert {"index", "links: config"} <= {row["file"] for row in alone} < {target.name for target in hostile.TARGETS}
    assert {(row["seconds by the clock"], row["MB"]) for row in alone} == {(0.5, 90)}
    assert (usual["file"], usual["MB"]) == (faults.MEDIAN, 90)
    assert set(document["about"]) <= {one["title"] for one in document["tables"]}
    assert 0 < files["most seconds of a refusal"] < hostile.MOST_SECONDS


def test_what_is_not_handled_ends_with_status_1(monkeypatch, tmp_path, few):
    few.append(("no locks", disks.Outcome(True, "", "half a model under its name")))
    out = tmp_path / "faults.json"
    with pytest.raises(SystemExit) as ending:
        call(monkeypatch, "--files", 1, "--json", out)
    document = json.loads(out.read_text())
    assert ending.value.code == 1
    assert document["findings"] == ["no locks: half a model under its name"]
    assert records.rows(document, faults.TITLES[1])[-1]["handled"] == 2


FUZZED = {"reader": "index", "seconds": 9, "executions": 500, "failing": 40, "places": 30, "inputs": 4}


def test_what_a_fuzzer_found_is_taken_in(monkeypatch, tmp_path, few):
    row = FUZZED | {"findings": ["KeyError: 'x'"]}
    stored = tmp_path / "fuzz.json"
    rows = [row, row | {"reader": "msgpack", "failing": 0, "findings": []}]
    stored.write_text(json.dumps({**measure.checkout(), "fuzz": rows}))
    out = tmp_path / "faults.json"
    with pytest.raises(SystemExit):
        call(monkeypatch, "--files", 1, "--fuzzed", stored, "--json", out)
    document = json.loads(out.read_text())
    assert document["findings"] == ["index: KeyError: 'x'"]
    assert document["fuzz"][0] == row
    rows = records.rows(document, faults.FUZZED)
    assert [(one["reader"], one["executions"], one["without a finding"]) for one in rows] == [
        ("index", 500, 460),
        ("msgpack", 500, 500),
        ("all", 1000, 960),
    ]


def test_what_a_fuzzer_found_at_another_commit_is_refused(monkeypatch, capsys, tmp_path):
    stored = tmp_path / "fuzz.json"
    stored.write_text(json.dumps({"commit": "abc", "uncommitted_changes": True, "fuzz": []}))
    with pytest.raises(SystemExit) as ending:
        call(monkeypatch, "--fuzzed", stored, "--json", tmp_path / "faults.json")
    assert ending.value.code == 2
    assert f"--fuzzed: {stored} is of commit abc with changes, and this is commit" in capsys.readouterr().err


def test_kills_are_counted_by_what_they_struck(monkeypatch, tmp_path):
    told = [
        kills.Outcome("SIGINT", "add", "solving", "", 2),
        kills.Outcome("SIGINT", "merge", "solving", "other bits"),
        kills.Outcome("SIGKILL", "merge", "", "none of 50 signals ended a run", 50),
    ]
    lines = "".join(json.dumps(one._asdict()) + "\n" for one in told)
    process = [sys.executable, "-c", f"print({lines!r}, end='')"]
    started = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **how: started(process, **how))
    by_signal, by_phase, findings = faults.killed(tmp_path, 3, 0)
    assert by_signal == [["SIGINT", 2, 1, 1, 2], ["SIGKILL", 1, 0, 0, 50]]
    assert [row for row in by_phase if row[1]] == [["solving", 2, 1, 1]]
    assert findings == ["SIGINT merge solving: other bits", "SIGKILL merge : none of 50 signals ended a run"]


def test_fuzzing_needs_a_fuzzer(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "is_installed", lambda: False)
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--seconds", "1"])
    with pytest.raises(SystemExit) as ending:
        fuzz.main()
    assert ending.value.code == 1
    assert capsys.readouterr().err == (
        "fuzz.py: atheris is not installed (pip install 'nufilt_jax[fuzz]', or make fuzz)\n"
    )
