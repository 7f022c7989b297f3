"""Images per second of CLIP's vision tower, beside transformers' torch class: from memory, and from JPEG to accuracy.

Weights are synthetic and images random, the same for both. From memory, both get normalised float32 pixels and give
pooled features; the best batch size of each counts. From JPEG, ours is the task that `nufilt evaluate` scores; the
other's images are decoded by as many threads, also ahead, and prepared by transformers' own preprocessor.
"""

import contextlib
import functools
import importlib.util
import io
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.common import measure, models, records, script
from benchmarks.common.measure import Times
from benchmarks.common.models import Tower
from benchmarks.common.records import Json
from nufilt_jax.evaluation.clip.tasks import open_image_task
from nufilt_jax.evaluation.scoring import Classifier
from nufilt_jax.evaluation.specs import ImageSpec
from nufilt_jax.models import parse_vision_config, to_flax_tree, vision_features

OURS, THEIRS = "nufilt_jax", "transformers, torch"
CLASSES = 10
JPEG_SIZE = (500, 375)  # width and height, those of many data sets' photographs
COLUMNS = ("contender", "batch", "compile s", "median images/s", "best images/s", "% CPU of others")
MEMORY, RATIO, JPEG = "Pixels in memory to features", "Times torch, by medians", "JPEG files to accuracy"

Params = dict[str, np.ndarray]


class Entry(NamedTuple):
    """What one contender did at one batch size.

    Attributes:
      setup_seconds: of compilation; None where there is none.
      times: of every run over all images.
      answer: features, or an accuracy.
      neighbours: % of the machine's CPU time that other processes took meanwhile.
    """

    setup_seconds: float | None
    times: Times
    answer: Any
    neighbours: float | None

    def row(self, contender: str, batch: int, n_images: int) -> list[Any]:
        """Of a table: rates, not seconds."""
        rates = [n_images / self.times.median, n_images / self.times.minimum]
        return [contender, batch, self.setup_seconds, *rates, self.neighbours]


class Head:
    """Random class embeddings behind no projection."""

    visual_projection = None

    def __init__(self, width: int) -> None:
        drawn = np.random.default_rng(1).standard_normal((CLASSES, width)).astype(np.float32)
        self.embeddings = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)

    def __call__(self, class_names: object, templates: object) -> np.ndarray:
        """The embeddings, whatever the names."""
        return self.embeddings


def weights(tower: Tower) -> Params:
    """Random weights of a tower whose norms let through what they get."""
    found = {name: models.pretrained(name, shape) for name, shape in tower.shapes().items()}
    norms = [name for name in found if name.endswith("weight") and found[name].ndim == 1]
    return found | {name: np.ones_like(found[name]) for name in norms}


def timed(call: Callable[[], Any], repeats: int, setup_seconds: float | None = None) -> Entry:
    """Runs a call until its answer is ready: once to warm up, then on the clock."""
    answer = call()
    neighbours = measure.Neighbours()
    times = measure.time_it(call, repeats, warm_up=False)
    return Entry(setup_seconds, times, answer, neighbours.percent())


