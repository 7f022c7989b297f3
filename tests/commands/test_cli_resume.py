"""The same command again, --add, and what keeps either from going on."""

import errno
import json
import os
import shutil
import signal

import model_builders as build
import numpy as np
import pytest

from nufilt_jax.engine import run as engine_run
from nufilt_jax.engine import walk
from nufilt_jax.output import arrays


def add(models, out, *names, options=()):
    return ["add", out, *(part for n in names for part in ("--task", f"{n}={models / n}")), *options]


def resumed(result):
    return [step["resumed"] for step in result.json["steps"]]


def beside(out):
    """What stands beside an output folder, the lock apart."""
    return {path.name for path in out.parent.iterdir()} - {out.name, f"{out.name}.lock"}


def test_same_command_twice_touches_nothing(shared_models, tmp_path, nufilt, command):
    argv = command(shared_models, tmp_path / "out", "--json")
    first = nufilt(*argv)
    assert (first.code, resumed(first)) == (0, [False] * 3)
    before = build.snapshot(tmp_path / "out")
    second = nufilt(*argv)
    assert (second.code, resumed(second)) == (0, [True] * 3)
    assert build.snapshot(tmp_path / "out") == before
    without_flag = [{**step, "resumed": False} for step in second.json["steps"]]
    assert without_flag == first.json["steps"]
    third = nufilt(*[part for part in argv if part != "--json"])
    assert "all is done" in third.out and "resumed" not in third.out


def test_two_fresh_runs_give_the_same_bits(shared_models, tmp_path, nufilt, command):
    for name in ("a", "b"):
        assert nufilt(*command(shared_models, tmp_path / name)).code == 0
    assert build.weight_bytes(tmp_path / "a") == build.weight_bytes(tmp_path / "b")
    assert (tmp_path / "a" / "forecast.json").read_bytes() == (tmp_path / "b" / "forecast.json").read_bytes()


METHODS = [
    (),
    ("--other-params", "average"),
    ("--other-params", "first", "--seed", "5"),
    ("--method", "null_space"),
    ("--method", "sum"),
    ("--method", "weight_average"),
    ("--method", "task_arithmetic", "--method-args", "scale=0.7"),
]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: " ".join(options) or "nufilt")
def test_add_equals_merging_all_at_once(shared_models, tmp_path, nufilt, command, options):
    assert nufilt(*command(shared_models, tmp_path / "all", *options, n=4)).code == 0
    assert nufilt(*command(shared_models, tmp_path / "grown", *options, n=3)).code == 0
    result = nufilt(*add(shared_models, tmp_path / "grown", "delta", options=("--json",)))
    assert (result.code, resumed(result)) == (0, [True, True, True, False])
    assert build.weight_bytes(tmp_path / "all") == build.weight_bytes(tmp_path / "grown")
    recipes = [json.loads((tmp_path / name / "nufilt.json").read_text()) for name in ("all", "grown")]
    assert recipes[0]["tasks"] == recipes[1]["tasks"]
    assert recipes[0]["config"] == recipes[1]["config"]
    assert beside(tmp_path / "grown") <= {"all", "all.lock"}


def test_add_does_not_need_the_earlier_tasks(models, tmp_path, nufilt, command, monkeypatch):
    assert nufilt(*command(models, tmp_path / "out", n=2)).code == 0
    shutil.rmtree(models / "alpha")
    shutil.rmtree(models / "beta")
    monkeypatch.chdir(models)
    result = nufilt("add", tmp_path / "out", "--task", "gamma=gamma", "--json")
    assert result.code == 0
    assert result.json["tasks"][2]["source"] == str(models / "gamma")


def test_sources_are_recorded_from_the_output_folder(models, tmp_path, nufilt, monkeypatch):
    monkeypatch.chdir(models)
    tasks = ("--task", "alpha=alpha", "--task", "beta=./beta")
    assert nufilt("merge", "--base", "base", *tasks, "--out", "../out", "--method", "sum").code == 0
    recipe = json.loads((tmp_path / "out" / "nufilt.json").read_text())
    assert [recipe["base"]["source"], *(task["source"] for task in recipe["tasks"])] == [
        f"../models/{name}" for name in ("base", "alpha", "beta")
    ]
    monkeypatch.chdir("/")
    assert nufilt("add", tmp_path / "out", "--task", f"gamma={models / 'gamma'}").code == 0


