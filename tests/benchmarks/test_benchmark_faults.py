"""The script that counts what a merge survives, at its smallest; tests/faults has the harnesses themselves."""

import json

import pytest

from benchmarks.common import records
from benchmarks.faults import disks, fuzz, hostile
from benchmarks.study import faults


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["faults.py", *map(str, arguments)])
    faults.main()


KILLS = [["SIGKILL", 3, 3, 2, 1], ["SIGINT", 2, 2, 2, 0]]


@pytest.fixture
def few(monkeypatch):
    """Without kills, which test_kills.py has, and with two disks."""
    found = [("no links", disks.Outcome(False, "", "")), ("a disk of 0.3 models", disks.Outcome(True, "nufilt: x", ""))]
    monkeypatch.setattr(faults, "killed", lambda *_: (KILLS, []))
    monkeypatch.setattr(disks, "study", lambda *_: found)
    monkeypatch.setattr(fuzz, "is_installed", lambda: False)
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
    assert (fallen["tried"], fallen["handled"], fallen["of these refused in one line"]) == (2, 2, 1)
    assert files["tried"] == files["handled"] == 2 * len(hostile.TARGETS)
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


def test_what_a_fuzzer_found_is_taken_in(monkeypatch, tmp_path, few):
    row = {"reader": "index", "seconds": 9, "executions": 500, "places": 30, "inputs": 4, "findings": ["KeyError: 'x'"]}
    stored = tmp_path / "fuzz.json"
    stored.write_text(json.dumps({"fuzz": [row, row | {"reader": "msgpack", "findings": []}]}))
    out = tmp_path / "faults.json"
    with pytest.raises(SystemExit):
        call(monkeypatch, "--files", 1, "--fuzzed", stored, "--json", out)
    document = json.loads(out.read_text())
    assert document["findings"] == ["index: KeyError: 'x'"]
    assert document["fuzz"][0] == row
    rows = records.rows(document, faults.FUZZED)
    assert [(one["reader"], one["executions"], one["without a finding"]) for one in rows] == [
        ("index", 500, 499),
        ("msgpack", 500, 500),
        ("all", 1000, 999),
    ]


def test_fuzzing_needs_a_fuzzer(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "is_installed", lambda: False)
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--seconds", "1"])
    with pytest.raises(SystemExit) as ending:
        fuzz.main()
    assert ending.value.code == 1
    assert capsys.readouterr().err == (
        "fuzz.py: atheris is not installed (pip install 'nufilt_jax[fuzz]', or make fuzz)\n"
    )
