"""The published procedure in PyTorch, three times: what the package is measured against.

- `torch`: the paper as printed (arXiv:2509.21413v2, Eqs. 7-10 and 15-17). Thin SVDs one by one, the projector built,
  the objective τ (P + BA) through autograd, one Adam over all layers.
- `torch-released`: the same, but with the products in the order of the authors' released program: never an n × n
  product in a step, everything but the targets formed anew in each.
- `torch-batched`: the best form known to us. Gram matrices, batched `eigh`, the objective reduced to n inputs with
  gradients written out, batched matrix products over all layers of one width, Adam by hand. Route to V1, layers per
  batch, threads and `torch.compile` are chosen by trial before the timed runs.

All take the same arrays, those already on their device, and return the updates τ (P + BA).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.common.shapes import Inputs
from benchmarks.speed.torch_batched import batched
from benchmarks.speed.torch_common import Clock, Contender, Outcome, Tensor, Tensors
from nufilt_jax.methods.nufilt import NufiltConfig


def contender(name: str, inputs: Inputs, config: NufiltConfig, device: str) -> Contender:
    """Puts the arrays on `device` (cpu or cuda) and gets contender `name` ready."""
    moved = Tensors(*({key: torch.from_numpy(x.copy()).to(device) for key, x in part.items()} for part in inputs))
    if name == "torch-batched":
        return batched(moved, config, device)
    objective = {"torch": printed_objective, "torch-released": released_objective}[name]
    return Contender(lambda: _eager(moved, config, device, objective), {})


class Layer(NamedTuple):
    """What the eager objectives know of one layer."""

    merged: Tensor  # D
    task: Tensor  # τ
    prior: Tensor  # V2
    new: Tensor  # V1
    projector: Tensor  # P
    targets: tuple[Tensor, Tensor]  # τ V1, D V2


def _eager(
    inputs: Tensors, config: NufiltConfig, device: str, objective: Callable[[Layer, Tensor, Tensor], Tensor]
) -> Outcome:
    """Layer by layer, with autograd; Adam sees all layers."""
    clock = Clock(device)
    with torch.no_grad():
        layers = {name: _layer(inputs.merged[name], inputs.task[name], config) for name in inputs.task}
    clock.lap("decompose")
    starts = {name: start.clone().requires_grad_() for name, start in inputs.start.items()}
    ends = {name: torch.zeros_like(start.T).requires_grad_() for name, start in inputs.start.items()}
    optimizer = torch.optim.Adam([*starts.values(), *ends.values()], lr=config.learning_rate)
    for _ in range(config.steps):
        optimizer.zero_grad()
        torch.stack([objective(layer, starts[name], ends[name]) for name, layer in layers.items()]).sum().backward()
        optimizer.step()
    clock.lap("adam")
    with torch.no_grad():
        updates = {name: x.task @ (x.projector + ends[name] @ starts[name]) for name, x in layers.items()}
    clock.lap("fuse")
    return Outcome(updates, clock.stages)


def _layer(merged: Tensor, task: Tensor, config: NufiltConfig) -> Layer:
    prior, new = _right_singular(merged, config.filter_rank), _right_singular(task, config.task_rank)
    projector = torch.eye(len(prior), device=prior.device) - prior @ prior.T
    return Layer(merged, task, prior, new, projector, (task @ new, merged @ prior))


def _right_singular(x: Tensor, rank: int) -> Tensor:
    _, _, vt = torch.linalg.svd(x, full_matrices=False)
    return vt[:rank].T.contiguous()


def printed_objective(layer: Layer, a: Tensor, b: Tensor) -> Tensor:
    """‖(τ − D − τ(P + BA)) V1‖² + ‖τ(P + BA) V2‖², as it stands."""
    response = layer.task @ (layer.projector + b @ a)
    plasticity = (layer.task - layer.merged - response) @ layer.new
    return plasticity.square().sum() + (response @ layer.prior).square().sum()


def released_objective(layer: Layer, a: Tensor, b: Tensor) -> Tensor:
    """The same number: in each block the merged model's answer, with filter and adapter, against a target."""
    loss = 0
    for target, v in zip(layer.targets, (layer.new, layer.prior), strict=True):
        kept = v - layer.prior @ (layer.prior.T @ v)
        answer = layer.merged @ v + layer.task @ kept
        loss = loss + (target - answer - layer.task @ (b @ (a @ v))).square().sum()
    return loss
