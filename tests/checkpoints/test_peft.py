"""PEFT folders: what is read, by every spelling, and what is refused, by name."""

import json
import math

import adapter_builders as adapters
import ml_dtypes
import model_builders as build
import numpy as np
import pytest
from safetensors.numpy import save_file

from nufilt_jax.checkpoints import fit, open_checkpoint, open_task, quantised_problems
from nufilt_jax.errors import CheckpointError

Q0, FC1 = adapters.MODULES[2], adapters.MODULES[-1]


@pytest.fixture(scope="module")
def base_tensors():
    return build.tower(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory, base_tensors):
    folder = build.write(tmp_path_factory.mktemp("models") / "base", base_tensors)
    return open_checkpoint(str(folder), role="base")


@pytest.fixture(scope="module")
def pairs(base_tensors):
    return adapters.factors(base_tensors, 1, modules=(Q0, FC1))


def changes(base, folder, module=Q0):
    """τ of a module, as the task tells it."""
    left, right = open_task(str(folder), base).unread([f"{module}.weight"]).change(f"{module}.weight")
    return left @ right


def product(pairs, scale, module=Q0):
    a, b = pairs[module]
    return scale * (b @ a)


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model.model."])
@pytest.mark.parametrize("infix", ["", ".default"])
def test_spellings_of_keys(tmp_path, base, pairs, prefix, infix):
    folder = adapters.write(tmp_path / "a", pairs, prefix=prefix, infix=infix)
    np.testing.assert_allclose(changes(base, folder), product(pairs, 2.0), rtol=1e-6, atol=1e-7)


