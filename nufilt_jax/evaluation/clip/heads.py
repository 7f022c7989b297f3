"""Zero-shot heads: one embedding per class, from a CLIP text tower and prompts."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from nufilt_jax.durable import make_folder, replacing
from nufilt_jax.errors import CheckpointError, Problem
from nufilt_jax.evaluation.clip.zero_shot import normalise_head
from nufilt_jax.evaluation.tokenizer import open_tokenizer
from nufilt_jax.models.clip_config import parse_text_config
from nufilt_jax.models.clip_text import text_features
from nufilt_jax.models.clip_text_names import to_text_tree

_BATCH = 64  # prompts
_LENGTHS = 16  # prompts are padded to a multiple of so many tokens: few shapes to compile
_TEXT_TOWER, _TEXT_PROJECTION = "text_model.", "text_projection.weight"
_VISUAL_PROJECTION = "visual_projection.weight"
# Whole models of the vision towers that come without their text half, by width, patch and image size.
_WHOLE_MODELS = {
    (768, 32, 224): "openai/clip-vit-base-patch32",
    (768, 16, 224): "openai/clip-vit-base-patch16",
    (1024, 14, 224): "openai/clip-vit-large-patch14",
    (1024, 14, 336): "openai/clip-vit-large-patch14-336",
}


@runtime_checkable
class HeadMaker(Protocol):
    """Makes zero-shot heads; `TextHeads` does."""

    @property
    def visual_projection(self) -> Float[np.ndarray, "d width"] | None:
        """`visual_projection.weight` of the same model, for image models that come without: heads live behind it."""
        ...

    def __call__(self, class_names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "c d"]:
        """One embedding of unit length per class."""
        ...


class TextHeads:
    """Makes heads with one text tower; a `HeadMaker`. Each head is kept in a cache on disk.

    Attributes:
      visual_projection: `visual_projection.weight` of the same model; None if it has none.
    """

    def __init__(
        self, params: Mapping[str, ArrayLike], config: Mapping[str, Any], folder: Path, *, cache: Path | None
    ) -> None:
        """Checks that there is a text tower; computes nothing yet.

        Args:
          params: of a whole CLIP model, or of its text half; flat, under canonical names.
          config: its `config.json`.
          folder: its folder, where `tokenizer.json` is too.
          cache: folder where heads are kept between runs; None for none.

        Raises:
          CheckpointError: there is no text tower, as in the checkpoints that hold the vision half alone: the line says
            what to give as `heads_from`; or it does not fit the config.
        """
        names = [name for name in params if name.startswith(_TEXT_TOWER)]
        if not names or _TEXT_PROJECTION not in params:
            lacking = "text projection" if names else "text tower"
            what = f"has no {lacking}, and zero-shot heads are made with it"
            raise CheckpointError(Problem(str(folder), what, f"give --heads-from {_whole_model(config)}"))
        self._params = {name: params[name] for name in (*sorted(names), _TEXT_PROJECTION)}
        self._config, self._folder, self._cache = parse_text_config(config), folder, cache
        jax.eval_shape(self._make_tree, self._params)  # refuses what does not fit
        projection = params.get(_VISUAL_PROJECTION)
        self.visual_projection = None if projection is None else np.asarray(projection).astype(np.float32)

    def __call__(self, class_names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "c d"]:
        """Mean over the templates of the prompts' unit embeddings, scaled to unit length.

        Raises:
          CheckpointError: there is no tokenizer, or it is another model's.
          MissingExtraError: `transformers` is not installed.
        """
        path = None if self._cache is None else self._cache / f"{self._key(class_names, templates)}.safetensors"
        if path is not None:
            with contextlib.suppress(OSError, SafetensorError, LookupError):  # none yet, or cut short
                return safetensors.load_file(path)["head"]
        prompts = [template.replace("{}", name) for name in class_names for template in templates]
        unit = normalise_head(self._embeddings(prompts)).astype(np.float64)
        head = normalise_head(unit.reshape(len(class_names), len(templates), -1).mean(axis=1))
        if path is not None:
            with contextlib.suppress(OSError):  # a cache that cannot be written is none
                _keep(head, path, {"class_names": class_names, "templates": templates})
        return head

    def _embeddings(self, prompts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        ids = self._tokens(prompts)
        batches = (ids[start : start + _BATCH] for start in range(0, len(prompts), _BATCH))
        # Padding needs no mask: the state of the end token is taken, which does not see what is behind it.
        found = [text_features(self._tree, batch, np.ones_like(batch), self._config) for batch in batches]
        return np.concatenate([np.asarray(part) for part in found])[: len(prompts)]

    def _tokens(self, prompts: Sequence[str]) -> Int[np.ndarray, "n t"]:
        """Tokens, with rows to fill the last batch."""
        longest = self._config.max_position_embeddings
        texts = self._tokenizer([*prompts], truncation=True, max_length=longest)["input_ids"]
        length = min(-(-max(map(len, texts)) // _LENGTHS) * _LENGTHS, longest)
        ids = np.zeros((-(-len(texts) // _BATCH) * _BATCH, length), np.int32)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        if ids.max() >= self._config.vocab_size:
            what = f"makes token {ids.max()}, and the model has {self._config.vocab_size}"
            raise CheckpointError(Problem(str(self._folder / "tokenizer.json"), what, "use the model's own"))
        return ids

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self._folder)

    @functools.cached_property
    def _tree(self) -> dict[str, Any]:
        return self._make_tree(self._params)

    def _make_tree(self, params: Mapping[str, ArrayLike]) -> dict[str, Any]:
        return to_text_tree(params, self._config, whole_model=True)

    def _key(self, class_names: Sequence[str], templates: Sequence[str]) -> str:
        digest = self._identity.copy()
        digest.update(json.dumps([[*class_names], [*templates]]).encode())
        return digest.hexdigest()

    @functools.cached_property
    def _identity(self) -> "hashlib._Hash":
        """Of everything that heads depend on, but for the prompts."""
        digest = hashlib.sha256(repr(self._config).encode())
        for name, value in self._params.items():
            array = np.ascontiguousarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.view(np.uint8).data if array.size else b"")
        with contextlib.suppress(OSError):  # told when it is needed
            digest.update((self._folder / "tokenizer.json").read_bytes())
        return digest


def _keep(head: Float[np.ndarray, "c d"], path: Path, about: Mapping[str, Sequence[str]]) -> None:
    """Writes a file whole or not at all; others may write the same at the same time."""
    make_folder(path.parent)
    with replacing(path) as draft:
        safetensors.save_file({"head": head}, draft, {name: json.dumps([*texts]) for name, texts in about.items()})


def _whole_model(config: Mapping[str, Any]) -> str:
    part = config.get("vision_config", config)
    shape = tuple(
        part.get(key, default) for key, default in (("hidden_size", 768), ("patch_size", 32), ("image_size", 224))
    )
    return _WHOLE_MODELS.get(shape, "a whole CLIP model with the same vision tower")
