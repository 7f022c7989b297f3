"""The grid is pure: which layers share a window, and in which order cells are done."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nufilt_jax.engine.grid import Stack, Window, cells, pieces, restarted, smallest, windows
from nufilt_jax.linalg.dispatch import chunk_size


def stack(name, n_layers, n_bytes, at_once=1, fewest=1):
    layers = tuple(f"{name}{i:03}" for i in range(n_layers))
    return Stack(layers, (n_bytes,), chunk_size(n_layers, at_once), at_once, fewest)


stacks_drawn = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 8), st.integers(1, 2)), min_size=1, max_size=5
).map(lambda rows: [stack(f"s{i}_", *row) for i, row in enumerate(rows)])


@given(stacks_drawn, st.integers(0, 1600))
def test_windows_hold_every_layer_once_and_in_order(stacks, most):
    found = windows(stacks, most)
    assert [n for row in found for part in row for n in part.layers] == [n for s in stacks for n in s.layers]
    assert all(row for row in found)


@given(stacks_drawn, st.integers(0, 1600))
def test_windows_are_whole_chunks_of_the_solver(stacks, most):
    whole = {name: s for s in stacks for name in s.layers}
    for part in (part for row in windows(stacks, most) for part in row):
        before = whole[part.layers[0]]
        start = before.layers.index(part.layers[0])
        assert start % before.chunk == 0
        assert chunk_size(len(part.layers), before.at_once) == before.chunk
        assert len(part.layers) > (before.fewest - 1) * before.chunk or part == before


@given(stacks_drawn, st.integers(0, 1600))
def test_no_window_is_larger_than_it_must_be(stacks, most):
    stacks = [s for s in stacks if s.at_once <= 2]  # with more, pieces can be alike the whole and smaller ones not
    for row in windows(stacks, most):
        assert sum(part.total for part in row) <= max(most, smallest(stacks))


def test_whole_stacks_stay_together_and_cut_ones_are_alike():
    stacks = [stack("a", 2, 10), stack("b", 12, 10, 2), stack("c", 3, 10)]
    rows = windows(stacks, 200)
    assert [[(part.layers[0][0], len(part.layers)) for part in row] for row in rows] == [
        [("a", 2)],
        [("b", 4)],
        [("b", 4)],
        [("b", 4)],
        [("c", 3)],
    ]
    assert [len(row) for row in windows(stacks, 680)] == [3]


def test_what_is_left_over_goes_with_the_chunk_before_it():
    assert [len(part.layers) for part in pieces(stack("a", 7, 1, 2), 0)] == [2, 2, 3]
    # Ten layers, four at once, go 4, 4, 2; the last six alone would go 3, 3.
    assert [len(part.layers) for part in pieces(stack("a", 10, 1, 4), 0)] == [10]


@given(stacks_drawn, st.integers(0, 1600), st.integers(0, 1600), st.randoms(use_true_random=False))
def test_other_windows_over_what_is_done_keep_every_count(stacks, before, now, random):
    done = {
        name: count
        for row in windows(stacks, before)
        for count in [random.randint(0, 3)]
        for part in row
        for name in part.layers
    }
    rows = restarted(stacks, done.get, now, first=5)
    assert sorted(name for row in rows for name in row.layers) == sorted(done)
    assert [row.number for row in rows] == list(range(5, 5 + len(rows)))
    assert all(done[name] == row.done for row in rows for name in row.layers)


@pytest.mark.parametrize("walk", ["rows", "columns"])
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 4))
def test_a_cell_comes_after_the_one_before_it(walk, done, n_tasks):
    rows = [Window(i, (stack(str(i), 1, 1),), count) for i, count in enumerate(done)]
    order = list(cells(rows, n_tasks, walk))
    assert sorted((cell.window.number, cell.task) for cell in order) == [
        (i, task) for i, count in enumerate(done) for task in range(count, n_tasks)
    ]
    for row in rows:
        assert [cell.task for cell in order if cell.window is row] == list(range(row.done, n_tasks))
    if walk == "columns":
        assert all(a.task <= b.task for a, b in itertools.pairwise(order))
    else:
        assert len(list(itertools.groupby(order, lambda cell: cell.window.number))) <= len(rows)
