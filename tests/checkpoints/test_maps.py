import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_builders import write_safetensors

from nufilt_jax.checkpoints import open_checkpoint
from nufilt_jax.checkpoints.maps import drop_pages, map_file

TENSORS = {f"layers.{number}.weight": np.full((4, 4), number, np.float32) for number in range(30)}


def test_what_is_read_of_many_shards_holds_no_descriptor(tmp_path):
    checkpoint = open_checkpoint(str(write_safetensors(tmp_path / "m", TENSORS, shards=30)))
    assert len(checkpoint.weight_files) == 30
    before = len(os.listdir("/dev/fd"))
    read = checkpoint.read()
    assert len(os.listdir("/dev/fd")) == before
    assert all(np.array_equal(read[name], value) for name, value in TENSORS.items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_map_lives_as_long_as_the_views_of_it(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(100)))
    part = map_file(path)[10:20].view(np.uint16)
    gc.collect()
    assert is_mapped(path) and part.tobytes() == bytes(range(10, 20))
    drop_pages(part)
    assert part.tobytes() == bytes(range(10, 20))
    del part
    assert not is_mapped(path)


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


def test_what_cannot_be_mapped_is_named(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="empty"):
        map_file(tmp_path / "empty")


def test_pages_of_what_is_no_file_are_left(tmp_path):
    numbers = np.arange(1 << 16)
    drop_pages(numbers[8:])
    assert np.array_equal(numbers, np.arange(1 << 16))
