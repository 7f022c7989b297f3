"""Parts of a finished merge, in files that other programs read: task vectors, D, the forecast, the solve itself."""

import contextlib
import functools
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nufilt_jax import __version__
from nufilt_jax.anatomy import FLAT, Shape, shape_in, tensor_of
from nufilt_jax.checkpoints import Checkpoint, fit, open_checkpoint, open_task, safetensors_files
from nufilt_jax.checkpoints.safetensors_files import Piece
from nufilt_jax.checkpoints.writer import output_error
from nufilt_jax.core.settings import SolveConfig
from nufilt_jax.core.solve import solve_group
from nufilt_jax.durable import make_folder, move, replacing, sync_tree
from nufilt_jax.engine.job import lacking_state
from nufilt_jax.errors import CheckpointError, ConfigError, OutputError, Problem, gathering, raise_all
from nufilt_jax.methods.stacked import stack_names, task_vector, whole
from nufilt_jax.output.documents import read_forecast, write_json
from nufilt_jax.output.place import FORECAST, STATE
from nufilt_jax.output.recipe import Model, Recipe
from nufilt_jax.output.state import AGAIN, stored_windows
from nufilt_jax.output.stored import Stored

PLATFORMS = ("cpu", "cuda", "tpu")
MODULES = "solve.json"  # of the folder with the compiled solve's StableHLO: what is in its files

ArrayOf = Callable[[str], np.ndarray]


def export_delta(recipe: Recipe, folder: Path, out: Path, *, offline: bool = False) -> int:
    """Writes D = θ^m − θ0 of every layer that the merge touched, in float32, as safetensors.

    Args:
      recipe: of the merge.
      folder: where it stands.
      out: the file; there is none yet.
      offline: use the local Hub cache alone.

    Returns:
      The number of tensors.

    Raises:
      CheckpointError: the state is damaged, or not there.
      OutputError: the file cannot be written.
    """
    with _state(recipe, folder) as stored:
        shapes = _shapes(recipe, folder, stored.layers, offline=offline)
        told = {"what": "delta", "step": str(len(recipe.steps)), "task": recipe.task_names[-1]}
        _write(out, shapes, lambda layer: whole(stored.deltas([layer])[layer]), told)
    return len(shapes)


def export_tau(recipe: Recipe, folder: Path, step: int, out: Path, *, offline: bool = False) -> int:
    """Writes τ = θ_t − θ0 of every layer that the merge touched, in float32, as safetensors.

    Args:
      recipe: of the merge.
      folder: where it stands.
      step: whose task, counted from 1.
      out: the file; there is none yet.
      offline: use the local Hub cache alone.

    Returns:
      The number of tensors.

    Raises:
      CheckpointError: base or task cannot be read, or are not what they were.
      OutputError: the file cannot be written.
    """
    source = recipe.tasks[step - 1]
    problems: list[Problem] = []
    opened = dict[str, Checkpoint]()
    for model, role in ((recipe.base, "base"), (source, "task")):
        how: dict[str, Any] = {"revision": model.revision, "offline": offline}
        with gathering(problems):
            if role == "base":
                opened[role] = open_checkpoint(model.source, role="base", **how)
            else:
                opened[role] = open_task(model.source, opened.get("base"), **how)
            problems += _changes(model, opened[role].sha256_as(model.sha256 or {}), folder)
    raise_all(CheckpointError, problems)
    base = opened["base"]
    layers = _state(recipe, folder).layers
    touched = tuple(dict.fromkeys(map(tensor_of, layers)))
    fitted = fit(base, opened["task"], touched, asked_for=recipe.settings.layers is not None)
    raise_all(CheckpointError, fitted.problems)
    before, after = base.read(touched), fitted.task.unread(touched)

    def change(layer: str) -> np.ndarray:
        return np.asarray(task_vector(before, after, ((layer,),)).stacks[0][0])

    shapes = {layer: shape_in(base.tensors, layer) for layer in layers}
    _write(out, shapes, change, {"what": "tau", "step": str(step), "task": source.name})
    return len(shapes)


def _changes(model: Model, now: Mapping[str, str], folder: Path) -> list[Problem]:
    return list(model.changes(now, model.source, folder))


def _state(recipe: Recipe, folder: Path) -> Stored:
    """The state of a merge, with all layers that its recipe tells of."""
    stored = Stored(stored_windows(folder / STATE))
    raise_all(CheckpointError, lacking_state(recipe, stored, folder))
    return stored


def _shapes(recipe: Recipe, folder: Path, layers: list[str], *, offline: bool) -> dict[str, Shape]:
    """Of layers, from the headers of the merged model, or of its base if it is an adapter."""
    is_adapter, base = recipe.settings.output == "adapter", recipe.base
    place = (base.source, base.revision) if is_adapter else (str(folder), None)
    tensors = open_checkpoint(place[0], revision=place[1], role="base", offline=offline).tensors
    what = "is in the state of the merge, and not in its model"
    unknown = [layer for layer in layers if tensor_of(layer) not in tensors]
    raise_all(CheckpointError, (Problem(str(folder), what, AGAIN, layer) for layer in unknown))
    return {layer: shape_in(tensors, layer) for layer in layers}


