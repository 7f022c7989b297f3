"""`nufilt merge` of LoRA adapters, alone and mixed with whole models."""

import json

import adapter_builders as adapters
import model_builders as build
import numpy as np
import pytest
from safetensors.numpy import load_file

from nufilt_jax.checkpoints import open_checkpoint, open_task

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
    assert_alike(updates(tmp_path / "ours", stream), updates(tmp_path / "theirs", stream), 1e-5)


@pytest.mark.parametrize("method", ["nufilt", "weight_average"])
def test_a_stream_of_adapters_is_that_of_whole_models(nufilt, stream, tmp_path, method):
    """All of it in factors; and so is what is kept of it."""
    ranks = RANKS if method == "nufilt" else ()
    merge(nufilt, stream, tmp_path / "ours", ["one", "two"], "--method", method, *ranks)
    merge(nufilt, stream, tmp_path / "theirs", ["one-whole", "two-whole"], "--method", method, *ranks)
    assert_alike(updates(tmp_path / "ours", stream), updates(tmp_path / "theirs", stream), 1e-5)
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
    assert_alike(updates(tmp_path / "parts", stream), updates(tmp_path / "whole", stream), 1e-5)


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


def adapter_updates(out, stream):
    """θ^m − θ0 as the adapter holds it."""
    base = open_checkpoint(str(stream / "base"), role="base")
    found = open_task(str(out), base).unread(build.SELECTED)
    return {name: np.matmul(*found.change(name)).astype(np.float64) for name in build.SELECTED}


@pytest.mark.parametrize("options", [(), ("--method", "nufilt", "--solver", "closed_form"), ("--method", "null_space")])
def test_an_adapter_comes_out(nufilt, stream, tmp_path, options):
    """It is the merged model's change, of the tasks' ranks together, in the names that their adapters use."""
    ranks = RANKS if not options else ("--filter-rank", "3")
    options = (*options, *ranks)
    merge(nufilt, stream, tmp_path / "model", ["one", "two"], *options)
    result = merge(nufilt, stream, tmp_path / "adapter", ["one", "two"], *options, "--output", "adapter")
    theirs = updates(tmp_path / "model", stream)
    assert_alike(adapter_updates(tmp_path / "adapter", stream), {name: theirs[name] for name in build.SELECTED}, 1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (5, 5, "FEATURE_EXTRACTION")
    assert config["target_modules"] == sorted(adapters.MODULES)
    assert result.json["adapter"]["energy_lost"] == 0


@pytest.mark.parametrize(
    "prefix", ["module.base_model.model.", "base_model.model._orig_mod.", "_orig_mod.module.base_model.model."]
)
def test_an_adapter_comes_out_without_what_wrapped_the_model(nufilt, stream, tmp_path, prefix):
    """peft looks for the modules of the class: `module.` and its like are not among them, nor are those within."""
    base, bias = build.tower(0), f"{adapters.MODULES[3]}.bias"
    pairs = adapters.factors(base, 1)
    within = {module.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): x for module, x in pairs.items()}
    for name, start, named in (("a", prefix, within), ("b", "base_model.model.", pairs)):
        adapters.write(tmp_path / name, named, prefix=start, extra={f"{start}{bias}": base[bias] + 1}, bias="all")
    how = ("--base", stream / "base", "--method", "weight_average", "--output", "adapter")
    told = [nufilt("merge", "--task", f"t={tmp_path / name}", *how, "--out", tmp_path / f"{name}-out") for name in "ab"]
    assert [result.code for result in told] == [0, 0], told[0].err
    assert f"{tmp_path / 'a'}: 21 names hold '_checkpoint_wrapped_module.', '" in told[0].err
    assert "of a wrapper" not in told[1].err
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a-out" / file).read_bytes() == (tmp_path / "b-out" / file).read_bytes()


def test_a_rank_that_was_filled_up_comes_out_as_it_went_in(nufilt, stream, tmp_path):
    """Of 5, which is worked on as 8."""
    adapters.write(tmp_path / "five", adapters.factors(build.tower(0), 3, 5))
    how = ("--base", stream / "base", "--output", "adapter", "--out", tmp_path / "out")
    assert nufilt("merge", "--task", f"five={tmp_path / 'five'}", *how).code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    recipe = json.loads((tmp_path / "out" / "nufilt.json").read_text())
    assert config["r"] == recipe["adapter"]["rank"] == 5 and config["rank_pattern"] == {}


