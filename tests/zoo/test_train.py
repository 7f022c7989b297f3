import dataclasses
import io
import json
from importlib import resources

import jax
import numpy as np
import pytest
from rich.console import Console

from nufilt_jax.errors import CheckpointError, ConfigError
from nufilt_jax.evaluation import evaluate_tasks
from nufilt_jax.zoo import STUDY, TASK_NAMES, TINY_FAMILY, evaluation_tasks, load_heads, load_params
from nufilt_jax.zoo.draws import HARD, MILD
from nufilt_jax.zoo.families import Phase
from nufilt_jax.zoo.train import build, main
from nufilt_jax.zoo.training import initial_params, make_data, make_heads, train_tower

WEIGHTS = resources.files("nufilt_jax.zoo") / "weights"
SELECTED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight")


def test_training():
    phase = Phase(steps=100, batch=8, learning_rate=1e-3, weight_decay=0.0, n_images=64, other_rate=0.0)
    data = make_data(TINY_FAMILY, ["shapes", "letters"], MILD, phase.n_images)
    start = initial_params(TINY_FAMILY, 0)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules multiply the step count by a float
        first, losses = train_tower(TINY_FAMILY, start, data, phase, jax.random.key(0))
        again, _ = train_tower(TINY_FAMILY, initial_params(TINY_FAMILY, 0), data, phase, jax.random.key(0))
    assert len(losses) == 2
    assert losses[1] < losses[0]
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        moved = float(np.abs(value - start[name]).max())
        assert (moved > 1e-4) == name.endswith(SELECTED), name  # the rate of all others is zero


def test_the_shipped_weights_are_not_overwritten(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "tiny"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "tiny travels with the package: give a folder for the new one, --out" in capsys.readouterr().err


def test_shipped_heads_are_those_of_the_script():
    shipped = load_heads()
    for task, head in make_heads(TINY_FAMILY).items():
        np.testing.assert_allclose(shipped[task], head, atol=1e-6)


def test_shipped_weights_score_as_their_record_says():
    record = json.loads((WEIGHTS / "training.json").read_text())["validation"]
    tasks = evaluation_tasks(split="val")
    # One image of 500 is 0.002; another machine's rounding may move a few that are on the edge.
    assert evaluate_tasks(load_params("base"), TINY_FAMILY.config, tasks) == pytest.approx(
        record["pretrained"], abs=0.01
    )
    for task in tasks:
        score = evaluate_tasks(load_params(task.name), TINY_FAMILY.config, [task])[task.name]
        assert score == pytest.approx(record["individual"][task.name], abs=0.01)
    assert tuple(record["individual"]) == TASK_NAMES


# As the study's family, with two tasks and next to no training.
SHORT = Phase(steps=50, batch=4, learning_rate=1e-3, weight_decay=0.0, n_images=32)
SMALL = dataclasses.replace(
    TINY_FAMILY, name="small", tasks=("hue", "gaps"), looks=HARD, pretrain=SHORT, finetune=SHORT
)


def built(family, folder, **options):
    printed = io.StringIO()
    with jax.numpy_dtype_promotion("standard"):
        build(family, folder, Console(file=printed, width=200), **options)
    return printed.getvalue()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUFILT_CACHE", str(folder))
        built(SMALL, folder / "small" / "weights")
        yield folder


def test_a_family_is_made_once(cache):
    weights = cache / "small" / "weights"
    before = {path.name: path.read_bytes() for path in weights.iterdir()}
    assert set(before) == {f"{name}.safetensors" for name in ("base", "hue", "gaps", "heads")} | {"training.json"}
    assert built(SMALL, weights) == ""
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == before


def test_only_what_is_missing_is_trained_again(cache):
    weights = cache / "small" / "weights"
    record, tuned = (weights / "training.json").read_text(), (weights / "gaps.safetensors").read_bytes()
    unfinished = json.loads(record)
    del unfinished["validation"]["individual"]["gaps"]
    (weights / "training.json").write_text(json.dumps(unfinished))
    printed = built(SMALL, weights)
    assert "gaps" in printed
    assert "hue" not in printed
    assert "pre-trained" not in printed
    assert (weights / "gaps.safetensors").read_bytes() == tuned
    assert json.loads((weights / "training.json").read_text()) == json.loads(record)


def test_other_settings_train_everything_again(cache, tmp_path):
    for path in (cache / "small" / "weights").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    printed = built(dataclasses.replace(SMALL, finetune=dataclasses.replace(SHORT, learning_rate=2e-3)), tmp_path)
    assert all(name in printed for name in ("pre-trained", "hue", "gaps"))


def test_a_family_made_here_is_read_like_the_shipped_one(cache):
    record = json.loads((cache / "small" / "weights" / "training.json").read_text())["validation"]
    tasks = evaluation_tasks(SMALL.tasks, split="val", family=SMALL)
    assert evaluate_tasks(load_params("base", SMALL), SMALL.config, tasks) == record["pretrained"]
    for task in tasks:
        score = evaluate_tasks(load_params(task.name, SMALL), SMALL.config, [task])
        assert score[task.name] == record["individual"][task.name]
        assert record["individual"][task.name] != record["pretrained"][task.name]
    with pytest.raises(ConfigError, match=r"no built-in model .digits. .one of base, hue, gaps"):
        load_params("digits", SMALL)


def test_a_family_that_is_not_made_says_how(cache):
    with pytest.raises(CheckpointError, match=r"run python -m nufilt_jax\.zoo\.train study"):
        load_params("base", STUDY)


def test_a_base_that_was_trained_likewise_is_taken_over(cache, tmp_path):
    source = cache / "small" / "weights"
    gentle = dataclasses.replace(SMALL, finetune=dataclasses.replace(SHORT, learning_rate=1e-4))
    printed = built(gentle, tmp_path / "gentle", pretrained=source)
    assert "hue" in printed
    assert "pre-trained" not in printed
    base, tuned = (
        {folder: (folder / f"{name}.safetensors").read_bytes() for folder in (source, tmp_path / "gentle")}
        for name in ("base", "hue")
    )
    assert len(set(base.values())) == 1
    assert len(set(tuned.values())) == 2
    other = dataclasses.replace(gentle, pretrain=dataclasses.replace(SHORT, learning_rate=2e-3))
    assert "pre-trained" in built(other, tmp_path / "other", pretrained=source)
