"""`nufilt merge` of LoRA adapters, alone and mixed with whole models."""

import json

import adapter_builders as adapters
import model_builders as build
import numpy as np
import pytest

RANKS = ("--filter-rank", "3", "--adapter-rank", "2", "--task-rank", "2", "--steps", "4")


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A base, two adapters of ranks 2 and 3, a whole model; and the adapters as whole models."""
    folder = tmp_path_factory.mktemp("adapters")
    base = build.tower(0)
    build.write(folder / "base", base)
    for seed, (name, rank) in enumerate({"one": 2, "two": 3}.items(), 1):
        pairs = adapters.factors(base, seed, rank)
        adapters.write(folder / name, pairs, base_model_name_or_path=str(folder / "base"))
        build.write(folder / f"{name}-whole", adapters.merged(base, pairs))
    build.write(folder / "full", build.fine_tuned(base, 9))
    return folder


def merge(nufilt, stream, out, tasks, *options):
    given = [part for task in tasks for part in ("--task", f"{task.removesuffix('-whole')}={stream / task}")]
    result = nufilt("merge", "--base", stream / "base", *given, "--out", out, *options, "--json")
    assert result.code == 0, result.err
    return result


def updates(out, stream):
    """θ^m − θ0 of every tensor."""
    merged, base = build.weights(out), build.weights(stream / "base")
    return {name: merged[name].astype(np.float64) - base[name] for name in base}


def assert_alike(ours, theirs, tolerance):
    """Within a share of the whole update: single tensors may hardly move."""
    size = np.sqrt(sum(np.sum(x**2) for x in theirs.values()))
    gap = np.sqrt(sum(np.sum((ours[name] - theirs[name]) ** 2) for name in theirs))
    assert size > 0.1 and gap <= tolerance * size, gap / size


@pytest.mark.parametrize("method", ["nufilt", "opcm", "ties"])
def test_a_mixed_stream_is_that_of_whole_models(nufilt, stream, tmp_path, method):
    ranks = RANKS if method == "nufilt" else ()
    merge(nufilt, stream, tmp_path / "ours", ["one", "full", "two"], "--method", method, *ranks)
    merge(nufilt, stream, tmp_path / "theirs", ["one-whole", "full", "two-whole"], "--method", method, *ranks)
    # The whole models are rounded to float32, of weights 30 times as large as what moved them.
    assert_alike(updates(tmp_path / "ours", stream), updates(tmp_path / "theirs", stream), 3e-5)


@pytest.mark.parametrize("method", ["nufilt", "weight_average"])
def test_a_stream_of_adapters_is_that_of_whole_models(nufilt, stream, tmp_path, method):
    """All of it in factors; and so is what is kept of it."""
    ranks = RANKS if method == "nufilt" else ()
    merge(nufilt, stream, tmp_path / "ours", ["one", "two"], "--method", method, *ranks)
    merge(nufilt, stream, tmp_path / "theirs", ["one-whole", "two-whole"], "--method", method, *ranks)
    assert_alike(updates(tmp_path / "ours", stream), updates(tmp_path / "theirs", stream), 3e-5)
    [window] = (tmp_path / "ours" / "state").iterdir()
    assert json.loads((window / "window.json").read_text())["ranks"][build.Q0] == 5


def test_what_is_kept_in_factors_is_gone_on_with(nufilt, stream, tmp_path, stop_before, in_windows):
    """Stopped and resumed, cut in windows, and added to."""
    merge(nufilt, stream, tmp_path / "whole", ["one", "two", "full"], *RANKS)
    in_windows(10_000)
    go_on = stop_before("two")
    given = [part for task in ("one", "two") for part in ("--task", f"{task}={stream / task}")]
    command = ("merge", "--base", stream / "base", *given, "--out", tmp_path / "parts", *RANKS)
    assert nufilt(*command).code == 130
    go_on()
    assert nufilt(*command).code == 0
    added = nufilt("add", tmp_path / "parts", "--task", f"full={stream / 'full'}")
    assert added.code == 0, added.err
    assert_alike(updates(tmp_path / "parts", stream), updates(tmp_path / "whole", stream), 2e-5)


def test_the_recipe_has_the_hashes_of_weights_and_config(nufilt, stream, tmp_path):
    result = merge(nufilt, stream, tmp_path / "out", ["one"], "--method", "sum")
    assert result.json["tasks"][0]["sha256"].keys() == {"adapter_model.safetensors", "adapter_config.json"}


def test_an_adapter_is_refused_with_all_that_is_wrong(refused, stream, tmp_path):
    pairs = adapters.factors(build.tower(0), 1)
    adapters.write(tmp_path / "bad", pairs, use_dora=True, lora_alpha=None)
    lines = refused("merge", "--base", stream / "base", "--task", f"bad={tmp_path / 'bad'}", "--out", tmp_path / "out")
    assert len(lines) == 2 and any("DoRA" in line for line in lines) and any("lora_alpha" in line for line in lines)


def test_numbers_that_are_not_finite_are_named_as_stored(refused, stream, tmp_path):
    pairs = adapters.factors(build.tower(0), 1)
    pairs[adapters.MODULES[0]][0][0, 0] = np.inf
    adapters.write(tmp_path / "bad", pairs)
    [line] = refused("merge", "--base", stream / "base", "--task", f"bad={tmp_path / 'bad'}", "--out", tmp_path / "out")
    assert f"base_model.model.{adapters.MODULES[0]}.lora_A.weight: has NaN or infinite numbers" in line


def test_another_base_is_warned_of(nufilt, stream, tmp_path):
    adapters.write(tmp_path / "a", adapters.factors(build.tower(0), 1), base_model_name_or_path="org/other")
    result = nufilt(
        "merge", "--base", stream / "base", "--task", f"a={tmp_path / 'a'}", "--out", tmp_path / "o", "--method", "sum"
    )
    assert result.code == 0
    assert "warning: " in result.err and "was trained on 'org/other'" in result.err
