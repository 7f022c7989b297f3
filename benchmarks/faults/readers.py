"""The readers of weight files, each given any bytes as its file: what a fuzzer tries, and the tests again."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.records import ROOT
from benchmarks.faults import models
from nufilt_jax.checkpoints import open_checkpoint
from nufilt_jax.errors import NufiltError, printable

CORPUS = ROOT / "tests" / "faults" / "corpus"  # inputs that between them reach all of the readers
FAILING = "failing"  # the file to which a process that fuzzes adds a byte for each input that fails
MOST_SECONDS = 2.0  # of the processor, for one input


class Target(NamedTuple):
    """A reader.

    Attributes:
      name: of its corpus and of its row in the results.
      file: that is damaged, in a folder that is sound otherwise.
      words: that the format knows, for a fuzzer to put in.
    """

    name: str
    file: str
    words: tuple[bytes, ...]


_SAFETENSORS = (b'"dtype":"F32"', b'"BF16"', b'"F4"', b'"shape":[]', b'"data_offsets":[0,0]', b'"__metadata__":{}')
_INDEX = (b'"weight_map":{', b'"metadata":{}', b'"model-00001-of-00002.safetensors"', b"../", b"\\u0000", b"\\ud800")
_MSGPACK = (b"\xa5shape", b"\xa6chunks", b"\xb9__msgpack_chunked_array__\xc3", b"\xa7float32", b"\xc7\x01\x01", b"\x93")
TARGETS = {
    target.name: target
    for target in (
        Target("safetensors", "model.safetensors", _SAFETENSORS),
        Target("index", "model.safetensors.index.json", _INDEX),
        Target("msgpack", "flax_model.msgpack", _MSGPACK),
    )
}


class Reader:
    """A model folder of which one file is any bytes, opened as commands open it, and all its weights read."""

    def __init__(self, target: Target, folder: Path) -> None:
        _, task = models.base_and_task(size=2, n_layers=1)
        models.write(folder, task, shards=2)
        self._folder, self._path = folder, folder / target.file
        if target.name != "index":  # which needs its shards
            (folder / TARGETS["index"].file).unlink()

    def read(self, data: bytes) -> bool:
        """Whether these bytes are a model.

        Raises:
          Exception: anything but a refusal in words: a fault of the reader.
        """
        self._path.write_bytes(data)
        start = time.process_time()
        try:
            open_checkpoint(str(self._folder), role="base").read()
            is_model = True
        except NufiltError as error:
            is_model = False
            lines = [str(problem) for problem in error.problems]
            if not all(lines) or not lines:
                raise ValueError("a refusal without words") from error
            if any(line != printable(line) for line in lines):
                raise ValueError("a refusal with orders to a terminal") from error
        if (seconds := time.process_time() - start) > MOST_SECONDS:
            raise TimeoutError(f"one input took {seconds:.1f} s")
        return is_model


def corpus(target: Target) -> Iterator[Path]:
    """The inputs that are kept for a reader."""
    yield from sorted((CORPUS / target.name).iterdir())