def test_sources_are_found_through_a_link_above_the_output_and_behind_it(models, tmp_path, nufilt, monkeypatch):
    """And as a recipe names them that was written for the folder as it was spelt."""
    (tmp_path / "deep" / "er" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er" / "real")
    given = ("--base", models / "base", "--task", f"alpha={models / 'alpha'}", "--method", "sum")
    assert nufilt("merge", *given, "--out", tmp_path / "link" / "out").code == 0
    monkeypatch.chdir(tmp_path / "link")
    recipe = tmp_path / "link" / "out" / "nufilt.json"
    assert json.loads(recipe.read_text())["base"]["source"] == "../../../../models/base"
    for out in ("out", tmp_path / "link" / "out"):
        assert nufilt("verify", out).code == 0
        assert nufilt("plan", "--config", f"{out}/nufilt.json").code == 0
        assert nufilt("merge", "--add", out, "--task", f"beta={models / 'beta'}").code == 0
    recipe.write_text(recipe.read_text().replace("../../../../models", "../../models"))
    assert nufilt("verify", tmp_path / "link" / "out").code == 0
    assert nufilt("plan", "--config", recipe).code == 0


def test_adding_the_last_task_again_adds_nothing(shared_models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, n=2)).code == 0
    assert nufilt(*add(shared_models, out, "gamma", "delta")).code == 0
    before = build.snapshot(out)
    for again in (("delta",), ("gamma", "delta"), ()):
        result = nufilt(*add(shared_models, out, *again, options=("--json",)))
        assert (result.code, resumed(result)) == (0, [True] * 4)
    assert build.snapshot(out) == before


def test_adding_the_last_name_with_other_weights_is_refused(shared_models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, n=2)).code == 0
    before = build.snapshot(out)
    result = nufilt("add", out, "--task", f"beta={shared_models / 'gamma'}")
    assert result.code == 1
    hashes = [json.loads((out / "nufilt.json").read_text())["tasks"][1]["sha256"]["model.safetensors"]]
    assert len(result.lines) == 1 and hashes[0] in result.err and str(shared_models / "gamma") in result.err
    result = nufilt("add", out, "--task", f"alpha={shared_models / 'alpha'}")
    assert (result.code, "alpha names two tasks" in result.err) == (1, True)
    assert build.snapshot(out) == before


def test_interrupted_run_goes_on(shared_models, tmp_path, nufilt, command, stop_before):
    assert nufilt(*command(shared_models, tmp_path / "whole")).code == 0
    argv = command(shared_models, tmp_path / "out", "--json")
    go_on = stop_before("gamma")
    result = nufilt(*argv)
    assert (result.code, len(result.lines), result.out) == (130, 1, "")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    go_on()
    result = nufilt(*argv)
    assert (result.code, resumed(result)) == (0, [True, True, False])
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    assert beside(tmp_path / "out") <= {"whole", "whole.lock"}
    forecasts = [json.loads((tmp_path / name / "forecast.json").read_text()) for name in ("out", "whole")]
    assert forecasts[0] == forecasts[1]


def test_a_run_that_finished_no_step_binds_nobody(shared_models, tmp_path, nufilt, command, stop_before):
    out = tmp_path / "deep" / "er" / "out"
    go_on = stop_before("alpha")
    assert nufilt(*command(shared_models, out)).code == 130
    go_on()
    result = nufilt(*command(shared_models, out, "--method", "sum", "--json", n=2))
    assert (result.code, resumed(result)) == (0, [False, False])
    assert beside(out) == set()


@pytest.mark.parametrize("stop_at", ["alpha", "beta"])
def test_add_to_an_unfinished_merge(shared_models, tmp_path, nufilt, command, stop_before, stop_at):
    assert nufilt(*command(shared_models, tmp_path / "whole", n=4)).code == 0
    out = tmp_path / "out"
    go_on = stop_before(stop_at)
    assert nufilt(*command(shared_models, out, n=3)).code == 130
    go_on()
    result = nufilt(*add(shared_models, out, "delta", options=("--json",)))
    assert (result.code, resumed(result)) == (0, [stop_at == "beta", False, False, False])
    assert [task["name"] for task in result.json["tasks"]] == list(build.TASKS)
    assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "whole")


