import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from nufilt_jax import compile_cache
from nufilt_jax.errors import ConfigError, OutputError
from nufilt_jax.evaluation import evaluate_tasks
from nufilt_jax.models import canonical_shapes, parse_vision_config
from nufilt_jax.zoo import (
    CLASS_NAMES,
    TASK_NAMES,
    evaluation_tasks,
    family_folder,
    load_heads,
    load_params,
    materialise,
)

WEIGHTS = Path(str(resources.files("nufilt_jax.zoo") / "weights"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return materialise(tmp_path_factory.mktemp("cache") / "tiny")


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 3.8e6


def test_folders_are_ordinary_ones(zoo):
    assert tuple(zoo.tasks) == TASK_NAMES
    for name, folder in {"base": zoo.base, **zoo.tasks}.items():
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "clip_vision_model"
        assert config["architectures"] == ["CLIPVisionModel"]
        params = load_file(folder / "model.safetensors")
        shapes = {key: value.shape for key, value in params.items()}
        assert shapes == canonical_shapes(parse_vision_config(config))
        stored = load_file(WEIGHTS / f"{name}.safetensors")
        for key, value in params.items():
            assert value.dtype == np.float32
            assert np.isfinite(value).all()
            assert stored[key].dtype == np.float16
            np.testing.assert_array_equal(value, stored[key].astype(np.float32))
        with safe_open(folder / "model.safetensors", "numpy") as file:
            assert file.metadata() == {"format": "pt"}


def test_preprocessor_does_what_the_tasks_state(zoo):
    document = json.loads((zoo.base / "preprocessor_config.json").read_text())
    task = evaluation_tasks(("shapes",), n_images=2)[0]
    assert (tuple(document["image_mean"]), tuple(document["image_std"])) == (task.mean, task.std)
    assert document["crop_size"] == {"height": 32, "width": 32}


def test_heads(zoo):
    written = load_file(zoo.folder / "heads.safetensors")
    names = json.loads((zoo.folder / "heads.json").read_text())
    assert set(written) == set(TASK_NAMES)
    for task, head in load_heads().items():
        np.testing.assert_array_equal(written[task], head)
        np.testing.assert_allclose(head @ head.T, np.eye(len(CLASS_NAMES[task])), atol=1e-5)
        assert names[task] == list(CLASS_NAMES[task])


def test_fine_tuning_has_taught_what_pretraining_had_not(zoo):
    config = json.loads((zoo.base / "config.json").read_text())
    tasks = zoo.evaluation_tasks()
    before = evaluate_tasks(load_params("base"), config, tasks)
    after = {task.name: evaluate_tasks(load_params(task.name), config, [task])[task.name] for task in tasks}
    gains = {name: after[name] - before[name] for name in TASK_NAMES}
    assert min(gains.values()) > 0.03, gains
    assert np.mean(list(gains.values())) > 0.10, gains
    for task in tasks:
        assert before[task.name] > 1.5 / len(task.class_names)


def test_evaluation_tasks_are_drawn_anew_and_alike():
    first, second = (evaluation_tasks(("letters", "position"), n_images=30) for _ in range(2))
    assert [task.name for task in first] == ["letters", "position"]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        assert one.class_names == CLASS_NAMES[one.name]
    validation = evaluation_tasks(("letters",), n_images=30, split="val")[0]
    assert (validation.images != first[0].images).any()


def test_the_second_call_writes_nothing(tmp_path):
    zoo = materialise(tmp_path / "deep" / "tiny")
    times = {path: path.stat().st_mtime_ns for path in zoo.folder.rglob("*")}
    assert materialise(tmp_path / "deep" / "tiny") == zoo
    assert {path: path.stat().st_mtime_ns for path in zoo.folder.rglob("*")} == times
    assert [path.name for path in zoo.folder.parent.iterdir()] == ["tiny"]


def test_damage_is_repaired_and_foreign_files_stay(tmp_path):
    zoo = materialise(tmp_path / "tiny")
    wanted = snapshot(zoo.folder)
    (zoo.base / "model.safetensors").write_bytes(b"half")
    (zoo.tasks["digits"] / "config.json").unlink()
    (zoo.base / "notes.txt").write_text("mine")
    materialise(tmp_path / "tiny")
    assert snapshot(zoo.folder) == wanted | {"base/notes.txt": b"mine"}


def test_processes_at_the_same_time(tmp_path, zoo):
    code = "import sys; from nufilt_jax.zoo import materialise; sys.stdin.read(1); materialise(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "cache" / "tiny")]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for run in runs:
        run.stdin.write(b"x")
        run.stdin.flush()
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors.decode()
    assert snapshot(tmp_path / "cache" / "tiny") == snapshot(zoo.folder)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny"]


def test_a_lost_race_takes_what_the_winner_wrote(tmp_path, monkeypatch, zoo):
    target = tmp_path / "tiny"
    rename = Path.rename

    def slow_rename(self, other):
        monkeypatch.setattr(Path, "rename", rename)
        materialise(other)
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", slow_rename)
    materialise(target)
    assert snapshot(target) == snapshot(zoo.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_unusable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"the built-in checkpoints cannot be written: (Not a directory|File exists)"):
        materialise(tmp_path / "file" / "tiny")


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NUFILT_CACHE", str(tmp_path / "own"))
    assert family_folder() == tmp_path / "own" / "tiny"
    monkeypatch.delenv("NUFILT_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert family_folder() == tmp_path / "xdg" / "nufilt_jax" / "tiny"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert family_folder() == tmp_path / ".cache" / "nufilt_jax" / "tiny"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert family_folder() == tmp_path / "Library" / "Caches" / "nufilt_jax" / "tiny"
    assert compile_cache.default_folder() == str(tmp_path / "Library" / "Caches" / "nufilt_jax" / "xla")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert family_folder() == tmp_path / "local" / "nufilt_jax" / "tiny"
    assert compile_cache.default_folder() == str(tmp_path / "local" / "nufilt_jax" / "xla")
    monkeypatch.delenv("LOCALAPPDATA")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ConfigError, match="NUFILT_CACHE: is not set, and this user has no home folder"):
        family_folder()


def test_unknown_model():
    with pytest.raises(ConfigError, match=r"no built-in model '\.\./base'"):
        load_params("../base")
