"""What a merge takes is planned from shapes: against the compiled programs' own account, and at the edges."""

import jax
import jax.numpy as jnp
import pytest

from nufilt_jax import NufiltConfig
from nufilt_jax.engine import memory
from nufilt_jax.engine.grid import Stack
from nufilt_jax.engine.memory import RUNTIME, Reach, Sizes, largest_on_device, parse_size, plan_windows, workspace
from nufilt_jax.errors import ConfigError
from nufilt_jax.linalg.dispatch import layers_at_once
from nufilt_jax.methods import nufilt

MB = 10**6


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8GB", 8 * 10**9), ("8GiB", 8 << 30), ("512 mib", 512 << 20), ("1.5TB", 15 * 10**11), ("70000B", 70000)],
)
def test_a_size_is_read(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8 apples", "0GB", "1e9", "8GB8", "9" * 40, "∞GB"])
def test_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"max_memory must be a size as 8GB or 8GiB"):
        parse_size(text)


@pytest.mark.parametrize("shape", [(256, 256), (768, 768), (768, 256), (128, 768)], ids=str)
@pytest.mark.parametrize(
    "config", [NufiltConfig(), NufiltConfig(filter_rank=16, adapter_rank=8, steps=3)], ids=["paper", "small"]
)
def test_the_workspace_is_what_the_compiler_says(shape, config):
    if jax.default_backend() != "cpu":
        return  # there all layers are solved at once
    chunk, n_layers = layers_at_once(), 2 * layers_at_once()
    stack = jax.ShapeDtypeStruct((n_layers, *shape), jnp.float32)
    keys = jax.ShapeDtypeStruct((n_layers, 2), jnp.uint32)
    lowered = nufilt._step.lower((stack,), (stack,), keys, config=config, until_certified=False)
    said = lowered.compile().memory_analysis().temp_size_in_bytes
    assert 0.75 * said <= workspace(shape, chunk, config) <= 2 * said


SIZES = Sizes(workspace=10 * MB, tensor=20 * MB, stored=5 * MB, model=0)
STACK = Stack(tuple(f"layer{i:02}" for i in range(40)), (5 * MB,), 2, 2, 2)  # 20 MB each


LAYERS = Reach()


def planned(cap, reach=LAYERS):
    return plan_windows([STACK], SIZES, reach, cap, lambda _: 0, 0, n_tasks=2)


def test_a_model_that_fits_is_one_window():
    rows, found = planned(RUNTIME + 3 * STACK.total + 100 * MB)
    assert len(rows) == 1 and found.read_ahead and found.planned <= found.allowed


@pytest.mark.parametrize("cap", [RUNTIME + n * MB for n in (400, 700, 1100, 2000)])
def test_what_is_planned_is_under_the_cap(cap):
    rows, found = planned(cap)
    assert found.planned <= cap and len(rows) > 1
    assert sum(row.n_bytes for row in rows) == STACK.total


def test_with_little_room_nothing_is_read_ahead():
    rows, found = planned(RUNTIME + 10 * MB + 40 * MB + 2 * 80 * MB)
    assert not found.read_ahead and {len(row.layers) for row in rows} == {4}


def test_an_impossible_cap_is_refused_with_the_least_that_would_do():
    with pytest.raises(ConfigError, match="GB are too little") as caught:
        planned(RUNTIME)
    least = parse_size(caught.value.problems[0].fix.split("--max-memory ")[1].rstrip(")"))
    assert planned(least)[1].planned <= least
    with pytest.raises(ConfigError):
        planned(least - 2 * MB)


def test_a_rule_of_the_whole_model_has_one_window_or_none():
    reach = Reach(states=2, workspace=2.0, whole_model=True)
    rows, _ = planned(RUNTIME + 7 * STACK.total, reach)
    assert len(rows) == 1
    with pytest.raises(ConfigError, match="with all layers together, as this method needs"):
        planned(RUNTIME + 3 * STACK.total, reach)