def test_interrupted_add_goes_on_and_hides_nothing(shared_models, tmp_path, nufilt, command, stop_before):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, n=2, tasks=None)).code == 0
    before = build.snapshot(out)
    go_on = stop_before("delta")
    assert nufilt(*add(shared_models, out, "gamma", "delta")).code == 130
    assert build.snapshot(out) == before
    go_on()
    result = nufilt(*add(shared_models, out, "gamma", "delta", options=("--json",)))
    assert (result.code, resumed(result)) == (0, [True, True, True, False])
    assert nufilt(*command(shared_models, tmp_path / "whole", n=4)).code == 0
    assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "whole")


CHANGES = {
    "--seed": ("--seed", "7"),
    "--steps": ("--steps", "3"),
    "--method": ("--method", "sum"),
    "--dtype": ("--dtype", "float16"),
    "--format": ("--format", "flax"),
    "--layers": ("--layers", "q_proj"),
    "--other-params": ("--other-params", "average"),
    "--learning-rate": ("--learning-rate", "0.01"),
}


@pytest.fixture(scope="module")
def finished(shared_models, tmp_path_factory, command):
    from nufilt_jax.cli import main

    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(command(shared_models, out, "--quiet")) == 0
    return out


def test_what_is_out_of_the_range_of_a_type_is_added_in_a_wider_one(shared_models, tmp_path, nufilt, command):
    """As the refusal says: what is merged is kept, and nothing but its writing may change."""
    huge, out = build.weights(shared_models / "delta"), tmp_path / "out"
    huge[build.SELECTED[0]] = np.full_like(huge[build.SELECTED[0]], 1e6)
    build.write(tmp_path / "delta", huge)
    assert nufilt(*command(shared_models, out, "--method", "sum", "--dtype", "float16")).code == 0
    added = nufilt(*add(tmp_path, out, "delta"))
    assert added.code == 1 and "has numbers out of the range of float16 (write a wider --dtype; what is " in added.err
    refused = nufilt(*add(tmp_path, out, "delta", options=("--dtype", "float64", "--seed", "7", "--layers", "q")))
    assert refused.code == 1 and [line.split(", got")[0] for line in refused.lines] == [
        "nufilt: --dtype: must be one of float32, bfloat16, float16",
        "nufilt: --seed: is 0 in this merge",
        "nufilt: --layers: is not given in this merge",
    ]
    planned = nufilt(*add(tmp_path, out, "delta", options=("--dtype", "float32", "--plan")))
    assert planned.code == 0, planned.err
    wider = nufilt(*add(tmp_path, out, "delta", options=("--dtype", "float32", "--json")))
    assert wider.code == 0 and resumed(wider) == [True] * 4, wider.err
    assert json.loads((out / "nufilt.json").read_text())["dtype"] == "float32"
    assert {x.dtype for x in build.weights(out).values() if x.dtype.kind == "f"} == {np.dtype(np.float32)}
    whole = command(shared_models, tmp_path / "whole", "--method", "sum", "--dtype", "float32")
    assert nufilt(*whole, "--task", f"delta={tmp_path / 'delta'}").code == 0
    assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "whole")
    assert nufilt("verify", out).code == 0


@pytest.mark.parametrize("option", CHANGES)
def test_changed_settings_are_refused(shared_models, finished, nufilt, command, option):
    before = build.snapshot(finished.parent)
    argv = command(shared_models, finished)
    if option == "--steps":
        argv = [part if part != "4" or argv[i - 1] != "--steps" else "3" for i, part in enumerate(argv)]
    else:
        argv += CHANGES[option]
    result = nufilt(*argv)
    assert (result.code, len(result.lines)) == (1, 1), result.err
    line = result.lines[0]
    assert line.startswith(f"nufilt: {option}: is ") and CHANGES[option][1] in line.split(", got ")[1]
    assert str(finished) in line
    assert build.snapshot(finished.parent) == before
    added = nufilt(*add(shared_models, finished, "delta", options=CHANGES[option]))
    assert (added.code, len(added.lines)) == (1, 1), added.err
    assert added.lines[0].startswith(f"nufilt: {option}: is ")
    assert build.snapshot(finished.parent) == before


