import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle_adaptation
import oracle_wemoe as oracle
import pytest

from nufilt_jax import methods
from nufilt_jax.errors import SolveError
from nufilt_jax.methods import adaptation, matrices, wemoe
from nufilt_jax.methods.selection import select
from nufilt_jax.methods.stacked import TaskVector, stack_names
from nufilt_jax.methods.wemoe import WemoeConfig
from nufilt_jax.models import canonical_shapes, parse_vision_config
from nufilt_jax.models.experts import gate_weights, mixed_dense

D, INNER, BLOCKS = 6, 9, 2
LAYER = "vision_model.encoder.layers.{}"
MLP = LAYER + ".mlp"
FC1, FC2 = MLP + ".fc1.weight", MLP + ".fc2.weight"
Q = LAYER + ".self_attn.q_proj.weight"
QUICK = {"first_rank": 4, "later_rank": 2, "steps": 3, "learning_rate": 3e-3}


def shapes(inner=INNER):
    found = {
        "vision_model.embeddings.position_embedding.weight": (5, D),
        "vision_model.embeddings.class_embedding": (D,),
    }
    for i in range(BLOCKS):
        for part in ("q", "k", "v", "out"):
            stem = f"{LAYER.format(i)}.self_attn.{part}_proj"
            found |= {f"{stem}.weight": (D, D), f"{stem}.bias": (D,)}
        found |= {FC1.format(i): (inner, D), FC2.format(i): (D, inner), f"{MLP.format(i)}.fc1.bias": (inner,)}
        found[f"{LAYER.format(i)}.layer_norm1.weight"] = (D,)
    return found


def model(seed, base=None, inner=INNER):
    rng = np.random.default_rng(seed)
    params = {name: 0.4 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes(inner).items()}
    if base is not None:
        params = {name: base[name] + np.float32(0.3) * x for name, x in params.items()}
    return params | {"vision_model.embeddings.position_ids": np.arange(5)[None]}


BASE = model(0)
TASKS = [model(seed, BASE) for seed in (1, 2, 3)]


def is_attention(name):
    return "self_attn" in name


def is_expert_matrix(name):
    return name.endswith((".fc1.weight", ".fc2.weight"))


def forward(params, batch):
    """Blocks without attention, built from the package's own expert layers."""
    hidden = batch
    for i in range(BLOCKS):
        weight, bias = params[Q.format(i)], params[Q.format(i).replace("weight", "bias")]
        hidden = jnp.matmul(hidden, weight.T, precision="highest") + bias[None, None]
        stem = MLP.format(i)
        gate = {"kernel": params[f"{stem}.gate.weight"].T, "bias": params[f"{stem}.gate.bias"]}
        w = gate_weights(gate, hidden)
        first, last = (layer(params, f"{stem}.{part}") for part in ("fc1", "fc2"))
        hidden = hidden + mixed_dense(last, w, jnp.tanh(mixed_dense(first, w, hidden)))
    return jnp.mean(hidden, axis=1)


answer = jax.jit(forward)


def layer(params, stem):
    numbers = {name.split(".")[-2] for name in params if name.startswith(f"{stem}.experts.")}
    experts = {n: {part: params[f"{stem}.experts.{n}.{part}"] for part in "ab"} for n in numbers}
    return {"kernel": params[f"{stem}.weight"].T, "experts": experts}


def batches(n_steps, seed=9):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(3, 4, D)).astype(np.float32) for _ in range(n_steps)]


def rule_for(**options):
    return methods.get("wemoe", WemoeConfig(**{**QUICK, **options}))


def update(state, task, rule, seed=9, **options):
    return rule.update(state, task, data=methods.TaskData(iter(batches(50, seed)), forward), **options)


def merge(tasks=TASKS, base=BASE, **options):
    rule = rule_for(**options)
    state = rule.init(base)
    for index, task in enumerate(tasks):
        state = update(state, task, rule, index)
    return state


def product(state, name, number):
    stem = wemoe.expert_name(name, number)
    return np.asarray(state.added[f"{stem}.b"], np.float64) @ np.asarray(state.added[f"{stem}.a"], np.float64)


def test_attention_is_task_arithmetic_and_the_rest_stays():
    merged = merge().merged
    for name, x in BASE.items():
        if is_attention(name):
            wanted = x + 0.3 * sum(task[name] - x for task in TASKS)
            np.testing.assert_allclose(merged[name], wanted, atol=1e-6)
            assert not np.array_equal(merged[name], x)
        else:
            np.testing.assert_array_equal(merged[name], x)


