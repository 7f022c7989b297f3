"""Models of one base that differ in what no layer holds; tensors that no rule can merge."""

import re

import architecture_models as arch
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import nufilt_jax as nj
from nufilt_jax.patterns import patterns

BERT, BERT_MODEL = arch.Entry("bert", "5"), arch.Entry("bert_model", "5")
VIT, VIT_MODEL = arch.Entry("vit", "5"), arch.Entry("vit_model", "5")
LLAMA, GPT2 = arch.Entry("llama", "5"), arch.Entry("gpt2", "4.57")
FILTERED = ("--method", "null_space", *arch.FILTER)
# Every rule but those that learn from examples, as cheaply as it goes.
METHODS = {name: () for name in sorted(nj.methods.RULES) if not nj.methods.RULES[name].needs_data}
METHODS |= {"nufilt": arch.RANKS, "adapter_only": arch.RANKS[2:], "null_space": arch.FILTER} | {
    "wudi": ("--method-args", "steps=3")
}


def headless(tensors, entry):
    """The backbone alone, under its own names."""
    prefix = f"{entry.config['model_type']}."
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def with_head(tensors, n_classes, name="classifier", seed=7):
    """The model with a head of so many classes."""
    rng = np.random.default_rng(seed)
    return tensors | {
        f"{name}.weight": rng.standard_normal((n_classes, width_of(tensors))).astype(np.float32),
        f"{name}.bias": rng.standard_normal(n_classes).astype(np.float32),
    }


def width_of(tensors):
    return next(x.shape[1] for name, x in tensors.items() if name.endswith("attention.output.dense.weight"))


def without(tensors, word):
    return {name: x for name, x in tensors.items() if word not in name}


def merged(nufilt, folder, *options, **where):
    """Merges; returns the tensors and what was said on stderr."""
    result = nufilt(*arch.merge_command(folder, *(options or FILTERED), **where))
    assert result.code == 0, result.err
    lines = [line for line in result.lines if "outside the selected layers" not in line]  # tasks here move all there is
    return arch.weights(folder / where.get("out", "out"))[0], lines


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert arch.same_bits(found[name], x), name


def one_line(lines, *words):
    """The one line that names all of these."""
    [line] = [line for line in lines if all(word in line for word in words)]
    return line


# --- heads ---


@pytest.mark.parametrize("entry", [BERT, VIT], ids=arch.label)
def test_task_heads_that_the_base_lacks(entry, tmp_path, nufilt):
    base = without(entry.stored(), "classifier")
    tasks = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    arch.write_trio(tmp_path / "plain", base, entry.config, tasks)
    wanted, lines = merged(nufilt, tmp_path / "plain")
    assert lines == []
    arch.write_trio(tmp_path / "heads", base, entry.config, [with_head(tasks[0], 10), with_head(tasks[1], 7)])
    found, lines = merged(nufilt, tmp_path / "heads")
    assert_same(found, wanted)
    assert all("classifier" in line and "2" in line for line in lines)
    assert 1 <= len(lines) <= 2  # one for each task at most
    refused = nufilt(*arch.merge_command(tmp_path / "heads", *FILTERED, "--strict", out="strict"))
    assert (refused.code, refused.out) == (1, "") and not (tmp_path / "heads" / "strict").exists()
    for task in ("t1", "t2"):
        for leaf in ("weight", "bias"):
            assert one_line(refused.lines, f"classifier.{leaf}", str(tmp_path / "heads" / task)).startswith("nufilt: ")


def test_task_heads_of_other_sizes(tmp_path, nufilt):
    base = with_head(without(VIT.stored(), "classifier"), 1000)
    plain = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    arch.write_trio(tmp_path / "plain", base, VIT.config, plain)
    wanted, _ = merged(nufilt, tmp_path / "plain")
    arch.write_trio(tmp_path / "heads", base, VIT.config, [with_head(plain[0], 10), with_head(plain[1], 7)])
    found, lines = merged(nufilt, tmp_path / "heads")
    assert_same(found, wanted)
    assert arch.same_bits(found["classifier.weight"], base["classifier.weight"])
    assert lines and all("classifier" in line for line in lines)
    refused = nufilt(*arch.merge_command(tmp_path / "heads", *FILTERED, "--strict", out="strict"))
    assert (refused.code, refused.out) == (1, "") and not (tmp_path / "heads" / "strict").exists()
    one_line(refused.lines, "classifier.weight", "[10, 32]", "[1000, 32]")
    one_line(refused.lines, "classifier.bias", "[7]", "[1000]")