def from_memory(tower: Tower, params: Params, pixels: np.ndarray, batch: int, repeats: int) -> Entry:
    """Our forward pass over all images in batches."""
    config = parse_vision_config(tower.config())
    tree = to_flax_tree(params, config)
    forward = jax.jit(functools.partial(vision_features, config=config))
    program, setup = measure.compile_it(forward, tree, pixels[:batch])

    def run() -> np.ndarray:
        found = [program(tree, pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
        return np.concatenate([np.asarray(part) for part in found])

    return timed(run, repeats, setup)


def from_jpeg(tower: Tower, params: Params, folder: Path, head: Head, repeats: int) -> Entry:
    """Our task over a data set's files."""
    names = tuple(map(str, range(CLASSES)))
    spec = ImageSpec(dataset=str(folder), split="test", templates=("{}",), class_names=names)
    task = open_image_task(spec, "random", model_config=tower.config(), preprocessor_config={}, head=head, offline=True)
    return timed(lambda: task.score(params), repeats)


@contextlib.contextmanager
def jpegs(n_images: int) -> Iterator[Path]:
    """A data set of smooth random photographs, as a parquet file in a folder that does not stay."""
    import datasets
    from datasets import config
    from PIL import Image

    rng = np.random.default_rng(0)
    files = [io.BytesIO() for _ in range(n_images)]
    for file in files:
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    labels = rng.integers(0, CLASSES, n_images).tolist()
    rows = {"image": [{"bytes": file.getvalue(), "path": None} for file in files], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        (data := Path(folder, "data")).mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(data / "test.parquet")
        config.HF_DATASETS_CACHE = Path(folder, "cache")
        yield data


def run(options: Any) -> Json:
    """Runs everything the options ask for."""
    environment = measure.environment("transformers", "datasets", "pillow")
    tower = Tower(width=options.width, blocks=options.blocks)
    params = weights(tower)
    torch_model = _torch_model(tower, params) if options.against else None
    memory = _memory(tower, params, torch_model, options)
    best = {name: min(entries, key=lambda n: entries[n].times.median) for name, entries in memory.items()}
    sizes = best | {OURS: Classifier(params, tower.config()).batch_size}
    files = _files(tower, params, torch_model, sizes, options)
    rows = [entries[n].row(name, n, options.images) for n in options.batches for name, entries in memory.items()]
    file_rows = [[*entry.row(name, sizes[name], options.images), entry.answer] for name, entry in files.items()]
    tables = [records.table(MEMORY, COLUMNS, rows), records.table(JPEG, (*COLUMNS, "accuracy"), file_rows)]
    if options.against:
        tables.append(_ratios({name: memory[name][batch] for name, batch in best.items()}, files))
    return {
        "benchmark": "evaluation",
        "dtype": "float32",
        "environment": environment,
        "seconds": {
            "memory": {name: {n: one.times.seconds for n, one in entries.items()} for name, entries in memory.items()},
            "jpeg": {name: entry.times.seconds for name, entry in files.items()},
        },
        "settings": script.settings(options),
        "tables": tables,
    }


def _memory(tower: Tower, params: Params, torch_model: Any, options: Any) -> dict[str, dict[int, Entry]]:
    """By contender and batch size."""
    pixels = np.random.default_rng(0).standard_normal((options.images, 3, 224, 224), np.float32)
    found: dict[str, dict[int, Entry]] = {}
    for batch in options.batches:
        script.say(f"batches of {batch}")
        found.setdefault(OURS, {})[batch] = from_memory(tower, params, pixels, batch, options.repeats)
        if torch_model is not None:
            call = functools.partial(torch_model.features, pixels, batch)
            found.setdefault(THEIRS, {})[batch] = timed(call, options.repeats)
    return found


def _files(tower: Tower, params: Params, torch_model: Any, sizes: dict[str, int], options: Any) -> dict[str, Entry]:
    """By contender."""
    script.say("from JPEG")
    head = Head(tower.width)
    with jpegs(options.images) as folder:
        found = {OURS: from_jpeg(tower, params, folder, head, options.repeats)}
        if torch_model is not None:
            call = functools.partial(torch_model.accuracy, folder, head.embeddings, sizes[THEIRS])
            found[THEIRS] = timed(call, options.repeats)
    return found


def _torch_model(tower: Tower, params: Params) -> Any:
    from benchmarks.speed import torch_vision

    return torch_vision.Model(tower.config(), params)


def _ratios(memory: dict[str, Entry], whole: dict[str, Entry]) -> Json:
    ours, theirs = (memory[name].answer.astype(np.float64) for name in (OURS, THEIRS))
    apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    wrong = abs(whole[OURS].answer - whole[THEIRS].answer)
    speeds = [statistics.median(part[THEIRS].times.seconds) / part[OURS].times.median for part in (memory, whole)]
    columns = ("from", "images/s", "largest difference")
    return records.table(RATIO, columns, [["memory, best batch sizes", speeds[0], apart], ["JPEG", speeds[1], wrong]])


def main() -> None:
    """Parses the command line."""
    script.prepare_process()
    parser = script.Parser(__doc__, "evaluation_PLATFORM.json")
    parser.add_argument("--against", choices=("torch",), help="also time transformers' class: torch")
    parser.add_argument("--images", type=script.at_least(1), default=128, help="of every run (default: 128)")
    parser.add_argument(
        "--batches",
        type=script.at_least(1),
        nargs="+",
        default=[8, 16, 32, 64],
        metavar="N",
        help="sizes (8 16 32 64)",
    )
    parser.add_argument("--repeats", type=script.at_least(1), default=5, help="timed runs (default: 5)")
    parser.add_argument("--blocks", type=script.at_least(1), default=12, help="of the tower (default: 12)")
    parser.add_argument("--width", type=script.at_least(1), default=768, help="of the tower (default: 768)")
    options = parser.parse_args()
    if uneven := [batch for batch in options.batches if options.images % batch]:
        parser.error(f"argument --batches: {options.images} images do not make whole batches of {uneven[0]}")
    if options.against and importlib.util.find_spec("torch") is None:
        parser.exit(1, f"{parser.prog}: --against: PyTorch is not installed (pip install torch)\n")
    if options.against and jax.default_backend() != "cpu":
        parser.error("argument --against: this compares CPUs; set JAX_PLATFORMS=cpu")
    document = run(options)
    platform = document["environment"]["platform"]
    records.finish(document, options.json or records.RESULTS / f"evaluation_{platform}.json")


if __name__ == "__main__":
    main()
