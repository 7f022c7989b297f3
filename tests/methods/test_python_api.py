"""The public Python names that are more than one method: a merge as one call, starts, canonical names, own rules."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Literal

import adapter_builders as adapters
import jax
import jax.numpy as jnp
import model_builders as build
import numpy as np
import orbax.checkpoint as ocp
import pytest
from merging import BASE, SELECTED, TASKS, rule_for
from safetensors.numpy import load_file, save_file

import nufilt_jax as nj
from nufilt_jax.api import merge as in_api
from nufilt_jax.errors import CheckpointError, ConfigError, NufiltError, SolveError
from nufilt_jax.methods.merger import Merger


def test_a_merge_as_one_call_is_the_command(shared_models, tmp_path, nufilt, command):
    base, tasks = shared_models / "base", {name: shared_models / name for name in ("alpha", "beta")}
    how = {"method": "task_arithmetic", "scale": 0.25, "other_params": "average", "dtype": "bfloat16"}
    options = ("--method", "task_arithmetic", "--method-args", "scale=0.25")
    options += ("--other-params", "average", "--dtype", "bfloat16")
    assert nufilt(*command(shared_models, tmp_path / "command", *options, tasks=tasks)).code == 0
    merged = nj.merge(base, tasks, tmp_path / "out", max_memory="4GB", **how)
    assert build.weight_bytes(tmp_path / "out") == build.weight_bytes(tmp_path / "command")
    assert (tmp_path / "out" / "nufilt.json").is_file() and (tmp_path / "out" / "state").is_dir()
    del how["dtype"]
    in_memory = nj.merge(str(base), list(tasks.values()), **how)
    params = [nj.load(str(path)) for path in tasks.values()]
    loaded = nj.merge(
        nj.load(str(base)), params, config=nj.TaskArithmeticConfig(scale=0.25), **how_without(how, "scale")
    )
    for name, value in merged.items():
        assert np.array_equal(in_memory[name], loaded[name])
        assert np.array_equal(loaded[name].astype(value.dtype), value)
    saved = nj.merge(str(base), params, tmp_path / "saved", **how)
    assert np.array_equal(nj.load(str(tmp_path / "saved"))[build.Q0], saved[build.Q0])
    with pytest.warns(UserWarning, match="of its squared change is outside"):
        nj.merge(base, [tasks["alpha"]], tmp_path / "sum", method="sum", layers="fc2")


def test_places_in_the_home_folder(shared_models, tmp_path, monkeypatch):
    """Of what is written too, by all ways there are, and of examples."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(shared_models / "base", tmp_path / "base")
    task = nj.load("~/base")
    nj.merge("~/base", ["~/base"], "~/merged", method="sum")
    nj.merge("~/base", [task], "~/loaded", method="sum")
    nj.save(task, "~/saved", like="~/base")
    with pytest.raises(NufiltError, match=f"{tmp_path}/examples"):
        nj.merge("~/base", ["~/base"], "~/learnt", method="wemoe", data="~/examples")
    assert not list((tmp_path / "here").iterdir())
    assert all((tmp_path / name / "model.safetensors").is_file() for name in ("merged", "loaded", "saved"))


def test_places_are_texts_or_paths(shared_models, tmp_path):
    base = shared_models / "base"
    weights = nj.load(base)
    nj.save(weights, tmp_path / "saved", like=base)
    assert build.weight_bytes(tmp_path / "saved") == build.weight_bytes(base)
    assert nj.load(tmp_path / "saved").keys() == nj.load(str(base)).keys()


