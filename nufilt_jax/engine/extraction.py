"""A low-rank adapter out of a whole model: the leading directions of what its fine-tuning changed."""

import dataclasses
import functools
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nufilt_jax.anatomy import is_lookup, tensor_of
from nufilt_jax.checkpoints import Checkpoint, fit, open_checkpoint, open_task, parse_source
from nufilt_jax.checkpoints.dtypes import FLOATS
from nufilt_jax.checkpoints.newer_names import is_saved_by_newer, newer_names
from nufilt_jax.checkpoints.partners import Fitted, listed
from nufilt_jax.checkpoints.peft.experts import called_as_experts, is_expert
from nufilt_jax.checkpoints.peft.writer import NewPair, module_of, stored_module, write_adapter
from nufilt_jax.checkpoints.survey import squared_change
from nufilt_jax.checkpoints.writer import output_error
from nufilt_jax.config import problem
from nufilt_jax.durable import make_folder, move, sync_tree
from nufilt_jax.engine.readable import select_readable
from nufilt_jax.errors import CheckpointError, ConfigError, OutputError, Problem, raise_all
from nufilt_jax.linalg.dense import matmul, norm
from nufilt_jax.linalg.directions import rank_mask
from nufilt_jax.linalg.dispatch import after, chunk_size, layers_by_products, run_alone
from nufilt_jax.linalg.programs import Program
from nufilt_jax.linalg.subspace import leading_of
from nufilt_jax.methods.stacked import stack_names, task_vector
from nufilt_jax.output.documents import write_json
from nufilt_jax.patterns import patterns

REPORT = "extract.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractedLayer:
    """One layer of an adapter.

    Attributes:
      module: as the model's class calls it.
      shape: of its weight.
      rank: of its factors; 0 where nothing changed.
      kept: share of its squared change that the factors hold.
    """

    module: str
    shape: tuple[int, ...]
    rank: int
    kept: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """What was extracted.

    Attributes:
      layers: of the adapter, in the order of their names.
      kept: share of the squared change of all layers that the adapter holds.
      outside: share of the model's whole squared change that lies in tensors that an adapter does not reach, or that
        were not selected.
      notices: names read otherwise than stored, and what the model has no partner of in the base, or the base in it.
    """

    layers: tuple[ExtractedLayer, ...]
    kept: float
    outside: float
    notices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For `extract.json`."""
        return dataclasses.asdict(self)


def extract_adapter(
    source: str,
    base_source: str,
    out: Path,
    *,
    rank: int,
    layers: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
    watch: Callable[[str], None] = lambda text: None,
) -> Extraction:
    """Writes the best adapter of a rank, for every layer by itself: B A is τ on its leading right singular vectors.

    Its modules are called as the base's files name them, or as transformers 5 does if it saved the base; with a prefix
    if the model's class puts one before those.

    Args:
      source: the whole model, `PATH_OR_HUB[@REV]`.
      base_source: that it was fine-tuned from, or merged onto.
      out: a folder that does not exist or is empty.
      rank: of every layer, or that of the layer if it is less.
      layers: regular expression of the layers; None for all linear layers that NUFILT would merge.
      dtype: of the factors; None for float32.
      offline: use the local Hub cache alone.
      watch: is told of every stack.

    Raises:
      NufiltError: the models do not fit each other, nothing changed, or the folder cannot be written.
    """
    if rank < 1:
        raise ConfigError(problem("rank", f"must be at least 1, got {rank}"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(Problem(str(out), "exists and is not an empty folder", "choose another --out, or remove it"))
    base, model = _opened(source, base_source, offline)
    reachable, tables = _reachable(base, model, layers)
    fitted = fit(base, model, reachable, asked_for=layers is not None)
    raise_all(CheckpointError, fitted.problems)
    model, names = fitted.task, tuple(name for name in reachable if name not in fitted.kept)
    found: dict[str, tuple[ExtractedLayer, Any]] = {}
    for members in _chunks(base, names):
        watch(f"{len(found)} of {len(names)} layers")
        found |= _extracted(base, model, members, rank, fitted.class_prefix)
    pairs = {layer.module: NewPair(layer.rank, layer.shape, pair) for layer, pair in found.values() if layer.rank}
    if not pairs:
        raise CheckpointError(Problem(source, "differs from the base in none of the layers", "give another base"))
    result = _summary(base, model, [found[name][0] for name in names], names)
    result = dataclasses.replace(result, notices=(*model.notices, *_notices(base, fitted, tables, names)))
    _publish(out, lambda folder: write_adapter(folder, pairs, base, dtype=dtype), result)
    return result


def _opened(source: str, base_source: str, offline: bool) -> tuple[Checkpoint, Checkpoint]:
    name, revision = parse_source(base_source)
    base = open_checkpoint(name, revision=revision, offline=offline, role="base")
    name, revision = parse_source(source)
    return base, open_task(name, base, revision=revision, offline=offline)


def _reachable(base: Checkpoint, model: Checkpoint, layers: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The matrices that an adapter's factors can reach, and the chosen lookup tables, which peft adapts otherwise."""
    chosen = select_readable(base, (model,), layers=layers).layers
    whole = [name for name in chosen if name == tensor_of(name) and name.endswith(".weight")]
    tables = tuple(name for name in whole if is_lookup(name))
    return tuple(name for name in whole if name not in tables), tables