def _write(out: Path, shapes: Mapping[str, Shape], array_of: ArrayOf, told: Mapping[str, str]) -> None:
    """Streams a file of layers in float32: one at a time is in memory."""

    def content(layer: str) -> Iterator[memoryview]:
        array = np.ascontiguousarray(array_of(layer), np.dtype("<f4"))
        if array.shape != shapes[layer]:
            what = f"has shape {list(array.shape)} in the state, and {list(shapes[layer])} in the model"
            raise CheckpointError(Problem(str(out), what, AGAIN, layer))
        yield array.reshape(-1).view(np.uint8).data

    pieces = [Piece(layer.removesuffix(FLAT), "F32", shape, content(layer)) for layer, shape in shapes.items()]
    with _writing(out), replacing(out) as draft:
        safetensors_files.write_file(draft, pieces, {"format": "pt", "nufilt_jax": __version__, **told})


def export_forecast(folder: Path, step: int | None, out: Path) -> int:
    """Writes what is known of each layer of each step without data, as a JSON object `{"rows": [...]}` of flat rows.

    Args:
      folder: where the merge stands.
      step: counted from 1; None for all.
      out: the file; there is none yet.

    Returns:
      The number of rows.

    Raises:
      OutputError: the forecast is damaged, or the file cannot be written.
    """
    rows = []
    for number, told in enumerate(read_forecast(folder / FORECAST), 1):
        if step in (None, number):
            near = set(told["near_equal_cuts"])
            rows += [
                {"step": number, "task": told["task"], "layer": layer, **row, "near_equal_cut": layer in near}
                for layer, row in told["layers"].items()
            ]
    with _writing(out):
        write_json(out, {"rows": rows})
    return len(rows)


def export_solve(recipe: Recipe, folder: Path, out: Path, *, offline: bool = False) -> int:
    """Writes the solve of every stack of layers of one shape as StableHLO for each platform, with `solve.json`.

    A module takes D and τ, [layers, m, n], and A's start, [layers, r_l, n], and gives the updates, the losses
    [layers, steps + 1] and whether all is finite, [layers]. It is the program that a merge runs, in the portable form
    of StableHLO, which later versions of XLA read.

    Args:
      recipe: of the merge.
      folder: where it stands.
      out: the folder to make.
      offline: use the local Hub cache alone.

    Returns:
      The number of modules.

    Raises:
      CheckpointError: the state is not there.
      ConfigError: the method has no such solve.
      OutputError: the folder cannot be written.
    """
    config = recipe.settings.config
    if not isinstance(config, SolveConfig):
        what = f"{recipe.settings.method} has no solve that is compiled by layers"
        raise ConfigError(Problem("--what", what, "export stablehlo of a merge by nufilt or adapter_only"))
    layers = _state(recipe, folder).layers
    known = _shapes(recipe, folder, layers, offline=offline)
    shapes = {name: shape for name, shape in known.items() if len(shape) == 2}
    modules = []
    with _writing(out), _new_folder(out) as draft:
        for members in stack_names(shapes, shapes):
            sizes = (len(members), *shapes[members[0]])
            for platform in PLATFORMS:
                name = f"solve-{'x'.join(map(str, sizes))}.{platform}.mlirbc"
                exported = _exported(sizes, config, platform)
                (draft / name).write_bytes(exported.mlir_module_serialized)
                modules.append({"file": name, "platform": platform, **_signature(exported), "layers": list(members)})
        write_json(draft / MODULES, {"jax": jax.__version__, **recipe.settings.to_json(), "modules": modules})
    return len(modules)


def _exported(sizes: tuple[int, int, int], config: SolveConfig, platform: str) -> Any:
    from jax import export

    n_layers, _, width = sizes
    stack = jax.ShapeDtypeStruct(sizes, np.float32)
    start = jax.ShapeDtypeStruct((n_layers, config.trained_rank, width), np.float32)
    return export.export(jax.jit(functools.partial(_solve, config=config)), platforms=[platform])(stack, stack, start)


def _solve(merged: Any, task: Any, start: Any, *, config: SolveConfig) -> tuple[Any, Any, Any]:
    found = solve_group((merged,), (task,), start, config=config)
    return found.updates[0], found.losses, found.ok


def _signature(exported: Any) -> dict[str, Any]:
    named = (("arguments", exported.in_avals), ("results", exported.out_avals))
    return {what: [{"shape": list(x.shape), "dtype": x.dtype.name} for x in avals] for what, avals in named}


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name at the end, if all went well."""
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    make_folder(draft)
    try:
        yield draft
        sync_tree(draft)
        move(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise output_error(out, error) from error
