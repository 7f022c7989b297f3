"""`nufilt extract`: the adapter nearest to what a model changed, and how near that is."""

import json

import adapter_builders as adapters
import ml_dtypes
import model_builders as build
import numpy as np
import pytest

from nufilt_jax.checkpoints import open_checkpoint, open_task

FC1 = [name for name in build.SELECTED if "fc1" in name]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a fine-tune of full rank, and one whose changes have rank 2."""
    folder = tmp_path_factory.mktemp("extract")
    base = build.tower(0)
    build.write(folder / "base", base)
    build.write(folder / "full", build.fine_tuned(base, 1))
    build.write(folder / "thin", adapters.merged(base, adapters.factors(base, 2)))
    return folder


def changes(models, out):
    base = open_checkpoint(str(models / "base"), role="base")
    tensors = open_task(str(out), base).unread(build.SELECTED)
    return {name: np.matmul(*tensors.change(name)) for name in build.SELECTED}


@pytest.mark.parametrize("rank", [3, 40])
def test_every_layer_is_its_best_approximation(nufilt, models, tmp_path, rank):
    """Against the SVD in float64; beyond the rank of a layer, all of it."""
    out = tmp_path / "a"
    result = nufilt("extract", models / "full", "--base", models / "base", "--rank", rank, "--out", out, "--json")
    assert result.code == 0, result.err
    told = {layer["module"]: layer for layer in result.json["layers"]}
    base, full, found = build.weights(models / "base"), build.weights(models / "full"), changes(models, out)
    for name in build.SELECTED:
        tau = full[name].astype(np.float64) - base[name]
        u, s, vt = np.linalg.svd(tau, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(found[name], best, atol=1e-5 * s[0])
        layer = told[name.removesuffix(".weight")]
        assert layer["kept"] == pytest.approx(np.sum(s[:rank] ** 2) / np.sum(s**2), rel=1e-5)
        assert layer["rank"] == min(rank, *tau.shape)
    assert json.loads((out / "extract.json").read_text())["kept"] == result.json["kept"]


def test_what_has_the_rank_is_kept_whole(nufilt, models, tmp_path):
    out = tmp_path / "a"
    result = nufilt("extract", models / "thin", "--base", models / "base", "--rank", 8, "--out", out)
    assert result.code == 0, result.err
    assert "energy kept: 100.00%" in result.out and "fc1" in result.out
    base, thin = build.weights(models / "base"), build.weights(models / "thin")
    for name, change in changes(models, out).items():
        np.testing.assert_allclose(base[name] + change, thin[name], atol=2e-6)


def test_lookup_tables_are_left_and_told(nufilt, models, tmp_path):
    """peft adapts them otherwise than matrices."""
    out, table = tmp_path / "a", "vision_model.embeddings.position_embedding.weight"
    how = ("--base", models / "base", "--rank", 2, "--layers", "position_embedding|fc1", "--out", out)
    result = nufilt("extract", models / "full", *how)
    assert result.code == 0, result.err
    assert f"{table} is a lookup table, and has no place in the adapter" in result.err
    modules = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(name.removesuffix(".weight") for name in FC1)


def test_what_is_outside_is_warned_of(nufilt, models, tmp_path):
    out = tmp_path / "a"
    how = ("--layers", "q_proj", "--rank", 2, "--dtype", "bfloat16")
    result = nufilt("extract", models / "full", "--base", models / "base", "--out", out, *how)
    assert result.code == 0
    assert "of its squared change is in tensors that the adapter does not hold" in result.err
    assert {str(x.dtype) for x in build.weights(out).values()} == {"bfloat16"}


@pytest.mark.parametrize("prefix", ["transformer.", "module.transformer.", "module."])
def test_modules_are_called_as_the_model_s_class_calls_them(nufilt, models, tmp_path, prefix):
    """A base saved without its head: its fine-tune's names are longer, and peft looks for those."""
    bare = {f"h.{i}.mlp.weight": x for i, x in enumerate(build.weights(models / "base")[name] for name in FC1)}
    tuned = {f"{prefix}{name}": x for name, x in build.fine_tuned(bare, 1).items()}
    build.write(tmp_path / "base", bare, model_type="other")
    build.write(tmp_path / "full", tuned | {f"{prefix[:-12]}lm_head.weight": np.ones((3, 2), "f")}, model_type="other")
    how = ("--base", tmp_path / "base", "--rank", 40, "--out", tmp_path / "a")
    result = nufilt("extract", tmp_path / "full", *how, "--json")
    assert result.code == 0 and "2 names begin with" in result.err, result.err
    assert "1 tensor has no place in the adapter: " in result.err and "lm_head.weight (the base has none)" in result.err
    own = prefix.removeprefix("module.")
    assert [layer["module"] for layer in result.json["layers"]] == [f"{own}h.0.mlp", f"{own}h.1.mlp"]
    read = open_task(str(tmp_path / "a"), open_checkpoint(str(tmp_path / "base"), role="base")).read()
    for name in bare:
        np.testing.assert_allclose(read[name], tuned[prefix + name], atol=2e-6)


