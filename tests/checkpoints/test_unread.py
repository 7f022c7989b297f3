import threading
from concurrent.futures import CancelledError

import pytest
from checkpoint_builders import bits_equal, clip_model, flax_vision_tree, vision_tower, write_flax, write_safetensors

from nufilt_jax.checkpoints import open_checkpoint, survey_file
from nufilt_jax.errors import CheckpointError


@pytest.fixture(params=["safetensors", "flax"])
def checkpoint(tmp_path, request):
    if request.param == "safetensors":
        return open_checkpoint(str(write_safetensors(tmp_path / "m", clip_model(), shards=2)))
    return open_checkpoint(str(write_flax(tmp_path / "m", flax_vision_tree(vision_tower()))))


def test_unread_tensors_are_those_that_read_gives(checkpoint):
    unread, read = checkpoint.unread(checkpoint.tensors), checkpoint.read()
    assert list(unread) == list(read) and len(unread) == len(read)
    assert {name: x.shape for name, x in unread.items()} == {name: x.shape for name, x in read.items()}
    assert all(bits_equal(unread[name], read[name]) for name in read)
    with pytest.raises(CheckpointError, match="is not in this checkpoint"):
        checkpoint.unread(["nothing"])


def test_stop_ends_every_way_of_reading(checkpoint):
    stop = threading.Event()
    unread = checkpoint.unread(checkpoint.tensors, stop=stop)
    name = next(iter(unread))
    assert unread[name].size > 0
    stop.set()
    for read in (
        lambda: unread[name],
        lambda: checkpoint.sha256(stop=stop),
        lambda: survey_file(checkpoint.weight_files[0], (), stop=stop),
    ):
        with pytest.raises(CancelledError):
            read()
