"""A merge as a grid: rows are windows of layers, columns tasks; a cell needs only the cell before it in its row.

A layer's new D depends on that layer's earlier D and its τ alone. So some whole layers, a *window*, can be taken
through all tasks before the next window is looked at, and no more of a model than that needs to be in memory. Where it
depends on numbers of the whole model too, a *survey* looks at all windows before each column, and finds them.

Windows are whole chunks of the solver (`linalg.dispatch`): then every layer is solved beside the same layers whatever
the windows are, and on one machine the bits are the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from nufilt_jax.linalg.dispatch import chunk_size
from nufilt_jax.methods.stacked import total_rank
from nufilt_jax.output.facts import WindowDone

Direction = Literal["rows", "columns"]


class Stack(NamedTuple):
    """Layers of one shape, in order.

    Attributes:
      layers: their names.
      shape: of each of them.
      chunk: so many are solved at a time, in the whole stack.
      at_once: so many could be, see `linalg.dispatch`; 1 where layers have nothing to do with each other.
      fewest: chunks that a piece must have, unless it is the whole: of one chunk the compiler makes no loop, and rounds
        otherwise than within one.
      is_solved: whether the method works on them; else they follow `--other-params`.
      ranks: of layers whose D is kept in factors, the rank that each task may add; None for those kept whole.
    """

    layers: tuple[str, ...]
    shape: tuple[int, ...]
    chunk: int = 1
    at_once: int = 1
    fewest: int = 1
    is_solved: bool = True
    ranks: tuple[int, ...] | None = None

    @property
    def n_bytes(self) -> int:
        """Of one layer's D, in float32."""
        return 4 * (math.prod(self.shape) if self.ranks is None else total_rank(self.ranks) * sum(self.shape))

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return len(self.layers) * self.n_bytes

    def part(self, start: int, end: int) -> "Stack":
        """Some of the layers."""
        return self._replace(layers=self.layers[start:end])