def test_adapters_from_python(tmp_path, monkeypatch):
    """In memory and into a folder, as an adapter too: the same model."""
    base = build.tower(0)
    build.write(tmp_path / "base", base)
    tasks = [adapters.write(tmp_path / name, adapters.factors(base, i)) for i, name in enumerate(("one", "two"))]
    in_memory = nj.merge(tmp_path / "base", tasks, method="sum")
    whole = nj.merge(tmp_path / "base", tasks, tmp_path / "whole", method="sum")
    put_on = nj.merge(tmp_path / "base", tasks, tmp_path / "adapter", method="sum", output="adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    for name in base:
        np.testing.assert_allclose(in_memory[name], whole[name], atol=1e-6)
        np.testing.assert_allclose(put_on[name], whole[name], atol=1e-6)
    with pytest.raises(ConfigError, match=r"^output: belongs to out"):
        nj.merge(tmp_path / "base", tasks, method="sum", output="adapter")
    with pytest.raises(ConfigError, match=r"devices: needs folders or Hub ids \(give no weights"):
        nj.merge(tmp_path / "base", [base], tmp_path / "else", method="sum", devices=2)
    with pytest.raises(ConfigError, match=r'^devices must be a whole number or "all", got \'many\'$'):
        nj.merge(tmp_path / "base", tasks, tmp_path / "else", method="sum", devices="many")
    with pytest.raises(NufiltError, match="devices: 99 are asked for"):
        nj.merge(tmp_path / "base", tasks, tmp_path / "else", method="sum", devices=99)


def how_without(how, name):
    return {key: value for key, value in how.items() if key != name}


def test_errors_speak_python(tmp_path, shared_models):
    for settings, message in (
        ({"filter_rank": -1}, r"^filter_rank must be at least 0, got -1$"),
        ({"scale": 1.0}, r"^scale: nufilt has no such setting \(its settings: adapter_rank, "),
        ({"method": "tie"}, r"^method: 'tie' is not known "),
        ({"layers": "nothing"}, r"^layers: no matrix matches 'nothing'"),
        ({"out": tmp_path / "o"}, r"^out: needs a base that is a folder or Hub id"),
        ({"dtype": "float16"}, r"^dtype: belongs to out"),
        ({"config": nj.NufiltConfig(), "steps": 3}, r"^steps: does not go with config"),
    ):
        with pytest.raises(ConfigError, match=message):
            nj.merge(BASE, TASKS, **settings)
    with pytest.raises(ConfigError, match="tasks: is empty"):
        nj.merge(BASE, [])
    with pytest.raises(CheckpointError, match=r"task 'b': vision_model.* \(10 tensors\): is missing"):
        nj.merge(BASE, {"a": TASKS[0], "b": {}}, method="sum")
    with pytest.raises(NufiltError, match="max_memory must be a size as 8GB"):
        nj.merge(
            shared_models / "base", [shared_models / "alpha"], tmp_path / "out", max_memory="8 apples", method="sum"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 1 << 63}, "seed must be below 2^63, got 9223372036854775808"),
        ({"output": "lora"}, "output must be one of model, adapter, got 'lora'"),
        ({"output": "adapter", "adapter_out_rank": 0}, "adapter_out_rank must be at least 1, got 0"),
        ({"format": "bin"}, "format must be one of safetensors, flax, msgpack, got 'bin'"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"dtype": np.float16}, "dtype must be one of float32, bfloat16, float16, got <class 'numpy.float16'>"),
        ({"other_params": ["first"]}, "other_params must be one of pretrained, first, average, got ['first']"),
        ({"conv": "no"}, "conv must be true or false, got 'no'"),
        ({"layers": 5}, "layers must be a regular expression as text, got 5"),
        ({"max_memory": float("nan")}, "max_memory must be a whole number, got nan"),
        ({"method": None}, "method: 'None' is not known "),
        ({"config": nj.NufiltConfig()}, "config: sum takes a SumConfig, got a NufiltConfig"),
        ({"seed": "1", "dtype": "int8", "max_memory": "8 apples"}, "max_memory must be a size as 8GB or 8GiB"),
        ({"seed": "1", "steps": 3}, "steps: sum has no such setting"),
    ],
    ids=str,
)
def test_settings_are_checked_as_the_commands_are(shared_models, tmp_path, settings, message):
    """Before any work, all at once, and with what is wrong with the models."""
    base, task = shared_models / "base", shared_models / "alpha"
    with pytest.raises(NufiltError) as caught:
        nj.merge(base, [task, tmp_path / "no/such/model"], tmp_path / "out", **{"method": "sum"} | settings)
    told = str(caught.value)
    assert message in told and "no/such/model" in told
    assert not any(name in settings and f"{name} " not in told for name in ("seed", "dtype"))
    assert not list(tmp_path.iterdir()) or [path.name for path in tmp_path.iterdir()] == ["out.lock"]
    if not settings.keys() & {"output", "format", "dtype", "max_memory"}:
        with pytest.raises(ConfigError, match=re.escape(message)):
            nj.merge(BASE, TASKS, **{"method": "sum"} | settings)


def test_what_is_no_model_is_told_at_once(shared_models):
    base = {"model.layers.0.mlp.up_proj.weight": np.zeros((4, 4), np.float32)}
    flax, torch = SimpleNamespace(params=base), SimpleNamespace(state_dict=lambda: base)
    with pytest.raises(ConfigError) as caught:
        nj.merge(None, {"a": flax, "b": torch, "c": base})  # pyright: ignore[reportArgumentType]
    told = "must be a folder, a Hub id or weights by name, got "
    assert str(caught.value).splitlines() == [
        f"base: {told}NoneType",
        f"tasks['a']: {told}types.SimpleNamespace (nufilt_jax.from_flax takes params and config of a Flax model)",
        f"tasks['b']: {told}types.SimpleNamespace (give its state_dict() as arrays of NumPy)",
    ]
    for tasks in (str(shared_models / "a"), shared_models / "a", None):
        with pytest.raises(ConfigError, match="tasks: must be a list of models, or models by name"):
            nj.merge(base, tasks)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"^tasks\[1\]: must be a folder"):
        nj.merge(base, [base, (base,)])  # pyright: ignore[reportArgumentType]


