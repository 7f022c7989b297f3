"""The contender `torch-batched`: the reduced objective over all layers of one width, every choice made by trial."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.common import measure
from benchmarks.common.shapes import grouped
from benchmarks.speed.torch_common import Clock, Contender, Outcome, Tensor, Tensors
from nufilt_jax.methods.nufilt import NufiltConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's
BLOCK, PASSES = 16, 24  # of the block iteration for V1
ALL = 10**6  # layers in one batch
CHUNKS = {"cpu": (1, 2, 4, 8), "cuda": (ALL, 4)}
TRIAL_NUMBERS = 2**24  # of the Gram matrices in a trial
TRIAL_LAYERS, TRIAL_STEPS, TRIAL_REPEATS = 16, 10, 3


class Group(NamedTuple):
    """All layers of one width, on the device: stacks [layers, m, n] per shape."""

    names: tuple[str, ...]
    merged: tuple[Tensor, ...]
    task: tuple[Tensor, ...]
    start: Tensor

    def head(self, layers: int) -> "Group":
        """The first few layers of the largest stack."""
        i = max(range(len(self.task)), key=lambda i: self.task[i].numel())
        merged, task = self.merged[i][:layers], self.task[i][:layers]
        return Group((), (merged,), (task,), self.start[: len(task)])


class Plan(NamedTuple):
    """How a group is solved."""

    iterate: bool = False  # V1 by block iteration, not by eigh
    threads: int = 1  # layers in eigh at the same time, one core each; 1: all cores for each layer
    chunk: int = ALL  # layers per batch of Adam steps
    compiled: bool = False  # the step, by torch.compile

    def __str__(self) -> str:
        route = "block iteration" if self.iterate else "eigh"
        decompositions = f"V1 by {route}, {self.threads} at once"
        layers = "all" if self.chunk == ALL else self.chunk
        return f"{decompositions}, steps {'compiled' if self.compiled else 'eager'}, batches of {layers}"


class Problem(NamedTuple):
    """The objective reduced to the n inputs (`nufilt_jax.core.adapt`), for several layers."""

    gram: Tensor
    pull: Tensor
    directions: Tensor  # V = [V2 V1]


def batched(inputs: Tensors, config: NufiltConfig, device: str) -> Contender:
    """Chooses a plan for every group and gets the contender ready."""
    groups = []
    for group in grouped({name: tuple(x.shape) for name, x in inputs.task.items()}):
        merged, task = (
            tuple(torch.stack([part[name] for name in names]) for names in group.stacks) for part in inputs[:2]
        )
        groups.append(Group(group.names, merged, task, torch.stack([inputs.start[name] for name in group.names])))
    torch.manual_seed(0)
    with torch.no_grad():
        plans, trials = zip(*(_choose(group, config, device) for group in groups), strict=True)

    def run() -> Outcome:
        clock = Clock(device)
        with torch.no_grad():
            parts = [_solve(group, plan, config, clock) for group, plan in zip(groups, plans, strict=True)]
        return Outcome({name: x for part in parts for name, x in part.items()}, clock.stages)

    notes = {
        str(group.start.shape[-1]): {"plan": str(plan), "trials": trial.seconds}
        for group, plan, trial in zip(groups, plans, trials, strict=True)
    }
    return Contender(run, notes)


def _solve(group: Group, plan: Plan, config: NufiltConfig, clock: Clock) -> dict[str, Tensor]:
    merged_gram, task_gram = _grams(group.merged), _grams(group.task)
    prior, new = _decompose(merged_gram, task_gram, plan, config)
    del merged_gram
    clock.lap("decompose")
    sizes = [len(x) for x in group.task]
    halves = zip(group.merged, group.task, prior.split(sizes), new.split(sizes), strict=True)
    pulls, removed = zip(*itertools.starmap(_reduce, halves), strict=True)
    problem = Problem(task_gram, torch.cat(pulls), torch.cat([prior, new], dim=2))
    clock.lap("reduce")
    a, b = _train(problem, group.start, plan, config)
    clock.lap("adam")
    parts = zip(group.task, removed, prior.split(sizes), a.split(sizes), b.split(sizes), strict=True)
    updates = [_fuse(*part) for part in parts]
    clock.lap("fuse")
    return dict(zip(group.names, itertools.chain.from_iterable(updates), strict=True))


def _grams(stacks: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.mT @ x for x in stacks])


def _decompose(merged_gram: Tensor, task_gram: Tensor, plan: Plan, config: NufiltConfig) -> tuple[Tensor, Tensor]:
    prior = _by_eigh(merged_gram, config.filter_rank, plan.threads)
    if plan.iterate and config.task_rank:
        return prior, _by_iteration(task_gram, config.task_rank)
    return prior, _by_eigh(task_gram, config.task_rank, plan.threads)


def _by_eigh(grams: Tensor, rank: int, threads: int) -> Tensor:
    parts = _in_threads(lambda g: torch.linalg.eigh(g)[1], grams.split(1) if threads > 1 else [grams], threads)
    return torch.cat([vectors[:, :, vectors.shape[2] - rank :].flip(2) for vectors in parts])


def _by_iteration(grams: Tensor, rank: int) -> Tensor:
    """Block power iteration with Cholesky-QR, and Rayleigh-Ritz at its end."""
    n = grams.shape[-1]
    q = torch.randn(n, min(n, max(BLOCK, 2 * rank)), device=grams.device).expand(len(grams), -1, -1)
    for _ in range(PASSES):
        q = _cholesky_qr(_cholesky_qr(grams @ q))
    _, u = torch.linalg.eigh(q.mT @ (grams @ q))
    return q @ u[:, :, u.shape[2] - rank :].flip(2)


def _cholesky_qr(y: Tensor) -> Tensor:
    y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True)
    inner = y.mT @ y
    inner.diagonal(dim1=1, dim2=2).add_(1e-6)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(inner).mT, y, upper=True, left=False)


def _reduce(merged: Tensor, task: Tensor, prior: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """K = τᵀ C1, and τ V2."""
    removed = task @ prior
    missing = removed @ (prior.mT @ new) - merged @ new
    return task.mT @ missing, removed


def _fuse(task: Tensor, removed: Tensor, prior: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(torch.baddbmm(task, removed, prior.mT, alpha=-1), task @ b, a)


def _train(problem: Problem, start: Tensor, plan: Plan, config: NufiltConfig) -> tuple[Tensor, Tensor]:
    """All Adam steps of a chunk of layers before the next chunk: its state stays in the cache."""
    step = torch.compile(_step, dynamic=False) if plan.compiled else _step
    rates = _rates(config, start.device)
    chunks = zip(*(x.split(plan.chunk) for x in (start, *problem)), strict=True)

    def train(start: Tensor, gram: Tensor, pull: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        a, b = start.clone(), torch.zeros_like(start.mT).contiguous()
        moments = [torch.zeros_like(x) for x in (a, a, b, b)]
        for rate, correction in rates:
            step(Problem(gram, pull, directions), a, b, moments, rate, correction)
        return a, b

    a, b = zip(*itertools.starmap(train, chunks), strict=True)
    return torch.cat(a), torch.cat(b)


def _rates(config: NufiltConfig, device: Any) -> list[tuple[Tensor, Tensor]]:
    """Adam's bias corrections per step, as tensors: `torch.compile` would specialise on numbers."""
    pairs = [(config.learning_rate / (1 - BETAS[0] ** t), 1 / (1 - BETAS[1] ** t)) for t in range(1, config.steps + 1)]
    return [tuple(row.unbind()) for row in torch.tensor(pairs, device=device)]


