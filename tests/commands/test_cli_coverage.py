"""What is merged and what is left is said: patterns with counts, shares of the tasks' change, warnings."""

import model_builders as build
import numpy as np
import pytest

LLAMA = {"model_type": "llama"}


def llama(seed=0):
    """A Llama-like model with more outside its blocks than usual."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def moved(base, names, by=0.1):
    return {name: np.asarray(x + np.float32(by), x.dtype) if name in names else x for name, x in base.items()}


def share_of(base, inside, outside):
    sizes = [sum(base[name].size for name in names) for names in (inside, outside)]
    return sizes[1] / sum(sizes)


@pytest.fixture
def folder(tmp_path):
    base = llama()
    blocks = [name for name in base if ".layers." in name]
    build.write(tmp_path / "base", base, **LLAMA)
    build.write(tmp_path / "inside", moved(base, blocks), **LLAMA)
    build.write(tmp_path / "head", moved(base, [*blocks, "lm_head.weight"]), **LLAMA)
    return tmp_path


def arguments(folder, *names, out="out", method="sum"):
    tasks = [part for name in names for part in ("--task", f"{name}={folder / name}")]
    return ["merge", "--base", folder / "base", *tasks, "--out", folder / out, "--method", method]


def test_what_is_selected_is_told_as_patterns_with_counts(folder, nufilt):
    wanted = [
        ("model.layers.*.self_attn.{q,k,v,o}_proj", 4, 8, 2048),
        ("model.layers.*.mlp.{gate,up}_proj", 2, 4, 1536),
    ]
    plan = nufilt(*arguments(folder, "inside"), "--plan", "--json").json
    merge = nufilt(*arguments(folder, "inside"), "--json").json
    for document in (plan, merge):
        rows = {tuple(row[key] for key in ("pattern", "kinds", "layers", "parameters")) for row in document["selected"]}
        assert rows == set(wanted)
    assert {row["pattern"] for row in plan["left"]} == {"model.embed_tokens", "lm_head"}
    text = nufilt(*arguments(folder, "inside", out="again")).out
    assert "merged  model.layers.*.self_attn.{q,k,v,o}_proj  4 x 2\n" in text


def test_what_the_tasks_moved_elsewhere_is_told_with_its_share(folder, nufilt):
    base = llama()
    share = share_of(base, [name for name in base if ".layers." in name], ["lm_head.weight"])
    result = nufilt(*arguments(folder, "inside", "head"), "--json")
    [row] = result.json["left"]
    assert row["pattern"] == "lm_head" and row["share"]["inside"] == 0
    assert row["share"]["head"] == pytest.approx(share, rel=1e-3)
    assert [step["outside"] for step in result.json["steps"]] == pytest.approx([0, share], rel=1e-3)
    [line] = result.lines
    assert line.startswith(f"nufilt: warning: head: {share:.1%} of its squared change is outside the selected layers")
    assert f"lm_head {share:.1%}" in line


def test_a_method_that_touches_all_leaves_nothing(folder, nufilt):
    result = nufilt(*arguments(folder, "head", method="task_arithmetic"), "--json")
    assert (result.json["left"], result.err) == ([], "")


@pytest.mark.parametrize(("moves", "warned"), [("text_model", True), ("mlp.fc2", False)])
def test_what_the_published_choice_leaves_of_clips_vision_tower_is_no_warning(moves, warned, tmp_path, nufilt):
    base = build.tower(0) | build.text_side()
    task = moved(base, [name for name in base if moves in name and base[name].dtype == np.float32])
    for name, model in (("base", base), ("task", task)):
        build.write(tmp_path / name, model, model_type="clip")
    result = nufilt(*arguments(tmp_path, "task"))
    assert result.code == 0 and bool(result.lines) == warned
    assert "up to 100.0% of a task's squared change" in result.out


def test_an_expression_reaches_clips_text_tower_if_it_names_it(tmp_path, nufilt):
    base = build.tower(0) | build.text_side()
    build.write(tmp_path / "base", base, model_type="clip")
    build.write(tmp_path / "task", moved(base, list(base)), model_type="clip")
    for expression, expected in (
        (r"text_model.*q_proj", {"text_model"}),
        (r"(vision|text)_model.*q_proj", {"text_model", "vision_model"}),
        ("projection|q_proj", {"text_model", "vision_model", "visual_projection"}),
        (r"^(?!vision_model).*q_proj", {"text_model"}),
        (r"^\w+\.encoder.*q_proj", {"vision_model"}),
        ("q_proj", {"vision_model"}),
    ):
        plan = nufilt(*arguments(tmp_path, "task"), "--layers", expression, "--plan", "--json").json
        assert {name.split(".")[0] for name in plan["layers_selected"]} == expected


def test_small_changes_of_a_float64_base_are_kept(tmp_path, nufilt):
    base = {name: x.astype(np.float64) for name, x in llama().items()}
    rng = np.random.default_rng(1)
    tasks = [{name: x + 1e-6 * rng.standard_normal(x.shape) for name, x in base.items()} for _ in range(2)]
    for name, model in (("base", base), ("a", tasks[0]), ("b", tasks[1])):
        build.write(tmp_path / name, model, **LLAMA)
    assert nufilt(*arguments(tmp_path, "a", "b", method="task_arithmetic")).code == 0
    merged = build.weights(tmp_path / "out")
    for name, x in base.items():
        wanted = 0.3 * sum(task[name] - x for task in tasks)
        assert merged[name].dtype == np.float64
        np.testing.assert_allclose(merged[name] - x, wanted, atol=1e-6 * np.abs(wanted).max())


def test_another_type_may_be_asked_for_while_nothing_is_written(folder, nufilt):
    """A merged tensor that float16 cannot hold is found at the end: what is merged is gone on with."""
    base = llama()
    huge = "model.layers.0.self_attn.q_proj.weight"
    build.write(folder / "huge", moved(base, [huge], by=1e5), **LLAMA)
    refused = nufilt(*arguments(folder, "inside", "huge"), "--dtype", "float16")
    assert refused.code == 1 and huge in refused.err and "float16" in refused.err and not (folder / "out").exists()
    done = nufilt(*arguments(folder, "inside", "huge"), "--dtype", "bfloat16", "--json")
    assert done.code == 0 and [step["resumed"] for step in done.json["steps"]] == [True, True]
    other = nufilt(*arguments(folder, "inside", "huge"), "--dtype", "float32")
    assert other.code == 1 and "--dtype: is 'bfloat16'" in other.err


def test_what_earlier_tasks_moved_elsewhere_stays_told(folder, nufilt):
    """A task is added, of which nothing is left out; and the finished merge again."""
    assert nufilt(*arguments(folder, "head")).code == 0
    told = nufilt("add", folder / "out", "--task", f"inside={folder / 'inside'}", "--json").json
    [row] = told["left"]
    assert row["pattern"] == "lm_head" and row["share"]["head"] > 0.1 and row["share"]["inside"] == 0
    again = nufilt("add", folder / "out", "--json").json
    assert all(again[key] == told[key] for key in ("selected", "left", "memory", "versions"))
