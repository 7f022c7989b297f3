"""One recipe gives the same bits, whatever the order of hashes and files, the locale and the number of cores."""

import os

import model_builders as build
import pytest

ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
from nufilt_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be chosen on Linux alone")
def test_another_process_on_one_core_finds_the_same_bits(shared_models, tmp_path, nufilt, finish, command):
    out = tmp_path / "out"
    assert nufilt(*command(shared_models, out)).code == 0
    environment = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "LANG": "C", "TZ": "Asia/Tokyo"}
    told = finish("-c", ON_ONE_CORE, "verify", out, "--json", env=environment)
    assert told.code == 0, told.err
    assert told.json["bit_for_bit"]
    assert told.json["recomputed"]["identical"] == told.json["recomputed"]["tensors"] > 0


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
