"""`--devices`: in a process with eight simulated ones."""

import json

import model_builders as build
import numpy as np

SIMULATED = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def moved(folder, base):
    return {name: x - base[name] for name, x in build.weights(folder).items()}


def differences(folder, other, base):
    """How far each update is off, as a share of it."""
    pairs = ((one, moved(other, base)[name]) for name, one in moved(folder, base).items() if one.any())
    return [np.linalg.norm(one - two) / np.linalg.norm(one) for one, two in pairs]


def test_eight_devices_give_the_weights_of_one(shared_models, tmp_path, nufilt, finish, command):
    """Of an interrupted merge too, and of one that is added to, whatever their numbers of devices."""
    assert nufilt(*command(shared_models, tmp_path / "one", n=4)).code == 0
    out = tmp_path / "out"
    interrupted = "import nufilt_jax.engine.walk as w, sys; from nufilt_jax.cli import main; keep = w.Walk._keep\n"
    interrupted += "def stop(walk):\n    keep(walk)\n    if len(walk.rows[0].records) == 2: raise KeyboardInterrupt\n"
    interrupted += "w.Walk._keep = stop; w.KEPT_EVERY = 0; sys.exit(main(sys.argv[1:]))"
    argv = command(shared_models, out, "--json")
    stopped = finish("-c", interrupted, *argv, "--devices", "8", env=SIMULATED)
    assert stopped.code == 130, stopped.err
    resumed = nufilt(*argv)
    assert (resumed.code, [step["resumed"] for step in resumed.json["steps"]]) == (0, [True, True, False])
    task = f"delta={shared_models / 'delta'}"
    added = finish("-m", "nufilt_jax.cli", "add", out, "--task", task, "--devices", "all", "--json", env=SIMULATED)
    assert added.code == 0, added.err
    assert json.loads(added.out)["device"].endswith(", 8 of them")
    found = differences(tmp_path / "one", out, build.weights(shared_models / "base"))
    assert len(found) == len(build.SELECTED)
    assert 0 < max(found) < 2e-5  # some steps were another program's


def test_what_a_method_makes_of_them(shared_models, tmp_path, nufilt, command):
    """All devices of this process are one: what says that they are of no use must not be said."""
    result = nufilt(*command(shared_models, tmp_path / "out", "--method", "weight_average", "--devices", "all", n=2))
    assert (result.code, result.err) == (0, "")


def test_a_method_that_has_no_use_for_them(shared_models, tmp_path, finish, command):
    argv = command(
        shared_models, tmp_path / "out", "--method", "weight_average", "--devices", "3", "--plan", "--json", n=2
    )
    result = finish("-m", "nufilt_jax.cli", *argv, env=SIMULATED)
    said = "--devices: no effect: weight_average does not solve layer by layer, and runs on one device"
    assert (result.code, result.err) == (0, f"nufilt: warning: {said}\n")
    assert said in json.loads(result.out)["warnings"]
