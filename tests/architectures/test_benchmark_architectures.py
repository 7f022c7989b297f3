"""The script from its arguments to its results."""

import json

import pytest

from benchmarks.study import architectures

FAMILIES = ("clip", "t5_relu")


def test_rows_are_what_was_merged(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["architectures.py", "--families", *FAMILIES, "--json", str(out)])
    monkeypatch.setattr(
        architectures, "opens", lambda entry, folder: "yes" if (folder / "config.json").exists() else "no"
    )
    architectures.main()
    document = json.loads(out.read_text())
    rows = architectures.records.rows(document, "Layers merged of each family")
    sources = [f"transformers {series}" for series in ("4.57", "5")]
    assert [(row["family"], row["stored by"]) for row in rows] == [(f, s) for f in FAMILIES for s in sources]
    assert [row["layers"] for row in rows] == [10, 10, 32, 32]
    assert {(row["as expected"], row["opens"]) for row in rows} == {("yes", "yes")}
    assert all(0 < row["kept"] < 1 and 0 < row["largest error"] < 5e-5 for row in rows)
    assert "| clip | transformers 4.57 |" in capsys.readouterr().out


def test_an_unknown_family_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["architectures.py", "--families", "perceptron"])
    with pytest.raises(SystemExit) as left:
        architectures.main()
    assert (left.value.code, capsys.readouterr().err.count("\n")) == (2, 1)