def test_a_sequence_classifier_of_a_language_model(tmp_path, nufilt):
    """`score.weight` in place of `lm_head.weight`, as LlamaForSequenceClassification has it."""
    base = LLAMA.stored()
    plain = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    score = {"score.weight": np.ones((3, 32), np.float32)}
    arch.write_trio(tmp_path / "plain", base, LLAMA.config, plain)
    arch.write_trio(tmp_path / "score", base, LLAMA.config, [without(task, "lm_head") | score for task in plain])
    found, lines = merged(nufilt, tmp_path / "score")
    assert_same(found, merged(nufilt, tmp_path / "plain")[0])
    assert "score.weight" in " ".join(lines)


def test_a_layer_that_only_one_side_has_is_no_head(tmp_path, nufilt):
    base = LLAMA.stored()
    short, long = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    long |= {name.replace("layers.1.", "layers.2."): x for name, x in long.items() if "layers.1." in name}
    arch.write_trio(tmp_path / "more", base, LLAMA.config, [short, long])
    arch.write_trio(tmp_path / "less", base, LLAMA.config, [short, without(short, "layers.1.")])
    for kind, task, n_tensors in (("more", "t2", 9), ("less", "t2", 7)):  # two norms are no layers
        result = nufilt(*arch.merge_command(tmp_path / kind, *FILTERED))
        assert result.code == 1 and not (tmp_path / kind / "out").exists()
        one_line(result.lines, str(tmp_path / kind / task), f"({n_tensors} tensors)")


# --- prefixes ---


@pytest.mark.parametrize("side", ["tasks", "base"])
@pytest.mark.parametrize(
    ("entry", "prefix"),
    [
        (BERT_MODEL, "bert."),
        (VIT_MODEL, "vit."),
        (arch.Entry("llama_model", "5"), "model."),
        (LLAMA, "module."),
        (LLAMA, "_orig_mod."),
        (VIT, "module."),
        (BERT, "_orig_mod."),
    ],
    ids=lambda part: part if isinstance(part, str) else arch.label(part),
)
def test_a_prefix_on_one_side_only(entry, prefix, side, tmp_path, nufilt):
    base = entry.stored()
    tasks = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    arch.write_trio(tmp_path / "plain", base, entry.config, tasks)
    wanted, lines = merged(nufilt, tmp_path / "plain")
    assert lines == []
    if side == "tasks":
        tasks = [prefixed(task, prefix) for task in tasks]
    else:
        base, wanted = prefixed(base, prefix), prefixed(wanted, prefix)
    arch.write_trio(tmp_path / "prefixed", base, entry.config, tasks)
    found, lines = merged(nufilt, tmp_path / "prefixed")
    assert_same(found, wanted)
    assert 1 <= len(lines) <= 2 and all(prefix in line for line in lines)
    assert all(str(len(base)) in line for line in lines)
    refused = nufilt(*arch.merge_command(tmp_path / "prefixed", *FILTERED, "--strict", out="strict"))
    assert (refused.code, refused.out) == (1, "") and prefix in refused.err
    assert not (tmp_path / "prefixed" / "strict").exists()


@pytest.mark.parametrize("side", ["tasks", "base"])
@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("_orig_mod.", ""), ("_checkpoint_wrapped_module.", "module."), ("_fsdp_wrapped_module.",) * 2],
)
def test_wrappers_of_modules_within_on_one_side_only(wrapper, prefix, side, tmp_path, nufilt):
    """As `torch.compile` of every block leaves them; what comes out is called as in the base's files."""
    base = LLAMA.stored()
    tasks = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    arch.write_trio(tmp_path / "plain", base, LLAMA.config, tasks)
    wanted, _ = merged(nufilt, tmp_path / "plain")
    if side == "tasks":
        tasks = [prefixed(wrapped(task, wrapper), prefix) for task in tasks]
    else:
        base, wanted = (prefixed(wrapped(x, wrapper), prefix) for x in (base, wanted))
    arch.write_trio(tmp_path / "wrapped", base, LLAMA.config, tasks)
    found, lines = merged(nufilt, tmp_path / "wrapped")
    assert_same(found, wanted)
    n_wrapped = sum(".layers." in name for name in base)
    assert len(lines) == (4 if prefix else 2)
    assert sum(f"{n_wrapped} names differ from the base's by '{wrapper}' of a wrapper" in line for line in lines) == 2
    refused = nufilt(*arch.merge_command(tmp_path / "wrapped", *FILTERED, "--strict", out="strict"))
    assert (refused.code, refused.out) == (1, "") and wrapper in refused.err


def wrapped(tensors, wrapper):
    """With something around every block."""
    return {re.sub(r"(layers\.\d+\.)", rf"\1{wrapper}", name): x for name, x in tensors.items()}