def test_names_of_tasks_are_texts(shared_models, tmp_path):
    base, task = shared_models / "base", shared_models / "alpha"
    for models, out in (((base, task), tmp_path / "out"), ((base, task), None), ((BASE, TASKS[0]), None)):
        with pytest.raises(ConfigError) as caught:
            nj.merge(models[0], {1: models[1], " ": models[1]}, out, method="sum")
        whats = [problem.what for problem in caught.value.problems]
        assert whats == [f"{name!r} is no name: it must be a text that is not empty" for name in (1, " ")]
    with pytest.raises(NufiltError, match="task: a names two tasks"):
        nj.merge(base, {"a": task, "a ": task}, tmp_path / "out", method="sum")


def test_numbers_of_any_library_are_kept_as_a_recipe_has_them(shared_models, tmp_path, nufilt):
    base, tasks = shared_models / "base", [shared_models / "alpha", shared_models / "beta"]
    how = {"max_memory": 0.5 * 8e9, "seed": np.int64(3), "conv": np.True_, "format": "msgpack", "method": "tsvm"}
    how |= {"other_params": "average"}
    for _ in range(2):  # the same call again reads the recipe
        nj.merge(base, (task for task in tasks), tmp_path / "out", layers=re.compile("fc1"), **how)
    assert (tmp_path / "out" / "flax_model.msgpack").is_file()
    recipe = json.loads((tmp_path / "out" / "nufilt.json").read_text())
    kept = {"seed": 3, "conv": True, "format": "flax", "method": "tsv_m", "layers": "fc1"}
    assert {name: recipe[name] for name in kept} == kept
    assert recipe["memory"]["allowed"] == 4_000_000_000 and isinstance(recipe["memory"]["allowed"], int)
    assert nufilt("verify", tmp_path / "out").code == 0


def test_warnings_speak_python(shared_models, tmp_path):
    """In memory and into a folder alike; nj.merge warns of no option of the command line."""
    base, task = shared_models / "base", shared_models / "alpha"
    how = {"layers": "fc2", "filter_rank": 24, "adapter_rank": 2, "task_rank": 2, "steps": 1}
    command = importlib.import_module("nufilt_jax.merge")  # once imported, it stands for the function
    for out, merge in ((None, nj.merge), (None, command), (tmp_path / "out", in_api)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            merge(base, [task], out, **how)
        texts = [str(found.message) for found in told]
        assert any(text.startswith("filter_rank: 24 directions are all that layers with 24") for text in texts)
        assert not [text for text in texts if "--" in text] and {found.filename for found in told} == {__file__}
        if out is not None:
            assert any("(select more with layers, or see other_params)" in text for text in texts)
    message = r"^seed is 0 in the merge .*choose another out, .* continue it with nufilt add\)"
    with pytest.raises(NufiltError, match=message):
        nj.merge(base, [task], tmp_path / "out", seed=1, **how)


@pytest.mark.parametrize(
    ("tasks", "settings", "kind"),
    [
        (["nowhere"], {}, CheckpointError),
        (["nowhere", "nowhere/else/again"], {}, CheckpointError),
        (["alpha"], {"layers": "nothing"}, ConfigError),
        (["alpha"], {"layers": "("}, ConfigError),
        (["nowhere"], {"layers": "nothing"}, NufiltError),
    ],
)
@pytest.mark.parametrize("out", [None, "out"])
def test_problems_of_one_kind_are_of_its_class(shared_models, tmp_path, monkeypatch, tasks, settings, kind, out):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NufiltError) as caught:
        nj.merge(
            shared_models / "base",
            [shared_models / name for name in tasks],
            out and tmp_path / out,
            method="sum",
            **settings,
        )
    assert type(caught.value) is kind


def test_rule_and_state_say_what_they_are():
    rule = nj.methods.get("ties", nj.TiesConfig(density=0.5))
    assert repr(rule).startswith("Merger(ties, TiesConfig(scale=0.3, density=0.5")
    state = rule.update(rule.init(BASE), TASKS[0])
    assert repr(state).startswith(f"MergeState(step=1, {len(state.touched)} of {len(BASE)} tensors merged, ")


def test_ties_runs_without_compiling():
    """As one debugs in JAX, which then hands numbers of Python to the bodies of loops."""
    base, *tasks = [{name: params[name] for name in SELECTED[:2]} for params in (BASE, *TASKS[:2])]
    expected = nj.merge(base, tasks, method="ties")
    with jax.disable_jit():
        found = nj.merge(base, tasks, method="ties")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "settings"), [("null_space", {}), ("nufilt", {"adapter_rank": 0}), ("nufilt", {})])
def test_a_state_is_saved_as_any_pytree(tmp_path, name, settings):
    ranks = {"filter_rank": 4} if name == "null_space" else {"filter_rank": 4, "adapter_rank": 2, "task_rank": 2}
    rule = nj.methods.get(name, nj.methods.config_of(name, None, ranks | settings))
    state = rule.init(BASE)
    for task in TASKS[:2]:
        state = rule.update(state, task)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        again = checkpointer.restore(tmp_path / "state", like)
    one, other = (rule.update(x, TASKS[2]).merged for x in (state, again))
    for key, value in one.items():
        np.testing.assert_array_equal(other[key], value)