def test_push_warns_of_a_base_that_only_this_machine_has(nufilt, stream, tmp_path):
    out = tmp_path / "out"
    tasks = ("--base", stream / "base", "--task", f"one={stream / 'one'}", "--method", "sum")
    assert nufilt("merge", *tasks, "--output", "adapter", "--out", out).code == 0
    pushed = nufilt("push", out, "me/adapter", "--dry-run")
    what = f"nufilt: warning: adapter_config.json: names its base by a folder of this machine, {stream / 'base'} ("
    assert (pushed.code, len(pushed.lines)) == (0, 1) and pushed.err.startswith(what)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    assert nufilt("push", out, "me/adapter", "--dry-run").err == ""


def test_a_lower_rank_loses_what_it_says(nufilt, stream, tmp_path):
    how = ("--method", "sum", "--output", "adapter", "--adapter-out-rank", 2)
    result = merge(nufilt, stream, tmp_path / "out", ["one", "two"], *how)
    merge(nufilt, stream, tmp_path / "model", ["one", "two"], "--method", "sum")
    ours, theirs = adapter_updates(tmp_path / "out", stream), updates(tmp_path / "model", stream)
    total = sum(np.sum(theirs[name] ** 2) for name in build.SELECTED)
    lost = sum(np.sum((theirs[name] - ours[name]) ** 2) for name in build.SELECTED)
    told = json.loads((tmp_path / "out" / "nufilt.json").read_text())["adapter"]
    assert told == result.json["adapter"] and told["rank"] == 2
    assert told["energy_lost"] == pytest.approx(lost / total, rel=1e-4) and lost / total > 0.01


