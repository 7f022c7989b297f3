"""Merges of weights in memory: what is refused before them, and what their user is told."""

import model_builders as build
import pytest

import nufilt_jax as nj
from nufilt_jax.engine import loaded
from nufilt_jax.errors import ConfigError, NufiltError, OutputError


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