def test_given_starts_take_the_place_of_the_drawn_ones():
    rule = rule_for("nufilt")
    first = rule.update(rule.init(BASE), TASKS[0])
    config = rule.config
    starts = {name: nj.draw_start(0, 2, name, config.adapter_rank, BASE[name].shape[1]) for name in SELECTED}
    drawn, given = rule.update(first, TASKS[1]), rule.update(first, TASKS[1], adapter_start=starts)
    other = rule.update(first, TASKS[1], adapter_start={name: 2 * x for name, x in starts.items()})
    for name in SELECTED:
        np.testing.assert_allclose(given.delta[name], drawn.delta[name], atol=1e-6)
        assert not np.allclose(other.delta[name], drawn.delta[name], atol=1e-6)
    bad = starts | {SELECTED[0]: np.zeros((1, 1)), SELECTED[1]: np.full_like(starts[SELECTED[1]], np.nan)}
    with pytest.raises(ConfigError) as error:
        rule.update(first, TASKS[1], adapter_start={name: bad[name] for name in SELECTED[:-1]})
    assert len(error.value.problems) == 3 and f"{SELECTED[0]}: must have shape" in str(error.value)
    with pytest.raises(ConfigError, match="adapter_start: means nothing to sum"):
        rule_for("sum").update(rule_for("sum").init(BASE), TASKS[0], adapter_start=starts)


@pytest.mark.parametrize("name", [name for name, rule in nj.methods.RULES.items() if not rule.needs_data])
def test_a_merged_model_is_enough_to_go_on_or_it_is_said(name):
    rule = rule_for(name)
    assert isinstance(rule, Merger)
    state = rule.init(BASE)
    for task in TASKS[:2]:
        state = rule.update(state, task)
    if rule.remembers:
        assert state.extra
        with pytest.raises(ConfigError, match=f"{name} remembers more of a merge"):
            nj.continue_from(BASE, state.merged, rule, step=2)
        return
    assert not state.extra
    again = nj.continue_from(BASE, state.merged, rule, step=2)
    for key in state.touched:  # θ^m is rounded, D is not
        np.testing.assert_allclose(again.delta[key], state.delta[key], atol=3e-7)
    assert again.step == 2 and rule.update(again, TASKS[2]).step == 3


def test_what_cannot_be_continued_from():
    with pytest.raises(ConfigError, match="step: must be at least 1, got 0"):
        nj.continue_from(BASE, BASE, step=0)
    with pytest.raises(CheckpointError, match="and 9 more: is missing"):
        nj.continue_from(BASE, {}, rule_for("sum"))
    for step in (2.5, "2", True, None):
        with pytest.raises(
            ConfigError, match=f"step must be a whole number, got {step!r}|step: must be a whole number"
        ):
            nj.continue_from(BASE, TASKS[0], rule_for("sum"), step=step)
    state = nj.continue_from(BASE, TASKS[0] | {KEPT: TASKS[0][KEPT] * np.nan}, rule_for("sum"), step=np.int64(2))
    assert state.step == 2 and type(state.step) is int
    with pytest.raises(CheckpointError, match=f"^merged: {SELECTED[0]}: has NaN or infinite numbers"):
        nj.continue_from(BASE, with_nan(TASKS[0], SELECTED[0]), rule_for("sum"))


def test_canonical_names_of_live_parameters():
    turned = {name.removeprefix("vision_model."): x for name, x in BASE.items()}  # as transformers 5 writes them
    assert nj.canonical(turned).keys() == BASE.keys()
    nested = {
        "vision_model": {"encoder": {"layers": {"0": {"mlp": {"fc1": {"kernel": np.zeros((4, 8), np.float32)}}}}}}
    }
    [(name, array)] = nj.canonical(nested, {"model_type": "clip_vision_model"}).items()
    assert (name, array.shape) == ("vision_model.encoder.layers.0.mlp.fc1.weight", (8, 4))
    with pytest.raises(CheckpointError, match=r"params: x: must be an array of NumPy or JAX, got int$"):
        nj.canonical({"x": 3})
    with pytest.raises(CheckpointError, match="config: must be a model's config or a dict"):
        nj.canonical({"x": np.zeros(3)}, config=3)


def test_authors_names():
    assert nj.methods.find("iso").name == "iso_c" and nj.methods.find("tsvm").name == "tsv_m"


@pytest.fixture
def registry(monkeypatch):
    """The registry, as it was after the test."""
    monkeypatch.setattr(nj.methods, "RULES", dict(nj.methods.RULES))


