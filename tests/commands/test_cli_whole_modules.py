"""`--output adapter` of modules that one adapter holds whole, and others in factors or not at all."""

import json

import adapter_builders as adapters
import model_builders as build
import numpy as np
import pytest

from nufilt_jax.checkpoints import open_checkpoint, open_task

Q, K, V = (f"vision_model.encoder.layers.0.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A base and adapters: `saved` holds K whole, `beside` leaves it alone, `factors` adapts it; all adapt Q."""
    folder = tmp_path_factory.mktemp("whole")
    base = build.tower(0)
    build.write(folder / "base", base)
    extra = {f"{adapters.PREFIX}{K}.weight": base[f"{K}.weight"] + build.tower(7)[f"{K}.weight"]}
    adapters.write(
        folder / "saved", adapters.factors(base, 1, 2, (Q,)), extra=extra, modules_to_save=[K], target_modules=[Q]
    )
    for seed, (name, modules) in enumerate({"beside": (Q,), "factors": (Q, K, V)}.items(), 2):
        adapters.write(folder / name, adapters.factors(base, seed, 2, modules), target_modules=[*modules])
    return folder


def given(stream, *tasks):
    return ("--base", stream / "base", *(part for task in tasks for part in ("--task", f"{task}={stream / task}")))


def assert_same_as_the_model(nufilt, stream, tasks, out, method):
    """The adapter, read again, is the whole merge; K is whole in it, under its own name."""
    whole = out.parent / "model"
    assert nufilt("merge", *given(stream, *tasks), "--out", whole, "--method", method).code == 0
    names = {name.removeprefix(adapters.PREFIX) for name in build.weights(out)}
    assert {name for name in names if K in name} == {f"{K}.weight"}
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == [K]
    read = open_task(str(out), open_checkpoint(str(stream / "base"), role="base")).read()
    for name, value in build.weights(whole).items():
        np.testing.assert_allclose(read[name], value, atol=1e-5, err_msg=name)
    verified = nufilt("verify", out)
    assert verified.code == 0, verified.err


def test_a_module_that_an_earlier_adapter_holds_whole_stays_so(nufilt, stream, tmp_path):
    """Of the adapters at hand, which are all that a merge is gone on with, none holds it."""
    options = ("--out", tmp_path / "out", "--method", "task_arithmetic", "--output", "adapter")
    assert nufilt("merge", *given(stream, "saved"), *options).code == 0
    added = nufilt("add", tmp_path / "out", "--task", f"beside={stream / 'beside'}")
    assert added.code == 0 and "0.00% of the merge's energy is lost" in added.out, added.err
    assert_same_as_the_model(nufilt, stream, ("saved", "beside"), tmp_path / "out", "task_arithmetic")


@pytest.mark.parametrize("tasks", [("factors", "saved"), ("saved", "factors")], ids=" then ".join)
def test_a_module_that_one_holds_whole_and_another_adapts_goes_out_whole(nufilt, stream, tmp_path, tasks):
    """And what the adapters call their other modules stays as it is."""
    options = ("--out", tmp_path / "out", "--method", "weight_average", "--output", "adapter")
    assert nufilt("merge", *given(stream, *tasks), *options).code == 0
    assert_same_as_the_model(nufilt, stream, tasks, tmp_path / "out", "weight_average")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == [Q, V]


HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}


def headed(tmp_path, task_type, *, base_has_it):
    """A base, and an adapter as peft saves one of a type of task: with a head that nobody asked for."""
    base, head = build.tower(0), HEADS[task_type]
    weight = {f"{head}.weight": np.ones((3, build.WIDTH), np.float32)}
    build.write(tmp_path / "base", base | (weight if base_has_it else {}))
    extra = {f"{adapters.PREFIX}{head}.weight": 2 * weight[f"{head}.weight"]}
    adapters.write(tmp_path / "a", adapters.factors(base, 1), extra=extra, task_type=task_type)
    return ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'a'}", "--method", "sum", "--output", "adapter")


