"""On CPU two LAPACK calls in flight freeze the process: the library must not let its callers get there."""

import dataclasses
import itertools
import re
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from nufilt_jax import NufiltConfig, solve_layer, solve_stack
from nufilt_jax.core import solve
from nufilt_jax.errors import ConfigError
from nufilt_jax.linalg import dispatch

CONFIG = NufiltConfig(filter_rank=6, adapter_rank=3, task_rank=2, steps=3)
WATCHDOG_SECONDS = 480

# Everything a caller may do wrong, on two cores: stacks of two shapes without waiting, threads, one jitted program.
CALLER = """
import os, threading
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
import nufilt_jax as nj

config = nj.NufiltConfig(filter_rank=6, adapter_rank=3, task_rank=2, steps=3)
key = jax.random.key(0)
tall, wide = jax.random.normal(key, (2, 4, 300, 288)), jax.random.normal(key, (2, 4, 60, 64))
starts = jnp.full((4, 3, 288), 0.01), jnp.full((4, 3, 64), 0.01)

def both(tall, wide):
    one = nj.solve_stack(*tall, config=config, adapter_init=starts[0])
    two = nj.solve_stack(*wide, config=config, adapter_init=starts[1])
    return one.update, two.update

def worker():
    for _ in range(4):
        both(tall, wide)

for _ in range(4):
    both(tall, wide)
threads = [threading.Thread(target=worker) for _ in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
together = jax.jit(both)
for _ in range(8):
    out = together(tall, wide)
jax.block_until_ready(out)

layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)]
layers += [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)]
layers += [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(4)]
shapes = {"q_proj": (64, 64), "down_proj": (64, 288), "gate_proj": (96, 64)}  # two stacks of one width, one of another
base = {n: jnp.zeros(shapes[n.split(".")[-2]]) for n in layers}
rule = nj.methods.get("nufilt", config)
state = rule.init(base)
for step in range(30):
    task = {n: jax.random.normal(jax.random.key(step), x.shape) for n, x in base.items()}
    state = rule.update(state, task)
print("alive")
"""


def test_callers_cannot_make_it_hang():
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CALLER)],
        capture_output=True,
        text=True,
        timeout=WATCHDOG_SECONDS,
        check=False,
    )
    assert found.stdout.strip() == "alive", found.stderr


def computations(program, *arguments):
    """{computation: {instruction: (operands, computations it calls, is a LAPACK call)}} of a compiled program."""
    found, current = {}, {}
    for line in jax.jit(program).lower(*arguments).compile().as_text().splitlines():
        if opening := re.match(r"(?:ENTRY )?(%[\w.-]+) .*\{$", line):
            current = found.setdefault(opening[1], {})
        elif row := re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (.*)$", line):
            words = set(re.findall(r"%[\w.-]+", row[2]))
            current[row[1]] = (words, 'custom_call_target="lapack' in row[2])
    return {
        name: {i: (words & rows.keys(), words & found.keys(), lapack) for i, (words, lapack) in rows.items()}
        for name, rows in found.items()
    }


def unordered_lapack_calls(found):
    """Pairs of instructions that call LAPACK, themselves or within, of which neither waits for the other."""
    bearing = {name for name, rows in found.items() if any(lapack for _, _, lapack in rows.values())}
    while more := {n for n, rows in found.items() if any(c & bearing for _, c, _ in rows.values())} - bearing:
        bearing |= more
    pairs = []
    for rows in found.values():
        calls = [i for i, (_, called, lapack) in rows.items() if lapack or called & bearing]
        waits = {i: reachable(i, rows) for i in calls}
        pairs += [(a, b) for a, b in itertools.combinations(calls, 2) if a not in waits[b] and b not in waits[a]]
    return pairs, bearing


def reachable(start, rows):
    seen, todo = set(), [start]
    while todo:
        for operand in rows[todo.pop()][0] - seen:
            seen.add(operand)
            todo.append(operand)
    return seen