@pytest.mark.parametrize(
    ("version", "module", "notice"),
    [
        ("5.23.0", "vit.layers.{}.mlp.fc1", "modules are called as in transformers 5, which saved the base"),
        ("4.57.1", "vit.encoder.layer.{}.intermediate.dense", "modules are called as in the files of the base"),
        (None, "vit.encoder.layer.{}.intermediate.dense", "peft with transformers 5, which calls them otherwise, may"),
    ],
)
def test_modules_are_called_as_in_the_series_that_saved_the_base(nufilt, models, tmp_path, version, module, notice):
    """Files keep the names of transformers 4; a folder serves one series, and which is told."""
    places = [f"vit.encoder.layer.{i}.intermediate.dense.weight" for i in range(len(FC1))]
    for model in ("base", "thin"):
        tensors = dict(zip(places, (build.weights(models / model)[name] for name in FC1), strict=True))
        build.write(tmp_path / model, tensors, model_type="vit", transformers_version=version)
    out = tmp_path / "a"
    how = ("--base", tmp_path / "base", "--rank", 2, "--layers", "dense", "--out", out)
    result = nufilt("extract", tmp_path / "thin", *how)
    assert result.code == 0 and notice in result.err, result.err
    modules = [module.format(i) for i in range(len(FC1))]
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == modules
    assert {name.split(".lora_")[0] for name in build.weights(out)} == {adapters.PREFIX + name for name in modules}
    read = open_task(str(out), open_checkpoint(str(tmp_path / "base"), role="base")).read()
    for name, weight in build.weights(tmp_path / "thin").items():
        np.testing.assert_allclose(read[name], weight, atol=2e-6)