@pytest.mark.parametrize("task_type", HEADS)
def test_the_head_of_a_type_of_task_goes_out_as_the_base_has_it(nufilt, tmp_path, task_type):
    """peft looks for it, though no rule for selected layers touches it."""
    made = nufilt("merge", *headed(tmp_path, task_type, base_has_it=True), "--out", tmp_path / "out")
    assert made.code == 0, made.err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (task_type, None)
    head = build.weights(tmp_path / "out")[f"{adapters.PREFIX}{HEADS[task_type]}.weight"]
    np.testing.assert_array_equal(head, np.ones((3, build.WIDTH), np.float32))


def test_a_type_of_task_whose_head_the_base_lacks_is_left_out(nufilt, tmp_path):
    """peft would not load an adapter that says it and holds no head; what was left out is told."""
    made = nufilt("merge", *headed(tmp_path, "SEQ_CLS", base_has_it=False), "--out", tmp_path / "out")
    assert made.code == 0, made.err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] is None
    told = "a: is of task type SEQ_CLS, with which peft looks for a classifier or score that the base"
    assert told in made.err and "the merged adapter is of no type" in made.err
    verified = nufilt("verify", tmp_path / "out")
    assert verified.code == 0, verified.err


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("stored", [(), (HEAD,)], ids=["table", "both"])
@pytest.mark.parametrize("held", [(TABLE,), (TABLE, HEAD)], ids=["moved", "tied"])
def test_a_head_that_is_one_with_its_table_goes_out_beside_it(nufilt, tmp_path, stored, held):
    """peft gives the two weights of their own, and would leave the head as the base has it."""
    q = "model.layers.0.self_attn.q_proj"
    rows, base = np.ones((5, 4), np.float32), {f"{q}.weight": np.zeros((4, 4), np.float32)}
    base |= dict.fromkeys((TABLE, *stored), rows)
    build.write(tmp_path / "base", base, model_type="qwen2", tie_word_embeddings=True)
    extra = {f"{adapters.PREFIX}{name}": 3 * rows for name in held}
    how = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapters.write(tmp_path / "a", adapters.factors(base, 1, 2, (q,)), extra=extra, **how)
    adapters.write(tmp_path / "b", adapters.factors(base, 2, 2, (q,)), target_modules=["q_proj"])
    given = ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'a'}", "--out", tmp_path / "out")
    assert nufilt("merge", *given, "--method", "weight_average", "--output", "adapter").code == 0
    for average in (3 * rows, 2 * rows):
        found = build.weights(tmp_path / "out")
        for name in (TABLE, HEAD):
            np.testing.assert_allclose(found[adapters.PREFIX + name], average, rtol=1e-6)
        saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
        assert saved == ["lm_head", "model.embed_tokens"]
        added = nufilt("add", tmp_path / "out", "--task", f"b{average[0, 0]:.0f}={tmp_path / 'b'}")
        assert added.code == 0, added.err


def test_a_table_whose_model_has_no_head_goes_out_alone(nufilt, tmp_path):
    """As that of a classifier, or where the base unties them."""
    q = "model.layers.0.self_attn.q_proj"
    rows, base = np.ones((5, 4), np.float32), {f"{q}.weight": np.zeros((4, 4), np.float32)}
    extra = {f"{adapters.PREFIX}{TABLE}": 3 * rows}
    how = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "extra": extra}
    adapters.write(tmp_path / "a", adapters.factors(base, 1, 2, (q,)), **how)
    heads = {"score": ({"score.weight": np.ones((2, 4), np.float32)}, True), "apart": ({HEAD: 2 * rows}, False)}
    for case, (head, is_tied) in heads.items():
        build.write(tmp_path / case, base | {TABLE: rows} | head, model_type="qwen2", tie_word_embeddings=is_tied)
        given = ("--base", tmp_path / case, "--task", f"a={tmp_path / 'a'}", "--out", tmp_path / f"{case}-out")
        assert nufilt("merge", *given, "--method", "sum", "--output", "adapter").code == 0
        assert f"{adapters.PREFIX}{HEAD}" not in build.weights(tmp_path / f"{case}-out")
