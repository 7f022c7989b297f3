"""A merge in windows: the same bits as in one, however it is walked, stopped and gone on with."""

import functools
import json
import signal

import jax
import model_builders as build
import numpy as np
import pytest

from nufilt_jax.engine import walk
from nufilt_jax.engine.walk import Walk
from nufilt_jax.linalg import dispatch

SMALL = 5000  # bytes of a window: the towers' stacks of 16 x 16 and 24 x 16 make 3 of 2 to 5 layers


def recipe(folder):
    return json.loads((folder / "nufilt.json").read_text())


def forecast(folder):
    return json.loads((folder / "forecast.json").read_text())


METHODS = [
    (),
    ("--other-params", "average"),
    ("--method", "null_space"),
    ("--method", "weight_average"),
    ("--method", "magmax", "--method-args", "variant=text"),
    ("--method", "tsv_m"),
    ("--method", "ties"),
    ("--method", "opcm", "--layers", "q_proj|fc1", "--other-params", "average"),
]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: " ".join(options) or "nufilt")
@pytest.mark.parametrize("most", [0, SMALL])
def test_windows_give_the_same_bits(shared_models, tmp_path, nufilt, command, in_windows, options, most):
    assert nufilt(*command(shared_models, tmp_path / "whole", *options)).code == 0
    in_windows(most)
    result = nufilt(*command(shared_models, tmp_path / "out", *options, "--json"))
    assert result.code == 0, result.err
    assert len(result.json["windows"]) > 1
    assert {row["tasks"] for row in result.json["windows"]} == {3}
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    assert forecast(tmp_path / "out") == forecast(tmp_path / "whole")
    for mine, whole in zip(result.json["steps"], recipe(tmp_path / "whole")["steps"], strict=True):
        np.testing.assert_allclose(mine["losses"], whole["losses"], rtol=1e-6)
        assert mine["outside"] == whole["outside"]


def test_large_layers_are_solved_one_by_one(shared_models, tmp_path, nufilt, command, in_windows, monkeypatch):
    """In every window as in the whole model; `layers_by_products` says which are large."""
    monkeypatch.setattr(dispatch, "MOST_NUMBERS", 24 * 16)
    jax.clear_caches()
    assert nufilt(*command(shared_models, tmp_path / "whole")).code == 0
    in_windows(0)
    result = nufilt(*command(shared_models, tmp_path / "out", "--json"))
    jax.clear_caches()
    assert result.code == 0, result.err
    assert max(row["layers"] for row in result.json["windows"]) == 2
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")


SURVEYED = [("--method", "ties", "--method-args", "variant=text"), ("--method", "opcm")]


@pytest.mark.parametrize("options", [(), *SURVEYED], ids=" ".join)
def test_one_window_or_several_can_be_added_to(shared_models, tmp_path, nufilt, command, in_windows, options):
    assert nufilt(*command(shared_models, tmp_path / "whole", *options, n=4)).code == 0
    cuts = [("a", SMALL, 1 << 30), ("b", 1 << 30, 0), ("c", SMALL, 0), ("d", 0, SMALL)]
    for name, before, after in cuts[:2] if options else cuts:
        out = tmp_path / name
        in_windows(before)
        assert nufilt(*command(shared_models, out, *options)).code == 0
        in_windows(after)
        result = nufilt("add", out, "--task", f"delta={shared_models / 'delta'}", "--json")
        assert (result.code, [step["resumed"] for step in result.json["steps"]]) == (0, [True] * 3 + [False])
        assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "whole"), name
        assert forecast(out) == forecast(tmp_path / "whole")
        assert {path.name for path in (out / "state").iterdir()} == {
            f"window-{number:04}" for number in range(len(result.json["windows"]))
        }


@pytest.mark.parametrize("cell", range(1, 12))
def test_a_run_stopped_at_any_cell_goes_on_where_it_was(
    shared_models, tmp_path, nufilt, command, in_windows, monkeypatch, cell
):
    assert nufilt(*command(shared_models, tmp_path / "whole", n=4)).code == 0
    in_windows(SMALL)
    merge, merged = Walk._merge, []

    def stopped(self, *args):
        if len(merged) == cell:
            raise KeyboardInterrupt
        merged.append(args[0])
        return merge(self, *args)

    monkeypatch.setattr(Walk, "_merge", stopped)
    assert nufilt(*command(shared_models, tmp_path / "out", n=4)).code == 130
    kept = recipe(tmp_path / "out.partial")["windows"]
    assert sum(row["tasks"] for row in kept) == cell
    before, again = len(merged), []
    monkeypatch.setattr(
        Walk, "_merge", lambda self, *args: merge(self, *args) if again.append(args[0]) is None else None
    )
    result = nufilt(*command(shared_models, tmp_path / "out", "--json", n=4))
    assert result.code == 0, result.err
    assert before + len(again) == len(kept) * 4
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    assert forecast(tmp_path / "out") == forecast(tmp_path / "whole")


