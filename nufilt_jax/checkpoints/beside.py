"""What belongs to a model beside its weights, told from the names of the files alone: on disk and on the Hub alike.

Everything is kept but weights in other formats, the state of a training, and what would make `transformers` open
something else than the weights. A subfolder with weights, such as `2_Dense` of a sentence-transformers model, is a part
of the model and kept, in the first format that it has.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from nufilt_jax.checkpoints.folders import ADDED, is_pickle, is_small, is_weight_file, unreadable
from nufilt_jax.checkpoints.safetensors_files import pointer_problem
from nufilt_jax.errors import Problem

# An earlier merge's: true of it, not of its copy.
OWN_FILES = frozenset(
    {"nufilt.json", "forecast.json", "evaluation.json", "accuracy_matrix.png", "analysis.json", "report.html"}
)
_RECIPE = "nufilt.json"
OWN_FOLDERS = frozenset({"state", "analysis"})
_NO_PART = re.compile(
    r"\.git|\.cache|\.huggingface|\.ipynb_checkpoints|__pycache__|original|onnx|openvino|coreml|gguf|tflite|metal"
    r"|(last-|tmp-)?checkpoint(-\d+)?|global_?step\d+|wandb|lost\+found",
    re.IGNORECASE,
)
# Of the training alone: transformers', its loggers', DeepSpeed's, and of torch's distributed checkpoints.
_LEFT = re.compile(
    r"\.git|trainer_state\.json|trainer_log\.jsonl|training_args\.(json|ya?ml)|(all|train|eval|test|predict)_results\.json"
    r"|latest|zero_to_fp32\.py|\.metadata|nohup\.out"
)
_EVENTS = re.compile(r"events\.out\.tfevents\..*")  # of a training too, in whatever subfolder
# With one of these beside the weights they are taken for an adapter's base, or for quantised.
_MISLEADING = re.compile(r"adapter_(config|model)\b.*|(hf_)?quant(ize|ization)?_config\.json")
_MODULES, _MODULE = "modules.json", re.compile(r"\d+_\w+")  # of sentence-transformers


def files_beside(names: Iterable[str]) -> list[str]:
    """The files that a copy of the model needs beside its weights.

    Args:
      names: of all files below the folder, joined by `/`.
    """
    folders: dict[str, list[str]] = {}
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, []).append(file)
    has_modules = _MODULES in folders.get("", ())
    gone = {folder for folder, files in folders.items() if folder and not _is_part(folder, files, has_modules)}
    kept: list[str] = []
    for folder, files in folders.items():
        if not any(str(above) in gone for above in (PurePosixPath(folder), *PurePosixPath(folder).parents)):
            weights = _weights_kept(folder, files, has_modules) if folder else ()
            plain = (file for file in files if not is_weight_file(file) and not _is_left(folder, file))
            kept += (f"{folder}/{file}" if folder else file for file in (*weights, *plain))
    return sorted(kept)


def _is_part(folder: str, files: Sequence[str], has_modules: bool) -> bool:
    """Whether a subfolder belongs to the model: not if all its weights are in other formats, or it is a merge."""
    parts = PurePosixPath(folder).parts
    if any(_NO_PART.fullmatch(part) for part in parts) or parts[0] in OWN_FOLDERS or _RECIPE in files:
        return False
    return bool(_weights_kept(folder, files, has_modules)) or not any(is_weight_file(file) for file in files)


def _weights_kept(folder: str, files: Sequence[str], has_modules: bool) -> list[str]:
    """A subfolder's weights in the first format that it has, with their index."""
    weights = [file for file in files if is_weight_file(file)]
    for kind in (".safetensors", ".msgpack"):
        if any(file.endswith(kind) for file in weights):
            return [file for file in weights if kind in file]
    # Older sentence-transformers: copied, never read, and without them the other modules would not open.
    is_module = has_modules and _MODULE.fullmatch(folder) is not None
    return [file for file in weights if is_module and is_pickle(file)]


def _is_left(folder: str, file: str) -> bool:
    if _EVENTS.fullmatch(file):
        return True
    return not folder and (file in OWN_FILES or any(left.fullmatch(file) for left in (_LEFT, _MISLEADING)))


def is_wanted_of_task(name: str) -> bool:
    """Whether a file of a task's repository is fetched beside its weights: the small ones of its top folder."""
    return name == ADDED or ("/" not in name and is_small(name) and not is_weight_file(name))


def not_to_copy(root: Path) -> list[Problem]:
    """What beside a model cannot be read, is a link out of its folder, or was not fetched by a clone without git-lfs.

    A stranger's folder could name a private file by a link. Those of the Hub's cache lead to its own blobs.
    """
    errors = list[OSError]()
    names = files_beside(names_below(root, errors.append))
    found = [unreadable(error, root) for error in errors]
    within = Path(os.path.realpath(root))
    for name in names:
        target = Path(os.path.realpath(root / name))
        is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not is_blob and not target.is_relative_to(within):
            what = f"is a link to {target}, outside the model's folder, and would be copied"
            found.append(Problem(str(root / name), what, "put the file itself there, or remove the link"))
            continue
        try:
            with (root / name).open("rb") as file:
                problem = pointer_problem(file, str(root / name))
        except OSError as error:
            problem = unreadable(error, root / name)
        found += [problem] if problem else []
    return found


def names_below(root: Path, tell: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """Names of all files below a folder, joined by `/`; links to folders are not followed, broken ones are no files.

    Args:
      root: the folder.
      tell: is told of every folder that cannot be listed.
    """
    for folder, subfolders, names in os.walk(root, onerror=tell):
        here = Path(folder)
        gone = OWN_FOLDERS if here == root else frozenset[str]()
        subfolders[:] = [name for name in subfolders if not _NO_PART.fullmatch(name) and name not in gone]
        yield from ((here / name).relative_to(root).as_posix() for name in names if _is_file(here / name))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError:  # of its folder, whose names alone may be read: opening it will tell
        return True