def test_names_of_a_tower_without_its_prefix(tmp_path, base, pairs):
    """As transformers 5 calls the modules of a vision tower."""
    short = {module.removeprefix("vision_model."): pair for module, pair in pairs.items()}
    folder = adapters.write(tmp_path / "a", short)
    np.testing.assert_allclose(changes(base, folder), product(pairs, 2.0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_float_types(tmp_path, base, pairs, dtype):
    folder = adapters.write(tmp_path / "a", pairs, dtype=dtype)
    stored = {module: tuple(x.astype(dtype).astype(np.float32) for x in pair) for module, pair in pairs.items()}
    np.testing.assert_allclose(changes(base, folder), product(stored, 2.0), rtol=1e-6, atol=1e-7)


def test_scales(tmp_path, base, base_tensors):
    """α/r, α/√r, and patterns of both, the first that matches."""
    pairs = adapters.factors(base_tensors, 1, 4, (Q0,)) | adapters.factors(base_tensors, 2, 2, (FC1,))
    how = {"rank": 4, "rank_pattern": {"fc1": 2}, "alpha_pattern": {r"encoder\.layers\.0\.self_attn\.q_proj": 3}}
    folder = adapters.write(tmp_path / "a", pairs, lora_alpha=10, **how)
    np.testing.assert_allclose(changes(base, folder, Q0), product(pairs, 3 / 4, Q0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(changes(base, folder, FC1), product(pairs, 10 / 2, FC1), rtol=1e-6, atol=1e-7)
    folder = adapters.write(tmp_path / "b", pairs, lora_alpha=10, use_rslora=True, **how)
    np.testing.assert_allclose(changes(base, folder, FC1), product(pairs, 10 / math.sqrt(2), FC1), rtol=1e-6, atol=1e-7)


def test_whole_tensors_and_biases(tmp_path, base, base_tensors, pairs):
    """`modules_to_save` and trained biases stand in place of the base's, in old and new spelling."""
    bias, norm = f"{adapters.MODULES[3]}.bias", "vision_model.post_layernorm"
    new = np.full(build.WIDTH, 7, np.float32)
    extra = {
        f"base_model.model.{bias.replace('.bias', '.base_layer.bias')}": new,
        f"base_model.model.{norm}.modules_to_save.default.weight": 2 * new,
        f"base_model.model.{norm}.original_module.weight": 3 * new,
    }
    folder = adapters.write(tmp_path / "a", pairs, extra=extra, bias="all", modules_to_save=["post_layernorm"])
    task = open_task(str(folder), base)
    read = task.read()
    assert read.keys() == base_tensors.keys()
    np.testing.assert_array_equal(read[bias], new)
    np.testing.assert_array_equal(read[f"{norm}.weight"], 2 * new)
    np.testing.assert_allclose(
        read[f"{Q0}.weight"], adapters.merged(base_tensors, pairs)[f"{Q0}.weight"], rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(read[build.FC2], base_tensors[build.FC2])


def test_which_base_it_was_trained_on(tmp_path, base, pairs):
    exact = {"target_modules": [Q0, FC1]}
    same = adapters.write(tmp_path / "a", pairs, base_model_name_or_path=str(base.path), **exact)
    other = adapters.write(tmp_path / "b", pairs, base_model_name_or_path="openai/clip-vit-base-patch16", **exact)
    assert open_task(str(same), base).notices == ()
    [notice] = open_task(str(other), base).notices
    assert "was trained on 'openai/clip-vit-base-patch16'" in notice


CONFIGS = {
    "dora": ({"use_dora": True}, "use_dora is True: DoRA"),
    "loha": ({"peft_type": "LOHA"}, "is an adapter of type 'LOHA', and only plain LoRA and rsLoRA can be merged"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "type 'PROMPT_TUNING'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "unknown": ({"use_zora": True}, "has the unknown setting use_zora = True, which may change what the factors mean"),
    "rank": ({"r": 3}, "rank 2, but adapter_config.json says r = 3"),
    "no rank": ({"r": None}, "r must be a whole number from 1, got None"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
    "alphas": ({"alpha_pattern": {"fc1": "4"}}, "alpha_pattern fc1 must be a finite number, got '4'"),
    "pattern": ({"rank_pattern": ["fc1"]}, "rank_pattern must be an object, got ['fc1']"),
    "endless": (
        {"target_modules": r"(\w+\.?)+!"},
        r"takes too long to match with the names of modules: '(\\w+\\.?)+!'",
    ),
    "endless rank": ({"rank_pattern": {r"(.*)*!": 1}}, "takes too long to match with the names of modules: '(.*)*!'"),
    "vast": ({"target_modules": r"((a{1,60000}){1,60000}b?){60000}"}, "is not among the target_modules"),
    "targets": ({"target_modules": ["q_proj"]}, "is not among the target_modules"),
    "regex": ({"target_modules": r".*\.q_proj"}, "is not among the target_modules"),
    "broken": ({"target_modules": "("}, "is no regular expression"),
    "layers": ({"layers_to_transform": [0]}, "is not among the target_modules"),
    "excluded": ({"exclude_modules": ["fc1"]}, "is not among the target_modules"),
    "numbers": ({"target_modules": [1]}, "target_modules must be a text or a list of texts, got [1]"),
    "layer": ({"layers_to_transform": "1"}, "layers_to_transform must be whole numbers, got '1'"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(tmp_path, base, pairs, case):
    fields, message = CONFIGS[case]
    folder = adapters.write(tmp_path / "a", pairs, **{"rank": 2} | fields) if "r" not in fields else None
    if folder is None:
        folder = adapters.write(tmp_path / "a", pairs)
        (folder / "adapter_config.json").write_text(json.dumps(adapters.config(2, **fields)))
    with pytest.raises(CheckpointError) as error:
        open_task(str(folder), base)
    assert message in str(error.value)


REMEDIES = {
    "no change": (
        "it is no change of the base's weights: leave this task out",
        *({"peft_type": f"{kind}_TUNING"} for kind in ("PREFIX", "PROMPT", "P", "MULTITASK_PROMPT")),
        *({"peft_type": kind} for kind in ("ADAPTION_PROMPT", "XLORA")),
        {"layer_replication": [[0, 2], [0, 2]]},
        {"alora_invocation_tokens": [1]},
    ),
    "change": ("merge_and_unload() and save the whole model", {"peft_type": "IA3"}, {"use_dora": True}),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_adapters_that_are_refused_are_told_what_peft_can_do(tmp_path, base, pairs, case):
    """It has no merge_and_unload() for what depends on the input, or adds to it."""
    fix, *configs = REMEDIES[case]
    for i, fields in enumerate(configs):
        with pytest.raises(CheckpointError) as error:
            open_task(str(adapters.write(tmp_path / str(i), pairs, rank=2, **fields)), base)
        [problem] = error.value.problems
        assert problem.fix.endswith(fix), fields
    key = "prompt_embeddings" if case == "no change" else f"base_model.model.{Q0}.ia3_l"
    with pytest.raises(CheckpointError) as error:
        open_task(str(adapters.write(tmp_path / "key", pairs, extra={key: np.zeros((2, 2), np.float32)})), base)
    assert error.value.problems[0].fix.endswith(fix)


@pytest.mark.parametrize("targets", [r".*\.(q_proj|fc1)", "all-linear", ["q_proj", "mlp.fc1"], [Q0, FC1]])
def test_targets_that_cover(tmp_path, base, pairs, targets):
    folder = adapters.write(tmp_path / "a", pairs, target_modules=targets, layers_to_transform=None)
    assert len(open_task(str(folder), base).factors) == 2


def test_modules_of_the_config_that_have_no_factors(tmp_path, base, pairs):
    """Few of many, and none where the config names none."""
    some = adapters.write(tmp_path / "a", pairs, target_modules=["q_proj", "fc1"])
    [notice] = open_task(str(some), base).notices
    stay = "vision_model.encoder.layers.*.mlp.fc1, vision_model.encoder.layers.*.self_attn.q_proj"
    assert "holds no factors of 2 matrices that the target_modules of its adapter_config.json name" in notice
    assert notice.endswith(f"and which stay the base's: {stay}")
    first = adapters.write(tmp_path / "b", pairs, target_modules=["q_proj", "fc1"], layers_to_transform=[0, 1])
    assert len(open_task(str(first), base).notices) == 1
    exact = adapters.write(tmp_path / "c", pairs, target_modules=[Q0, FC1])
    assert open_task(str(exact), base).notices == ()


KEYS = {
    "embedding": ("base_model.model.shared.lora_embedding_A", "LoRA of an embedding"),
    "dora": (f"base_model.model.{Q0}.lora_magnitude_vector", "DoRA"),
    "adalora": (f"base_model.model.{Q0}.lora_E", "AdaLoRA"),
    "loha": (f"base_model.model.{Q0}.hada_w1_a", "LoHa"),
    "lokr": (f"base_model.model.{Q0}.lokr_w1", "LoKr"),
    "ia3": (f"base_model.model.{Q0}.ia3_l", "IA³"),
    "prompt": ("prompt_embeddings", "prompt tuning"),
    "prompts": ("prompt_encoder.default.embedding.weight", "prompt tuning"),
    "unknown": (f"base_model.model.{Q0}.lora_C.weight", "a variant of LoRA"),
    "bias": (f"base_model.model.{Q0}.lora_B.bias", "LoRA with biases of its own"),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_that_are_refused(tmp_path, base, pairs, case):
    key, what = KEYS[case]
    folder = adapters.write(tmp_path / "a", pairs, extra={key: np.zeros((2, 2), np.float32)})
    with pytest.raises(CheckpointError) as error:
        open_task(str(folder), base)
    [problem] = error.value.problems
    assert problem.tensor == key and f"belongs to {what}" in problem.what


@pytest.mark.parametrize("class_prefix", ["", "model."])
@pytest.mark.parametrize("module", ["vision_model.adapter.proj", "prompt_encoder.embed", "prompt_encoder.embedding"])
def test_modules_of_the_model_that_are_called_as_what_others_store(tmp_path, base_tensors, pairs, module, class_prefix):
    """Saved whole, or their biases: the base knows them, whatever the class calls them within."""
    whole = {f"{module}.weight": np.ones((2, build.WIDTH), np.float32), f"{module}.bias": np.ones(2, np.float32)}
    base = open_checkpoint(str(build.write(tmp_path / "base", base_tensors | whole)), role="base")
    extra = {
        f"{adapters.PREFIX}{class_prefix}{module}.weight": 2 * whole[f"{module}.weight"],
        f"{adapters.PREFIX}{class_prefix}{module}.base_layer.bias": 3 * whole[f"{module}.bias"],
    }
    named = {class_prefix + name: pair for name, pair in pairs.items()}
    read = open_task(str(adapters.write(tmp_path / "a", named, extra=extra, bias="all")), base).read()
    assert read.keys() == base.tensors.keys()
    np.testing.assert_array_equal(read[f"{module}.weight"], 2 * whole[f"{module}.weight"])
    np.testing.assert_array_equal(read[f"{module}.bias"], 3 * whole[f"{module}.bias"])


def test_factors_that_do_not_fit(tmp_path, base, pairs):
    """All of them at once, each by its name in the file."""
    a, b = pairs[Q0]
    wrong = {Q0: (a, b[:-1]), "vision_model.encoder.layers.7.mlp.fc1": pairs[FC1]}
    folder = adapters.write(tmp_path / "a", wrong)
    with pytest.raises(CheckpointError) as error:
        open_task(str(folder), base)
    text = str(error.value)
    assert f"{Q0}.lora_A.weight: changes a weight of shape [15, 16], which is [16, 16] in the base" in text
    assert (
        "layers.7.mlp.fc1.lora_A.weight: adapts vision_model.encoder.layers.7.mlp.fc1, which is no module of the base"
        in text
    )


def test_factors_that_contradict(tmp_path, base, pairs):
    a, b = pairs[Q0]
    short = Q0.removeprefix("vision_model.")
    cases = {
        "means the same as ": {f"{Q0}.lora_A.weight": a},
        "belongs to ": {f"base_model.model.{Q0}.hada_w1_a": a},
        "adapts the same weight as ": {f"{short}.lora_A.weight": a, f"{short}.lora_B.weight": b},
        ": LoRA of a convolution cannot be merged": {
            f"{FC1}.lora_A.weight": a[:, :, None, None],
            f"{FC1}.lora_B.weight": b[:, :, None, None],
        },
    }
    for number, (what, extra) in enumerate(cases.items()):
        folder = adapters.write(tmp_path / str(number), {Q0: (a, b)}, extra=extra)
        with pytest.raises(CheckpointError) as error:
            open_task(str(folder), base)
        assert what in str(error.value)
        assert what != "belongs to " or ", which cannot be merged" in str(error.value)


def test_two_names_of_a_whole_tensor(tmp_path, base, pairs):
    """As peft writes the head of some adapters; only copies that differ contradict each other."""
    value = np.full(16, 0.5, np.float32)
    names = (f"{adapters.PREFIX}visual.modules_to_save.bias", f"{adapters.PREFIX}visual.bias")
    folder = adapters.write(tmp_path / "a", pairs, extra=dict.fromkeys(names, value))
    alone = adapters.write(tmp_path / "b", pairs, extra={names[0]: value})
    assert open_task(str(folder), base).tensors.keys() == open_task(str(alone), base).tensors.keys()
    other = adapters.write(tmp_path / "c", pairs, extra=dict(zip(names, (value, value + 1), strict=True)))
    with pytest.raises(CheckpointError, match=r"means the same as base_model\.model\.visual"):
        open_task(str(other), base)


def test_adapters_without_factors_or_weights(tmp_path, base, base_tensors, pairs):
    folder = adapters.write(tmp_path / "a", pairs)
    save_file({f"base_model.model.{FC1}.weight": base_tensors[f"{FC1}.weight"]}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no LoRA factors"):
        open_task(str(folder), base)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is a PEFT adapter without its adapter_model"):
        open_task(str(folder), base)


def test_half_a_pair(tmp_path, base, pairs):
    folder = adapters.write(tmp_path / "a", pairs)
    key = f"base_model.model.{Q0}.lora_A.weight"
    save_file({key: pairs[Q0][0]}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_A\.weight: has no partner lora_B"):
        open_task(str(folder), base)


def test_pickled_adapters_are_not_opened(tmp_path, base, pairs):
    folder = adapters.write(tmp_path / "a", pairs)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: is a pickle"):
        open_task(str(folder), base)


def test_an_adapter_is_no_model(tmp_path, pairs):
    folder = adapters.write(tmp_path / "a", pairs)
    with pytest.raises(CheckpointError, match="is a PEFT adapter, no model"):
        open_checkpoint(str(folder), role="base")


def test_conv1d(tmp_path):
    """GPT-2 keeps its weights as `[d_in, d_out]`; the factors are B `[d_out, r]` and A `[r, d_in]` all the same."""
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((4, 12)).astype(np.float32)
    name = "h.0.attn.c_attn"
    tensors = {f"{name}.weight": stored, "wte.weight": np.zeros((5, 4), np.float32)}
    base = open_checkpoint(str(build.write(tmp_path / "base", tensors, model_type="gpt2")), role="base")
    a, b = rng.standard_normal((2, 4)).astype(np.float32), rng.standard_normal((12, 2)).astype(np.float32)
    how = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    folder = adapters.write(tmp_path / "a", {f"transformer.{name}": (a, b)}, **how)
    read = open_task(str(folder), base).read()[f"{name}.weight"]
    np.testing.assert_allclose(read, stored.T + 2 * (b @ a), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "key", ["c_proj.weight", "c_proj.modules_to_save.weight", "c_proj.modules_to_save.default.weight"]
)
@pytest.mark.parametrize("model_type", ["gpt2", "own"])
def test_whole_conv1d_weights_lie_as_the_base_s(tmp_path, model_type, key):
    """A square one looks alike both ways."""
    rng = np.random.default_rng(0)
    square, fused, a, b = (rng.standard_normal(n).astype(np.float32) for n in ((4, 4), (4, 12), (2, 4), (12, 2)))
    tensors = {"h.0.attn.c_proj.weight": np.zeros((4, 4), np.float32), "h.0.attn.c_attn.weight": fused}
    base = open_checkpoint(str(build.write(tmp_path / "base", tensors, model_type=model_type)), role="base")
    extra = {f"base_model.model.transformer.h.0.attn.{key}": square}
    how = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["c_proj"], "extra": extra}
    task = open_task(str(adapters.write(tmp_path / "a", {"transformer.h.0.attn.c_attn": (a, b)}, **how)), base)
    np.testing.assert_array_equal(task.read()["h.0.attn.c_proj.weight"], square.T)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gemma2"}, "ties to model.embed_tokens.weight"),
        ({"tie_word_embeddings": True}, "ties to model.embed_tokens.weight"),
        ({"tie_word_embeddings": False}, "which is no module of the base"),
    ],
)
def test_a_head_that_the_base_does_not_store(tmp_path, config, expected):
    tensors = {"model.embed_tokens.weight": np.zeros((5, 4), np.float32)}
    base = open_checkpoint(
        str(build.write(tmp_path / "base", tensors, **{"model_type": "llama"} | config)), role="base"
    )
    pairs = {"lm_head": (np.ones((2, 4), np.float32), np.ones((5, 2), np.float32))}
    with pytest.raises(CheckpointError, match=expected):
        open_task(str(adapters.write(tmp_path / "a", pairs, target_modules=["lm_head"])), base)


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("copies", [(), (HEAD,)], ids=["table", "both"])
@pytest.mark.parametrize("form", ["moved", "tied", "apart"])
def test_a_table_that_is_the_head_too(tmp_path, copies, form):
    rows, q = np.ones((5, 4), np.float32), "model.layers.0.self_attn.q_proj"
    tensors = {TABLE: rows, f"{q}.weight": np.zeros((4, 4), np.float32)} | {name: rows.copy() for name in copies}
    folder = build.write(tmp_path / "base", tensors, model_type="llama", tie_word_embeddings=True)
    base = open_checkpoint(str(folder), role="base")
    heads = {"moved": {}, "tied": {HEAD: 3 * rows}, "apart": {HEAD: 2 * rows}}[form]
    extra = {f"base_model.model.{name}": x for name, x in ({TABLE: 3 * rows} | heads).items()}
    how = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "extra": extra}
    task = open_task(str(adapters.write(tmp_path / "a", adapters.factors(tensors, 1, modules=(q,)), **how)), base)
    assert [*task.tensors] == [*base.tensors, *([HEAD] if form == "apart" else [])]
    np.testing.assert_array_equal(task.read()[TABLE], 3 * rows)
    said = f"replaces {TABLE}, which is the head too in the base {base.source}: both move, and merge_and_unload() of"
    assert [said in line for line in task.notices] == ([True] if form == "moved" else [])
    fitted = fit(base, task, [*base.tensors], strict=form != "apart")
    assert bool(fitted.problems) == (form == "apart" and bool(copies))


PACKED = [
    ({"weight": np.zeros((128, 1), np.uint8), "weight.absmax": np.zeros(4, np.uint8)}, "weight holds U8"),
    ({"qweight": np.zeros((2, 16), np.int32), "scales": np.zeros((1, 16), np.float16)}, "qweight holds I32"),
]


@pytest.mark.parametrize(("stored", "said"), PACKED, ids=["nf4", "gptq"])
def test_a_base_that_is_packed_is_the_one_it_was_trained_on(tmp_path, base_tensors, pairs, stored, said):
    tensors = {name: x for name, x in base_tensors.items() if name != f"{Q0}.weight"}
    tensors |= {f"{Q0}.{name}": x for name, x in stored.items()}
    base = open_checkpoint(str(build.write(tmp_path / "base", tensors)), role="base")
    with pytest.raises(CheckpointError) as caught:
        open_task(str(adapters.write(tmp_path / "a", pairs)), base)
    [line] = map(str, caught.value.problems)
    assert f"adapts {Q0}, which is quantised in the base {base.source}: {Q0}.{said} (dequantize the base first)" in line


def test_a_factor_holds_no_integers_of_a_quantised_base(tmp_path, base_tensors, pairs):
    tensors = base_tensors | {f"{Q0}.weight": np.zeros((16, 16), np.int8), f"{Q0}.SCB": np.ones(16, np.float32)}
    base = open_checkpoint(str(build.write(tmp_path / "base", tensors)), role="base")
    task = open_task(str(adapters.write(tmp_path / "a", pairs)), base)
    found = [quantised_problems(model, lambda name, shape: len(shape) == 2, []) for model in (base, task)]
    assert [[problem.tensor for problem in problems] for problems in found] == [[f"{Q0}.weight"], []]