@pytest.mark.parametrize("decomposition", ["auto", "eigh", "svd", "subspace"])
@pytest.mark.parametrize("width", [48, 288])
def test_in_one_program_every_decomposition_waits_for_the_one_before(decomposition, width):
    """In the compiled program of a group of three stacks, its loops and branches included."""
    config = NufiltConfig(filter_rank=6, adapter_rank=3, task_rank=2, steps=3, decomposition=decomposition)
    stacks = tuple(jnp.zeros((2, m, width)) for m in (24, 48, 96))

    def program(d, t, a):
        return solve.solve_group(d, t, a, config=config)

    pairs, bearing = unordered_lapack_calls(computations(program, stacks, stacks, jnp.zeros((6, 3, width))))
    assert bearing
    assert pairs == []


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "closed_form", "decomposition": "eigh"},
        {"solver": "closed_form"},
        {"solver": "closed_form", "task_rank": 0},
        {"solver": "closed_form", "filter_rank": 0},
        {"adapter_rank": 0, "task_rank": 0, "steps": 0},
        {"adapter_rank": 0},
        {"filter_rank": 0},
    ],
    ids=str,
)
def test_whatever_the_solver_and_the_ranks_they_wait(changes):
    """Where a rank is 0, updates or losses depend on no decomposition. One layer each: no loop orders the stacks."""
    config = dataclasses.replace(CONFIG, **{"decomposition": "svd", **changes})
    stacks = tuple(jnp.zeros((1, m, 48)) for m in (24, 48))

    def program(d, t, a):
        return solve.solve_group(d, t, a, config=config)

    start = jnp.zeros((2, config.trained_rank, 48))
    pairs, bearing = unordered_lapack_calls(computations(program, stacks, stacks, start))
    assert bearing
    assert pairs == []


def test_cuts_at_ranks_that_are_data_wait_too():
    stacks = tuple(jnp.zeros((1, m, 48)) for m in (24, 48))

    def program(d, t, a, ranks):
        return solve.solve_group(d, t, a, config=CONFIG, ranks=ranks)

    start = jnp.zeros((2, CONFIG.trained_rank, 48))
    pairs, bearing = unordered_lapack_calls(computations(program, stacks, stacks, start, jnp.asarray([3, 1])))
    assert bearing
    assert pairs == []


def test_the_closed_form_calls_lapack_for_its_directions_alone():
    config = dataclasses.replace(CONFIG, solver="closed_form", filter_rank=0, task_rank=0)
    stack = jnp.ones((2, 24, 48))

    def program(d, t, a):
        return solve.solve_group((d,), (t,), a, config=config)

    assert unordered_lapack_calls(computations(program, stack, stack, jnp.zeros((2, 0, 48)))) == ([], set())


def test_chunks_of_layers_wait_for_each_other():
    """As the 120 layers of a ViT-L/14 on 16 cores: no multiple of a chunk, and no second call beside the loop."""
    n_layers = 2 * dispatch.layers_at_once() + 1
    d, a = jnp.zeros((n_layers, 24, 16)), jnp.zeros((n_layers, 3, 16))

    def program(d, a):
        return solve.solve_group((d,), (d,), a, config=CONFIG)

    pairs, bearing = unordered_lapack_calls(computations(program, d, a))
    assert bearing
    assert pairs == []


def test_solves_of_one_jitted_caller_wait_for_each_other():
    d, a = jnp.ones((2, 24, 16)), jnp.zeros((2, 3, 16))

    def twice(d, a):
        return [solve_stack(d, scale * d, config=CONFIG, adapter_init=a).update for scale in (1.0, 2.0)]

    pairs, bearing = unordered_lapack_calls(computations(twice, d, a))
    assert bearing
    assert pairs == []


def test_an_optimization_barrier_would_not_do():
    """And the test above sees what is missing: the CPU compiler drops barriers."""

    def barrier(a, b):
        _, v = jnp.linalg.eigh(a)
        b, v = jax.lax.optimization_barrier((b, v))
        return v, jnp.linalg.eigh(b)[1]

    def chained(a, b):
        _, v = jnp.linalg.eigh(a)
        return v, jnp.linalg.eigh(dispatch.after(b, v))[1]

    found = {f: unordered_lapack_calls(computations(f, jnp.eye(8), jnp.eye(8)))[0] for f in (barrier, chained)}
    assert len(found[barrier]) == 1
    assert found[chained] == []