def test_changed_tasks_are_refused(shared_models, finished, nufilt, command):
    before = build.snapshot(finished.parent)
    for names in (("alpha", "beta"), ("beta", "alpha", "gamma"), build.TASKS):
        result = nufilt(*command(shared_models, finished, tasks=names))
        assert (result.code, len(result.lines)) == (1, 1)
        assert "alpha, beta, gamma" in result.err and ", ".join(names) in result.err
    assert build.snapshot(finished.parent) == before


@pytest.mark.parametrize("name", ["base", "beta"])
def test_changed_weights_are_refused(models, tmp_path, nufilt, command, name):
    out = tmp_path / "out"
    argv = command(models, out)
    assert nufilt(*argv).code == 0
    old = json.loads((out / "nufilt.json").read_text())
    before = build.snapshot(out)
    shutil.rmtree(models / name)
    build.write(models / name, build.fine_tuned(build.tower(0), 77))
    result = nufilt(*argv)
    assert (result.code, len(result.lines)) == (1, 1), result.err
    entry = old["base"] if name == "base" else old["tasks"][1]
    assert entry["sha256"]["model.safetensors"] in result.err and str(models / name) in result.err
    added = nufilt(*add(models, out, "delta"))
    assert added.code == (1 if name == "base" else 0)
    if name == "base":
        assert entry["sha256"]["model.safetensors"] in added.err and len(added.lines) == 1
        assert build.snapshot(out) == before


def test_an_output_is_no_source_of_itself(shared_models, tmp_path, nufilt, command):
    out, link = tmp_path / "out", tmp_path / "link"
    assert nufilt(*command(shared_models, out, "--method", "sum", n=2)).code == 0
    link.symlink_to(out)
    before = build.snapshot(out)
    what = "is the output folder itself, which the merge would replace (give a copy of it)"
    for source in (out, link):
        for options in ((), ("--plan",)):
            result = nufilt("merge", "--add", out, "--task", f"gamma={source}", *options)
            assert (result.code, result.lines) == (1, [f"nufilt: --task: gamma {what}"])
    assert build.snapshot(out) == before
    copy = shutil.copytree(out, tmp_path / "copy")
    assert nufilt("add", out, "--task", f"gamma={copy}").code == 0
    assert nufilt("verify", out, "--quick").code == 0
    recipe = json.loads((copy / "nufilt.json").read_text())
    (copy / "nufilt.json").write_text(json.dumps({**recipe, "base": {**recipe["base"], "source": "."}}))
    result = nufilt(*add(shared_models, copy, "gamma"))
    assert (result.code, result.lines) == (1, [f"nufilt: --base: {copy} {what}"])


def test_vanished_base(models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(models, out, n=2)).code == 0
    before = build.snapshot(out)
    shutil.rmtree(models / "base")
    result = nufilt(*add(models, out, "delta"))
    assert (result.code, len(result.lines)) == (1, 1)
    assert result.err.startswith(f"nufilt: {models / 'base'}: there is no such folder")
    assert build.snapshot(out) == before and beside(out) == {"models"}


def test_settings_are_frozen_in_the_recipe(shared_models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    options = ("--method", "task_arithmetic", "--method-args", "scale=0.7")
    assert nufilt(*command(shared_models, out, *options, n=2)).code == 0
    result = nufilt(*add(shared_models, out, "gamma", options=(*options, "--json")))
    assert (result.code, result.json["config"]) == (0, {"scale": 0.7, "accumulate": True})
    result = nufilt(*add(shared_models, out, "delta", options=("--method-args", "scale=0.3")))
    assert (result.code, "0.7" in result.err, "0.3" in result.err) == (1, True, True)


@pytest.mark.parametrize("content", ["a file", "a folder", "a strange recipe", "an empty recipe"])
def test_foreign_folder_is_left_alone(shared_models, tmp_path, nufilt, command, content):
    out = tmp_path / "out"
    if content == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        name = {"a folder": "thesis.tex"}.get(content, "nufilt.json")
        (out / name).write_text("{}" if content == "an empty recipe" else "mine")
    before = build.snapshot(tmp_path)
    for argv in (command(shared_models, out), add(shared_models, out, "delta")):
        result = nufilt(*argv)
        assert (result.code, len(result.lines)) == (1, 1)
        assert result.err.startswith(f"nufilt: {out}")
        assert build.snapshot(tmp_path) == before


def test_foreign_folder_that_comes_while_merging_is_left_alone(shared_models, tmp_path, nufilt, command, monkeypatch):
    out = tmp_path / "out"
    write = engine_run.write_checkpoint

    def and_meanwhile(*args, **options):
        write(*args, **options)
        out.mkdir()
        (out / "thesis.tex").write_text("mine")

    monkeypatch.setattr(engine_run, "write_checkpoint", and_meanwhile)
    result = nufilt(*command(shared_models, out))
    assert (result.code, len(result.lines)) == (1, 1)
    assert (out / "thesis.tex").read_text() == "mine"


def test_empty_output_folder_is_used(shared_models, tmp_path, nufilt, command):
    (tmp_path / "out").mkdir()
    assert nufilt(*command(shared_models, tmp_path / "out", "--method", "sum")).code == 0
    assert (tmp_path / "out" / "nufilt.json").is_file()


def test_nothing_to_continue(tmp_path, shared_models, nufilt):
    result = nufilt(*add(shared_models, tmp_path / "deep" / "none", "delta"))
    assert (result.code, len(result.lines)) == (1, 1)
    assert "holds no merge to continue" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["removed", "truncated", "garbage", "of other layers"])
