"""Merges of weights in memory: what is refused before them, and what their user is told."""

import re
import warnings

import jax.numpy as jnp
import ml_dtypes
import model_builders as build
import numpy as np
import pytest

import nufilt_jax as nj
from nufilt_jax.engine import loaded
from nufilt_jax.errors import CheckpointError, ConfigError, NufiltError, OutputError


@pytest.fixture
def unmerged(monkeypatch):
    """Nothing may be merged."""
    monkeypatch.setattr(loaded, "merged_one_by_one", lambda *_: pytest.fail("was merged in vain"))


@pytest.mark.usefixtures("unmerged")
def test_a_place_that_cannot_be_written_is_refused_before_weights_in_memory_are_merged(tmp_path):
    """And is left as it was; as it is with models of the disk."""
    base = tmp_path / "base"
    build.write(base, {"model.layers.0.mlp.up_proj.weight": build.tower(0)[build.Q0]}, model_type="llama")
    task = nj.load(base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for out, settings, kind, message in (
        ("full", {}, OutputError, "full: exists and is not an empty folder"),
        ("full/file", {}, OutputError, "file: exists and is not an empty folder"),
        ("full/file/new/out", {}, OutputError, "full/file/new/out: cannot be written: "),
        ("new/" + 250 * "x", {}, OutputError, "xxx: cannot be written: "),
        ("base/out", {}, ConfigError, "out lies inside the base's folder, whose files are copied"),
        ("new/out", {"format": "flax"}, ConfigError, "is a 'llama' model, which has no Flax form"),
    ):
        with pytest.raises(kind, match=message):
            nj.merge(base, [task], tmp_path / out, method="sum", **settings)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(NufiltError) as caught:
        nj.merge(base, [{}], tmp_path / "full", method="sum")
    assert [text in str(caught.value) for text in ("is missing", "is not an empty folder")] == [True, True]


def test_settings_and_examples_without_effect_are_told_wherever_the_models_are(shared_models, tmp_path):
    """Of settings by name those that were given, of a config those that are not by default; as the command tells."""
    base, task = shared_models / "base", shared_models / "alpha"
    ranks = {"filter_rank": 4, "adapter_rank": 2, "task_rank": 2}
    own = nj.NufiltConfig(solver="closed_form", steps=9, filter_rank=4, task_rank=2)
    idle = "ridge: has no effect: the solver is adam"
    for models, out, settings, expected in (
        ((base, task), None, {"ridge": 0.5}, [idle]),
        ((nj.load(base), nj.load(task)), None, {"ridge": 1.0}, [idle]),
        ((base, nj.load(task)), tmp_path / "saved", {"ridge": 0.5}, [idle]),
        ((base, task), tmp_path / "out", {"data": tmp_path}, ["data: no effect: nufilt learns from no examples"]),
        ((base, task), None, {"config": own}, ["steps: has no effect: the solver is closed_form"]),
        ((base, task), None, {"config": nj.NufiltConfig(**ranks)}, []),
    ):
        how = settings if "config" in settings else ranks | settings
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            nj.merge(models[0], [models[1]], out, **how)
        assert [str(found.message) for found in told if "no effect" in str(found.message)] == expected


def test_weights_in_memory_are_rounded_once_as_they_are_written(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    matrices = [build.tower(seed)[build.Q0] for seed in range(4)]
    base, *tasks = [(matrix / 64 + number / 7).astype(ml_dtypes.bfloat16) for number, matrix in enumerate(matrices)]
    for folder, weight in (("base", base), *zip("abc", tasks, strict=True)):
        build.write(tmp_path / folder, {name: weight}, model_type="llama")
    places, held = [tmp_path / folder for folder in "abc"], [{name: weight} for weight in tasks]
    for dtype, wanted in (("float32", np.float32), (None, ml_dtypes.bfloat16)):
        how = {"method": "weight_average", "dtype": dtype}
        merged = nj.merge(tmp_path / "base", held, tmp_path / f"held-{dtype}", **how)
        command = nj.merge(tmp_path / "base", places, tmp_path / f"placed-{dtype}", **how)
        assert merged[name].dtype == wanted
        np.testing.assert_array_equal(merged[name], command[name])
        np.testing.assert_array_equal(merged[name], nj.load(tmp_path / f"held-{dtype}")[name])
    assert (nj.load(tmp_path / "held-float32")[name] != merged[name].astype(np.float32)).any()


def test_what_the_type_cannot_hold_is_refused_wherever_the_models_are(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    base, task = ({name: np.full((4, 4), number, np.float16)} for number in (6e4, 6.3e4))
    for folder, params in (("base", base), ("task", task)):
        build.write(tmp_path / folder, params, model_type="llama")
    said = f"{name}: has numbers out of the range of float16"
    for models, out, fix in (
        ((base, task), None, "give a base of a wider type"),
        (({name: jnp.asarray(base[name])}, {name: jnp.asarray(task[name])}), None, "give a base of a wider type"),
        ((tmp_path / "base", tmp_path / "task"), None, "give a base of a wider type"),
        ((tmp_path / "base", task), tmp_path / "out", "write a wider dtype"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"{said} ({fix})")):
            nj.merge(models[0], [models[1]] * 3, out, method="sum")
    assert not (tmp_path / "out").exists()
    nj.merge(tmp_path / "base", [task] * 3, tmp_path / "out", method="sum", dtype="float32")
    assert nj.load(tmp_path / "out")[name][0, 0] == 69024  # 63000 in float16 is 63008


def test_a_filter_as_wide_as_its_layers_is_told_of_weights_in_memory_too():
    base = {"model.layers.0.mlp.up_proj.weight": build.tower(0)[build.Q0]}
    told = "filter_rank: 24 directions are all that layers with 16 inputs have, and the filter will remove every direc"
    with pytest.warns(UserWarning, match=f"^{told}tion"):
        nj.merge(base, [base], filter_rank=24, adapter_rank=2, task_rank=2)