def test_own_rules(registry):
    mean = dataclasses.replace(nj.methods.RULES["sum"], name="mine")
    assert nj.methods.register(mean) is mean and nj.methods.get("mine").name == "mine"
    assert nj.methods.register(mean) is mean
    with pytest.raises(ConfigError, match="there is a method 'sum' already"):
        nj.methods.register(dataclasses.replace(mean, name="sum"))
    with pytest.raises(ConfigError, match="there is a method 'iso' already"):
        nj.methods.register(dataclasses.replace(mean, name="iso"))
    assert "iso" not in nj.methods.RULES
    with pytest.raises(ConfigError, match=r"it is a rule of your own: say method my:RULE"):
        nj.methods.find("my:RULE")


OF_TEXTS = """
from __future__ import annotations
import dataclasses
from typing import Literal
from nufilt_jax.methods import MethodConfig, Rule, number
from nufilt_jax.methods.state import as_it_is

@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(MethodConfig):
    keep: float = number(0.5, at_least=0, at_most=1)
    n: int = 3
    fast: bool = False
    mode: Literal["x", "y"] = "x"
    label: str = "a"

RULE = Rule(name="texts", config=TextConfig, advance=as_it_is)
"""


def test_types_of_settings_may_be_written_as_texts(shared_models, tmp_path, nufilt, registry, monkeypatch):
    """As an import from `__future__` makes of all annotations."""
    (tmp_path / "rule_of_texts.py").write_text(OF_TEXTS)
    monkeypatch.chdir(tmp_path)

    def planned(*pairs):
        given = ("--base", shared_models / "base", "--task", f"a={shared_models / 'alpha'}", "--json")
        return nufilt("plan", *given, "--method", "rule_of_texts:RULE", "--method-args", *pairs)

    told = planned("keep=0.2", "n=4", "fast=true", "mode=y", "label=b").json["config"]
    assert told == {"keep": 0.2, "n": 4, "fast": True, "mode": "y", "label": "b"}
    assert planned("keep=2", "n=-1", "fast=2", "mode=z", "label=").err.splitlines() == [
        "nufilt: --method-args: fast must be true or false, got '2'",
        "nufilt: --method-args: keep must be at most 1, got 2.0",
        "nufilt: --method-args: n must be at least 0, got -1",
        "nufilt: --method-args: mode must be one of x, y, got 'z'",
    ]
    own = nj.methods.find("rule_of_texts:RULE").config
    with pytest.raises(ConfigError, match="label must be a text, got 3"):
        own(label=3)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (float | None, "float | None"),
        (tuple[float, ...], "tuple[float, ...]"),
        (Literal[1, 2], "Literal[1, 2]"),
        (list, "list"),
        ("float | None", "float | None"),
    ],
)
def test_settings_of_types_that_none_can_have_are_refused(registry, kind, told):
    own = dataclasses.make_dataclass(
        "OwnConfig", [("w", kind, None)], bases=(nj.methods.MethodConfig,), frozen=True, kw_only=True
    )
    message = (
        rf"method: OwnConfig.w is declared as {re.escape(told)}, which no setting can be \(declare it as bool, int"
    )
    with pytest.raises(ConfigError, match=message):
        nj.methods.register(dataclasses.replace(nj.methods.RULES["sum"], name="mine", config=own))
    with pytest.raises(ConfigError, match=message):
        own()
    assert "mine" not in nj.methods.RULES


def test_a_type_of_a_setting_that_is_nowhere_is_told(registry):
    own = dataclasses.make_dataclass("OwnConfig", [("w", "Nowhere", 1)], bases=(nj.methods.MethodConfig,), frozen=True)
    with pytest.raises(ConfigError, match="OwnConfig has settings whose types cannot be found: name 'Nowhere' is not"):
        nj.methods.register(dataclasses.replace(nj.methods.RULES["sum"], name="mine", config=own))


def own_rule(advance):
    """A merger of a rule of one's own, after its first task."""
    rule = nj.methods.register(nj.methods.Rule(name="mine", config=nj.methods.MethodConfig, advance=advance))
    merger = nj.methods.get(rule.name)
    return merger, merger.update(merger.init(BASE), TASKS[0])


def with_stacks(change):
    """An update that returns D + τ with every stack changed."""
    return lambda state, task, context: nj.methods.Advance(
        nj.methods.Stacked(
            tuple(change(d + t) for d, t in zip(state.delta.stacks, task.stacks, strict=True)), task.names
        )
    )


def beside_d(**others):
    return lambda state, task, context: nj.methods.Advance(state.delta, **others)


