"""Merges with the layers divided among eight simulated devices, on two cores; prints what the test looks at as JSON."""

import json
import os
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

import nufilt_jax as nj
from nufilt_jax.compile_cache import enable_compile_cache
from nufilt_jax.linalg.spread import AXIS, laid_out, layer_mesh, spread_program
from nufilt_jax.methods.nufilt import _stack_by_stack
from nufilt_jax.methods.starts import adapter_keys

N_LAYERS = 11  # on eight devices two each, and none on the last two
COLLECTIVE = re.compile(r"= .*?\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter|send|recv)[-\w]*\(")
CONFIG = nj.NufiltConfig(filter_rank=6, adapter_rank=4, task_rank=2, steps=5)
CONFIGS = {"nufilt": CONFIG, "wudi": None, "opcm": None, "iso_c": None}
SHAPES = {f"model.layers.{i}.{part}": (m, 32) for i in range(N_LAYERS) for part, m in (("a.weight", 32), ("b", 40))}
SHAPES["model.layers.0.c"] = (24, 32)  # alone of its shape: it lies on the first device as it is


def tasks():
    rng = np.random.default_rng(0)
    return [{n: 0.01 * rng.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()} for _ in range(2)]


def merged(method, config, mesh):
    rule = nj.methods.get(method, config, mesh=mesh, layers="layers")
    state = rule.init({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
    for task in tasks():
        state = rule.update(state, task)
    assert {device for x in state.delta.stacks for device in jnp.asarray(x).devices()} == {jax.devices()[0]}
    assert set(state.report) == (set(SHAPES) if method in ("nufilt", "wudi") else set())
    return {name: np.asarray(x) for name, x in state.delta.items()}


def difference(one, other):
    return max(float(np.linalg.norm(one[n] - other[n]) / np.linalg.norm(one[n])) for n in one)


def collectives(mesh, turn):
    """Of the program of a step, as it is compiled for all devices."""
    d = (jnp.zeros((N_LAYERS, 32, 32)), jnp.zeros((N_LAYERS, 40, 32)))
    keys = adapter_keys(0, 1, tuple(map(str, range(N_LAYERS))))
    stacks, others = laid_out(d, mesh), laid_out(tuple((x, keys) for x in d), mesh)
    how = {"function": _stack_by_stack, "static": (("config", CONFIG),), "mesh": mesh}
    return COLLECTIVE.findall(str(spread_program.lower(stacks, others, turn, **how).compile().as_text()))


def summed(mesh):
    """What does ask the other devices, to know that it would be seen."""
    layers = jax.sharding.PartitionSpec(AXIS)
    program = jax.shard_map(lambda x: jax.lax.psum(x, AXIS), mesh=mesh, in_specs=layers, out_specs=layers)
    return COLLECTIVE.findall(str(jax.jit(program).lower(jnp.zeros(8)).compile().as_text()))


def main():
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    enable_compile_cache()
    mesh = layer_mesh(jax.devices())
    turns = laid_out(jnp.arange(8) == 1, mesh)
    found = {"collectives": [collectives(mesh, turn) for turn in (None, turns)], "summed": summed(mesh)}
    found["differences"] = {}
    for method, config in CONFIGS.items():
        one = merged(method, config, None)
        found["differences"][method] = difference(one, merged(method, config, mesh))
    # Several threads, with and without the mesh, of which none waits for another by itself.
    threads = [threading.Thread(target=merged, args=("nufilt", CONFIG, mesh)) for mesh in 2 * (mesh, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
