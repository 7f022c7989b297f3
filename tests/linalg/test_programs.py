"""How programs are traced and compiled: for one platform where they run alone, for any inside a caller's."""

import jax
import jax.numpy as jnp

from nufilt_jax.linalg import programs
from nufilt_jax.linalg.programs import Program, by_platform


def test_what_the_user_tells_xla_is_left_to_them(monkeypatch):
    monkeypatch.setattr(programs, "_SOONER_ON_CPU", {"xla_one": 1, "xla_two": False})
    monkeypatch.setattr(programs, "_LAST_WITH_IT", jax.__version_info__)
    monkeypatch.setenv("XLA_FLAGS", "--xla_two_more=1")
    assert programs.options("cpu") == {"xla_one": 1, "xla_two": False}
    monkeypatch.setenv("XLA_FLAGS", "--xla_other --xla_one=3")
    assert programs.options("cpu") == {"xla_two": False} and programs.options("cpu", by_elements=True) == {}
    monkeypatch.delenv("XLA_FLAGS")
    assert programs.options("tpu") == {"optimization_level": 19}


def branching():
    """A program of two branches, and which of them are traced."""
    traced = []

    def branch(name, more):
        def added(x):
            traced.append(name)
            return x + more

        return added

    return Program(lambda x: by_platform(x, cpu=branch("cpu", 1), default=branch("default", 2))), traced


def test_alone_a_program_is_traced_for_the_platform_that_it_runs_on():
    program, traced = branching()
    there = jax.default_backend()
    assert float(program(jnp.zeros(()))) == (1 if there == "cpu" else 2)
    assert set(traced) == {"cpu": {"cpu"}, "tpu": {"default"}}.get(there, {"cpu", "default"})
    program.prepare(jnp.zeros(()))  # the same again
    assert len(traced) == len(set(traced))


def test_inside_a_callers_jit_a_program_is_traced_for_all_platforms():
    program, traced = branching()
    alone = float(program(jnp.zeros(())))
    whole = jax.jit(program)
    assert float(whole(jnp.zeros(()))) == alone
    assert {"cpu", "default"} <= set(traced)
    for platform, constant in {"cpu": 1, "tpu": 2}.items():
        text = whole.trace(jnp.zeros(())).lower(lowering_platforms=(platform,)).as_text()
        assert f"dense<{constant}.0" in text and f"dense<{3 - constant}.0" not in text


def test_a_program_within_a_program_is_for_all_platforms_too():
    """What is traced in it may be kept, and come up in a caller's for another one."""
    program, traced = branching()
    outer = Program(lambda x: 2 * program(x))
    outer(jnp.zeros(()))
    assert {"cpu", "default"} <= set(traced)
