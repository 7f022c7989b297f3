"""Our forward passes of T5 and of CLIP's text tower against transformers 5's torch classes, over folders they wrote."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from interop_helpers import PROJECTION, TEXT, VISION, config_of
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5ForConditionalGeneration,
)

import nufilt_jax as nj

T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,  # exceeded by the texts
    "decoder_start_token_id": 0,
}
EOS = TEXT["vocab_size"] - 3


def perturb(model, seed):
    """Every parameter drawn, norms and biases too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def t5(kind, head, seed=0):
    torch.manual_seed(seed)
    config = T5Config(**T5, feed_forward_proj=kind, tie_word_embeddings=head == "tied")
    model = T5ForConditionalGeneration(config)
    if head == "own":  # this version ties every T5 that it makes itself; Flan-T5's files hold a head
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        model.shared.weight.mul_(0.3)  # else the token just read is the likeliest, wherever the embedding is the head
    return perturb(model, seed)


def texts(vocabulary, n_tokens):
    """Ids and mask, padded on either side."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(2, vocabulary, (3, n_tokens)), np.ones((3, n_tokens), np.int64)
    mask[1, -5:] = 0
    mask[2, :4] = 0
    return ids, mask


def ours(*arrays):
    return [jnp.asarray(array.astype(np.int32)) for array in arrays]


def theirs(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def stored(model, folder):
    model.save_pretrained(folder)
    return nj.load(str(folder)), config_of(folder)


heads = pytest.mark.parametrize("head", ["tied", "own", "unscaled"])
kinds = pytest.mark.parametrize("kind", ["relu", "gated-gelu", "gated-silu"])


@heads
@kinds
def test_t5_logits(kind, head, tmp_path):
    model = t5(kind, head)
    params, config = stored(model, tmp_path / "m")
    assert ("lm_head.weight" in params) is (head == "own")
    ids, mask = texts(40, 33)
    decoder_ids, _ = texts(40, 27)
    with torch.no_grad():
        wanted = model(*theirs(ids, mask, decoder_ids)).logits.numpy()
    found = nj.models.t5_logits(params, *ours(ids, mask, decoder_ids), config)
    # float32 over five blocks of sums of 5 to 20 terms; logits are of order ten
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-5)


@heads
def test_t5_generation(head, tmp_path):
    model = t5("gated-gelu", head)
    params, config = stored(model, tmp_path / "m")
    ids, mask = texts(40, 33)
    theirs_ids, theirs_mask = theirs(ids, mask)
    wanted = model.generate(theirs_ids, attention_mask=theirs_mask, max_new_tokens=20, do_sample=False).numpy()[:, 1:]
    assert len(np.unique(wanted)) > 3  # else this test is void
    found = nj.models.t5_generate(params, *ours(ids, mask), config, max_new_tokens=20)
    np.testing.assert_array_equal(found[:, : wanted.shape[1]], wanted)
    assert (found[:, wanted.shape[1] :] == 0).all()  # they stop when all texts have ended


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 20), (6, 11), (64, 256), (7, 16)])
def test_t5_buckets_are_theirs(bidirectional, n_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    from nufilt_jax.models.t5_positions import relative_buckets

    sizes = {"bidirectional": bidirectional, "max_distance": max_distance}
    relative = np.arange(-2000, 2001)[None]
    wanted = T5Attention._relative_position_bucket(torch.from_numpy(relative), num_buckets=n_buckets, **sizes)
    np.testing.assert_array_equal(relative_buckets(*ours(relative), n_buckets=n_buckets, **sizes), wanted)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [EOS, 2])
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection, CLIPModel], ids=lambda k: k.__name__)
def test_clip_text_features(kind, eos, activation, tmp_path):
    text = TEXT | {"eos_token_id": eos, "hidden_act": activation, "num_hidden_layers": 2}
    torch.manual_seed(0)
    if kind is CLIPModel:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=PROJECTION))
    else:
        model = kind(CLIPTextConfig(**text, projection_dim=PROJECTION))
    params, config = stored(perturb(model, 1), tmp_path / "m")
    ids, mask = texts(EOS, 8)
    mask[2] = 1
    mask[2, 1] = 0
    ids[:, 6], ids[1, 2], ids[2, 4] = EOS, EOS, EOS + 2  # twice in one text, once after a higher token
    with torch.no_grad():
        if kind is CLIPModel:
            wanted = model.get_text_features(*theirs(ids, mask)).pooler_output
        elif kind is CLIPTextModelWithProjection:
            wanted = model(*theirs(ids, mask)).text_embeds
        else:
            wanted = model(*theirs(ids, mask)).pooler_output
    found = nj.models.clip_text_features(params, *ours(ids, mask), config)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5, rtol=1e-5)
