"""A finished merge held against its recipe."""

import hashlib
import json
import shutil

import model_builders as build
import numpy as np
import pytest

from nufilt_jax.engine import evaluation, verification
from nufilt_jax.engine.sameness import TOLERANCE
from nufilt_jax.output import place
from nufilt_jax.output.place import OutputPlace

SUM = ("--method", "sum")


@pytest.fixture
def merged(models, tmp_path, nufilt, command):
    """A merge of two models by summing, whose inputs a test may change."""
    assert nufilt(*command(models, tmp_path / "out", *SUM, n=2)).code == 0
    return tmp_path / "out"


def recipe_of(out):
    return json.loads((out / "nufilt.json").read_text())


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_recipe_holds_the_hashes_of_its_files(merged):
    files = {path.relative_to(merged).as_posix(): path for path in merged.rglob("*") if path.is_file()}
    wanted = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    del wanted["nufilt.json"]
    assert recipe_of(merged)["files"] == wanted
    assert {"model.safetensors", "config.json", "README.md", "forecast.json"} < wanted.keys()
    assert "state/window-0000/arrays.safetensors" in wanted
    assert set(place.REWRITTEN) == {"nufilt.json", evaluation.EVALUATION, evaluation.PICTURE}


def test_a_merge_that_nothing_happened_to(shared_models, tmp_path, nufilt, command):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, n=2)).code == 0
    before = build.snapshot(tmp_path)
    told = nufilt("verify", out, "--json")
    assert (told.code, told.err) == (0, "") and build.snapshot(tmp_path) == before
    assert told.json["holds"] and told.json["bit_for_bit"] and told.json["problems"] == []
    assert told.json["inputs"] == {"base": True, "alpha": True, "beta": True}
    again = told.json["recomputed"]
    n_layers = len(build.SELECTED)
    assert again["tensors"] == again["identical"] == len(build.weights(out)) + n_layers and again["worst"] == 0
    assert nufilt("verify", out).out.splitlines()[-1] == "verified"
    assert nufilt("add", out, "--task", f"gamma={shared_models / 'gamma'}").code == 0
    assert nufilt("verify", out).code == 0


def test_quick_merges_nothing(merged, nufilt, monkeypatch):
    monkeypatch.setattr(verification, "run", None)
    result = nufilt("verify", merged, "--quick", "--json")
    assert result.code == 0 and result.json["recomputed"] is None and result.json["quick"]
    assert nufilt("verify", merged, "--quick").out.splitlines() == [
        "inputs  3 of 3 are what they were",
        f"files   {len(recipe_of(merged)['files'])} were hashed",
        "verified",
    ]
    assert nufilt("verify", merged, "--quick", "--quiet").out == ""


def test_every_missing_or_changed_file_is_named(merged, models, nufilt):
    flip(merged / "config.json")
    flip(merged / "state" / "window-0000" / "window.json")
    (merged / "forecast.json").unlink()
    flip(models / "base" / "model.safetensors")
    shutil.rmtree(models / "beta")
    for options in ((), ("--quick",)):
        result = nufilt("verify", merged, *options)
        lines = [line for line in result.lines if line.startswith("nufilt: ")]
        assert result.code == 1 and len(lines) == len(result.lines) == 5
        for path, what in [
            (merged / "config.json", "had SHA-256 "),
            (merged / "state/window-0000/window.json", "had SHA-256 "),
            (merged / "forecast.json", "is missing"),
            (models / "base", f"has changed since the merge in {merged} began: model.safetensors had SHA-256 "),
            (models / "beta", "there is no such folder"),
        ]:
            assert any(line.startswith(f"nufilt: {path}: {what}") for line in lines), (path, lines)
        assert result.out.splitlines()[-1] == "not verified"
    told = nufilt("verify", merged, "--quick", "--json").json
    assert told["inputs"] == {"base": False, "alpha": True, "beta": False} and not told["holds"]
    assert len(told["problems"]) == 5


def test_a_model_card_is_its_users_to_edit(merged, nufilt):
    (merged / "README.md").write_text("# What this model is for\n")
    told = nufilt("verify", merged, "--quick", "--json")
    assert (told.code, told.err) == (0, "") and told.json["holds"]
    (note,) = told.json["notes"]
    assert note.startswith("README.md had SHA-256 ") and note.endswith(": a model card is its user's to edit")
    assert nufilt("verify", merged, "--quick").out.splitlines()[-2:] == [f"note    {note}", "verified"]
    assert nufilt("export", merged, "--what", "delta", "--out", merged.with_name("delta")).code == 0


