"""What people merge adapters with today, on a few layers: peft's `add_weighted_adapter`, and the published procedure.

Run by `benchmarks.speed.lora`, in a process of its own, as `python -m benchmarks.speed.torch_lora JSON`, where JSON has
the folder of the models, the modules, the rank and the number of tasks.

- peft: all adapters at once, of equal weight, `combination_type="svd"` to the rank of all together.
- published: the last task onto the sum of the others, dense, with thin SVDs and autograd (`speed.torch_reference`).
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from safetensors.numpy import load_file

from benchmarks.common.records import Json
from benchmarks.common.shapes import Inputs
from benchmarks.speed.torch_reference import contender
from nufilt_jax.methods.nufilt import NufiltConfig

Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # A and B of some layers


def read(folder: Path, modules: list[str], tasks: int) -> list[Factors]:
    """The factors of every task."""
    found = []
    for task in range(tasks):
        tensors = load_file(folder / f"task{task}" / "adapter_model.safetensors")
        stems = {module: f"base_model.model.{module}.lora" for module in modules}
        found.append({m: (tensors[f"{s}_A.weight"], tensors[f"{s}_B.weight"]) for m, s in stems.items()})
    return found


def with_peft(tasks: list[Factors], rank: int) -> float:
    """Seconds of one `add_weighted_adapter` of all tasks."""
    first = tasks[0]
    names = {module: f"layer{number}" for number, module in enumerate(first)}
    layers = {names[m]: torch.nn.Linear(a.shape[1], b.shape[0], bias=False) for m, (a, b) in first.items()}
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    model = peft.get_peft_model(torch.nn.ModuleDict(layers), config, adapter_name="task0")
    for task in range(1, len(tasks)):
        model.add_adapter(f"task{task}", config)
    with torch.no_grad():
        for number, factors in enumerate(tasks):
            for module, (a, b) in factors.items():
                layer = model.base_model.model[names[module]]
                layer.lora_A[f"task{number}"].weight.copy_(torch.from_numpy(a))
                layer.lora_B[f"task{number}"].weight.copy_(torch.from_numpy(b))
    every = [f"task{number}" for number in range(len(tasks))]
    start = time.perf_counter()
    how = {"combination_type": "svd", "svd_rank": rank * len(tasks)}
    model.base_model.add_weighted_adapter(every, [1.0] * len(every), "merged", **how)
    return time.perf_counter() - start


def published(tasks: list[Factors], config: NufiltConfig) -> float:
    """Seconds of one step of the printed procedure."""
    deltas = [{module: b @ a for module, (a, b) in factors.items()} for factors in tasks]
    merged = {module: np.sum([delta[module] for delta in deltas[:-1]], axis=0) for module in deltas[0]}
    rng = np.random.default_rng(0)
    rank = config.adapter_rank
    start = {m: 0.02 * rng.standard_normal((rank, x.shape[1]), np.float32) for m, x in merged.items()}
    return contender("torch", Inputs(merged, deltas[-1], start), config, "cpu").run().stages["total"]


def main() -> None:
    """Both, on the layers that the argument names."""
    folder, modules, rank, n_tasks = json.loads(sys.argv[1])
    tasks = read(Path(folder), modules, n_tasks)
    found: Json = {"peft": with_peft(tasks, rank), "published": published(tasks, NufiltConfig())}
    found["versions"] = {"torch": torch.__version__, "peft": peft.__version__}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