def test_without_a_cap_half_of_what_is_free_is_taken(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * (RUNTIME + 1100 * MB))
    rows, found = planned(None)
    assert len(rows) > 1 and found.told().by == "half of what is free"
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    assert planned(None)[0]  # nobody asked for a cap: it is tried


def test_windows_fit_on_the_device():
    """Whatever there is beside it: D, τ, the next τ and what the programs of all layers at once take."""
    there, plenty = 2000 * MB, RUNTIME + 10 * STACK.total
    matrices = [Stack(STACK.layers, (2000, 2500), 2, 2, 2)]
    most = largest_on_device(there, matrices, NufiltConfig(), Reach())
    programs = most / matrices[0].n_bytes * workspace(matrices[0].shape, 1, NufiltConfig())
    assert 3 * most + programs == pytest.approx(0.9 * there)
    rows, found = planned(plenty, Reach(on_device=most))
    assert len(rows) > 1 and max(row.n_bytes for row in rows) <= most
    assert sum(row.n_bytes for row in rows) == STACK.total and found.planned < plenty
    assert len(planned(plenty, Reach(on_device=STACK.total))[0]) == 1


def test_programs_of_layers_in_factors_take_a_device_no_more_than_those():
    stack, whole = (Stack(("layer",), (4096, 4096), ranks=ranks) for ranks in ((16, 16), None))
    in_factors, dense = (largest_on_device(2000 * MB, [x], NufiltConfig(), Reach()) / x.n_bytes for x in (stack, whole))
    assert in_factors > 10 * dense


def group(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_what_a_container_or_a_batch_job_leaves_is_what_is_free(tmp_path):
    """Of every group around the process; files in memory give way, and most groups have no limit."""
    told, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    told.write_text("0::/job/step\n")
    stat = "anon 5\ninactive_file 20\nactive_file 10"
    group(mounted / "job" / "step", {"memory.max": "max", "memory.current": 70, "memory.stat": stat})
    group(mounted / "job", {"memory.max": 100, "memory.current": 80, "memory.stat": stat})
    assert list(memory.left_in_groups(told, mounted)) == [50]
    group(mounted, {"memory.max": 60, "memory.current": 95, "memory.stat": stat})  # in a container: its own
    assert sorted(memory.left_in_groups(told, mounted)) == [0, 50]
    first = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 900, "memory.stat": "total_inactive_file 100"}
    told.write_text("12:cpu:/x\n9:memory:/job\n")
    group(mounted / "memory" / "job", first)
    assert list(memory.left_in_groups(told, mounted)) == [200]
    assert list(memory.left_in_groups(tmp_path / "none", mounted)) == []
    assert memory.free_memory() > 0


@pytest.mark.parametrize("reach", [Reach(on_device=60 * MB), Reach(on_device=700 * MB, whole_model=True)])
def test_a_device_that_is_too_small_is_refused(reach):
    with pytest.raises(ConfigError, match=r"device: its memory takes 0\.\d+ GB of D at a time, and .* have 0\.\d+ GB"):
        planned(RUNTIME + 10 * STACK.total, reach)


def test_what_an_earlier_run_has_left_may_divide_too_coarsely():
    """Twelve layers in chunks of four make no two windows; of all 24 eight would be a window's most."""
    stack = Stack(tuple(f"layer{i:02}" for i in range(24)), (5 * MB,), 4, 4, 2)
    half = {name: 2 for name in stack.layers[:12]}

    def planned(cap, done):
        return plan_windows([stack], SIZES, LAYERS, cap, lambda layer: done.get(layer, 0), 0, n_tasks=3)

    cap = SIZES.peak(8 * 20 * MB, 2, LAYERS, read_ahead=False)
    assert planned(cap, {})[1].planned <= cap
    with pytest.raises(ConfigError, match="GB are too little") as caught:
        planned(cap, half)
    enough = parse_size(caught.value.problems[0].fix.split("--max-memory ")[1].rstrip(")"))
    assert planned(enough, half)[1].planned <= enough
    # Windows that have all tasks are not worked on.
    assert planned(cap, dict.fromkeys(stack.layers, 3))[1].planned <= cap