def test_a_merge_that_another_run_writes_is_not_read(merged, models, tmp_path, nufilt, refused):
    gamma = f"gamma={models / 'gamma'}"
    with OutputPlace(merged).locked():
        for argv in (("verify", "--quick"), ("export", "--what", "delta", "--out", tmp_path / "delta")):
            assert refused(argv[0], merged, *argv[1:]) == [
                f"nufilt: {merged}: another run is writing here (wait for it)"
            ]
    with OutputPlace(merged).read_locked():
        assert nufilt("verify", merged, "--quick").code == 0
        (line,) = refused("add", merged, "--task", gamma)
        assert line.startswith(f"nufilt: {merged}: another run is reading here (wait for it")
    assert not merged.with_name("out.lock").exists()
    assert nufilt("add", merged, "--task", gamma, "--quiet").code == 0


def rehashed(out, **changes):
    """Writes the hashes of an output anew, as somebody would who wants to hide what was changed."""
    recipe = recipe_of(out) | changes
    recipe["files"] = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in recipe["files"]}
    (out / "nufilt.json").write_text(json.dumps(recipe))


def change_model(out, factor):
    path = out / "model.safetensors"
    tensors = build.weights(out)
    build.save_file(tensors | {build.Q0: tensors[build.Q0] * np.float32(factor)}, path, {"format": "pt"})


def test_what_another_recipe_would_give_is_found(merged, nufilt):
    change_model(merged, 1 + 1e-6)
    rehashed(merged)
    result = nufilt("verify", merged)
    (line,) = result.lines
    assert result.code == 1
    assert line.startswith(
        f"nufilt: {merged / 'model.safetensors'}: {build.Q0}: is not what the recipe gives: it differs"
    )
    assert "where 0 is allowed" in line
    assert nufilt("verify", merged, "--quick").code == 0


def test_numbers_that_json_has_not(merged, nufilt):
    """A copied tensor has no update to measure by, and a difference from a NaN is none."""
    tensors = build.weights(merged)
    copied = build.FC2
    for changed in ({copied: tensors[copied] + np.float32(1)}, {build.Q0: tensors[build.Q0] * np.float32(np.nan)}):
        build.save_file(tensors | changed, merged / "model.safetensors", {"format": "pt"})
        rehashed(merged)
        result = nufilt("verify", merged, "--json")
        (line,) = result.lines
        assert result.code == 1 and line.endswith(
            f"{next(iter(changed))}: is not what the recipe gives (merge again, or restore the output)"
        )
        again = result.json["recomputed"]
        assert (again["worst"], again["worst_tensor"]) == (None, next(iter(changed)))


def test_a_folder_without_its_state(merged, nufilt):
    """As `push` leaves it on the Hub: the model holds, and so does all that is there."""
    n_files = sum(not name.startswith("state/") for name in recipe_of(merged)["files"])
    state, arrays = merged / "state", merged / "state" / "window-0000" / "arrays.safetensors"
    arrays.rename(merged.with_name("arrays"))
    (line,) = nufilt("verify", merged, "--quick").lines
    assert line.startswith(f"nufilt: {arrays}: is missing")
    shutil.rmtree(state)
    for options in ((), ("--quick",)):
        told = nufilt("verify", merged, "--json", *options)
        assert (told.code, told.err, told.json["holds"], told.json["files"]) == (0, "", True, n_files)
        (note,) = told.json["notes"]
        assert note.startswith("state/ is not there")
    assert nufilt("verify", merged, "--quick").out.splitlines()[-2:] == [f"note    {note}", "verified"]
    change_model(merged, 1.01)
    rehashed(merged, files={name: "" for name in recipe_of(merged)["files"] if not name.startswith("state/")})
    assert nufilt("verify", merged, "--quick").code == 0
    (line,) = nufilt("verify", merged).lines
    assert f"{build.Q0}: is not what the recipe gives" in line