@pytest.mark.parametrize(
    ("advance", "message"),
    [
        (
            with_stacks(lambda d: d.mean(2, keepdims=True)),
            r"mine returned D of .* and its like as \[\d, \d+, 1\] float32, and",
        ),
        (with_stacks(lambda d: d.astype(jnp.bfloat16)), r"and its like as .*\] bfloat16, and was given .*\] float32"),
        (with_stacks(lambda d: None), "and its like as a NoneType, and was given"),
        (
            lambda state, task, context: nj.methods.Advance(
                nj.methods.Stacked(state.delta.stacks[:-1], state.delta.names[:-1])
            ),
            "mine returned D with other layers than it was given, or in another order",
        ),
        (
            lambda state, task, context: nj.methods.Advance(
                nj.methods.Stacked(state.delta.stacks, tuple(names[::-1] for names in state.delta.names))
            ),
            "mine returned D with other layers than it was given, or in another order",
        ),
        (
            lambda state, task, context: state.delta,
            "mine returned a Stacked, and must return a nufilt_jax.methods.Advance",
        ),
        (
            lambda state, task, context: nj.methods.Advance(dict(state.delta)),
            "mine returned a dict, and must return a nufilt_jax.methods.Stacked for D",
        ),
        (beside_d(extra={"seen": {"a": 1}}), "mine returned 'seen' in extra, which is no array of numbers"),
        (beside_d(added={"word": "abc"}), "mine returned 'word' in added, which is no array of numbers"),
    ],
)
def test_what_a_rule_returns_is_held_against_what_it_was_given(registry, advance, message):
    merger, state = own_rule(advance)
    with pytest.raises(ConfigError, match=message) as caught:
        merger.update(state, TASKS[1])
    assert str(caught.value).startswith("method: mine returned")
    with pytest.raises(ConfigError, match=message):  # tracers have shapes and types too
        jax.jit(merger.update)(state, TASKS[1])


def test_numbers_beside_d_are_kept_as_arrays(shared_models, tmp_path, registry):
    """Those of Python too, and what NumPy computed in float64 is rounded as the state is."""

    def advance(state, task, context):
        stacks = tuple(
            np.asarray(d) + np.float64(2) * np.asarray(t) for d, t in zip(state.delta.stacks, task.stacks, strict=True)
        )
        count = state.extra.get("count", 0) + 1
        return nj.methods.Advance(nj.methods.Stacked(stacks, task.names), extra={"count": count})

    merger, state = own_rule(advance)
    for task in (TASKS[1], TASKS[2]):
        state = merger.update(state, task)
    assert state.extra["count"] == 2 and {stack.dtype for stack in state.delta.stacks} == {np.dtype(np.float32)}
    tasks = {name: shared_models / name for name in ("alpha", "beta", "gamma")}
    merged = nj.merge(shared_models / "base", tasks, tmp_path / "out", method="mine")
    in_memory = nj.merge(shared_models / "base", tasks, method="mine")
    np.testing.assert_array_equal(merged[build.Q0], in_memory[build.Q0])


OWN = """
import dataclasses
import nufilt_jax as nj
from nufilt_jax.methods import Advance, MethodConfig, Rule
from nufilt_jax.methods.elementwise import blend

@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfConfig(MethodConfig):
    share: float = 0.5

def advance(state, task, context):
    return Advance(blend(state.delta, task, keep=1.0, gain=context.config.share))

RULE = Rule(name="half", config=HalfConfig, advance=advance)
OTHER = 3
"""


