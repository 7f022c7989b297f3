"""Tied tensors: several stored names of one parameter, listed once."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from nufilt_jax.anatomy import in_block, is_head, is_vocabulary
from nufilt_jax.checkpoints.tensors import TensorInfo, stream_bytes

# Models whose head is tied unless their config says otherwise, of those with names as Llama's; few configs say it.
_TIED = re.compile(r"(?:gemma\d?n?|cohere\d?|lfm\d|ernie4_5)(?:_moe|_text)?")
# Where a Llama's kin have their blocks and table, `X.layers.0` and `X.embed_tokens`: their configs say what is tied.
_SAID = ("model", "language_model.model")
_LLAMAS = (*_SAID, "model.language_model")
# One module of an encoder and a decoder, which know it under names of their own; behind a prefix but in T5.
_SHARED = re.compile(r"((?:.+\.)?)(?:shared|(?:encoder|decoder)\.embed_tokens)\.weight")
# A second vocabulary, beside that of words: no head of words is tied to it.
_ENTITIES = re.compile(r"(?:^|\.)entity_embeddings\.weight$")
_T5_BLOCK = re.compile(r"(?:encoder|decoder)\.block\.")


class _Group(NamedTuple):
    """Canonical names that may mean one tensor.

    Attributes:
      main: the name to keep.
      others: of copies.
      is_known: by the model's class or config, not by equal bytes alone.
    """

    main: str
    others: tuple[str, ...]
    is_known: bool


def tie(infos: Mapping[str, TensorInfo], config: Mapping[str, Any], *, compare_bytes: bool) -> dict[str, TensorInfo]:
    """Lists each tied tensor once, under its group's main name, and remembers the other copies.

    Args:
      infos: every stored tensor by canonical name.
      config: says whether an output head is tied to the embedding.
      compare_bytes: tie only copies that are equal in the file, whatever the config says.
    """
    tied = dict(infos)
    for group in _groups(infos, config):
        first, *others = (infos[name] for name in (group.main, *group.others) if name in infos)
        if first.name not in tied or not (group.is_known or compare_bytes):
            continue
        same = [other for other in others if is_copy(first, other, compare_bytes=compare_bytes)]
        if not group.is_known and not same:  # then it is no group, and the main name is not the model's
            continue
        for copy in (first, *same):
            del tied[copy.name]
        tied[group.main] = dataclasses.replace(first, name=group.main, aliases=tuple(same))
    return tied


def is_copy(one: TensorInfo, other: TensorInfo, *, compare_bytes: bool) -> bool:
    """Whether two stored tensors are the same parameter: of one form and, if asked, equal in every byte."""
    if (one.shape, one.dtype, one.axes) != (other.shape, other.dtype, other.axes):
        return False
    if not compare_bytes:
        return True
    pairs = zip(stream_bytes(one), stream_bytes(other), strict=True)
    return all(a == b for a, b in pairs)


def unties(config: Mapping[str, Any]) -> bool:
    """Whether a config says that a head has weights of its own; what it does not say is that the two are tied."""
    said = [part["tie_word_embeddings"] for part in _with_text_config(config) if "tie_word_embeddings" in part]
    return False in said and True not in said


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config says, or its model does if nothing is said, that the head is the table of the vocabulary."""
    parts = _with_text_config(config)
    by_default = any(_TIED.fullmatch(str(part.get("model_type", ""))) for part in parts) and not unties(config)
    return by_default or any(part.get("tie_word_embeddings") is True for part in parts)


def table_of(head: str, shape: tuple[int, ...], infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str:
    """The table that stands for a head that is not stored; empty if the head is not tied, or is none."""
    if head in infos or not is_head(head) or unties(config):
        return ""
    return next((name for name, info in infos.items() if is_vocabulary(name) and info.shape == shape), "")


def usual_head(table: str) -> str:
    """What a Llama's kin call the head that is one with a table; empty for other tables."""
    of = table.removesuffix(".embed_tokens.weight")
    return _head_beside(of) if of != table and of in _LLAMAS else ""


def _groups(names: Collection[str], config: Mapping[str, Any]) -> Iterator[_Group]:
    """Groups of which a member exists, by the names that there are.

    The embeddings of an encoder and a decoder are one module; a head belongs to them, or to a model's one table, unless
    the config unties it. Whether stored copies really are equal is for the reader to check.
    """
    outside = [name for name in names if name.endswith(".weight") and not in_block(name)]
    heads = tuple(name for name in outside if is_head(name))
    is_t5 = any(map(_T5_BLOCK.match, names))
    for prefix in dict.fromkeys(found[1] for name in outside if (found := _SHARED.fullmatch(name))):
        main = f"{prefix}shared.weight"
        copies = tuple(f"{prefix}{part}.embed_tokens.weight" for part in ("encoder", "decoder"))
        is_known = main in names or (is_t5 and not prefix)
        if is_known or all(name in names for name in copies):  # one alone is what a model without the other has
            yield _Group(main, (*copies, *(heads if _ties_shared_head(config) else ())), is_known)
        if is_known:
            return
    tied = is_tied(config)
    tables = [name for name in outside if is_vocabulary(name) and name not in heads and not _ENTITIES.search(name)]
    if len(tables) > 1:  # then the head is of the decoder
        tables = [name for name in tables if re.search(r"(?:^|\.)decoder\.", name)]
    if len(tables) == 1 and heads:
        says = tables[0] in (f"{of}.embed_tokens.weight" for of in _SAID)
        if tied or not (says or unties(config)):
            yield _Group(tables[0], heads, tied)
    elif tied and not tables:
        yield from _lone_head(names, heads)


def _lone_head(names: Collection[str], heads: Collection[str]) -> Iterator[_Group]:
    """A head that stands for the table of a Llama's kin, whose name is known."""
    for of in _LLAMAS:
        head = _head_beside(of)
        if head in heads and any(name.startswith(f"{of}.layers.") for name in names):
            yield _Group(f"{of}.embed_tokens.weight", (head,), is_known=True)
            return


def _head_beside(of: str) -> str:
    return "language_model.lm_head.weight" if of.startswith("language_model.") else "lm_head.weight"


def _with_text_config(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text_config = config.get("text_config")
    return [config, text_config] if isinstance(text_config, dict) else [config]


def _ties_shared_head(config: Mapping[str, Any]) -> bool:
    # transformers 5 writes `tie_word_embeddings: true` into every T5 config and keeps the
    # meaning of 4.x's flag in `scale_decoder_outputs`.
    said = ("tie_word_embeddings", "scale_decoder_outputs")
    return all(part.get(key, True) is True for part in _with_text_config(config) for key in said)