@pytest.mark.parametrize("options", [(), *SURVEYED], ids=" ".join)
def test_a_stopped_run_in_other_windows(shared_models, tmp_path, nufilt, command, in_windows, monkeypatch, options):
    assert nufilt(*command(shared_models, tmp_path / "whole", *options, n=4)).code == 0
    merge, left = Walk._merge, []

    def stopped(self, *args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return merge(self, *args)

    monkeypatch.setattr(Walk, "_merge", stopped)
    for most, n_cells in ((SMALL, 3), (0, 2), (1 << 30, 1), (SMALL, 1)):
        in_windows(most)
        left[:] = range(n_cells)
        assert nufilt(*command(shared_models, tmp_path / "out", *options, n=4)).code == 130
    monkeypatch.undo()
    assert nufilt(*command(shared_models, tmp_path / "out", *options, n=4)).code == 0
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    assert forecast(tmp_path / "out") == forecast(tmp_path / "whole")


@pytest.mark.parametrize("options", [("--method", "ties"), *SURVEYED], ids=" ".join)
def test_a_run_stopped_in_the_middle_of_a_surveyed_column(
    shared_models, tmp_path, nufilt, command, in_windows, monkeypatch, options
):
    """What the survey looked at is gone in the first window; in a survey nothing is, and it is done again."""
    out, merge, look = tmp_path / "out", Walk._merge, Walk._look
    assert nufilt(*command(shared_models, tmp_path / "whole", *options)).code == 0
    in_windows(SMALL)

    def stopped(self, cell, *args, then):
        if cell.task == 2 and cell.window is self.rows[1].window:
            raise KeyboardInterrupt
        return then(self, cell, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_look", functools.partialmethod(stopped, then=look))
        assert nufilt(*command(shared_models, out, *options)).code == 130
        assert {row["tasks"] for row in recipe(tmp_path / "out.partial")["windows"]} == {2}
        patch.setattr(Walk, "_look", look)
        patch.setattr(Walk, "_merge", functools.partialmethod(stopped, then=merge))
        assert nufilt(*command(shared_models, out, *options)).code == 130
        assert [row["tasks"] for row in recipe(tmp_path / "out.partial")["windows"]][:2] == [3, 2]
        patch.setattr(Walk, "_merge", merge)
        patch.setattr(Walk, "_look", None)
        assert nufilt(*command(shared_models, out, *options)).code == 0
    assert build.weight_bytes(out) == build.weight_bytes(tmp_path / "whole")


COPIES = [("ties", "variant=text"), ("ties", "merge_first=false"), ("opcm", "alpha=0.4")]


@pytest.mark.parametrize(("method", "argument"), COPIES)
def test_windows_count_an_embedding_as_often(tmp_path, nufilt, command, in_windows, method, argument):
    rng = np.random.default_rng(0)
    block = "encoder.block.{}.layer.0.SelfAttention.{}.weight"
    shapes = {"shared.weight": (20, 8), "lm_head.weight": (20, 8), "encoder.final_layer_norm.weight": (8,)}
    shapes |= {block.format(i, part): (8, 8) for i in range(3) for part in "qkvo"}
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for seed, name in enumerate(("base", *build.TASKS[:3])):
        build.write(tmp_path / name, build.fine_tuned(base, seed) if seed else base, model_type="t5")
    for out, most, copies in (("once", 1 << 30, 1), ("whole", 1 << 30, 3), ("out", 0, 3)):
        in_windows(most)
        options = ("--method", method, "--method-args", argument, f"embedding_copies={copies}")
        result = nufilt(*command(tmp_path, tmp_path / out, *options, "--json"))
        assert result.code == 0, result.err
    assert len(result.json["windows"]) > 3
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "whole")
    assert build.weight_bytes(tmp_path / "out") != build.weight_bytes(tmp_path / "once")


def test_ctrl_c_waits_for_the_cell(shared_models, tmp_path, nufilt, command, monkeypatch):
    """D is being written over by the program: what is kept is what it makes of it."""
    update, calls = walk.update, []

    def struck(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(walk, "update", struck)
    assert nufilt(*command(shared_models, tmp_path / "out")).code == 130
    monkeypatch.undo()
    result = nufilt(*command(shared_models, tmp_path / "out", "--json"))
    assert [step["resumed"] for step in result.json["steps"]] == [True, True, False]
