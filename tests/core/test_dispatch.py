"""On CPU two LAPACK calls in flight freeze the process: the library must not let its callers get there."""

import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from nufilt_jax import NufiltConfig, solve_layer, solve_stack
from nufilt_jax.core import solve, subspace
from nufilt_jax.errors import ConfigError

CONFIG = NufiltConfig(filter_rank=6, adapter_rank=3, task_rank=2, steps=3)
WATCHDOG_SECONDS = 240

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
base = {n: jnp.zeros((64, 64) if "q_proj" in n else (64, 288)) for n in layers}
rule = nj.methods.get("nufilt", config)
state = rule.init(base)
for step in range(6):
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


def lapack_calls(program, *arguments):
    """(name, operands) of the LAPACK calls, and every instruction's operands, in the entry of a compiled program."""
    text = jax.jit(program).lower(*arguments).compile().as_text()
    operands = {}
    for name, body in re.findall(r"^\s*(?:ROOT )?(%[\w.-]+) = (.*)$", text, re.MULTILINE):
        operands[name] = set(re.findall(r"%[\w.-]+", body))
    calls = [name for name, body in re.findall(r"(%[\w.-]+) = (.*custom_call_target=\"lapack.*)", text)]
    return calls, operands


def depends(name, on, operands):
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current == on:
            return True
        if current not in seen:
            seen.add(current)
            todo += operands.get(current, ())
    return False


def test_two_decompositions_in_one_program_wait_for_each_other():
    """In the compiled program, where an optimization barrier would have been dropped."""

    def chained(a, b):
        _, v = jnp.linalg.eigh(a)
        return v, jnp.linalg.eigh(subspace.after(b, v))[1]

    def barrier(a, b):
        _, v = jnp.linalg.eigh(a)
        b, v = jax.lax.optimization_barrier((b, v))
        return v, jnp.linalg.eigh(b)[1]

    a = jnp.eye(8)
    for program, waits in ((chained, True), (barrier, False)):
        (first, second), operands = lapack_calls(program, a, a)
        found = depends(second, first, operands) or depends(first, second, operands)
        assert found == waits


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
    with pytest.raises(ConfigError, match="solve_stack is the batched form"):
        jax.vmap(lambda d, t: solve_layer(d, t, config=CONFIG, adapter_init=jnp.zeros((3, 16))))(d, t)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_solve_exports_for_every_platform_and_never_asks_the_host(platform):
    shape = jax.ShapeDtypeStruct((2, 300, 288), jnp.float32)
    start = jax.ShapeDtypeStruct((2, 3, 288), jnp.float32)

    def program(d, t, a):
        return solve.solve_group((d,), (t,), a, config=CONFIG)

    exported = jax.export.export(jax.jit(program), platforms=[platform])(shape, shape, start)
    assert exported.platforms == (platform,)
    assert not re.search("python_(cpu|gpu|tpu)?_?callback|CallbackTo", exported.mlir_module())
