"""One recipe gives the same bits, whatever the order of hashes and files, the locale and the number of cores."""

import json
import os
import subprocess

import model_builders as build
import pytest

from nufilt_jax.linalg.dispatch import at_once


def locales():
    """Of this system, others first than those that it has without any."""
    try:
        told = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted(told, key=lambda name: (name in ("C", "POSIX"), name.startswith(("C.", "en_")), name))


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # on Linux they can be chosen
COUNTS = [n for n in (1, 2, 4) if n <= len(CORES)] or [os.cpu_count()]

LOCALES = sorted({"C", *locales()[:1]})  # one that is no English, where one is installed
ON_SOME_CORES = """
import os, sys
cores = {int(core) for core in sys.argv[1].split(",") if core}
if cores:
    os.sched_setaffinity(0, cores)
from nufilt_jax.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def merged(shared_models, tmp_path_factory, command):
    """A merge by nufilt on all cores, which tests only read."""
    from nufilt_jax.cli import main

    out = tmp_path_factory.mktemp("merge") / "out"
    assert main([*command(shared_models, out), "--quiet"]) == 0
    return out


@pytest.mark.parametrize("n_cores", COUNTS)
def test_another_process_on_so_many_cores_finds_the_same_bits(merged, finish, n_cores):
    environment = {"PYTHONHASHSEED": str(6 + n_cores), "LC_ALL": LOCALES[n_cores % len(LOCALES)], "TZ": "Asia/Tokyo"}
    cores = ",".join(map(str, CORES[:n_cores]))
    told = finish("-c", ON_SOME_CORES, cores, "verify", merged, "--json", env=environment)
    assert told.code == 0, told.err
    assert told.json["bit_for_bit"]
    assert told.json["recomputed"]["identical"] == told.json["recomputed"]["tensors"] > 0


def test_four_layers_at_a_time_give_the_same_bits_twice(shared_models, tmp_path, nufilt, command):
    """As a machine of four cores merges; `verify` takes the number from the recipe, on whatever cores."""
    out = tmp_path / "out"
    with at_once(4):
        assert nufilt(*command(shared_models, out, n=2)).code == 0
    assert json.loads((out / "nufilt.json").read_text())["host"]["layers_at_once"] == 4
    told = nufilt("verify", out, "--json")
    assert told.code == 0, told.err
    assert told.json["bit_for_bit"] and told.json["recomputed"]["identical"] == told.json["recomputed"]["tensors"] > 0


def test_the_order_of_files_and_shards_does_not_matter(shared_models, tmp_path, nufilt, command):
    names = ("base", *build.TASKS[:3])
    for number, name in enumerate(names):
        tensors = build.weights(shared_models / name)
        shuffled = dict(sorted(tensors.items(), key=lambda row: row[0][::-1]))
        build.write(tmp_path / "models" / name, shuffled, shards=number + 1)
    for models, out in ((shared_models, "whole"), (tmp_path / "models", "shards")):
        assert nufilt(*command(models, tmp_path / out)).code == 0
    whole, shards = (build.weights(tmp_path / out) for out in ("whole", "shards"))
    assert whole.keys() == shards.keys()
    assert all(build.same_bits(whole[name], shards[name]) for name in whole)