def test_a_rule_of_ones_own_from_the_command_line(shared_models, tmp_path, nufilt, registry, monkeypatch):
    (tmp_path / "my_rule_file.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    paths = {name: str(shared_models / name) for name in ("base", "alpha", "beta", "gamma")}
    tasks = ("--task", f"alpha={paths['alpha']}", "--task", f"beta={paths['beta']}")
    how = ("--method", "my_rule_file:RULE", "--method-args", "share=0.25", "--out", "out")
    result = nufilt("merge", "--base", paths["base"], *tasks, *how, "--json")
    assert result.code == 0, result.err
    assert (result.json["method"], result.json["config"]) == ("my_rule_file:RULE", {"share": 0.25})
    base, alpha, beta = (build.weights(shared_models / name)[build.Q0] for name in ("base", "alpha", "beta"))
    np.testing.assert_allclose(build.weights(tmp_path / "out")[build.Q0], alpha + 0.25 * (beta - base), atol=1e-6)
    added = nufilt("add", "out", "--task", f"gamma={paths['gamma']}", "--method", "my_rule_file:RULE")
    assert added.code == 0, added.err
    monkeypatch.setattr(nj.methods, "RULES", {name: nj.methods.RULES[name] for name in ("sum", "nufilt")})
    unknown = nufilt("add", "out", "--task", f"delta={paths['gamma']}")
    assert unknown.code == 1 and "it is a rule of your own: say --method my_rule_file:RULE" in unknown.err
    pushed = nufilt("push", "out", "USER/NAME", "--dry-run")
    assert pushed.code == 1 and "was merged by my_rule_file:RULE, and a recipe imports nothing" in pushed.err
    assert "damaged" not in unknown.err + pushed.err
    own = ("--method", "my_rule_file:RULE")
    for command in (
        ("push", "out", "USER/NAME", "--dry-run"),
        ("export", "out", "--what", "delta", "--out", "delta.safetensors"),
        ("verify", "out"),
    ):
        nj.methods.RULES.pop("my_rule_file:RULE", None)
        assert nufilt(*command).code == 1
        told = nufilt(*command, *own)
        assert told.code == 0, told.err
    assert "verified" in told.out and (tmp_path / "delta.safetensors").is_file()
    nj.methods.RULES.pop("my_rule_file:RULE", None)
    repeat = ("merge", "--config", "out/nufilt.json", "--out", "again")
    assert nufilt(*repeat).code == 1 and not (tmp_path / "again").exists()
    assert nufilt(*repeat, "--method", "my_rule_file:RULE").code == 0
    again, out = (build.weights(tmp_path / name)[build.Q0] for name in ("again", "out"))
    np.testing.assert_array_equal(again, out)
    for name, message in (
        ("my_rule_file:OTHER", "is a int, and not a nufilt_jax.methods.Rule"),
        ("my_rule_file:NONE", "cannot be imported"),
        ("no_such_module_here:RULE", "cannot be imported"),
    ):
        refused = nufilt("merge", "--base", paths["base"], *tasks, "--method", name, "--out", "else")
        assert refused.code == 1 and message in refused.err


def test_the_commands_module_is_called_as_the_function():
    code = "import nufilt_jax.merge, nufilt_jax as nj; print(nj.merge({'a.layers.0.w': 0}, [], method='sum'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError: tasks: is empty" in run.stderr


KEPT = "vision_model.embeddings.class_embedding"  # as all that no matrix rule touches


def with_nan(params, name):
    return params | {name: np.full_like(params[name], np.nan)}


def test_weights_that_cannot_be_merged_are_refused_all_at_once_before_any_work():
    bad = [with_nan(TASKS[0], SELECTED[0]), {key: x for key, x in TASKS[1].items() if key != SELECTED[1]}]
    with pytest.raises(CheckpointError) as error:
        nj.merge(with_nan(BASE, SELECTED[2]), bad)
    told = str(error.value)
    assert len(error.value.problems) == 3
    assert f"base: {SELECTED[2]}: has NaN or infinite numbers (fine-tune again, or exclude it with layers)" in told
    assert f"task 'task-1': {SELECTED[0]}: has NaN" in told
    assert f"task 'task-2': {SELECTED[1]}: is missing" in told
    with pytest.warns(UserWarning, match=f"task 'task-1': {KEPT}: has NaN .*; the merge does not touch it"):
        nj.merge(BASE, [with_nan(TASKS[0], KEPT)], method="sum")


LLAMA = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "lm_head.weight": (12, 8),
}
Q, UP, TABLE, HEAD = (
    next(name for name in LLAMA if key in name) for key in ("q_proj", "up_proj", "embed_tokens", "lm_head")
)


def llama(seed):
    g = np.random.default_rng(seed)
    return {name: g.standard_normal(shape).astype(np.float32) for name, shape in LLAMA.items()}


def tuned(base, seed, names=(Q, UP)):
    """Only in what a merge selects, unless other names are given."""
    g = np.random.default_rng(seed)
    return base | {name: base[name] + g.standard_normal(base[name].shape).astype(np.float32) for name in names}


@pytest.fixture(params=["in memory", "in a folder"])
def its_base(request, tmp_path):
    """A base in memory and in a folder, either with its weights."""
    base = llama(0)
    if request.param == "in memory":
        return base, base, "in memory"
    build.write(tmp_path / "base", base, model_type="llama")
    return tmp_path / "base", base, str(tmp_path / "base")


def test_a_task_in_memory_beside_an_adapter(tmp_path):
    base = llama(0)
    build.write(tmp_path / "base", base, model_type="llama")
    adapter = adapters.write(
        tmp_path / "adapter", {Q.removesuffix(".weight"): (np.ones((2, 8), np.float32), np.ones((8, 2), np.float32))}
    )
    in_memory = tuned(base, 1)
    build.write(tmp_path / "task", in_memory, model_type="llama")
    merged = nj.merge(tmp_path / "base", {"a": in_memory, "b": adapter}, method="sum")
    told = nj.merge(tmp_path / "base", {"a": tmp_path / "task", "b": adapter}, method="sum")
    for name in base:
        np.testing.assert_allclose(merged[name], told[name], atol=1e-6)
    what = r"adapter: is a PEFT adapter, which needs a base that is a folder or Hub id \(give the base's folder"
    with pytest.raises(CheckpointError, match=what):
        nj.merge(base, {"a": in_memory, "b": adapter}, method="sum")


