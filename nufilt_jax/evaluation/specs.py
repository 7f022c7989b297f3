"""Tasks as data: which data set each name means, which of its columns, and what the model is asked."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from nufilt_jax.errors import ConfigError, Problem, raise_all
from nufilt_jax.evaluation.t5.spec import TextSpec
from nufilt_jax.strict_json import JsonError, read_object


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """An image classification task; in JSON an object with `"kind": "image"` and these keys.

    Attributes:
      dataset: Hub id, or a folder: then it starts with `/`, `./`, `../` or `~`, and counts from the JSON file.
      split: of the data set, the one that scores are reported on.
      templates: prompts with one `{}` each, where the class name goes.
      config: of the data set, if it has several.
      revision: of the Hub id; None for its main branch.
      image: column of the images.
      label: column of the labels, whole numbers from 0, or false and true.
      class_names: by label; None for those that the label column's own feature has.
    """

    dataset: str
    split: str
    templates: tuple[str, ...]
    config: str | None = None
    revision: str | None = None
    image: str = "image"
    label: str = "label"
    class_names: tuple[str, ...] | None = None

    def faults(self) -> dict[str, str]:
        """What is wrong with the values, by key."""
        found: dict[str, str] = {}
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            found["templates"] = "must be one or more texts with one {} each, where the class name goes"
        if self.class_names is not None and len(set(self.class_names)) < max(2, len(self.class_names)):
            found["class_names"] = "must be two or more different texts"
        return found


Spec = ImageSpec | TextSpec
_SHOWN = 80  # characters of a value in a message
_NAME_TASKS = "name the tasks, as in {'mine': {...}}"

# What "kind" may say, and what such an entry holds: a frozen dataclass whose fields are `str` or `tuple[str, ...]`, or
# one of these or None, and that says in `faults()` what is wrong beyond that.
KINDS: Mapping[str, type[Spec]] = {"image": ImageSpec, "text": TextSpec}


def load_specs(user_file: Path | None = None) -> dict[str, Spec]:
    """The tasks by name: the paper's, and those of a file that adds to them or replaces them.

    Args:
      user_file: a JSON object of the form of `tasks.json` in this folder.

    Raises:
      ConfigError: the file cannot be read, or entries are wrong; everything found is listed by key.
    """
    shipped = (resources.files("nufilt_jax.evaluation") / "tasks.json").read_text(encoding="utf-8")
    specs = _parse(json.loads(shipped), "tasks.json", Path())
    if user_file is None:
        return specs
    try:
        with user_file.open("rb") as file:
            document = read_object(file)
    except JsonError as error:
        raise ConfigError(Problem(str(user_file), str(error), error.fix or _NAME_TASKS)) from error
    except OSError as error:
        raise ConfigError(Problem(str(user_file), f"cannot be read: {error.strerror or error}")) from error
    return specs | _parse(document, str(user_file), user_file.parent)


def _parse(document: Mapping[str, Any], file: str, folder: Path) -> dict[str, Spec]:
    problems: list[Problem] = []
    specs: dict[str, Spec] = {}
    for name, entry in document.items():
        kind = KINDS.get(str(entry.get("kind"))) if isinstance(entry, dict) else None
        if kind is None:
            what = f"must be an object whose 'kind' is one of {', '.join(KINDS)}"
            problems.append(Problem(f"{file}: {name}", what))
            continue
        values, faults = _values(kind, entry)
        if not faults:
            specs[name] = _resolved(kind(**values), folder)
            faults = specs[name].faults()
        problems += [Problem(f"{file}: {name}.{key}", what) for key, what in faults.items()]
    raise_all(ConfigError, problems)
    return specs


def _values(kind: type[Spec], entry: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields that an entry gives, and what is wrong with it by key."""
    hints = _hints(kind)
    unknown = f"is no key of a task of kind {entry['kind']!r}, which has {', '.join(hints)}"
    faults = {key: unknown for key in entry if key not in hints and key != "kind"}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        is_list, may_be_none = hints[field.name]
        if field.name not in entry:
            if field.default is dataclasses.MISSING:
                faults[field.name] = "is missing"
            continue
        value = entry[field.name]
        texts = value if is_list and isinstance(value, list) else [value]
        is_right = isinstance(value, list) == is_list and all(isinstance(text, str) and text for text in texts)
        if is_right or (value is None and may_be_none):
            values[field.name] = tuple(value) if isinstance(value, list) else value
        else:
            wanted = "a list of texts" if is_list else "a text"
            faults[field.name] = (
                f"must be {wanted}{' or null' if may_be_none else ''}, got {json.dumps(value)[:_SHOWN]}"
            )
    return values, faults


@functools.cache
def _hints(kind: type[Spec]) -> dict[str, tuple[bool, bool]]:
    """Of every field: whether it holds several texts, and whether it may hold None."""
    found: dict[str, tuple[bool, bool]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = any(typing.get_origin(part) is tuple for part in parts), type(None) in parts
    return found


def _resolved(spec: Spec, folder: Path) -> Spec:
    """Folders count from the file that names them."""
    if not spec.dataset.startswith(("/", "./", "../", "~")):
        return spec
    return dataclasses.replace(spec, dataset=str((folder / Path(spec.dataset).expanduser()).resolve()))