def test_every_tensor_is_touched_by_its_own_part():
    """Perturbing one tensor of a task moves that tensor if it is attention's, its own expert if it is a block's."""
    before = merge(TASKS[:1], steps=0).merged
    for name in shapes():
        task = TASKS[0] | {name: TASKS[0][name] + np.float32(1)}
        after = merge([task], steps=0).merged
        moved = {other for other in before if not np.array_equal(before[other], after[other])}
        if is_expert_matrix(name):
            assert moved == {f"{wemoe.expert_name(name, 0)}.{part}" for part in "ab"}
        else:
            assert moved == ({name} if is_attention(name) else set())


def test_experts_are_the_best_approximations():
    """‖τ − BA‖² is the tail of σ², the first with 4 directions and the later ones with 2."""
    state = merge()
    for number, (task, rank) in enumerate(zip(TASKS, (4, 2, 2), strict=True)):
        for name in filter(is_expert_matrix, BASE):
            tau = (task[name] - BASE[name]).astype(np.float64)
            a, b = (state.added[f"{wemoe.expert_name(name, number)}.{part}"] for part in "ab")
            assert (a.shape, b.shape) == ((rank, tau.shape[1]), (tau.shape[0], rank))
            tail = np.sum(np.linalg.svd(tau, compute_uv=False)[rank:] ** 2)
            assert np.sum((tau - product(state, name, number)) ** 2) == pytest.approx(tail, rel=1e-5)
            wanted_a, wanted_b = oracle.expert(tau, rank)
            np.testing.assert_allclose(product(state, name, number), wanted_b @ wanted_a, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(wanted_a, axis=1), rtol=1e-5)


def test_full_rank_and_zero_gates_are_task_arithmetic():
    """W = θ0 + 0.3 Σ τ_i for any input."""
    state = merge(first_rank=20, later_rank=20, steps=0)
    params = {n: np.zeros_like(x) if n.endswith("gate.weight") else np.asarray(x) for n, x in state.merged.items()}
    plain = {name: x for name, x in params.items() if name not in state.added}
    for name in filter(is_expert_matrix, BASE):
        plain[name] = BASE[name] + np.float32(0.3) * sum(task[name] - BASE[name] for task in TASKS)
    still = {f"{MLP.format(i)}.gate.{part}": np.zeros((1, D))[:, 0 if part == "bias" else slice(None)]
             for i in range(BLOCKS) for part in ("weight", "bias")}  # fmt: skip
    for [batch] in (batches(1, 5), batches(1, 6)):
        wanted = oracle.logits(plain | still, batch, BLOCKS)
        np.testing.assert_allclose(answer(params, batch), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["of_each", "of_mean"])
def test_gates_are_trained_as_published(kind):
    """Two tasks against the oracle: the gates of both move, all else is frozen."""
    options = {"steps": 5, "entropy": kind}
    rule, still = rule_for(**options), rule_for(**{**options, "steps": 0})
    state = rule.init(BASE)
    for number in range(2):
        start = update(state, TASKS[number], still, number)
        state = update(state, TASKS[number], rule, number)
        gates = {n: np.asarray(x, np.float64) for n, x in start.added.items() if ".gate." in n}
        frozen = {n: x for n, x in start.merged.items() if n not in gates}

        def loss(variables, batch, frozen=frozen):
            return oracle_adaptation.entropy(oracle.logits({**frozen, **variables}, batch, BLOCKS), kind)[0]

        gates, losses = oracle_adaptation.trained(loss, gates, batches(5, number), 3e-3)
        # A step is 3e-3 whatever the gradient's size; float32 forward passes leave a few 1e-6 of it open.
        for name, wanted in gates.items():
            np.testing.assert_allclose(state.added[name], wanted, atol=3e-5, err_msg=name)
        np.testing.assert_allclose(state.report["model"].losses, losses, rtol=1e-5)


def test_gates_grow_by_one_row_per_task():
    rule = rule_for(steps=0)
    states = [rule.init(BASE)]
    for task in TASKS:
        states.append(update(states[-1], task, rule))
    for i in range(BLOCKS):
        weights, biases = (
            [np.asarray(s.added[f"{MLP.format(i)}.gate.{part}"]) for s in states[1:]] for part in ("weight", "bias")
        )
        for t, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
            assert (weight.shape, bias.shape) == ((t, D), (t,))
            np.testing.assert_array_equal(weight, weights[-1][:t])  # older rows as they were
            np.testing.assert_array_equal(bias, np.full(t, np.float32(0.3)))