def test_a_jitted_caller_gets_the_same_numbers():
    d, t = jax.random.normal(jax.random.key(0), (2, 2, 24, 16))
    a0 = jnp.full((2, 3, 16), 0.01)
    eager = solve_stack(d, t, config=CONFIG, adapter_init=a0)

    @jax.jit
    def twice(d, t):
        one = solve_stack(d, t, config=CONFIG, adapter_init=a0)
        return one, solve_layer(d[1], t[1], config=CONFIG, adapter_init=a0[1])

    many, one = twice(d, t)
    assert float(jnp.abs(many.update - eager.update).max()) < 1e-5
    assert float(jnp.abs(one.update - eager.update[1]).max()) < 1e-5


def test_vmap_is_refused_with_the_way_out():
    d, t = jax.random.normal(jax.random.key(0), (2, 2, 24, 16))
    with pytest.raises(ConfigError, match=r"cannot be transformed by vmap or grad .solve_stack is the batched form"):
        jax.vmap(lambda d, t: solve_layer(d, t, config=CONFIG, adapter_init=jnp.zeros((3, 16))))(d, t)


@pytest.mark.parametrize("solver", ["adam", "closed_form"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_solve_exports_for_every_platform_and_never_asks_the_host(platform, solver):
    config = dataclasses.replace(CONFIG, solver=solver)
    shape = jax.ShapeDtypeStruct((2, 300, 288), jnp.float32)
    start = jax.ShapeDtypeStruct((2, config.trained_rank, 288), jnp.float32)

    def program(d, t, a):
        return solve.solve_group((d,), (t,), a, config=config)

    exported = jax.export.export(jax.jit(program), platforms=[platform])(shape, shape, start)
    assert exported.platforms == (platform,)
    assert not re.search("python_(cpu|gpu|tpu)?_?callback|CallbackTo", exported.mlir_module())


def test_on_a_gpu_every_decomposition_is_of_all_layers_at_once():
    """But for the SVD that replaces a layer's directions where they have no certificate."""
    shape, start = jax.ShapeDtypeStruct((5, 300, 288), jnp.float32), jax.ShapeDtypeStruct((5, 3, 288), jnp.float32)

    def program(d, t, a):
        return solve.solve_group((d,), (t,), a, config=CONFIG)

    module = jax.export.export(jax.jit(program), platforms=["cuda"])(shape, shape, start).mlir_module()
    calls = re.findall(r"stablehlo.custom_call @(cu\w+).*-> \(?tensor<([\dx]+)xf32>", module)
    assert {name for name, _ in calls} >= {"cusolver_syevd_ffi", "cusolver_potrf_ffi"}
    alone = {name for name, result in calls if not result.startswith("5x")}
    assert all("gesvd" in name or "geqrf" in name or "orgqr" in name for name in alone)


def test_a_gpu_takes_all_eigenvectors_of_the_main_program_in_one_call():
    """Which cuSOLVER does up to 32 columns alone: wider ones it takes layer after layer."""
    shape, start = jax.ShapeDtypeStruct((5, 300, 288), jnp.float32), jax.ShapeDtypeStruct((5, 3, 288), jnp.float32)
    config = dataclasses.replace(CONFIG, filter_rank=64, task_rank=24)

    def program(d, t, a):
        return solve.solve_group((d,), (t,), a, config=config, until_certified=False)

    module = jax.export.export(jax.jit(program), platforms=["cuda"])(shape, shape, start).mlir_module()
    widths = re.findall(r"@cusolver_syevd_ffi.*-> \(?tensor<5x(\d+)x\d+xf32>", module)
    assert widths and all(int(width) <= 32 for width in widths)


def test_layers_on_the_host_keep_their_order_and_have_one_blas_thread_each():
    def threads():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    def layer(x, y):
        time.sleep(0.02 if x == 0 else 0)
        return float(x + y), set(threads()) == {1}

    before = threads()
    stacks = np.arange(5.0), 10 * np.arange(5.0)
    assert list(dispatch.each_on_host(layer, *stacks)) == [(11.0 * i, True) for i in range(5)]
    assert threads() == before
    with pytest.raises(ZeroDivisionError):
        list(dispatch.each_on_host(lambda x: 1 // int(x), np.arange(3.0)))
    assert threads() == before
