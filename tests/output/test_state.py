import ml_dtypes
import numpy as np
import pytest

from nufilt_jax.errors import CheckpointError, OutputError
from nufilt_jax.output.state import load_state, save_state

STATE = {
    "delta": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(2.5)},
    "extra": {"seen": np.arange(3), "half": np.ones(2, ml_dtypes.bfloat16)},
}


@pytest.mark.parametrize(
    "name", [".", "mod\udce8le", "模型", "[x] #?%20", "a=b@c:d", 'it\'s "x"', "n" * 240, "\x1b[2J"]
)
def test_a_state_comes_back_in_every_bit(tmp_path, name):
    tmp_path = tmp_path / name
    tmp_path.mkdir(exist_ok=True)
    save_state(tmp_path / "state", STATE, 7)
    groups, step = load_state(tmp_path / "state")
    assert step == 7
    for group, members in STATE.items():
        assert set(groups[group]) == set(members)
        for name, value in members.items():
            found = groups[group][name]
            assert found.dtype == np.asarray(value).dtype
            np.testing.assert_array_equal(found, value)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_damaged_state_is_refused(tmp_path):
    save_state(tmp_path / "state", STATE, 7)
    for path in (tmp_path / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the state of the merge cannot be read"):
        load_state(tmp_path / "state")


def test_a_state_without_room_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match=r"the state needs .* MB and 0\.0 MB are free"):
        save_state(tmp_path / "state", STATE, 1)
    assert list(tmp_path.iterdir()) == []