def test_weights_in_memory_are_looked_at_as_a_folders_are(its_base):
    place, base, told = its_base
    task = tuned(base, 1)
    whole = task | {Q: np.ones((8, 8), np.int8)}
    more = task | {"model.layers.1.mlp.up_proj.weight": base[UP]}
    few = {name: x for name, x in task.items() if name != UP}
    with pytest.raises(CheckpointError) as caught:
        nj.merge(place, {"a": task, "b": more, "c": few}, method="sum")
    more_told, few_told = str(caught.value).splitlines()
    assert more_told.startswith(
        f"task 'b': model.layers.1.mlp.up_proj.weight: is not in the base {told} (save the task"
    )
    assert few_told.startswith(f"task 'c': {UP}: is missing, but the base {told} has it (all models must be")
    with pytest.raises(CheckpointError, match=f"^task 'a': {Q}: holds I8: quantised weights cannot be merged"):
        nj.merge(place, {"a": whole}, method="sum")
    with pytest.raises(CheckpointError, match=f"base: {Q}: holds I8: quantised weights cannot be merged"):
        nj.merge(base | {Q: np.ones((8, 8), np.int8)}, [task], method="sum")
    fine = task | {"model.layers.0.self_attn.position_ids": np.arange(4), Q: jnp.asarray(task[Q])}
    np.testing.assert_allclose(nj.merge(place, [fine], method="sum")[Q], task[Q], atol=1e-5)


def test_what_stays_the_bases_in_memory_is_said_or_refused(its_base):
    place, base, _ = its_base
    grown = tuned(base, 1) | {name: np.ones((13, 8), np.float32) for name in (TABLE, HEAD)}
    with pytest.warns(UserWarning, match=r"task 'a': 2 tensors are not merged and stay the base's: .*; strict refuses"):
        nj.merge(place, {"a": grown}, method="sum")
    with pytest.raises(CheckpointError) as caught:
        nj.merge(place, {"a": grown}, method="sum", strict=True)
    what = "[13, 8], [12, 8] in the base (leave out strict to keep the base's)"
    assert {*str(caught.value).splitlines()} == {f"task 'a': {name}: {what}" for name in (TABLE, HEAD)}
    with pytest.warns(UserWarning, match=r"^a: .* of its squared change is outside the selected layers .*: lm_head"):
        nj.merge(place, {"a": tuned(base, 1, (Q, HEAD))}, method="sum")


def test_tied_copies_in_memory_are_one_parameter():
    """A T5's table under its other names, as torch tells of it: equal copies count once, others are refused."""
    table = np.ones((12, 8), np.float32)
    base = {"shared.weight": table, "encoder.block.0.layer.0.SelfAttention.q.weight": np.eye(8, dtype=np.float32)}
    copies = {f"{part}.embed_tokens.weight": table.copy() for part in ("encoder", "decoder")}
    merged = nj.merge(base, [base | copies], method="sum")
    assert merged.keys() == base.keys()
    assert nj.merge(base | copies, [base, base | copies], method="sum").keys() == base.keys() | copies.keys()
    with pytest.raises(CheckpointError, match=r"task 'task-1': decoder.embed_tokens.weight: is not in the base"):
        nj.merge(base, [base | copies | {"decoder.embed_tokens.weight": 2 * table}], method="sum")


@pytest.mark.parametrize("name", ["nufilt", "sum", "iso_c"])
def test_a_rule_refuses_whole_numbers(name):
    rule = rule_for(name)
    with pytest.raises(CheckpointError, match=f"task: {SELECTED[0]}: holds int8: quantised weights cannot be merged"):
        rule.update(rule.init(BASE), TASKS[0] | {SELECTED[0]: TASKS[0][SELECTED[0]].astype(np.int8)})


@pytest.mark.parametrize("name", ["nufilt", "sum", "iso_c"])
def test_a_rule_tells_bad_weights_from_a_solve_that_failed(name):
    rule = rule_for(name)
    state = rule.update(rule.init(BASE), TASKS[0])
    with pytest.raises(SolveError, match=f"task: {SELECTED[0]}: has NaN or infinite numbers"):
        rule.update(state, with_nan(TASKS[1], SELECTED[0]))
    broken = rule.init(with_nan(BASE, SELECTED[0]))
    with pytest.raises(SolveError, match=f"base: {SELECTED[0]}: has NaN or infinite numbers"):
        rule.update(rule.update(broken, TASKS[0]), TASKS[1])


def test_models_of_the_disk_are_looked_at_as_the_command_does(shared_models, tmp_path):
    for name, key in (("alpha", SELECTED[0]), ("beta", KEPT)):
        shutil.copytree(shared_models / name, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        save_file(with_nan(weights, key), tmp_path / name / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{SELECTED[0]}: has NaN or infinite numbers"):
        nj.merge(shared_models / "base", [tmp_path / "alpha", shared_models / "beta"], method="sum")
    with pytest.warns(UserWarning, match=f"{KEPT}: has NaN or infinite numbers; the merge does not touch it"):
        nj.merge(shared_models / "base", [tmp_path / "beta"], method="sum")


def test_starts_do_not_depend_on_how_jax_is_configured():
    drawn = nj.draw_start(0, 1, "a", 2, 3)
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(nj.draw_start(0, 1, "a", 2, 3), drawn)