def _step(problem: Problem, a: Tensor, b: Tensor, moments: list[Tensor], rate: Tensor, correction: Tensor) -> None:
    """One Adam step in place."""
    rank_new = problem.pull.shape[2]
    z = a @ problem.directions
    z_new = z[:, :, z.shape[2] - rank_new :]
    overlap = z @ z.mT
    gb = problem.gram @ b
    gradient_b = torch.baddbmm(gb @ overlap, problem.pull, z_new.mT, beta=2, alpha=-2)
    gradient_z = (b.mT @ gb) @ z
    gradient_z[:, :, z.shape[2] - rank_new :] -= b.mT @ problem.pull
    gradient_a = 2 * (gradient_z @ problem.directions.mT)
    _adam(a, gradient_a, moments[0], moments[1], rate, correction)
    _adam(b, gradient_b, moments[2], moments[3], rate, correction)


def _adam(x: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: Tensor, correction: Tensor) -> None:
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    x.sub_(rate * first / ((second * correction).sqrt_() + EPSILON))


class Trials:
    """Picks the fastest plan by running each on a few layers; `seconds` keeps what they took, or why one failed."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: dict[str, float | str] = {}

    def fastest(self, what: str, plans: Iterable[Plan], call: Callable[[Plan], Any]) -> Plan:
        """The first plan if none runs."""
        return min(plans, key=lambda plan: self._time(f"{what}: {plan}", lambda: call(plan)))

    def _time(self, what: str, call: Callable[[], Any]) -> float:
        try:
            call()
            seconds = min(self._once(call) for _ in range(TRIAL_REPEATS))
        except (RuntimeError, ImportError, OSError) as error:  # no compiler, or no memory
            self.seconds[what] = f"{type(error).__name__}: {error}".splitlines()[0]
            return float("inf")
        self.seconds[what] = seconds
        return seconds

    def _once(self, call: Callable[[], Any]) -> float:
        clock = Clock(self._device)
        call()
        clock.lap("call")
        return clock.stages["total"]


def _choose(group: Group, config: NufiltConfig, device: str) -> tuple[Plan, Trials]:
    trials = Trials(device)
    head = group.head(max(1, min(TRIAL_LAYERS, TRIAL_NUMBERS // group.start.shape[-1] ** 2)))
    merged, task = _grams(head.merged), _grams(head.task)
    threads = sorted({1, measure.cores()}) if device == "cpu" else [1]
    routes = itertools.starmap(Plan, itertools.product((False, True), threads))
    plan = trials.fastest("decompose", routes, lambda plan: _decompose(merged, task, plan, config))
    prior, new = _decompose(merged, task, plan, config)
    pull, _ = _reduce(head.merged[0], head.task[0], prior, new)
    problem = Problem(task, pull, torch.cat([prior, new], dim=2))
    few = dataclasses.replace(config, steps=TRIAL_STEPS)
    first, *others = CHUNKS[device]
    chunks = [first, *(chunk for chunk in others if chunk < len(head.start))]

    def train(plan: Plan) -> tuple[Tensor, Tensor]:
        return _train(problem, head.start, plan, few)

    plan = trials.fastest("adam", [plan._replace(chunk=chunk) for chunk in chunks], train)
    return trials.fastest("adam", [plan, plan._replace(compiled=True)], train), trials


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any], threads: int) -> list[Any]:
    """Maps, with several threads of one core each, or with one that uses all cores."""
    if threads == 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def quietly(item: Any) -> Any:
            with torch.no_grad():  # a setting of the thread
                return function(item)

        return list(pool.map(quietly, items))