def prefixed(tensors, prefix):
    return {prefix + name: x for name, x in tensors.items()}


def test_a_prefix_and_heads_together(tmp_path, nufilt):
    """A bare encoder as base, classifiers of it as tasks, and the other way round."""
    whole = without(BERT.stored(), "classifier")
    base = headless(whole, BERT)
    tasks = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    arch.write_trio(tmp_path / "plain", base, BERT_MODEL.config, tasks)
    wanted, _ = merged(nufilt, tmp_path / "plain")
    heads = [with_head(prefixed(task, "bert."), n) for task, n in zip(tasks, (3, 5), strict=True)]
    arch.write_trio(tmp_path / "heads", base, BERT_MODEL.config, heads)
    found, lines = merged(nufilt, tmp_path / "heads")
    assert_same(found, wanted)
    assert "bert." in " ".join(lines) and "classifier" in " ".join(lines)
    larger = with_head(prefixed(base, "bert."), 2)
    arch.write_trio(tmp_path / "bare", larger, BERT.config, tasks)
    found, lines = merged(nufilt, tmp_path / "bare")
    assert_same(found, prefixed(wanted, "bert.") | {name: larger[name] for name in found if "classifier" in name})


# --- vocabularies and buffers ---


def test_grown_embeddings(tmp_path, nufilt):
    base = LLAMA.stored()
    plain = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    arch.write_trio(tmp_path / "plain", base, LLAMA.config, plain)
    wanted, _ = merged(nufilt, tmp_path / "plain")
    more = np.full((6, 32), 0.5, np.float32)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    grown = plain[1] | {name: np.concatenate([plain[1][name], more]) for name in names}
    arch.write_trio(tmp_path / "grown", base, LLAMA.config, [plain[0], grown])
    found, lines = merged(nufilt, tmp_path / "grown")
    assert_same(found, wanted)
    text = " ".join(lines)
    assert "[70, 32]" in text and "[64, 32]" in text and "embed_tokens" in text
    refused = nufilt(*arch.merge_command(tmp_path / "grown", *FILTERED, "--strict", out="strict"))
    assert refused.code == 1 and all(any(name in line for line in refused.lines) for name in names)


def rotary(n=2):
    frequencies = (1e4 ** -(np.arange(8) / 8)).astype(np.float32)
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies for i in range(n)}


def masks():
    tri = np.tril(np.ones((16, 16), np.float32))[None, None]
    found = {f"transformer.h.{i}.attn.bias": tri for i in range(2)}
    return found | {f"transformer.h.{i}.attn.masked_bias": np.asarray(-1e4, np.float32) for i in range(2)}


POSITIONS = {"bert.embeddings.position_ids": np.arange(20, dtype=np.float32)[None]}
BUFFERS = {
    "inv_freq": (LLAMA, rotary()),
    "one inv_freq": (LLAMA, {"model.rotary_emb.inv_freq": next(iter(rotary().values()))}),
    "masks": (GPT2, masks()),
    "positions": (BERT, POSITIONS),
}


@pytest.mark.parametrize("method", ["null_space", "task_arithmetic"])
@pytest.mark.parametrize("kind", BUFFERS)
def test_computed_buffers_on_one_side_only(kind, method, tmp_path, nufilt):
    entry, buffers = BUFFERS[kind]
    base = entry.stored()
    plain = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    options = ("--method", method, *(arch.FILTER if method == "null_space" else ()))
    arch.write_trio(tmp_path / "plain", base, entry.config, plain)
    wanted, _ = merged(nufilt, tmp_path / "plain", *options)
    arch.write_trio(tmp_path / "task", base, entry.config, [plain[0], plain[1] | buffers])
    assert_same(merged(nufilt, tmp_path / "task", *options)[0], wanted)
    arch.write_trio(tmp_path / "base", base | buffers, entry.config, plain)
    assert_same(merged(nufilt, tmp_path / "base", *options)[0], wanted | buffers)


# --- tensors that no rule can merge ---


@pytest.mark.parametrize("method", METHODS)
def test_empty_tensors_are_copied(method, tmp_path, nufilt):
    empty = {
        "model.layers.0.self_attn.extra.weight": np.zeros((0, 16), np.float32),
        "model.layers.1.mlp.extra.weight": np.zeros((0,), np.float32),
        "model.extra": np.zeros((0,), np.float32),
    }
    base = LLAMA.stored()
    tasks = [arch.fine_tuned(base, seed) for seed in (1, 2)]
    arch.write_trio(tmp_path, base | empty, LLAMA.config, [task | empty for task in tasks])
    found, _ = merged(nufilt, tmp_path, "--method", method, *METHODS[method])
    assert found.keys() == base.keys() | empty.keys()
    assert all(arch.same_bits(found[name], x) for name, x in empty.items())
    layer = LLAMA.layers[0]
    assert not arch.same_bits(found[layer], base[layer])


