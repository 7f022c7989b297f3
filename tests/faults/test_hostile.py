"""Files as strangers may make them: a merge, or a refusal in words; benchmarks/study/faults.py tries thousands."""

import sys

import pytest

from benchmarks.faults import hostile, mutations


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    return hostile.Sandbox(tmp_path_factory.mktemp("hostile") / "sandbox")


@pytest.mark.parametrize("target", hostile.TARGETS, ids=lambda target: f"{target.name} {target.file}")
def test_hostile_files(sandbox, target):
    outcomes = [sandbox.run(target, seed) for seed in range(1000, 1004)]
    assert [outcome.finding for outcome in outcomes if outcome.finding] == []


def fails(error):
    def main(_):
        raise error

    return main


def tells(out="", err="", status=1):
    def main(_):
        sys.stdout.write(out)
        sys.stderr.write(err)
        return status

    return main


@pytest.mark.parametrize(
    ("main", "finding"),
    [
        (fails(RecursionError()), "RecursionError came through"),
        (tells(), "a refusal without a line"),
        (tells(err="odd\n"), "a line that is none of ours"),
        (tells(err="nufilt: x: failed unforeseen: y\n"), "not foreseen"),
        (tells(err="nufilt: \x1b[2J\n"), "orders to a terminal"),
        (tells(err="nufilt: x\n" * 13), "13 lines"),
        (tells(err="nufilt: " + "x" * 5000 + "\n"), "a line without end"),
        (tells(out="\u202e", status=0), "orders to a terminal"),
        (tells(status=3), "status 3"),
    ],
)
def test_the_harness_sees_what_is_wrong(sandbox, monkeypatch, main, finding):
    monkeypatch.setattr(hostile, "main", main)
    assert finding in sandbox.run(hostile.TARGETS[0], 0).finding


def test_the_harness_sees_what_is_written_outside(sandbox, monkeypatch):
    def main(_):
        (sandbox.root / "outside" / "canary").write_text("touched")
        return 0

    monkeypatch.setattr(hostile, "main", main)
    assert "it wrote outside" in sandbox.run(hostile.TARGETS[0], 0).finding


def test_damage_is_drawn_by_seed_and_does_something():
    rng = mutations.Rng
    drawn = [mutations.damaged_object({"a": {"b": [1, 2]}, "c": "d"}, rng(seed)) for seed in range(50)]
    assert drawn == [mutations.damaged_object({"a": {"b": [1, 2]}, "c": "d"}, rng(seed)) for seed in range(50)]
    assert len(set(drawn)) > 40
    assert sum(mutations.damaged_bytes(b"x" * 99, rng(seed)) != b"x" * 99 for seed in range(50)) > 35
