import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse

import adapter_builders as adapters
import numpy as np
import pytest
from checkpoint_builders import (
    HIDDEN,
    WIDTH,
    bits_equal,
    flax_vision_tree,
    folder_bytes,
    vision_tower,
    write_flax,
    write_safetensors,
)

from nufilt_jax.checkpoints import open_checkpoint, open_task, parse_source
from nufilt_jax.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def test_parse_source(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert parse_source("org/name") == ("org/name", None)
    assert parse_source("org/name@v1.0") == ("org/name", "v1.0")
    assert parse_source("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    assert parse_source(f"{tmp_path}/a@b") == (f"{tmp_path}/a@b", None)
    assert parse_source(f"{tmp_path}/a@b@main") == (f"{tmp_path}/a@b", "main")
    assert parse_source("name@") == ("name@", None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub library's cache, in a folder of the test's own."""
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return folder


def fill(cache, name, source, ref="main"):
    """Lays a folder out as the cache does: blobs, links to them, and the commit that a branch means."""
    root = cache / f"models--{name.replace('/', '--')}"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (root / folder).mkdir(parents=True)
    (root / "refs" / ref).write_text(COMMIT)
    for path in source.iterdir():
        shutil.copy(path, root / "blobs" / path.name)
        (root / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{path.name}")


def refusal(*args, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(*args, **options)
    [problem] = caught.value.problems
    return str(problem)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_offline_reads_the_cache(tmp_path, cache, revision):
    fill(cache, "org/tiny", write_safetensors(tmp_path / "m", vision_tower(), shards=2))
    found = open_checkpoint("org/tiny", revision=revision, offline=True, role="base")
    assert (found.source, found.revision) == ("org/tiny", COMMIT)
    assert bits_equal(found.read([FC1])[FC1], vision_tower()[FC1])
    assert len(found.sha256()) == 2


def test_offline_says_what_the_cache_lacks(tmp_path, cache):
    line = refusal("org/tiny", offline=True)
    assert line.startswith("org/tiny: there is no such folder, and the local Hub cache does not hold it (")
    fill(cache, "org/tiny", write_safetensors(tmp_path / "m", vision_tower(), shards=2))
    assert "does not hold it at revision 'v2'" in refusal("org/tiny", revision="v2", offline=True)
    (cache / "models--org--tiny" / "blobs" / "model-00002-of-00002.safetensors").unlink()
    assert refusal("org/tiny", offline=True).startswith(
        "org/tiny/model-00002-of-00002.safetensors: is missing; the index puts 5 tensors there"
    )


@pytest.mark.parametrize(
    "source",
    [
        "./org",
        "../org",
        "a/b/c",
        "~/nope",
        "~nobody-here/x",
        "org//x",
        "-x",
        "a--b",
        "x y",
        "/no",
        "",
        "x/" * 3000,
    ],
    ids=lambda source: source[:20],
)
def test_what_cannot_be_a_hub_id_is_not_looked_up(source, monkeypatch):
    monkeypatch.setattr("nufilt_jax.checkpoints.hub._locate_on_hub", None)
    assert "there is no such folder (check the path)" in refusal(source)


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("org/base/", "org/base"),
        ("https://huggingface.co/org/base", "org/base"),
        ("https://huggingface.co/org/base/tree/main", "org/base@main"),
        ("https://mirror.example/org/base/blob/v1.0/config.json", "org/base@v1.0"),
        ("huggingface.co/org/base/", "org/base"),
        ("hf://org/base", "org/base"),
    ],
)
def test_an_address_of_the_hub_is_told_as_an_id(source, meant):
    expected = f"there is no such folder (check the path, or for a model of the Hub give {meant})"
    assert refusal(source) == f"{source}: {expected}"


def test_a_cache_that_cannot_be_written_is_told(tmp_path, hub, cache):
    hub.repos["org/tiny"] = write_safetensors(tmp_path / "repo", vision_tower())
    cache.write_text("no folder")
    line = refusal("org/tiny")
    assert "and the Hub's cache cannot be used: " in line and str(cache) in line
    assert line.endswith("(set HF_HOME to a folder with room that can be written)")


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's interface as fetching a model needs."""

    repos: dict  # name -> folder on disk, or the HTTP status to answer
    requests: list

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.unquote(self.path.partition("?")[0])
        self.requests.append((self.command, url, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/(.+))?", url)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", url)
        repo = self.repos.get((api or file)[1]) if api or file else None
        if repo is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif isinstance(repo, tuple):
            self._send(repo[0], {"error": "no"}, {"X-Error-Code": repo[1]})
        elif api and api[2] == "revision" and api[3] not in ("main", COMMIT):
            self._send(404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        elif api:
            self._send(200, self._listing(api[1], repo, is_tree=api[2] == "tree"))
        elif file and (repo / file[3]).is_file():
            self._send_file((repo / file[3]).read_bytes(), file[3])
        else:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    def _listing(self, name, repo, *, is_tree):
        files = sorted((path.relative_to(repo).as_posix(), path.stat().st_size) for path in repo.rglob("*.*"))
        if is_tree:
            return [{"type": "file", "path": f, "size": size, "oid": f.replace("/", "-")} for f, size in files]
        siblings = [{"rfilename": f, "size": size} for f, size in files]
        return {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }

    def _send_file(self, data, name):
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._send(206, data[start:stop], headers)
        else:
            self._send(200, data, headers)

    def _send(self, status, body, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(cache, monkeypatch):
    """A Hub on this machine: `hub.repos` to fill, `hub.requests` to look at."""
    handler = type("Handler", (_Hub,), {"repos": {}, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        _point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield handler
        server.shutdown()
        thread.join()


def _point_at(monkeypatch, endpoint):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_downloads_the_weights_of_one_format_and_what_lies_beside(tmp_path, hub, cache, capfd):
    repo = write_safetensors(tmp_path / "repo", vision_tower(), shards=2)
    write_flax(repo, flax_vision_tree(vision_tower()))
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(b"not needed")
    beside = ("own.py", "x.tiktoken", "[odd]*?.txt", "2_Dense/config.json", "2_Dense/model.safetensors")
    for name in beside:
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(b"a part")
    hub.repos["org/tiny"] = repo
    found = open_checkpoint("org/tiny", role="base")
    assert (found.revision, found.format) == (COMMIT, "safetensors")
    assert bits_equal(found.read([FC1])[FC1], vision_tower()[FC1])
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    assert set(folder_bytes(found.path)) == {*shards, index, "config.json", "tokenizer.json", *beside}
    assert open_checkpoint("org/tiny", offline=True).read().keys() == found.tensors.keys()
    assert capfd.readouterr().out == ""


def test_of_a_task_only_what_its_weights_mean_is_downloaded(tmp_path, hub, cache):
    repo = write_safetensors(tmp_path / "repo", vision_tower())
    (repo / "2_Dense").mkdir()
    for name in ("own.py", "2_Dense/model.safetensors"):
        (repo / name).write_bytes(b"a part")
    hub.repos["org/tiny"] = repo
    lean = {"model.safetensors", "config.json", "tokenizer.json"}
    assert set(folder_bytes(open_checkpoint("org/tiny", revision=COMMIT).path)) == lean
    whole = open_checkpoint("org/tiny", revision=COMMIT, role="base")  # though the cache has all of its weights
    assert set(folder_bytes(whole.path)) == lean | {"own.py", "2_Dense/model.safetensors"}


def test_headers_only_fetches_no_weight_and_writes_nothing(tmp_path, hub, cache):
    hub.repos["org/tiny"] = write_safetensors(tmp_path / "repo", vision_tower(), shards=2)
    hub.repos["org/flax"] = write_flax(tmp_path / "flax", flax_vision_tree(vision_tower()))
    for name in ("org/tiny", "org/flax"):
        found = open_checkpoint(name, headers_only=True, role="base")
        assert {n: i.shape for n, i in found.tensors.items()} == {n: v.shape for n, v in vision_tower().items()}
        with pytest.raises(CheckpointError, match="only its headers were fetched"):
            found.read()
    assert not cache.exists()
    assert all(span for _, url, span in hub.requests if "/resolve/" in url)


def test_headers_only_prefers_the_cache(tmp_path, hub, cache):
    fill(cache, "org/tiny", write_safetensors(tmp_path / "m", vision_tower()))
    assert open_checkpoint("org/tiny", headers_only=True).read().keys() == vision_tower().keys()
    assert hub.requests == []


def test_an_adapter_is_downloaded_with_its_config(tmp_path, hub, cache):
    """And planned from its header alone, without a download."""
    base = open_checkpoint(str(write_safetensors(tmp_path / "base", vision_tower())), role="base")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, WIDTH), (HIDDEN, 2)))
    how = {"target_modules": ["fc1"], "lora_alpha": 2}
    hub.repos["org/lora"] = adapters.write(tmp_path / "lora", {FC1.removesuffix(".weight"): (a, b)}, **how)
    planned = open_task("org/lora", base, headers_only=True)
    assert planned.factors[FC1].rank == 2 and not cache.exists()
    found = open_task("org/lora", base)
    assert found.revision == COMMIT
    assert set(folder_bytes(found.path)) == {"adapter_model.safetensors", "adapter_config.json"}
    np.testing.assert_allclose(np.matmul(*found.unread([FC1]).change(FC1)), b @ a, rtol=1e-6)


def test_a_pickle_is_refused_before_any_download(tmp_path, hub, cache):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "pytorch_model.bin").write_bytes(b"never fetched")
    hub.repos["org/tiny"] = tmp_path / "repo"
    assert refusal("org/tiny").startswith("org/tiny/pytorch_model.bin: is a pickle, which can run any code")
    assert not any("resolve" in url for _, url, _ in hub.requests)


def test_every_refusal_of_the_hub_is_one_line(tmp_path, hub, cache):
    hub.repos["org/tiny"] = write_safetensors(tmp_path / "repo", vision_tower())
    hub.repos["org/gated"] = (403, "GatedRepo")
    hub.repos["org/down"] = (400, "")
    assert refusal("org/none").startswith("org/none: there is no such folder, and the Hub has no such model")
    assert refusal("org/tiny", revision="v9").startswith("org/tiny: the Hub's model has no revision 'v9'")
    assert refusal("org/gated").startswith("org/gated: is gated on the Hub (accept its terms")
    assert "the Hub could not be asked: " in refusal("org/down")


def test_a_hub_that_does_not_answer_raises_a_class_that_users_know(hub):
    hub.repos["org/down"] = (400, "")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/down")
    assert type(caught.value) is CheckpointError


def test_without_network_the_cache_serves(tmp_path, cache, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        _point_at(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
        line = refusal("org/tiny")
        assert line.startswith("org/tiny: there is no such folder, and the Hub could not be asked: ")
        fill(cache, "org/tiny", write_safetensors(tmp_path / "m", vision_tower()))
        assert open_checkpoint("org/tiny").revision == COMMIT


def test_a_closed_port_is_one_line_within_seconds(tmp_path):
    code = (
        "from nufilt_jax.checkpoints import load\n"
        "from nufilt_jax.errors import NufiltError\n"
        "try: load('org/tiny')\n"
        "except NufiltError as error: print(error)\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert len(done.stdout.splitlines()) == 1 and "the Hub could not be asked" in done.stdout
    assert done.stderr == "" and not list(tmp_path.iterdir())


def test_local_folders_need_neither_jax_nor_the_hub_library(tmp_path):
    folder = write_flax(tmp_path / "m", flax_vision_tree(vision_tower()))
    code = (
        "import sys\nfrom nufilt_jax.checkpoints import open_checkpoint\n"
        f"open_checkpoint({str(folder)!r}).read()\n"
        "print(sorted({'jax', 'flax', 'huggingface_hub', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