def test_damaged_state(shared_models, tmp_path, nufilt, command, damage):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, n=2)).code == 0
    if damage == "of other layers":
        assert (
            nufilt(*command(shared_models, tmp_path / "other", "--layers", "q_proj", "--method", "sum", n=2)).code == 0
        )
        shutil.rmtree(out / "state")
        shutil.copytree(tmp_path / "other" / "state", out / "state")
    elif damage == "removed":
        shutil.rmtree(out / "state")
    else:
        for path in (out / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10] if damage == "truncated" else b"garbage")
    before = build.snapshot(out)
    result = nufilt(*add(shared_models, out, "delta"))
    assert (result.code, len(result.lines)) == (1, 1), result.err
    assert str(out) in result.err and "state" in result.err
    if damage == "removed":  # what others get of a push
        assert (
            f"{out / 'state'}: holds 0 of the {len(build.SELECTED)} layers that were merged (copy it from" in result.err
        )
        assert "push leaves it out without --with-state" in result.err
    assert build.snapshot(out) == before
    assert not (tmp_path / "out.partial").exists()


def test_losses_of_a_resumed_step_stay(shared_models, finished, nufilt, command):
    result = nufilt(*command(shared_models, finished, "--json"))
    assert np.isfinite(result.json["steps"][1]["losses"]).all() and len(result.json["steps"][1]["losses"]) == 5


def test_a_state_that_cannot_be_read_now_is_kept(shared_models, tmp_path, nufilt, command, stop_before, monkeypatch):
    out = tmp_path / "out"
    go_on = stop_before("gamma")
    assert nufilt(*command(shared_models, out)).code == 130
    go_on()
    before = build.snapshot(tmp_path / "out.partial" / "state")
    with monkeypatch.context() as patched:
        patched.setattr(arrays, "stream_spans", failing)
        result = nufilt(*command(shared_models, out))
    assert (result.code, len(result.lines)) == (1, 1)
    assert "cannot be read: Input/output error (nothing of it is lost: try again)" in result.err
    assert build.snapshot(tmp_path / "out.partial" / "state") == before
    assert resumed(nufilt(*command(shared_models, out, "--json"))) == [True, True, False]