def _notices(base: Checkpoint, fitted: Fitted, tables: tuple[str, ...], names: tuple[str, ...]) -> Iterator[str]:
    source = fitted.task.source
    stored = [stored_module(base, name) for name in names]
    if any(new != module for module, new in newer_names(stored, base.config).items()):
        yield f"{source}: modules are called as {_series(base)} may not find them"
    if is_saved_by_newer(base.config) and any(map(is_expert, stored)):
        what = "peft joins the experts of a block for transformers 5, and may load only a part"
        yield f"{source}: {what}{_mistaken(stored)}"
    yield from (f"{source}: {name} is a lookup table, and has no place in the adapter" for name in tables)
    yield from (f"{source}: {notice}" for notice in fitted.renamed)
    if fitted.kept:
        tensors = "1 tensor has" if len(fitted.kept) == 1 else f"{len(fitted.kept)} tensors have"
        yield f"{source}: {tensors} no place in the adapter: {listed(fitted.kept)}"


def _mistaken(stored: Sequence[str]) -> str:
    """What is most likely left out."""
    alike = called_as_experts(stored)
    named = ", ".join(group.pattern for group in patterns(alike))
    return f": it takes for experts what is called as they are, {named}" if alike else ""


def _series(base: Checkpoint) -> str:
    """The series of transformers whose names an adapter has, and the one that has others."""
    if is_saved_by_newer(base.config):
        return f"in transformers 5, which saved the base {base.source}: peft with transformers 4"
    return f"in the files of the base {base.source}: peft with transformers 5, which calls them otherwise,"


def _chunks(base: Checkpoint, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """A few layers of one shape at a time."""
    for members in stack_names({name: base.tensors[name].shape for name in names}, names):
        size = chunk_size(len(members), layers_by_products(base.tensors[members[0]].size))
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _extracted(
    base: Checkpoint, model: Checkpoint, members: tuple[str, ...], rank: int, prefix: str
) -> dict[str, tuple[ExtractedLayer, Any]]:
    vectors = task_vector(base.read(members), model.unread(members), (members,)).stacks[0]
    _, m, n = vectors.shape
    most = min(rank, m, n)
    program = functools.partial(_leading, rank=most)
    a, b, sizes, certified = jax.device_get(run_alone(functools.partial(program, until_certified=False), vectors))
    # Alone, as a merge does: beside others the result would depend on which they are.
    again = [i for i, ok in enumerate(certified) if not ok]
    a, b, sizes = np.array(a), np.array(b), np.array(sizes)  # copies: fetched ones are read-only
    for i in again:
        found = jax.device_get(run_alone(functools.partial(program, until_certified=True), vectors[i : i + 1]))
        a[i], b[i], sizes[i] = (x[0] for x in found[:3])
    results = {}
    for i, name in enumerate(members):
        whole, kept = (float(x) for x in sizes[i])
        used = int(np.count_nonzero(np.any(a[i], axis=1)))
        if not np.isfinite(a[i]).all() or not np.isfinite(b[i]).all():
            is_of_base = not all(np.isfinite(x).all() for _, x in base.read((name,)).items())
            info = (base if is_of_base else model).tensors[name]
            raise CheckpointError(Problem(str(info.file), "has NaN or infinite numbers", "", info.stored_name))
        share = min(1.0, (kept / whole) ** 2) if whole > 0 else 1.0  # rounding may hold a little more than all
        layer = ExtractedLayer(module=prefix + module_of(base, name), shape=(m, n), rank=used, kept=share)
        results[name] = layer, functools.partial(_pair, a[i], b[i])
    return results


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns that are used: those of rank beyond the matrix's are zero."""
    used = np.any(a, axis=1)
    return a[used], b[:, used]


@functools.partial(Program, static_argnames=("rank", "until_certified"))
def _leading(
    stack: Float[Array, "layers m n"], *, rank: int, until_certified: bool
) -> tuple[Array, Array, Array, Array]:
    """Vᵀ, τ V, (‖τ‖, ‖τ V‖) and whether it is certified, of every layer."""
    found = leading_of((stack,), rank, "auto", until_certified=until_certified)
    masked = jax.vmap(functools.partial(rank_mask, outputs=stack.shape[1]))(found)
    b = matmul(after(stack, masked.vectors), masked.vectors)
    sizes = jnp.stack([jax.vmap(norm)(stack), jax.vmap(norm)(b)], axis=1)
    return jnp.swapaxes(masked.vectors, 1, 2), b, sizes, found.certified


def _summary(base: Checkpoint, model: Checkpoint, layers: Sequence[ExtractedLayer], names: Sequence[str]) -> Extraction:
    """Shares of the whole, from the squared changes of all tensors that both have."""
    changes = dict[str, float]()
    for name, info in base.tensors.items():
        theirs = model.tensors.get(name)
        if theirs is None or theirs is info or theirs.shape != info.shape or not {info.dtype, theirs.dtype} <= FLOATS:
            continue
        new, old = model.unread([name])[name], base.read([name])[name]
        changes[name] = squared_change(np.asarray(new).reshape(-1), np.asarray(old).reshape(-1))
    inside = sum(changes.get(name, 0.0) for name in names)
    held = sum(layer.kept * changes.get(name, 0.0) for layer, name in zip(layers, names, strict=True))
    total = sum(changes.values())
    return Extraction(
        layers=tuple(layers),
        kept=held / inside if inside > 0 else 1.0,
        outside=(total - inside) / total if total > 0 else 0.0,
    )


def _publish(out: Path, write: Callable[[Path], None], result: Extraction) -> None:
    """Writes beside the place, then renames."""
    staging = out.parent / f".{out.name}.{secrets.token_hex(4)}"  # beside it: no rename leaves a file system
    try:
        make_folder(staging)
        write(staging)
        write_json(staging / REPORT, result.to_json())
        sync_tree(staging)
        move(staging, out)
    except OSError as error:
        raise output_error(out, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
