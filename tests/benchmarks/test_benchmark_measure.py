"""Times, rates, records and tables."""

import json

import jax
import pytest

from benchmarks.common import measure, records, script


def document(**environment):
    return {
        "environment": measure.environment() | environment,
        "tables": [
            records.table("speed", ("name", "runs", "seconds"), [["a", 5, 0.123456], ["b", 1, None]]),
            records.table("error", ("name", "max"), [["a", 1.23e-6]]),
        ],
    }


def test_warm_up_does_not_count():
    calls = []
    times = measure.time_it(lambda: calls.append(1), 3)
    assert (len(calls), len(times.seconds)) == (4, 3)


def test_minimum_and_median():
    times = measure.Times((3.0, 1.0, 2.0, 9.0))
    assert (times.minimum, times.median) == (1.0, 2.5)


def test_compilation_is_apart():
    program, seconds = measure.compile_it(jax.jit(lambda x, power: x**power, static_argnames="power"), 2.0, power=3)
    assert seconds > 0
    assert program(2.0) == 8


def test_rates_are_positive():
    assert measure.matmul_rate((16, 32), 2) > 0
    assert measure.copy_rate(2**16, 2) > 0


def test_neighbours_have_a_share():
    neighbours = measure.Neighbours()
    sum(range(10**6))
    assert 0 <= (neighbours.percent() or 0) <= 101


def test_without_a_system_that_tells_there_is_no_share(monkeypatch):
    monkeypatch.setattr(measure.Path, "read_text", lambda _: "nothing of use")
    assert measure.Neighbours().percent() is None


def test_environment_says_where_and_with_what():
    found = measure.environment()
    assert found["versions"]["jax"] == jax.__version__
    assert found["platform"] == jax.devices()[0].platform
    assert found["cpu_count"] >= 1
    assert len(found["commit"] or 40 * "x") == 40


def test_an_unknown_package_has_no_version():
    assert measure._version("no-such-package") is None


def test_json_is_sorted_indented_and_whole(tmp_path):
    path = tmp_path / "new" / "results.json"
    records.write_json({"b": [1], "a": 2}, path)
    assert path.read_text() == '{\n "a": 2,\n "b": [\n  1\n ]\n}\n'


def test_tables_come_back_from_json(tmp_path):
    records.write_json(document(), tmp_path / "r.json")
    stored = json.loads((tmp_path / "r.json").read_text())
    assert records.rows(stored, "speed")[0] == {"name": "a", "runs": 5, "seconds": 0.123456}


def test_markdown():
    text = records.markdown(document(commit="0123456789", uncommitted_changes=False, date="2026-01-02T03:04:05"))
    lines = text.splitlines()
    assert lines[:6] == [
        "**speed**",
        "",
        "| name | runs | seconds |",
        "| --- | ---: | ---: |",
        "| a | 5 | 0.1235 |",
        "| b | 1 |  |",
    ]
    assert "| a | 1.2e-06 |" in lines
    assert lines[-1].endswith("commit 01234567, 2026-01-02.")


def test_markdown_marks_uncommitted_changes():
    assert "01234567 with changes" in records.markdown(document(commit="0123456789", uncommitted_changes=True))


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (0.0, "0"),
        (138.9, "138.9"),
        (123456.0, "123456"),
        (2.5e7, "2.5e+07"),
        (0.99025, "0.9902"),
        (0.999999, "1 - 1.0e-06"),
        (1.0, "1"),
    ],
)
def test_numbers_in_cells(value, cell):
    assert records._cell(value) == cell


def test_whole_numbers_of_an_argument():
    assert script.at_least(2)("2") == 2
    with pytest.raises(script.argparse.ArgumentTypeError, match="must be at least 2, got 1"):
        script.at_least(2)("1")


def test_stored_results_are_printed(tmp_path, monkeypatch, capsys):
    records.write_json(document(), tmp_path / "r.json")
    monkeypatch.setattr("sys.argv", ["records.py", str(tmp_path / "r.json")])
    records.main()
    assert capsys.readouterr().out.startswith("**speed**")


@pytest.mark.parametrize("name", ["tiny.json", "tiny_ranks.json"])
def test_results_without_tables_are_refused(name, tmp_path, monkeypatch, capsys):
    """As they are stored; nothing is printed of those that have some."""
    records.write_json(document(), tmp_path / "r.json")
    monkeypatch.setattr("sys.argv", ["records.py", str(tmp_path / "r.json"), str(records.RESULTS / name)])
    with pytest.raises(SystemExit) as refused:
        records.main()
    shown = capsys.readouterr()
    assert (refused.value.code, shown.out, shown.err.count("\n")) == (1, "", 1)
    assert f"no tables are stored in {records.RESULTS / name} (python -m benchmarks.study.tiny --markdown" in shown.err