def failing(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_step_that_was_solved_when_the_run_was_stopped_is_whole(
    shared_models, tmp_path, nufilt, command, monkeypatch
):
    """Ctrl-C during a solve waits for it; the recipe then has all that it has of an undisturbed run."""
    update = walk.update

    def stopped(rule, state, task, *others):
        found = update(rule, state, task, *others)
        if task.name == "beta":
            signal.raise_signal(signal.SIGINT)
        return found

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(walk, "update", stopped)
        assert nufilt(*command(shared_models, out)).code == 130
    result = nufilt(*command(shared_models, out, "--json"))
    assert resumed(result) == [True, True, False]
    whole = nufilt(*command(shared_models, tmp_path / "whole", "--json"))
    assert [step["outside"] for step in result.json["steps"]] == [step["outside"] for step in whole.json["steps"]]


def test_what_a_user_adds_to_a_merge_stays(shared_models, tmp_path, nufilt, command):
    """When a task is added, as far as nothing new stands in its place; an edited model card gets another name."""
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--method", "sum", n=1)).code == 0
    mine = {"notes.txt": "mine", ".git/config": "[core]", "README.md": "edited"}
    for name, text in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    (out / "link").symlink_to("notes.txt")
    (out / "data").symlink_to(shared_models, target_is_directory=True)
    assert nufilt(*add(shared_models, out, "beta")).code == 0
    assert (out / "data").is_symlink() and (out / "data" / "base").is_dir()
    assert {name: (out / name).read_text() for name in ("notes.txt", ".git/config", "link", "README.old.md")} == {
        "notes.txt": "mine",
        ".git/config": "[core]",
        "link": "mine",
        "README.old.md": "edited",
    }
    assert "edited" not in (out / "README.md").read_text()
    assert nufilt("verify", out, "--quick").code == 0
    assert nufilt(*add(shared_models, out, "gamma")).code == 0
    assert (out / "README.old.md").read_text() == "edited" and not (out / "README.old1.md").exists()


def test_folders_of_a_user_stay_though_nothing_is_in_them(shared_models, tmp_path, nufilt, command):
    """Without `.git/refs` git knows no repository."""
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--method", "sum", n=1)).code == 0
    mine = {".git/refs/heads": 0o755, ".git/objects": 0o700, "runs/.old.0123abcd": 0o2775, "state/mine": 0o755}
    for name, mode in mine.items():
        (out / name).mkdir(parents=True)
        (out / name).chmod(mode)
    assert nufilt(*add(shared_models, out, "beta")).code == 0
    assert not (out / "state" / "mine").exists()
    stay = [name for name in mine if not name.startswith("state")]
    assert {name: (out / name).stat().st_mode & 0o7777 for name in stay} == {name: mine[name] for name in stay}
    assert beside(out) == set()


def test_a_folder_of_a_user_that_cannot_be_listed_stays(shared_models, tmp_path, nufilt, command, monkeypatch):
    """Until it can be, no task is added: what is in it would be lost."""
    out, scandir = tmp_path / "out", os.scandir
    assert nufilt(*command(shared_models, out, "--method", "sum", n=1)).code == 0
    (out / "private").mkdir()
    (out / "private" / "notes.txt").write_text("mine")

    def refuse(path):
        if str(path).endswith("private"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    before = build.snapshot(out)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        result = nufilt(*add(shared_models, out, "beta"))
    fix = "check the folder and its permissions"
    assert result.err.splitlines() == [f"nufilt: {out / 'private'}: cannot be read: Permission denied ({fix})"]
    assert (result.code, build.snapshot(out)) == (1, before)
    assert resumed(nufilt(*add(shared_models, out, "beta", options=("--json",)))) == [True, True]
    assert (out / "private" / "notes.txt").read_text() == "mine" and beside(out) == set()


def test_what_cannot_be_removed_when_all_is_done_is_told(shared_models, tmp_path, nufilt, command, monkeypatch):
    argv = command(shared_models, tmp_path / "out", "--method", "sum", n=1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        result = nufilt(*argv)
    what = "cannot be removed: it holds what may not be listed or changed"
    assert (result.code, result.err.count(f"nufilt: warning: {tmp_path / 'out.partial'}: {what}")) == (0, 1)
    assert nufilt(*argv).code == 0 and beside(tmp_path / "out") == set()


def test_what_a_user_has_edited_of_a_merge_is_kept_beside_and_told(shared_models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, "--method", "sum", n=1)).code == 0
    config = (out / "config.json").read_text()
    (out / "config.json").write_text("{}")
    (out / "README.md").write_text("edited")
    result = nufilt(*add(shared_models, out, "beta"))
    told = "edited since the merge, and written anew: README.md, config.json"
    assert (
        f"nufilt: warning: {out}: {told} (yours is kept as README.old.md, config.old.json)" in result.err.splitlines()
    )
    texts = {name: (out / name).read_text() for name in ("config.json", "config.old.json", "README.old.md")}
    assert texts == {"config.json": config, "config.old.json": "{}", "README.old.md": "edited"}
    result = nufilt(*add(shared_models, out, "gamma"))
    assert (result.code, "edited since" in result.err) == (0, False)
    assert (out / "config.old.json").read_text() == "{}" and not (out / "config.old1.json").exists()
    assert nufilt("verify", out, "--quick").code == 0