def test_all_rows_and_no_experts_are_trained_at_every_step():
    rule = rule_for()
    first = update(rule.init(BASE), TASKS[0], rule)
    second = update(first, TASKS[1], rule)
    for name, x in first.added.items():
        if ".experts." in name:
            np.testing.assert_array_equal(second.added[name], x)
        else:
            assert (np.asarray(second.added[name])[: len(x)] != np.asarray(x)).all()


def test_gate_starts_depend_on_seed_step_and_block():
    wide = {FC1.format(i): np.ones((4, 4000), np.float32) for i in range(BLOCKS)}
    vector = TaskVector(tuple(np.stack([x]) for x in wide.values()), tuple((name,) for name in wide))

    def rows(seed, step, names=tuple(wide)):
        state = methods.state.MergeState({}, vector, step)
        gates = wemoe.grow_gates(state, vector.only(tuple((n,) for n in names)), WemoeConfig(), seed)
        return [np.asarray(gates[f"{name.removesuffix('.fc1.weight')}.gate.weight"]) for name in names]

    first = rows(0, 0)
    np.testing.assert_array_equal(first[1], rows(0, 0, (FC1.format(1),))[0])
    others = [*first, *rows(1, 0), *rows(0, 1)]
    assert len({x.tobytes() for x in others}) == 6
    assert all(x.std() == pytest.approx(0.01, rel=0.05) and abs(x.mean()) < 1e-3 for x in others)
    assert merge(TASKS[:1], steps=0).added.keys() == merge(TASKS[1:2], steps=0).added.keys()


def test_permuting_a_batch_permutes_its_answers():
    params = {name: np.asarray(x) for name, x in merge().merged.items()}
    [batch] = batches(1, 7)
    order = np.array([2, 0, 1])
    together = answer(params, batch)
    np.testing.assert_allclose(answer(params, batch[order]), together[order], rtol=1e-4, atol=1e-5)
    assert np.abs(answer(params, batch[:1]) - together[:1]).max() > 1e-3  # but its company matters to an image


def test_parameter_count_of_table_5():
    """ViT-B/32 after 8 tasks: 103.7 M; by shapes alone."""
    base = canonical_shapes(parse_vision_config({"model_type": "clip_vision_model"}))
    names = stack_names(base, [name for name in base if wemoe.attention_and_feed_forward(name, base[name])])

    def grown():
        stacks = tuple(jnp.zeros((len(members), *base[members[0]])) for members in names)
        state = methods.state.MergeState({}, TaskVector(stacks, names))
        for step in range(8):
            task = TaskVector(tuple(x + 1 for x in stacks), names)
            delta, experts = wemoe.grow(state, task, WemoeConfig())
            added = experts | wemoe.grow_gates(state, task, WemoeConfig(), 0)
            state = dataclasses.replace(state, delta=delta, added=added, step=step + 1)
        return state.added

    added = jax.eval_shape(grown)
    count = sum(int(np.prod(shape)) for shape in base.values())
    assert count == 87_456_000
    assert count + sum(x.size for x in added.values()) == 103_749_984


@pytest.mark.parametrize("inner", [D, 1], ids=["as the attention", "single row"])
def test_blocks_of_other_shapes(inner):
    """Feed-forward matrices that share a stack with attention's, and such of one row."""
    base = model(0, inner=inner)
    tasks = [model(seed, base, inner) for seed in (1, 2)]
    state = merge(tasks, base, steps=0)
    for name, x in base.items():
        if is_attention(name):
            np.testing.assert_allclose(state.merged[name], x + 0.3 * sum(t[name] - x for t in tasks), atol=1e-6)
        elif is_expert_matrix(name):
            np.testing.assert_array_equal(state.merged[name], x)
            a, b = oracle.expert(tasks[1][name] - x, 2)
            np.testing.assert_allclose(product(state, name, 1), b @ a, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_low_rank_task_vectors(rank):
    """As of LoRA: beyond its rank an expert adds nothing."""
    rng = np.random.default_rng(8)
    task = dict(BASE)
    for name in filter(is_expert_matrix, BASE):
        m, n = BASE[name].shape
        task[name] = BASE[name] + (rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))).astype(np.float32)
    state = merge([task])
    for name in filter(is_expert_matrix, BASE):
        np.testing.assert_allclose(product(state, name, 0), task[name] - BASE[name], atol=1e-5)
        assert np.isfinite(state.added[f"{wemoe.expert_name(name, 0)}.a"]).all()


