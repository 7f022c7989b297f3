"""A mergekit YAML file, read where it means what a method here does, and refused by key where it does not.

Source: the keys and defaults of mergekit 0.1 (arcee-ai/mergekit, `docs/merge_methods.md`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nufilt_jax.api import task_names
from nufilt_jax.errors import ConfigError, Problem, raise_all
from nufilt_jax.strict_json import shown

_KNOWN = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "name")
_METHODS = {"linear": "weight_average", "task_arithmetic": "task_arithmetic", "ties": "ties"}
_PARAMETERS = {
    "linear": ("weight", "normalize"),
    "task_arithmetic": ("weight", "normalize", "lambda", "int8_mask"),
    "ties": ("weight", "density", "normalize", "lambda", "int8_mask"),
}
_BASE_TOKENIZER = (None, "base")
_TIES = (
    "trims every tensor for itself and elects signs over all models at once, which ties here does not: it takes one "
    "model after another, with one threshold for the whole model"
)


def options_of_mergekit(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The options that merge what a mergekit file describes.

    `linear` with equal weights is `weight_average`; `task_arithmetic` with equal weights is `task_arithmetic`, its
    `scale` their product with `lambda`, divided by their sum if `normalize` is true. `ties` is the same only for one
    model of which all entries are kept (`density: 1`), where both add λ τ.

    Args:
      document: the file's content, with the key `merge_method`.
      path: of the file.

    Raises:
      ConfigError: every key that means something else here, or nothing.
    """
    problems = [Problem(str(path), what, fix, key) for key, what, fix in _refused(document)]
    raise_all(ConfigError, problems)
    method, models, base = document["merge_method"], document["models"], document.get("base_model")
    tasks = [entry for entry in models if method == "linear" or entry["model"] != base]
    common, sources = document.get("parameters") or {}, [entry["model"] for entry in tasks]
    options: dict[str, Any] = {
        "base": base or tasks[0]["model"],
        "tasks": dict(zip(task_names(sources), sources, strict=True)),
        "method": _METHODS[method],
    }
    # mergekit moves all that it merges, and our methods for these do.
    if method != "linear":
        weights = [_of(entry, common, "weight", 1.0) for entry in tasks]
        normalised = _of({}, common, "normalize", method == "ties")
        scale = _of({}, common, "lambda", 1.0) * (1 / len(tasks) if normalised else weights[0])
        options["method_args"] = {"scale": scale}
    if dtype := document.get("out_dtype") or document.get("dtype"):
        options["dtype"] = dtype
    return options


def _refused(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Keys that cannot be followed, what is wrong with them, and what to do."""
    method = document["merge_method"]
    if method not in _METHODS:
        fix = "nufilt merge --method help lists the methods of this program"
        yield "merge_method", f"{shown(method)} is not read; {', '.join(_METHODS)} are", fix
    for key in document:
        if key not in _KNOWN:
            yield key, "means nothing here", "remove it if the merge may go without"
    if document.get("tokenizer_source") not in _BASE_TOKENIZER:
        yield (
            "tokenizer_source",
            f"must be base, got {shown(document['tokenizer_source'])}",
            "the tokenizer is the base's",
        )
    models = document.get("models")
    if not isinstance(models, list) or not models or not all(_is_entry(entry) for entry in models):
        yield "models", "must be a list of models, each with the key model", ""
        return
    if method not in _METHODS:  # what else it needs, and what its parameters mean, is not known
        return
    base = document.get("base_model")
    if method != "linear" and not isinstance(base, str):
        yield "base_model", "is missing", f"{method} needs the model that all were fine-tuned from"
    tasks = [(i, entry) for i, entry in enumerate(models) if method == "linear" or entry["model"] != base]
    if not tasks:
        yield "models", "names no model besides the base", ""
        return
    yield from _refused_parameters(method, document, tasks)
    if method == "ties" and len(tasks) > 1:
        fix = "in a file of this program's own keys say method = ties, for its kind of it"
        yield "merge_method", f"ties of mergekit {_TIES}", fix


def _refused_parameters(
    method: str, document: Mapping[str, Any], tasks: list[tuple[int, Mapping[str, Any]]]
) -> Iterator[tuple[str, str, str]]:
    common = document.get("parameters") or {}
    places = [
        ("parameters", common),
        *((f"models[{i}].parameters", entry.get("parameters") or {}) for i, entry in tasks),
    ]
    for i, entry in tasks:
        if unknown := [key for key in entry if key not in ("model", "parameters")]:
            yield f"models[{i}].{unknown[0]}", "means nothing here", "remove it if the merge may go without"
        if "+" in entry["model"]:
            yield f"models[{i}].model", "is a model and an adapter", "merge the adapter first, or give its folder alone"
    are_read = True
    for place, parameters in places:
        if not isinstance(parameters, dict):
            yield place, "must be a table", ""
            are_read = False
            continue
        for key, value in parameters.items():
            kind = bool if key in ("normalize", "int8_mask") else int | float
            if key not in _PARAMETERS[method]:
                yield f"{place}.{key}", f"means nothing for {method}", "remove it if the merge may go without"
            elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                yield f"{place}.{key}", f"must be one value for all layers, got {shown(value)}", ""
                are_read = False
    if not are_read:
        return
    weights = [_of(entry, common, "weight", 1.0) for _, entry in tasks]
    if len({float(weight) for weight in weights}) > 1 or not weights[0]:
        told = ", ".join(map(str, weights))
        yield "models", f"have the weights {told}: here all models of a merge count alike", "give them one weight"
    if method == "linear" and _of({}, common, "normalize", True) is False:
        yield "parameters.normalize", "must be true: weight_average is a mean", "remove it"
    densities = [_of(entry, common, "density", 1.0) for _, entry in tasks] if method == "ties" else [1.0]
    if any(density != 1 for density in densities):
        yield "density", f"ties of mergekit {_TIES}", "in a file of this program's own keys say method = ties"


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("model"), str) and bool(entry["model"])


def _of(entry: Mapping[str, Any], common: Mapping[str, Any], key: str, default: Any) -> Any:
    """A parameter of a model, else of all models, else mergekit's default."""
    return (entry.get("parameters") or {}).get(key, common.get(key, default))
