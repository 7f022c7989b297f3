"""Files as strangers may make them: a merge, or a refusal in words; benchmarks/study/faults.py tries thousands."""

import io
import pickle
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.faults import hostile, mutations


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    return hostile.Sandbox(tmp_path_factory.mktemp("hostile") / "sandbox")


@pytest.mark.parametrize("target", hostile.TARGETS, ids=lambda target: f"{target.name} {target.file}")
def test_hostile_files(sandbox, target, monkeypatch):
    monkeypatch.setattr(hostile, "MOST_SECONDS", 30.0)  # how fast a refusal is, is measured where nothing else runs
    cases = [sandbox.draw(target, seed) for seed in range(1000, 1004)]
    outcomes = [sandbox.run(case) for case in cases]
    assert [outcome.finding for outcome in outcomes if outcome.finding] == []


@pytest.fixture(scope="module")
def case(sandbox):
    return sandbox.draw(hostile.TARGETS[0], 0)


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
def test_the_harness_sees_what_is_wrong(sandbox, case, monkeypatch, main, finding):
    monkeypatch.setattr(hostile, "main", main)
    assert finding in sandbox.run(case).finding


@pytest.mark.parametrize(
    ("path", "finding"),
    [
        ("../outside/canary", "it wrote elsewhere"),
        ("one-task/config.json", "it wrote elsewhere"),
        ("lora/new", "it wrote elsewhere"),
        ("new", "it wrote elsewhere"),
        ("../outside/executed", "it executed what it was given"),
        ("out.traceback", ""),
        ("done/new", ""),
    ],
)
def test_the_harness_sees_what_is_written(sandbox, case, monkeypatch, path, finding):
    def main(_):
        Path(path).write_text("touched")
        return 0

    monkeypatch.setattr(hostile, "main", main)
    found = sandbox.run(case).finding
    assert finding in found and bool(found) == bool(finding)


def test_what_strangers_give_would_be_seen_if_it_were_executed(sandbox, tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    executed = tmp_path / "outside" / "executed"
    for seed in range(12):
        rng = mutations.Rng(seed)
        exec(mutations.code(rng).decode(), {})
        executed.unlink()
        data = mutations.pickled(rng)
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read("archive/data.pkl")
        pickle.loads(data)
        executed.unlink()


def test_a_refusal_by_a_process_of_its_own(sandbox):
    [target] = [target for target in hostile.TARGETS if target.name == "pickle alone"]
    seconds, taken = hostile.measured(sandbox, sandbox.draw(target, 0))
    assert seconds > 0 and 10e6 < taken < 1e9
    with pytest.raises(SystemExit, match="ended with status 0 in a process"):
        hostile.measured(sandbox, hostile.Case(hostile.TARGETS[0], ("--version",), b""))


def test_no_case_is_run_twice(tmp_path, monkeypatch):
    def fake(name, damage, *commands):
        return hostile.Target(name, "one/config.json", damage, commands)

    two, three = (lambda _, rng: rng.choice((b"a", b"b"))), (lambda _, rng: b"%d" % rng.randrange(3))
    few, more = fake("few", two, ("x",)), fake("more", three, ("y",), ("z",))
    monkeypatch.setattr(hostile, "TARGETS", [few, more])
    sandbox = hostile.Sandbox(tmp_path / "sandbox")
    monkeypatch.setattr(sandbox, "run", lambda case: case)
    cases = [case for case, _ in hostile.study(sandbox, 100)]
    assert len({(case.command, case.content) for case in cases}) == len(cases) == 8
    assert [case.target.name for case in cases[-3:]] == ["more"] * 3
    assert sandbox.draw(few, 7) is None
    sound = (tmp_path / "sandbox" / "sound" / "one" / "config.json").read_bytes()
    monkeypatch.setattr(hostile, "TARGETS", [fake("same", lambda *_: sound, ("x",))])
    assert [*hostile.study(hostile.Sandbox(tmp_path / "again"), 9)] == []


def test_damage_is_drawn_by_seed_and_does_something():
    rng = mutations.Rng
    drawn = [mutations.damaged_object({"a": {"b": [1, 2]}, "c": "d"}, rng(seed)) for seed in range(50)]
    assert drawn == [mutations.damaged_object({"a": {"b": [1, 2]}, "c": "d"}, rng(seed)) for seed in range(50)]
    assert len(set(drawn)) > 40
    assert sum(mutations.damaged_bytes(b"x" * 99, rng(seed)) != b"x" * 99 for seed in range(50)) > 35