def test_the_base_is_not_read_for_an_adapter(nufilt, stream, tmp_path):
    """Weights that are all NaN would be refused, had anybody looked; and the state is gone on with."""
    base = build.tower(0)
    adapters_of = {name: adapters.factors(base, seed) for seed, name in enumerate(("one", "two"), 1)}
    build.write(tmp_path / "base", {name: np.full_like(x, np.nan) for name, x in base.items()})
    for name, pairs in adapters_of.items():
        adapters.write(tmp_path / name, pairs)
    given = ("--base", tmp_path / "base", "--task", f"one={tmp_path / 'one'}", "--out", tmp_path / "out")
    result = nufilt("merge", *given, "--output", "adapter", *RANKS, "--json")
    assert result.code == 0, result.err
    assert build.weights(tmp_path / "out").keys() == build.weights(tmp_path / "one").keys()
    assert result.json["base"]["sha256"].keys() == {"model.safetensors#header"}
    added = nufilt("add", tmp_path / "out", "--task", f"two={tmp_path / 'two'}")
    assert added.code == 0, added.err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_biases_go_out_whole(nufilt, stream, tmp_path):
    """Of methods that touch every tensor."""
    base, name = build.tower(0), f"{adapters.MODULES[3]}.bias"
    extra = {f"base_model.model.{name}": base[name] + 1}
    adapters.write(tmp_path / "biased", adapters.factors(base, 1), extra=extra, bias="all")
    given = ("--base", stream / "base", "--task", f"a={tmp_path / 'biased'}", "--out", tmp_path / "out")
    assert nufilt("merge", *given, "--output", "adapter", "--method", "weight_average").code == 0
    opened = open_task(str(tmp_path / "out"), open_checkpoint(str(stream / "base"), role="base"))
    np.testing.assert_allclose(opened.read([name])[name], base[name] + 1, atol=1e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["bias"] == "all"


def test_layers_that_a_later_task_takes_out_of_factors_are_verified(nufilt, stream, tmp_path):
    """All tasks known from the start, D would never have been in factors: the last bits are others, and no fault."""
    out = tmp_path / "out"
    merge(nufilt, stream, out, ["one", "two"], "--method", "nufilt", *RANKS)
    assert nufilt("verify", out, "--json").json["bit_for_bit"]
    added = nufilt("add", out, "--task", f"three={stream / 'two'}")
    assert added.code == 0, added.err
    found = nufilt("verify", out, "--json")
    assert found.code == 0, found.err
    assert {"what": "commands", "then": "several", "now": "one"} in found.json["differences"]
    assert 0 < found.json["recomputed"]["worst"] < 2e-5


NO_ADAPTER = {
    "full": (("full",), ("--output", "adapter"), "--output: adapter: full: a whole model changes its matrices"),
    "method": (("one",), ("--output", "adapter", "--method", "ties"), "--output: adapter: ties is not linear"),
    "rank": (("one",), ("--adapter-out-rank", 2), "--adapter-out-rank: belongs to --output adapter"),
    "kind": (("one",), ("--output", "lora"), "--output: must be one of model, adapter"),
    "zero": (("one",), ("--output", "adapter", "--adapter-out-rank", 0), "--adapter-out-rank: must be at least 1"),
    "nothing": (
        ("one", "two"),
        ("--output", "adapter", "--layers", "fc2"),
        "--output: adapter: no task's adapter changes any of the selected layers, so that it would be empty",
    ),
    "flax": (("one",), ("--output", "adapter", "--format", "flax"), "--format: does not go with --output adapter"),
}


@pytest.mark.parametrize("case", NO_ADAPTER)
def test_what_no_adapter_can_hold(refused, stream, tmp_path, case):
    tasks, options, message = NO_ADAPTER[case]
    given = [part for task in tasks for part in ("--task", f"{task}={stream / task}")]
    lines = refused("merge", "--base", stream / "base", *given, "--out", tmp_path / "out", *options)
    assert any(message in line for line in lines), lines


def test_a_selection_that_is_refused_is_told_once(refused, stream, tmp_path):
    given = ("--base", stream / "base", "--task", f"one={stream / 'one'}", "--out", tmp_path / "out")
    (line,) = refused("merge", *given, "--output", "adapter", "--layers", "no_such_layer")
    assert "no_such_layer" in line and "would be empty" not in line


def test_an_adapter_is_verified_and_exported(nufilt, stream, tmp_path):
    """By the hashes that it has, of the base's header alone; D and τ come out whole."""
    merge(nufilt, stream, tmp_path / "out", ["one", "two"], "--method", "sum", "--output", "adapter")
    verified = nufilt("verify", tmp_path / "out")
    assert verified.code == 0, verified.err
    whole = nufilt("export", tmp_path / "out", "--what", "delta", "--out", tmp_path / "delta.safetensors")
    last = nufilt("export", tmp_path / "out", "--what", "tau", "--step", 2, "--out", tmp_path / "tau.safetensors")
    assert (whole.code, last.code) == (0, 0), whole.err + last.err
    ours = adapter_updates(tmp_path / "out", stream)
    assert_alike(load_file(tmp_path / "delta.safetensors"), ours, 1e-6)
    one = adapters.factors(build.tower(0), 1, 2)
    tau = load_file(tmp_path / "tau.safetensors")
    first = {name: 2 * np.matmul(*one[name.removesuffix(".weight")][::-1]) for name in ours}
    assert_alike({name: tau[name] + first[name] for name in ours}, ours, 1e-5)


def test_a_recipe_of_an_adapter_is_merged_again(nufilt, stream, tmp_path):
    """With what it says of its output, and the same bits."""
    how = ("--method", "sum", "--output", "adapter", "--adapter-out-rank", 2)
    merge(nufilt, stream, tmp_path / "out", ["one", "two"], *how)
    again = nufilt("merge", "--config", tmp_path / "out" / "nufilt.json", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert build.weight_bytes(tmp_path / "again") == build.weight_bytes(tmp_path / "out")
    whole = ("--config", tmp_path / "out" / "nufilt.json", "--output", "model", "--out", tmp_path / "whole")
    assert nufilt("merge", *whole).code == 0  # a model has no rank of an adapter
    merge(nufilt, stream, tmp_path / "model", ["one", "two"], "--method", "sum")
    assert build.weight_bytes(tmp_path / "whole") == build.weight_bytes(tmp_path / "model")


def test_a_finished_adapter_again(nufilt, stream, tmp_path):
    """The same command tells what the recipe does."""
    given = ("merge", "--base", stream / "base", "--task", f"one={stream / 'one'}", "--method", "sum")
    how = (*given, "--output", "adapter", "--out", tmp_path / "out")
    first = nufilt(*how, "--json").json
    again = nufilt(*how)
    assert again.code == 0 and "all is done" in again.out and "adapter of rank 2" in again.out, again.err
    told = nufilt(*how, "--json").json
    assert all(told[key] == first[key] for key in ("adapter", "selected", "left", "versions", "memory"))


@pytest.mark.parametrize("rank", [2, 7])
def test_an_added_adapter_may_have_other_modules(nufilt, stream, tmp_path, rank):
    """Its ranks are those of a merge of both, whether D is kept in factors or not."""
    base = build.tower(0)
    given = ("--task", f"one={adapters.write(tmp_path / 'one', adapters.factors(base, 1, rank, adapters.MODULES[:2]))}")
    added = ("--task", f"two={adapters.write(tmp_path / 'two', adapters.factors(base, 2, rank, adapters.MODULES[1:]))}")
    how = ("--base", stream / "base", "--method", "sum", "--output", "adapter", "--out", tmp_path / "out")
    assert nufilt("merge", *given, *how).code == 0
    assert nufilt("add", tmp_path / "out", *added).code == 0
    assert nufilt("merge", *given, *added, *how[:-1], tmp_path / "both").code == 0
    recipes = [json.loads((tmp_path / name / "nufilt.json").read_text()) for name in ("out", "both")]
    assert recipes[0]["adapter"] == recipes[1]["adapter"]
    verified = nufilt("verify", tmp_path / "out")
    assert verified.code == 0, verified.err


@pytest.mark.parametrize("outputs", [("adapter", "model"), ("model", "adapter")], ids=" then ".join)
def test_a_recipe_is_merged_again_with_another_output(nufilt, stream, tmp_path, outputs):
    merge(nufilt, stream, tmp_path / "out", ["one", "two"], "--method", "sum", "--output", outputs[0])
    recipe = ("--config", tmp_path / "out" / "nufilt.json")
    again = nufilt("merge", *recipe, "--output", outputs[1], "--out", tmp_path / "again")
    assert again.code == 0, again.err
    build.write(tmp_path / "other", build.tower(5))
    other = nufilt("merge", *recipe, "--output", outputs[1], "--base", tmp_path / "other", "--out", tmp_path / "none")
    assert other.code == 0, other.err  # another base was never promised


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_adapters_of_both_series_go_out_in_the_names_of_the_first(nufilt, tmp_path, order):
    """transformers 5 calls the modules of a ViT otherwise than 4 does; both are of the same weights."""
    names = {
        "vit.encoder.layer.0.attention.attention.query": "vit.layers.0.attention.q_proj",
        "vit.encoder.layer.1.output.dense": "vit.layers.1.mlp.fc2",
    }
    rng = np.random.default_rng(0)
    base = {f"{name}.weight": rng.standard_normal((build.WIDTH, build.WIDTH)).astype(np.float32) for name in names}
    build.write(tmp_path / "base", base, model_type="vit")
    # The first has one module alone, so that the name of the other is told by the second.
    pairs = {task: adapters.factors(base, i, modules=tuple(names)[: i + 1]) for i, task in enumerate(order)}
    adapters.write(tmp_path / "old", pairs["old"], target_modules=[*names])
    adapters.write(tmp_path / "new", {names[m]: x for m, x in pairs["new"].items()}, target_modules=[*names.values()])
    how = ("--method", "sum", "--layers", "query|dense", "--output", "adapter")
    merge(nufilt, tmp_path, tmp_path / "out", order, *how)
    modules = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(names if order[0] == "old" else names.values())
    read = open_task(str(tmp_path / "out"), open_checkpoint(str(tmp_path / "base"), role="base")).read()
    expected = adapters.merged(adapters.merged(base, pairs["old"]), pairs["new"])
    for name in base:
        np.testing.assert_allclose(read[name], expected[name], atol=1e-5)
