"""The script that kills merges, at the fewest instants; and what it makes of runs that went wrong."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.common import records
from benchmarks.study import kills


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["kills.py", *map(str, arguments)])
    kills.main()


def test_killed_merges_come_to_the_same_bits(monkeypatch, capsys, tmp_path):
    out = tmp_path / "kills.json"
    call(monkeypatch, "--kills", 2, "--walk", "rows", "--method", "sum", "--json", out)
    document = json.loads(out.read_text())
    assert capsys.readouterr().out.strip() == records.markdown(document)
    [row] = records.rows(document, kills.TITLE)
    assert (row["walk"], row["kills"], row["identical"]) == ("rows", 2, 2)
    assert sum(row[phase] for phase in kills.PHASES) == 2
    assert 0 < row["of these in cells"] < row["seconds undisturbed"]
    assert 0 <= row["most seconds repeated"] < kills.LIMIT
    found = document["kills"]["rows"]
    assert all(one["differences"] == [] and 0 <= one["kept"] <= 12 for one in found)
    instants = [one["seconds"] for one in found]
    assert instants == sorted(instants) and 0 < instants[0] <= instants[-1] < row["seconds undisturbed"]


def event(what, at, task=0, layers="ab"):
    return {"what": what, "at": at, "task": task, "layers": list(layers), "ended": 9.0}


def test_only_cells_that_are_merged_again_are_repeated():
    first = [event("begin", 1), event("end", 3), event("begin", 4, task=1), event("end", 4.5, task=1)]
    first += [event("begin", 8, layers="c")]
    assert kills.repeated(first, []) == 0
    assert kills.repeated(first, [event("begin", 0, task=1, layers="b")]) == 0.5
    assert kills.repeated(first, [event("begin", 0, layers="c"), event("begin", 0, task=1, layers="c")]) == 1
    assert kills.repeated(first, first) == 3.5
    assert kills.repeated([], first) == 0


def test_where_a_run_was():
    begun, cells = [event("begin", 1)], [event("begin", 1), event("end", 2)]
    runs = [(-9, []), (-9, begun), (-9, cells), (-9, 12 * cells), (0, 12 * cells)]
    assert [kills.phase(kills.Run(status, 3.0, events)) for status, events in runs] == [*kills.PHASES, kills.OVER]


def test_one_bit_is_a_difference(tmp_path):
    merges = kills.Study(tmp_path, "rows", ("--method", "sum"))
    assert merges.merge(tmp_path / "out", kills.IN_THREE).status == 0
    wanted = kills.content(tmp_path / "out")
    assert kills.different(tmp_path / "out", wanted) == []
    assert {name.split()[0] for name in wanted} >= {"model", "delta", "forecast.json", "scores"}
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    tensors[name].reshape(-1).view(np.uint8)[0] ^= 1
    save_file(tensors, path, {"format": "pt"})
    assert kills.different(tmp_path / "out", wanted) == [f"model {name}"]
    shutil.rmtree(tmp_path / "out" / "state")
    assert "there is no model" not in kills.different(tmp_path / "out", wanted)
    assert len(kills.different(tmp_path / "out", wanted)) > 10
    assert kills.different(tmp_path / "none", wanted) == ["there is no model"]


@pytest.mark.parametrize("wrong", [{"differences": ["model a"]}, {"repeated": 61.0}])
def test_it_fails_if_a_merge_differs_or_repeats_too_much(monkeypatch, tmp_path, wrong):
    good = {"phase": kills.PHASES[1], "stands": False, "repeated": 0.5, "lost": 2.0, "differences": []}
    monkeypatch.setattr(kills, "study", lambda *_: ([good, good | wrong], kills.Run(0, 3.0, [])))
    out = tmp_path / "kills.json"
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "--walk", "rows", "--json", out)
    assert left.value.code == 1
    [row] = records.rows(json.loads(out.read_text()), kills.TITLE)
    assert row["identical"] == 2 - ("differences" in wrong)