class Window(NamedTuple):
    """A row of the grid.

    Attributes:
      number: of the window.
      stacks: its layers.
      done: number of tasks that are merged into it already.
    """

    number: int
    stacks: tuple[Stack, ...]
    done: int = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all its layers."""
        return tuple(name for stack in self.stacks for name in stack.layers)

    @property
    def n_bytes(self) -> int:
        """Bytes of its D."""
        return sum(stack.total for stack in self.stacks)

    def told(self, done: int) -> WindowDone:
        """A window in plan and recipe, with the number of tasks that are merged into it."""
        return WindowDone(layers=len(self.layers), bytes=self.n_bytes, tasks=done)


class Cell(NamedTuple):
    """One task and one window.

    Attributes:
      window: whose layers are in it.
      task: its number.
      look: the number of the look that is taken at them; None where they are merged.
    """

    window: Window
    task: int
    look: int | None = None


def windows(stacks: Sequence[Stack], most_bytes: float) -> list[tuple[Stack, ...]]:
    """Divides stacks into windows of at most `most_bytes`, or into as many as there can be if that is too little.

    Stacks stay whole where they fit. One that does not is cut into equal windows, so that few programs serve all.

    >>> stack = Stack(tuple("abcdefgh"), (5, 2), chunk=2, at_once=2)
    >>> [[s.layers for s in window] for window in windows([stack], 200)]
    [[('a', 'b', 'c', 'd')], [('e', 'f', 'g', 'h')]]
    """
    found: list[tuple[Stack, ...]] = []
    filling: tuple[Stack, ...] = ()
    for stack in stacks:
        if sum(part.total for part in (*filling, stack)) <= most_bytes:
            filling = (*filling, stack)
            continue
        found += [filling] if filling else []
        filling = ()
        if stack.total <= most_bytes:
            filling = (stack,)
        else:
            found += [(part,) for part in pieces(stack, most_bytes)]
    return [*found, filling] if filling else found


def pieces(stack: Stack, most_bytes: float) -> list[Stack]:
    """A stack in equal pieces of whole chunks, each of at most `most_bytes` if that can be.

    Layers that are left over go with the last piece. No piece is such that alone it would be solved in other chunks.
    """
    most_pieces = max(1, len(stack.layers) // stack.chunk // stack.fewest)
    wanted = min(most_pieces, max(1, -(-stack.total // max(1, int(most_bytes)))))
    finest = [stack]
    for n_pieces in range(wanted, most_pieces + 1):
        parts = _cut(stack, n_pieces)
        if all(map(_is_alike, parts)):
            finest = parts
            if max(part.total for part in parts) <= most_bytes:
                return parts
    if len(finest) > 1:
        return finest
    # None as fine as asked for keeps the bits: a coarser cut comes nearer to that than the whole stack.
    coarser = (_cut(stack, n_pieces) for n_pieces in range(wanted, 1, -1))
    return next((parts for parts in coarser if all(map(_is_alike, parts))), finest)


def _cut(stack: Stack, n_pieces: int) -> list[Stack]:
    """Pieces of whole chunks, as equal as can be."""
    n_chunks = len(stack.layers) // stack.chunk
    starts = [stack.chunk * -(-i * n_chunks // n_pieces) for i in range(n_pieces)]
    ends = [*starts[1:], len(stack.layers)]
    return [stack.part(start, end) for start, end in zip(starts, ends, strict=True)]


def _is_alike(part: Stack) -> bool:
    """Whether a piece is solved in the chunks of the stack that it is of."""
    n_layers = len(part.layers)
    return chunk_size(n_layers, part.at_once) == part.chunk and -(-n_layers // part.chunk) >= part.fewest


def dealt(rows: Sequence[Window], n_tasks: int, n_hands: int) -> list[list[Window]]:
    """Windows that are not done, dealt so that all hands have about as much to do; the larger first.

    >>> rows = [Window(i, (Stack(("a",), (m, 1)),)) for i, m in enumerate((5, 9, 4, 1))]
    >>> [[row.number for row in hand] for hand in dealt(rows, 1, 2)]
    [[1, 3], [0, 2]]
    """
    hands: list[list[Window]] = [[] for _ in range(n_hands)]
    work = [0] * n_hands

    def left(row: Window) -> int:
        return (n_tasks - row.done) * row.n_bytes

    # Stable: among equals the number decides, so that processes that deal by themselves deal alike.
    for row in sorted((row for row in rows if row.done < n_tasks), key=left, reverse=True):
        hand = work.index(min(work))
        hands[hand].append(row)
        work[hand] += left(row)
    return [sorted(hand, key=lambda row: row.number) for hand in hands]


def smallest(stacks: Sequence[Stack]) -> int:
    """Bytes of the largest window if all are as small as they can be."""
    return max((part.total for stack in stacks for part in pieces(stack, 0)), default=0)


def restarted(stacks: Sequence[Stack], done: Callable[[str], int], most_bytes: float, first: int = 0) -> list[Window]:
    """The windows of a merge of which something may be done: only layers into which as many tasks are merged share one.

    Args:
      stacks: all layers.
      done: number of tasks that are merged into a layer.
      most_bytes: as in `windows`.
      first: number of the first window.
    """
    counts = sorted({done(layer) for stack in stacks for layer in stack.layers}, reverse=True)
    found: list[Window] = []
    for count in counts:
        alike = (
            stack._replace(layers=tuple(layer for layer in stack.layers if done(layer) == count)) for stack in stacks
        )
        rows = windows([stack for stack in alike if stack.layers], most_bytes)
        found += [Window(first + len(found) + i, row, count) for i, row in enumerate(rows)]
    return found


def cells(
    rows: Sequence[Window],
    n_tasks: int,
    walk: Direction,
    n_looks: Callable[[int], int] = lambda task: 0,
    whole: Sequence[Window] = (),
) -> Iterator[Cell]:
    """What is left to do, in order: window after window, or task after task.

    Args:
      rows: the windows to walk over.
      n_tasks: number of columns.
      walk: in which order.
      n_looks: gives the number of looks before a column.
      whole: all windows of the grid, where `rows` are a part of them.

    >>> rows = [Window(0, (), done=1), Window(1, ())]
    >>> [(cell.window.number, cell.task) for cell in cells(rows, 2, "columns")]
    [(1, 0), (0, 1), (1, 1)]
    """
    if walk == "rows":
        for row in rows:
            yield from (Cell(row, task) for task in range(row.done, n_tasks))
        return
    for task in range(n_tasks):
        if all(row.done <= task for row in whole or rows):  # once one is past it, what was looked at is gone
            yield from (Cell(row, task, look) for look in range(n_looks(task)) for row in rows)
        yield from (Cell(row, task) for row in rows if row.done <= task)
