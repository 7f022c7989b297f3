"""What goes into a recipe: what went in, how, and what each step did."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from nufilt_jax import __version__
from nufilt_jax.checkpoints import Checkpoint
from nufilt_jax.config import option
from nufilt_jax.core.forecast import Forecast
from nufilt_jax.engine.adapter_output import told_of
from nufilt_jax.engine.coverage import coverage
from nufilt_jax.engine.inspection import Inspection
from nufilt_jax.engine.job import Recorded, recorded_in
from nufilt_jax.engine.plan import Plan
from nufilt_jax.engine.sameness import tolerance_entry
from nufilt_jax.errors import NufiltError
from nufilt_jax.linalg.dispatch import LAPACK_BATCH, layers_at_once
from nufilt_jax.methods import find
from nufilt_jax.methods.state import LayerReport
from nufilt_jax.output.facts import Host
from nufilt_jax.output.place import OutputPlace
from nufilt_jax.output.recipe import Model, Recipe, Step

_LIBRARIES = ("jax", "jaxlib", "optax", "orbax-checkpoint", "safetensors", "numpy")
NEAR_EQUAL = 1e-3  # relative gap at the cut below which the choice of directions is called arbitrary


def new_recipe(plan: Plan, inspection: Inspection) -> Recipe:
    """The recipe, with the steps that earlier runs have done marked as resumed."""
    several = f", {plan.devices} of them" if plan.devices > 1 and find(plan.settings.method).spreads else ""
    selected, left = coverage(plan, inspection.changes)
    recorded = plan.recorded.recipe if plan.recorded else None
    versions, device = version_entry(), device_entry() + several
    return Recipe(
        base=_opened("base", plan.base, inspection.base_sha256),
        tasks=tuple(
            _opened(source.name, plan.tasks[source.name], inspection.task_sha256[source.name])
            if source.name in plan.tasks
            else Model(source.name, source.source, source.revision, inspection.task_sha256[source.name])
            for source in plan.sources
        ),
        settings=plan.settings,
        selected=selected,
        left=left,
        steps=tuple(step.as_resumed() for step in (recorded.steps if recorded else ())),
        windows=recorded.windows if recorded else (),
        versions=versions,
        device=device,
        host=_host(plan.recorded, versions, device),
        memory=plan.memory.told(),
        adapter=told_of(plan) if plan.settings.output == "adapter" else None,
    )


def version_entry() -> dict[str, str]:
    """Of this program and its libraries."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"nufilt_jax": __version__, "python": platform.python_version()} | libraries


def device_entry() -> str:
    """The device that JAX computes on."""
    device = jax.local_devices()[0]
    return f"{device.platform}: {device.device_kind}"


def this_host() -> Host:
    """This one.

    Chunks of layers share the degree of a polynomial (see `linalg.dispatch`), and XLA compiles for the processor at
    hand. The number of cores by itself changes nothing.
    """
    told = {"machine": platform.machine(), "processor": _processor(), "layers_at_once": layers_at_once()}
    return Host(**told, tolerance=tolerance_entry())


def layers_then(host: Host) -> int:
    """How many layers were solved at a time, by a recipe's `host`; as many as here, where it does not tell."""
    told = host.layers_at_once
    return told if type(told) is int and 0 < told <= LAPACK_BATCH else layers_at_once()  # JSON's true is an int, too


def layers_as_begun(place: OutputPlace) -> int:
    """How many layers to solve at a time, so that a merge that stands here goes on in its bits.

    On another processor they cannot, and all cores are used.
    """
    with contextlib.suppress(NufiltError):  # which is told where the merge is gone on with
        recorded = recorded_in(place)
        if recorded is not None and recorded.has_begun:
            then, n_layers = recorded.recipe.host, layers_then(recorded.recipe.host)
            if _unmixed(then) == dataclasses.replace(this_host(), layers_at_once=n_layers):
                return n_layers
    return layers_at_once()


def _unmixed(host: Host) -> Host:
    """The same, whatever else something was merged on."""
    return dataclasses.replace(host, is_mixed=None)


def _host(recorded: Recorded | None, versions: Mapping[str, str], device: str) -> Host:
    here = this_host()
    if recorded is None or not recorded.has_begun:
        return here
    then = recorded.recipe
    is_mixed = (_unmixed(then.host), then.versions, then.device) != (here, versions, device) or then.host.is_mixed
    return dataclasses.replace(here, is_mixed=True) if is_mixed else here


def _processor() -> str:
    with contextlib.suppress(OSError):  # where there is no /proc
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def facts(plan: Plan, inspection: Inspection) -> dict[str, Any]:
    """What the result depends on, and who solves what: alike in all processes that share a merge."""
    settings = plan.settings.to_json()
    config = settings.pop("config")
    models = {"the base": inspection.base_sha256, **{f"task {n}": sha for n, sha in inspection.task_sha256.items()}}
    return {
        "the order of tasks": ", ".join(source.name for source in plan.sources),
        **{option(name): value for name, value in {**settings, **config}.items()},
        **{f"{model}: SHA-256 of {file}": x for model, sha256 in models.items() for file, x in sha256.items()},
        **{f"the version of {name}": version for name, version in version_entry().items()},
        "the division into windows": [row.told(row.done).to_json() for row in plan.rows],
    }


def _opened(name: str, checkpoint: Checkpoint, sha256: Mapping[str, str]) -> Model:
    """A checkpoint in the recipe; a local folder with its full path, so that it is found from anywhere."""
    source = os.path.abspath(checkpoint.path) if checkpoint.revision is None else checkpoint.source
    return Model(name, source, checkpoint.revision, dict(sha256))


def step_of(task: str, seconds: float, report: Mapping[str, LayerReport], timings: Mapping[str, float]) -> Step:
    """A step. Losses are sums over layers, before each Adam step and after the last."""
    rows = [np.asarray(row.losses, np.float64) for row in report.values() if row.has_losses]
    losses = tuple(_number(loss) for loss in np.sum(rows, axis=0)) if rows else ()
    return Step(task=task, seconds=round(seconds, 3), losses=losses, timings=timings)


def forecast_entry(report: Mapping[str, LayerReport]) -> dict[str, Any]:
    """A step in `forecast.json`: what can be known of each layer before evaluating anything."""
    layers = {name: _layer_entry(row) for name, row in report.items()}
    near_equal = [
        name for name, row in report.items() if row.forecast is not None and row.forecast.cut_gap < NEAR_EQUAL
    ]
    return {"near_equal_cuts": near_equal, "layers": layers}


def _layer_entry(row: LayerReport) -> dict[str, Any]:
    told: dict[str, Any] = dict.fromkeys(Forecast._fields) | {"certified": True}  # what needs no directions has them
    if row.forecast is not None:
        numbers = {field: _number(value) for field, value in row.forecast._asdict().items()}
        told = numbers | {"certified": bool(row.forecast.certified)}
    named = {"captured_share" if field == "captured" else field: value for field, value in told.items()}
    before, after = (_number(cast(Any, row.losses)[i]) if row.has_losses else None for i in (0, -1))
    return {**named, "loss_before": before, "loss_after": after}


def _number(value: Any) -> float | None:
    """For JSON, which knows no infinity: as where nothing lies beyond a cut."""
    return float(value) if np.isfinite(value) else None