def test_interrupted_it_has_nothing_to_go_on_from(merged, nufilt, monkeypatch):
    def struck(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nufilt_jax.commands.verify.verify_hashes", struck)
    result = nufilt("verify", merged)
    assert (result.code, result.lines) == (130, ["nufilt: interrupted; the same command again begins anew"])


def test_other_versions_may_change_bits_and_little_more(merged, nufilt):
    versions = recipe_of(merged)["versions"] | {"jax": "0.1"}
    change_model(merged, 1 + 1e-7)
    rehashed(merged, versions=versions)
    told = nufilt("verify", merged, "--json")
    assert told.code == 0, told.err
    assert [row["what"] for row in told.json["differences"]] == ["jax"] and not told.json["bit_for_bit"]
    assert told.json["recomputed"]["worst_tensor"] == build.Q0
    assert "jax (then 0.1, now" in nufilt("verify", merged).out
    change_model(merged, 1.01)
    rehashed(merged, versions=versions)
    result = nufilt("verify", merged)
    assert result.code == 1 and "where 4e-05 is allowed" in result.err


@pytest.fixture(scope="module")
def with_losses(shared_models, tmp_path_factory, command):
    """A merge of two models by the method, whose steps have losses; tests change copies of it."""
    from nufilt_jax.cli import main

    out = tmp_path_factory.mktemp("losses") / "out"
    assert main(command(shared_models, out, "--quiet", n=2)) == 0
    return out


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda losses: [losses[0] * 1.0001, *losses[1:]], "loss 1 of beta is not what the recipe gives: it is 1."),
        (lambda losses: [losses[0] * 1.01, *losses[1:]], "loss 1 of beta is not what the recipe gives: it is 1."),
        (lambda losses: [], "loss 1 of beta is not what the recipe gives: it is None, and should be "),
        (lambda losses: [*losses[:-1], None], " of beta is not what the recipe gives: it is None, and should be "),
        (lambda losses: [*losses, 1.0], " of beta is not what the recipe gives: it is 1.0, and should be None"),
    ],
    ids=["changed a little", "changed", "left out", "not finite", "one more"],
)
def test_losses_are_those_of_merging_again(with_losses, nufilt, request, edit, said):
    recipe = recipe_of(with_losses)
    text = (with_losses / "nufilt.json").read_text()
    recipe["steps"][1]["losses"] = edit(recipe["steps"][1]["losses"])
    try:
        for versions in (recipe["versions"], recipe["versions"] | {"jax": "0.1"}):
            (with_losses / "nufilt.json").write_text(json.dumps(recipe | {"versions": versions}))
            result = nufilt("verify", with_losses)
            is_found = versions == recipe["versions"] or "a little" not in request.node.name
            assert (result.code, len(result.lines)) == ((1, 1) if is_found else (0, 0)), result.err
            assert not is_found or (said in result.err and f"nufilt: {with_losses / 'nufilt.json'}: " in result.err)
    finally:
        (with_losses / "nufilt.json").write_text(text)


def test_losses_of_windows_add_up_in_another_order(shared_models, tmp_path, nufilt, command, in_windows, monkeypatch):
    in_windows(5000)
    assert nufilt(*command(shared_models, tmp_path / "out", n=2)).code == 0
    monkeypatch.undo()
    result = nufilt("verify", tmp_path / "out", "--json")
    assert (result.code, result.json["holds"]) == (0, True), result.err


@pytest.mark.parametrize("kept", [0, 1])
def test_steps_that_are_missing_of_a_finished_merge_are_damage(merged, models, nufilt, tmp_path, kept):
    recipe = recipe_of(merged)
    (merged / "nufilt.json").write_text(json.dumps(recipe | {"steps": recipe["steps"][:kept]}))
    before = build.snapshot(tmp_path)
    for argv in (
        ("verify", merged),
        ("verify", merged, "--quick"),
        ("analyze", merged),
        ("push", merged, "me/model", "--dry-run"),
        ("evaluate", merged),
        ("export", merged, "--what", "delta", "--out", tmp_path / "delta"),
        ("add", merged, "--task", f"gamma={models / 'gamma'}"),
    ):
        result = nufilt(*argv)
        assert (result.code, len(result.lines)) == (1, 1), (argv, result.err)
        assert f"{merged}: the recipe nufilt.json is damaged or of another version: its steps are not" in result.err
    assert build.snapshot(tmp_path) == before


def test_no_damaged_document_costs_the_model(merged, nufilt, tmp_path):
    forecast, recipe = merged / "forecast.json", merged / "nufilt.json"
    export = ("export", merged, "--what", "forecast", "--out", tmp_path / "rows")
    forecast.write_text("{")
    assert nufilt(*export).lines[0].endswith(" (merge again)")
    forecast.unlink()
    assert nufilt(*export).lines == [f"nufilt: {forecast}: cannot be read: No such file or directory (merge again)"]
    recipe.write_text("{")
    (line,) = nufilt("verify", merged).lines
    assert line.endswith("(restore it, or merge again into another folder)")


def test_a_state_of_another_merge_is_found(merged, models, tmp_path, nufilt, command):
    other = tmp_path / "other"
    assert nufilt(*command(models, other, *SUM, tasks=("alpha", "gamma"))).code == 0
    shutil.rmtree(merged / "state")
    shutil.copytree(other / "state", merged / "state")
    rehashed(merged)
    result = nufilt("verify", merged)
    assert result.code == 1 and f"nufilt: {merged}: state: " in result.err and len(result.lines) == 1