def fp8(tensors, word):
    """With the matrices of this word in float8, a scale beside each."""
    found = dict(tensors)
    for name, x in tensors.items():
        if word in name and name in build.SELECTED:
            found |= {name: x.astype(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": np.ones((1, 1), np.float32)}
    return found


@pytest.mark.parametrize("word", ["self_attn", ""])
@pytest.mark.parametrize("which", ["base", "full"])
def test_quantised_layers_are_refused(refused, models, tmp_path, which, word):
    """Also where others could be extracted: nothing is left out in silence."""
    for name in ("base", "full"):
        tensors = build.weights(models / name)
        build.write(tmp_path / name, fp8(tensors, word) if name == which else tensors)
    how = ("--base", tmp_path / "base", "--rank", 2, "--out", tmp_path / "a")
    lines = refused("extract", tmp_path / "full", *how)
    where = str(tmp_path / which / "model.safetensors")
    assert any(where in line and "q_proj.weight" in line and "holds F8_E4M3" in line for line in lines)
    assert not (tmp_path / "a").exists()


def test_quantised_layers_that_are_not_extracted_do_not_matter(nufilt, models, tmp_path):
    for name in ("base", "full"):
        build.write(tmp_path / name, fp8(build.weights(models / name), "self_attn"))
    how = ("--base", tmp_path / "base", "--rank", 2, "--layers", r"fc1\.weight", "--out", tmp_path / "a")
    result = nufilt("extract", tmp_path / "full", *how)
    assert result.code == 0, result.err


REFUSED = {
    "rank": (("--rank", 0), "--rank: must be at least 1, got 0"),
    "same": (("--rank", 2), "differs from the base in none of the layers"),
    "dtype": (("--rank", 2, "--dtype", "int8"), "--dtype: must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(refused, models, tmp_path, case):
    options, message = REFUSED[case]
    [line] = refused("extract", models / "base", "--base", models / "base", "--out", tmp_path / "a", *options)
    assert message in line


def test_what_is_missing(refused, models):
    [line] = refused("extract", models / "full", "--base", models / "base", code=2)
    assert "--rank, --out: missing" in line


@pytest.mark.parametrize("version", ["4.57.0", "5.1.0"])
def test_experts_come_out_as_peft_joins_them(nufilt, tmp_path, version):
    """For transformers 5 it stacks those of a block, also where not all of them changed, or have the rank."""
    block, rng = "model.layers.0.mlp", np.random.default_rng(0)
    modules = [f"{block}.experts.{i}.{name}_proj" for i in (0, 1, 10) for name in ("gate", "up")]
    base = {f"{m}.weight": rng.standard_normal((4, 16)).astype(np.float32) for m in modules}
    q, shared = "model.layers.0.self_attn.q_proj", f"{block}.shared_experts.up_proj"
    base |= {f"{m}.weight": rng.standard_normal((16, 16)).astype(np.float32) for m in (q, shared)}
    changed = [f"{m}.weight" for m in (modules[0], modules[3], q, shared)]
    full = base | {name: base[name] + rng.standard_normal(base[name].shape).astype(np.float32) for name in changed}
    build.write(tmp_path / "base", base, transformers_version=version)
    build.write(tmp_path / "full", full)
    given = (tmp_path / "full", "--base", tmp_path / "base", "--rank", 6, "--out", tmp_path / "out")
    result = nufilt("extract", *given, "--layers", r".*\.weight")
    assert result.code == 0, result.err
    stored = build.weights(tmp_path / "out")
    ranks = {m: stored.get(f"{adapters.PREFIX}{m}.lora_A.weight", np.zeros((0, 1))).shape[0] for m in modules}
    is_newer = version.startswith("5")
    assert ranks == {m: 6 if is_newer else 4 * (f"{m}.weight" in changed) for m in modules}
    told = "full: peft joins the experts of a block for transformers 5, and may load only a part: it takes for experts"
    assert (
        told in result.err and f"what is called as they are, {shared}".replace(".0.", ".*.") in result.err
    ) == is_newer
    read = open_task(str(tmp_path / "out"), open_checkpoint(str(tmp_path / "base"), role="base")).read()
    for name in {*base} - {f"{q}.weight", f"{shared}.weight"}:
        np.testing.assert_allclose(read[name], full[name], atol=1e-5)


@pytest.mark.parametrize("version", ["4.57.0", "5.1.0"])
@pytest.mark.parametrize("names", ["w1 w2 w3", "gate_proj down_proj up_proj"])
def test_experts_of_which_one_module_changed_come_out_with_the_others(nufilt, tmp_path, version, names):
    """peft drops what a block has if it finds no factors for one of the arrays that experts are joined to."""
    block, rng = "model.layers.{}.mlp.experts", np.random.default_rng(0)
    shapes = dict(zip(names.split(), ((6, 16), (16, 6), (6, 16)), strict=True))
    modules = {f"{block.format(b)}.{i}.{name}": x for b in (0, 1) for i in (0, 1) for name, x in shapes.items()}
    base = {f"{m}.weight": rng.standard_normal(shape).astype(np.float32) for m, shape in modules.items()}
    base["model.layers.0.mlp.experts.0.norm.weight"] = np.ones(16, np.float32)
    changed = f"{block.format(0)}.1.{names.split()[0]}.weight"
    build.write(tmp_path / "base", base, transformers_version=version)
    build.write(tmp_path / "full", base | {changed: base[changed] + 1})
    given = ("extract", tmp_path / "full", "--base", tmp_path / "base", "--rank", 2, "--out", tmp_path / "out")
    assert nufilt(*given, "--layers", r".*\.w\d\.weight|.*_proj\.weight").code == 0
    again = ("--base", tmp_path / "base", "--task", f"a={tmp_path / 'out'}", "--out", tmp_path / "merged")
    assert nufilt("merge", *again, "--method", "sum", "--output", "adapter").code == 0
    wanted = [m for m in modules if m.startswith(block.format(0))] if version.startswith("5") else [changed[:-7]]
    for folder in ("out", "merged"):
        stored = build.weights(tmp_path / folder)
        assert {name.partition(".lora_")[0] for name in stored} == {adapters.PREFIX + m for m in wanted}
        for module in wanted:
            a, b = (stored[f"{adapters.PREFIX}{module}.lora_{letter}.weight"] for letter in "AB")
            assert (b.shape[0], a.shape[1]) == modules[module]
            np.testing.assert_allclose(b @ a, np.full(modules[module], module == changed[:-7]), atol=1e-5)
