"""Merges of every family against the float64 oracle, along the right axis, and nothing else changed."""

import architecture_models as arch
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import nufilt_jax as nj
from nufilt_jax.methods import nufilt as rule

METHODS = {"null_space": arch.FILTER, "nufilt": arch.RANKS}
TOLERANCE = 5e-5  # of the update's norm, as in tests/methods: float32 against float64 over one step


def expected(method, entry, layer, base, first, second):
    """θ^m_2 − θ0 of one layer, [d_out, d_in]."""
    start_of, d, tau = (entry.matrix(x, layer) for x in (base, first, second))
    d, tau = d - start_of, tau - start_of
    if method == "null_space":
        return d + tau @ oracle.projector(d, 4)
    key = rule.adapter_keys(0, 2, (layer,))[0]
    start = rule.normal_start(jnp.asarray(key), 2, d.shape[1])
    return d + oracle.nufilt_update(d, tau, start, filter_rank=4, task_rank=2, steps=4)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entry", arch.LAYOUTS, ids=arch.label)
def test_every_layer_is_the_oracles_and_all_else_the_bases(entry, method, tmp_path, nufilt):
    base, *tasks = arch.write_trio(tmp_path, entry.stored(), entry.config)
    result = nufilt(*arch.merge_command(tmp_path, "--method", method, *METHODS[method]))
    assert result.code == 0, result.err
    merged, layout = arch.weights(tmp_path / "out")
    assert layout == arch.weights(tmp_path / "base")[1]
    for layer in entry.layers:
        wanted = expected(method, entry, layer, base, *tasks)
        found = entry.matrix(merged, layer) - entry.matrix(base, layer)
        assert np.linalg.norm(found - wanted) < TOLERANCE * np.linalg.norm(wanted), layer
    touched = {layer.partition("[")[0] for layer in entry.layers}
    for name in base.keys() - touched:
        assert arch.same_bits(merged[name], base[name]), name


def test_the_oracle_tells_the_axes_apart():
    """Or the test above would prove little: a square layer of GPT-2 merged the other way is far off."""
    entry = arch.Entry("gpt2", "5")
    base = entry.stored()
    tasks = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    layer = "transformer.h.0.attn.c_proj.weight"
    d, tau = (entry.matrix(task, layer) - entry.matrix(base, layer) for task in tasks)
    right, wrong = d + tau @ oracle.projector(d, 4), d + (tau.T @ oracle.projector(d.T, 4)).T
    assert np.linalg.norm(right - wrong) > 0.1 * np.linalg.norm(right)


@pytest.mark.parametrize("entry", [e for e in arch.LAYOUTS if any(map(e.is_turned, e.layers))], ids=arch.label)
def test_what_is_loaded_is_outputs_by_inputs(entry, tmp_path):
    base = entry.stored()
    arch.write(tmp_path / "base", base, entry.config)
    params = nj.load(str(tmp_path / "base"))
    assert params.keys() == base.keys()
    turned = {layer.partition("[")[0] for layer in entry.layers if entry.is_turned(layer)}
    for name, x in base.items():
        wanted = np.swapaxes(x, -1, -2) if name in turned else x
        np.testing.assert_array_equal(params[name], wanted, err_msg=name)
    nj.save(params, tmp_path / "again", like=str(tmp_path / "base"))
    again, layout = arch.weights(tmp_path / "again")
    assert layout == arch.weights(tmp_path / "base")[1]
    assert all(arch.same_bits(again[name], x) for name, x in base.items())


def test_a_stacked_and_a_split_expert_merge_alike(tmp_path, nufilt):
    """The matrices of Mixtral's experts, as the classes of 5 hold them and one by one."""
    stacked = arch.Entry("mixtral_stacked", "5")
    base, *tasks = arch.write_trio(tmp_path / "stacked", stacked.stored(), stacked.config)
    models = [split(model) for model in (base, *tasks)]
    arch.write_trio(tmp_path / "split", models[0], stacked.config, models[1:])
    merged = []
    for kind in ("stacked", "split"):
        result = nufilt(*arch.merge_command(tmp_path / kind, "--method", "null_space", *arch.FILTER))
        assert result.code == 0, result.err
        merged.append(arch.weights(tmp_path / kind / "out")[0])
    for name, wanted in split(merged[0]).items():
        np.testing.assert_allclose(merged[1][name], wanted, atol=1e-5, err_msg=name)


def split(tensors):
    """The same model with a tensor for each expert's matrix; gate and up stay one, or it would be another layer."""
    found = {}
    for name, x in tensors.items():
        if x.ndim == 3:
            stem, leaf = name.rsplit(".", 1)
            found |= {f"{stem}.{i}.{leaf}.weight": np.ascontiguousarray(part) for i, part in enumerate(x)}
        else:
            found[name] = x
    return found


def test_the_folder_of_sentence_transformers_stays_one(tmp_path, nufilt):
    entry = arch.Entry("sentence_transformers", "5")
    arch.write_trio(tmp_path, entry.stored(), entry.config)
    beside = {
        "modules.json": '[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},'
        ' {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]',
        "sentence_bert_config.json": '{"max_seq_length": 16, "do_lower_case": false}',
        "config_sentence_transformers.json": "{}",
        "1_Pooling/config.json": '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}',
    }
    for name, text in beside.items():
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(text)
    assert nufilt(*arch.merge_command(tmp_path, "--method", "sum")).code == 0
    for name, text in beside.items():
        assert (tmp_path / "out" / name).read_text() == text


@pytest.mark.parametrize("method", METHODS)
def test_a_task_that_moves_one_expert(method, tmp_path, nufilt):
    entry = arch.Entry("gpt_oss", "5")
    base = entry.stored()
    moved = "model.layers.1.mlp.experts.gate_up_proj"
    tasks = [dict(base), dict(base)]
    for seed, task in enumerate(tasks, 1):
        task[moved] = base[moved].copy()
        task[moved][1] = arch.fine_tuned(base, seed)[moved][1]
    arch.write_trio(tmp_path, base, entry.config, tasks)
    result = nufilt(*arch.merge_command(tmp_path, "--method", method, *METHODS[method]))
    assert result.code == 0, result.err
    merged, _ = arch.weights(tmp_path / "out")
    layer = f"{moved}[1]"
    wanted = expected(method, entry, layer, base, *tasks)
    found = entry.matrix(merged, layer) - entry.matrix(base, layer)
    assert np.linalg.norm(found - wanted) < TOLERANCE * np.linalg.norm(wanted)
    for name, x in base.items():
        kept, still = (np.delete(part, 1, 0) if name == moved else part for part in (merged[name], x))
        assert arch.same_bits(kept, still), name