def test_a_state_of_other_layers_is_found(merged, models, tmp_path, nufilt, command):
    other = tmp_path / "other"
    assert nufilt(*command(models, other, *SUM, "--layers", "q_proj", n=2)).code == 0
    shutil.rmtree(merged / "state")
    shutil.copytree(other / "state", merged / "state")
    rehashed(merged)
    result = nufilt("verify", merged)
    assert result.code == 1 and f"{merged / 'state'}: holds other layers than the recipe selects" in result.err
    # Of the layers of a state the model must know all.
    document = json.loads((merged / "state" / "window-0000" / "window.json").read_text())
    assert set(document["layers"]) < set(build.SELECTED)


@pytest.mark.parametrize("what", ["nothing", "no recipe", "no hashes", "damaged"])
def test_what_cannot_be_verified(merged, nufilt, tmp_path, what):
    if what == "no recipe":
        (merged / "nufilt.json").unlink()
    elif what == "no hashes":
        recipe = recipe_of(merged)
        del recipe["files"]
        (merged / "nufilt.json").write_text(json.dumps(recipe))
    elif what == "damaged":
        (merged / "nufilt.json").write_text("{")
    result = nufilt("verify", tmp_path / "none" if what == "nothing" else merged, "--quick", "--quiet")
    (line,) = result.lines
    told = {"no hashes": "its recipe holds no hashes of its files", "damaged": "is not JSON"}
    assert result.code == 1 and told.get(what, "holds no finished merge") in line


def test_bits_are_those_of_the_merge_whatever_the_cores(shared_models, tmp_path, nufilt, command, monkeypatch):
    from nufilt_jax.linalg import dispatch

    out, here = tmp_path / "out", dispatch.layers_at_once()
    with dispatch.at_once(here + 1):
        assert nufilt(*command(shared_models, out, n=2)).code == 0
    recipe = recipe_of(out)
    assert recipe["host"]["layers_at_once"] == here + 1
    assert nufilt("verify", out).code == 0
    # Of a merge begun anew on other cores the tolerance holds.
    host, versions = recipe["host"] | {"layers_at_once": here}, recipe["versions"] | {"jax": "0.1"}
    (out / "nufilt.json").write_text(json.dumps(recipe | {"host": host, "versions": versions}))
    told = nufilt("verify", out, "--json")
    assert told.code == 0 and told.json["recomputed"]["worst"] < 2 * TOLERANCE, told.err


@pytest.mark.parametrize("other", ["processor", "version", "device"])
def test_a_merge_of_two_hosts_is_called_one(shared_models, tmp_path, nufilt, command, monkeypatch, other):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out, *SUM, n=1)).code == 0
    recipe = recipe_of(out)
    then = {
        "processor": {"host": recipe["host"] | {"processor": "another"}},
        "version": {"versions": recipe["versions"] | {"jax": "0.1"}},
        "device": {"device": "gpu: another"},
    }
    (out / "nufilt.json").write_text(json.dumps(recipe | then[other]))
    assert nufilt("add", out, "--task", f"gamma={shared_models / 'gamma'}").code == 0
    assert recipe_of(out)["host"]["is_mixed"]
    told = nufilt("verify", out, "--json")
    assert told.code == 0 and [row["what"] for row in told.json["differences"]] == ["hosts"]


def test_a_merge_goes_on_with_as_many_layers_at_a_time(shared_models, tmp_path, nufilt, command, monkeypatch):
    """On the same kind of processor, so that the bits are those of one run; on another they cannot be."""
    from nufilt_jax.engine import records
    from nufilt_jax.linalg import dispatch

    out, here = tmp_path / "out", dispatch.layers_at_once()
    added = ("add", out, "--task", f"gamma={shared_models / 'gamma'}")
    with dispatch.at_once(here + 1):
        assert nufilt(*command(shared_models, out, n=2)).code == 0
    assert nufilt(*added).code == 0
    assert recipe_of(out)["host"] == records.this_host().to_json() | {"layers_at_once": here + 1}
    assert nufilt("verify", out).code == 0
    monkeypatch.setattr(records, "_processor", lambda: "another")
    assert nufilt("add", out, "--task", f"delta={shared_models / 'delta'}").code == 0
    assert recipe_of(out)["host"]["layers_at_once"] == here and recipe_of(out)["host"]["is_mixed"]