def fp8(name, x):
    scale = np.float32(np.abs(x).max() / 448)
    return {
        name: (x / scale).astype(ml_dtypes.float8_e4m3fn),
        f"{name}_scale_inv": np.full((1, 1), scale, np.float32),
    }


def int8(name, x):
    largest = np.abs(x).max(1)
    return {
        name: np.round(x / largest[:, None] * 127).astype(np.int8),
        f"{name.removesuffix('weight')}SCB": largest.astype(np.float32),
    }


def packed(name, x):
    """bitsandbytes' four bits: two numbers a byte, a scale for each block, a table of what the bits mean."""
    return {
        name: np.arange(x.size // 2, dtype=np.int64).astype(np.uint8)[:, None],
        f"{name}.absmax": np.ones(x.size // 64, np.float32),
        f"{name}.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": np.zeros(90, np.uint8),
    }


def gptq(name, x):
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": np.ones((x.shape[1] // 8, x.shape[0]), np.int32),
        f"{stem}qzeros": np.ones((1, x.shape[0] // 8), np.int32),
        f"{stem}scales": np.ones((1, x.shape[0]), np.float16),
        f"{stem}g_idx": np.zeros(x.shape[1], np.int32),
    }


def hqq(name, x):
    stem = name.removesuffix("weight")
    return {
        f"{stem}W_q": np.ones((x.shape[0] // 2, x.shape[1]), np.uint8),
        f"{stem}scale": np.ones((x.size // 16, 1), np.float16),
        f"{stem}zero": np.ones((x.size // 16, 1), np.float16),
        f"{stem}nbits": np.asarray(4),
        f"{stem}shape": np.asarray(x.shape),
    }


def quanto(name, x):
    stem = name.removesuffix("weight")
    return {
        f"{name}._data": np.ones(x.shape, np.int8),
        f"{name}._scale": np.ones((x.shape[0], 1), np.float32),
        f"{stem}input_scale": np.ones((), np.float32),
        f"{stem}output_scale": np.ones((), np.float32),
    }


def aqlm(name, x):
    stem, (m, n) = name.removesuffix("weight"), x.shape
    return {
        f"{stem}codes": np.ones((m, n // 8, 1), np.int16),
        f"{stem}codebooks": np.ones((1, 16, 1, 8), np.float16),
        f"{stem}scales": np.ones((m, 1, 1, 1), np.float16),
    }


def exl2(name, x):
    stem, (m, n) = name.removesuffix("weight"), x.shape
    return {
        f"{stem}q_weight": np.ones((n // 8, m), np.int32),
        f"{stem}q_scale": np.ones((1, m // 8), np.int32),
        f"{stem}q_scale_max": np.ones(1, np.float16),
        f"{stem}q_groups": np.ones(2, np.int16),
        f"{stem}q_invperm": np.arange(n, dtype=np.int16),
    }


def exl3(name, x):
    stem, (m, n) = name.removesuffix("weight"), x.shape
    return {
        f"{stem}trellis": np.ones((n // 16, m // 16, 48), np.int16),
        f"{stem}suh": np.ones(n, np.float16),
        f"{stem}svh": np.ones(m, np.float16),
    }


def vptq(name, x):
    stem, (m, n) = name.removesuffix("weight"), x.shape
    return {
        f"{stem}indices": np.ones((1, m, n // 8), np.int32),
        f"{stem}centroids.weight": np.ones((1, 64), np.float16),
        f"{stem}weight_scale": np.ones(n, np.float16),
        f"{stem}perm": np.arange(n, dtype=np.int16),
    }


# How a layer is stored, and its tensor that no rule can read, with the type that the file gives.
QUANTISED = {
    "fp8": (fp8, "weight", "F8_E4M3"),
    "int8": (int8, "weight", "I8"),
    "packed": (packed, "weight", "U8"),
    "gptq": (gptq, "qweight", "I32"),
}
# Quantisers whose names nobody has listed: told by what a layer has and lacks.
NAMED_OTHERWISE = {
    "hqq": (hqq, "W_q", "U8"),
    "quanto": (quanto, "weight._data", "I8"),
    "aqlm": (aqlm, "codes", "I16"),
    "exl2": (exl2, "q_weight", "I32"),
    "exl3": (exl3, "trellis", "I16"),
    "vptq": (vptq, "indices", "I32"),
}


def quantised(model, change):
    """A model whose layers are stored so, and the rest in bfloat16."""
    found = {}
    for name, x in model.items():
        found |= change(name, x) if name in LLAMA.layers else {name: x.astype(ml_dtypes.bfloat16)}
    return found


def assert_refused(nufilt, folder, method, leaf, dtype):
    result = nufilt(*arch.merge_command(folder, "--method", method, *METHODS[method]))
    assert (result.code, result.out) == (1, "") and not (folder / "out").exists()
    assert all(line.startswith("nufilt: ") for line in result.lines)
    where = str(folder / "base" / "model.safetensors")
    for layer in LLAMA.layers:  # alike ones share a line, which names the first and the pattern of all
        named = layer.removesuffix("weight") + leaf
        [group] = [
            group
            for group in patterns(layer.removesuffix("weight") + leaf for layer in LLAMA.layers)
            if named in group.names
        ]
        one_line(result.lines, where, group.names[0], dtype, *(["more like it"] if len(group.names) > 1 else []))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused(kind, method, tmp_path, nufilt):
    change, leaf, dtype = QUANTISED[kind]
    base = LLAMA.stored()
    config = LLAMA.config | {"quantization_config": {"quant_method": kind}}
    tasks = [quantised(arch.fine_tuned(base, s), change) for s in (1, 2)]
    arch.write_trio(tmp_path, quantised(base, change), config, tasks)
    assert_refused(nufilt, tmp_path, method, leaf, dtype)


@pytest.mark.parametrize("kind", NAMED_OTHERWISE)
def test_quantised_weights_of_any_name_are_refused(kind, tmp_path, nufilt):
    """The config, which a folder may lack, says nothing of it here."""
    change, leaf, dtype = NAMED_OTHERWISE[kind]
    base = LLAMA.stored()
    tasks = [quantised(arch.fine_tuned(base, s), change) for s in (1, 2)]
    arch.write_trio(tmp_path, quantised(base, change), LLAMA.config, tasks)
    for method in ("nufilt", "task_arithmetic"):
        assert_refused(nufilt, tmp_path, method, leaf, dtype)


def test_a_config_tells_of_quantised_weights_without_scales(tmp_path, nufilt):
    def whole(name, x):
        return {f"{name.removesuffix('weight')}numbers": np.ones(x.shape, np.int8)}

    base = LLAMA.stored()
    config = LLAMA.config | {"quantization_config": {"quant_method": "whole"}}
    arch.write_trio(tmp_path, quantised(base, whole), config, [quantised(base, whole)] * 2)
    assert_refused(nufilt, tmp_path, "task_arithmetic", "numbers", "I8")


@pytest.mark.parametrize("method", ["null_space", "task_arithmetic"])
def test_integers_beside_weights_are_buffers(method, tmp_path, nufilt):
    square = np.arange(16).reshape(4, 4)
    layer = "model.layers.0"
    beside = {
        f"{layer}.self_attn.bias": np.ones((1, 1, 4, 4), np.uint8),
        f"{layer}.self_attn.attention_biases": np.ones((2, 16), np.float32),
        f"{layer}.self_attn.attention_bias_idxs": square,  # LeViT's
        f"{layer}.self_attn.table": square,
        f"{layer}.mlp.down_proj.order": square,
        f"{layer}.rel.biases": np.ones(16, np.float32),
        f"{layer}.rel.relative_index": square,
        f"{layer}.bn.weight": np.ones(4, np.float32),
        f"{layer}.bn.num_batches_tracked": np.asarray(3),
        "model.lookup": square,
    }
    base = LLAMA.stored() | beside
    arch.write_trio(tmp_path, base, LLAMA.config)
    found, _ = merged(nufilt, tmp_path, "--method", method, *METHODS[method])
    assert all(arch.same_bits(found[name], x) for name, x in beside.items() if x.dtype.kind in "iu")


def test_one_quantised_task_is_refused_too(tmp_path, nufilt):
    base = LLAMA.stored()
    arch.write_trio(tmp_path, base, LLAMA.config)
    task = tmp_path / "t2" / "model.safetensors"
    layer = LLAMA.layers[3]
    save_file(without(arch.fine_tuned(base, 2), layer) | int8(layer, base[layer]), task)
    for method in ("sum", "ties", "null_space"):
        result = nufilt(*arch.merge_command(tmp_path, "--method", method, *METHODS[method]))
        assert result.code == 1 and any(
            str(task) in line and layer in line and "holds I8: quantised weights cannot be merged" in line
            for line in result.lines
        )