def test_experts_of_rank_zero_leave_the_feed_forward_alone():
    state = merge(TASKS[:2], first_rank=0, later_rank=0)
    assert state.added[f"{wemoe.expert_name(FC1.format(0), 1)}.a"].shape == (0, D)
    chex.assert_trees_all_equal(state.added, merge(TASKS[:2], first_rank=0, later_rank=0, steps=0).added)


def test_a_state_that_went_through_files_continues_alike():
    rule = rule_for()
    state = update(update(rule.init(BASE), TASKS[0], rule), TASKS[1], rule)
    restored = jax.tree.map(np.array, state)
    one, other = (update(s, TASKS[2], rule).merged for s in (state, restored))
    chex.assert_trees_all_equal(one, other)
    assert len(one) == len(BASE) + len(state.added) + 4 * BLOCKS


def test_update_changes_nothing_that_it_was_given():
    rule = rule_for()
    first = update(rule.init(BASE), TASKS[0], rule)
    copy = jax.tree.map(np.array, first)
    update(first, TASKS[1], rule)
    chex.assert_trees_all_equal(first, copy)


def test_second_merge_compiles_nothing_and_experts_share_a_program():
    merge()
    programs = adaptation._step, matrices._program, wemoe._shifted
    sizes = [program._cache_size() for program in programs]
    merge()
    assert [program._cache_size() for program in programs] == sizes
    matrices._program.clear_cache()
    merge()
    assert matrices._program._cache_size() == 2  # one for fc1, one for fc2, whatever the task's rank


def test_a_decomposition_that_is_not_finite_is_named():
    name = FC2.format(1)
    broken = TASKS[0] | {name: np.full_like(TASKS[0][name], 3e38)}
    rule = rule_for()
    with pytest.raises(SolveError) as error:
        update(rule.init(BASE), broken, rule)
    assert [problem.tensor for problem in error.value.problems] == [name]
    assert "its singular values are not finite" in str(error.value)


def test_progress_tells_of_the_gates():
    told = []
    rule = rule_for()
    update(rule.init(BASE), TASKS[0], rule, on_stack=lambda *news: told.append(news))
    [(text, report)] = told
    assert text == "gates of 2 blocks"
    assert report.losses.shape == (1, 3)


T5_ATTENTION = [
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.block.1.layer.1.EncDecAttention.o.weight",
]
T5_FEED_FORWARD = {
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (7, 3),
    "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": (7, 3),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": (3, 7),
    "decoder.block.1.layer.2.DenseReluDense.wi.weight": (7, 3),
    "decoder.block.1.layer.2.DenseReluDense.wo.weight": (3, 7),
}
T5_LEFT = ["shared.weight", "lm_head.weight", "encoder.block.0.layer.0.layer_norm.weight"]


def test_t5_blocks_are_found_by_their_names():
    params = {name: np.zeros((3, 3), np.float32) for name in T5_ATTENTION + T5_LEFT}
    params |= {name: np.zeros(shape, np.float32) for name, shape in T5_FEED_FORWARD.items()}
    assert set(select(params, scope=wemoe.RULE.scope).layers) == {*T5_ATTENTION, *T5_FEED_FORWARD}
    task = {name: x + 1 for name, x in params.items()}
    data = methods.TaskData(iter(()), forward)
    rule = rule_for(steps=0)
    state = rule.update(rule.init(params), task, data=data)
    gates = {name: x.shape for name, x in state.added.items() if ".gate." in name}
    assert gates == {
        "encoder.block.0.layer.1.DenseReluDense.gate.weight": (1, 3),
        "encoder.block.0.layer.1.DenseReluDense.gate.bias": (1,),
        "decoder.block.1.layer.2.DenseReluDense.gate.weight": (1, 3),
        "decoder.block.1.layer.2.DenseReluDense.gate.bias": (1,),
    }
    experts = {name for name in state.added if ".experts." in name}
    assert experts == {f"{wemoe.expert_name(name, 0)}.{part}" for name in T5_FEED_FORWARD for part in "ab"}


def test_a_gate_is_as_wide_as_its_block_whichever_matrix_has_experts():
    for part in ("fc1", "fc2"):
        rule = methods.get("wemoe", WemoeConfig(steps=0), layers=part)
        state = update(rule.init(BASE), TASKS[0], rule)
        assert state.added[f"{MLP.format(0)}.gate.weight"].shape == (1, D)
        assert {name.split(".")[5] for name in state.added if ".experts." in name} == {part}
