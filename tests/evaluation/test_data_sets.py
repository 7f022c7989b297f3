"""Data sets from folders and from the Hub's cache, and one clear line where there is none."""

import os
import shutil
import subprocess
import sys
import time

import datasets
import image_models as build
import pytest
from huggingface_hub import constants

from nufilt_jax.errors import ConfigError, MissingExtraError
from nufilt_jax.evaluation.data_sets import open_data_set

HERE = {"where": "task a", "offline": False}


@pytest.fixture
def folder(tmp_path):
    return build.write_data(tmp_path / "mine", build.images(5), [0, 1, 2, 1, 0])


def test_a_folder(folder, capfd):
    datasets.enable_progress_bars()  # whatever another test has left behind
    data = open_data_set(str(folder), split="test", **HERE)
    assert data.n_rows == 5
    assert list(data.columns) == ["image", "label"]
    assert list(data.rows()["label"]) == [0, 1, 2, 1, 0]
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()


def put_into_cache(folder, name, commit):
    """What downloading `name` leaves behind, as if the Hub had given it."""
    prepared = datasets.load_dataset_builder(str(folder))
    prepared.download_and_prepare()
    namespace, title = name.split("/")
    target = os.path.join(datasets.config.HF_DATASETS_CACHE, f"{namespace}___{title}", "default", "0.0.0", commit)
    shutil.copytree(prepared.cache_dir, target)
    for split in ("test",):
        os.rename(os.path.join(target, f"{prepared.dataset_name}-{split}.arrow"), f"{target}/{title}-{split}.arrow")


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_the_cache_serves_without_network(folder, offline):
    name, commit = f"someone/mine_{offline}".lower(), "0123456789abcdef0123456789abcdef01234567"
    put_into_cache(folder, name, commit)
    for revision in (None, "main", commit):
        data = open_data_set(name, split="test", revision=revision, where="task a", offline=offline)
        assert data.n_rows == 5
        assert data.columns["label"].names == [*build.CLASSES]
        assert list(data.rows()["label"]) == [0, 1, 2, 1, 0]
    with pytest.raises(ConfigError, match=f"this machine holds revision {commit}, not {'f' * 40}"):
        open_data_set(name, split="test", revision="f" * 40, where="task a", offline=offline)
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_what_is_not_there_is_named_with_the_command_that_fetches_it(offline):
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        open_data_set("me/no", split="test", config="small", revision="v1", where="task a", offline=offline)
    [line] = str(caught.value).splitlines()
    assert line.startswith("task a: data set me/no: is not on this machine, and ")
    command = "import datasets; datasets.load_dataset('me/no', 'small', revision='v1')"
    assert line.endswith(f'(fetch it by: python -c "{command}")')
    assert ("the Hub could not be asked: " in line) is not offline
    assert time.monotonic() - start < 20  # the library itself tries for half a minute


def test_a_revision_that_the_hub_does_not_know(monkeypatch):
    from huggingface_hub import HfApi, errors

    def unknown(*_, **__):
        raise errors.RevisionNotFoundError.__new__(errors.RevisionNotFoundError)  # made, it wants an answer over HTTP

    monkeypatch.setattr(HfApi, "dataset_info", unknown)
    with pytest.raises(ConfigError, match="me/no: there is no revision 'v1'"):
        open_data_set("me/no", split="test", config="small", revision="v1", where="task a", offline=False)

    def nobodys(*_, **__):
        raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)

    monkeypatch.setattr(HfApi, "dataset_info", nobodys)
    with pytest.raises(ConfigError, match="me/no: the Hub has none of this name, or it is private"):
        open_data_set("me/no", split="test", config="small", revision=None, where="task a", offline=False)


def test_the_hub_librarys_own_switch_is_obeyed(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"me/no: is not on this machine, and .* asked: .*offline"):
        open_data_set("me/no", split="test", **HERE)


def test_what_is_wrong_is_one_line(tmp_path, folder):
    def refusal(source, **arguments):
        with pytest.raises(ConfigError) as caught:
            open_data_set(str(source), **{"split": "test"} | HERE | arguments)
        [line] = str(caught.value).splitlines()
        assert line.startswith(f"task a: data set {source}: ")
        return line

    assert "there is no such folder" in refusal(tmp_path / "none")
    assert "there is no split 'train' (choose from test)" in refusal(folder, split="train")
    assert "BuilderConfig 'small' not found. Available: ['default']" in refusal(folder, config="small")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in refusal(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "test.parquet").write_bytes(b"nonsense")
    assert "cannot be read: Parquet magic bytes not found" in refusal(tmp_path / "broken")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("print('never run')")
    assert "scripts are no longer supported" in refusal(tmp_path / "code")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"the library datasets, which is not installed \(pip install"):
        open_data_set("me/no", split="test", **HERE)


def test_the_library_is_not_imported_for_nothing():
    code = "import sys, nufilt_jax.evaluation.clip.tasks; print(*{'datasets', 'transformers', 'PIL'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.split() == []
