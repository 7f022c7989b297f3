"""How far a walk over the grid is in one of its rows."""

import dataclasses

from nufilt_jax.engine.grid import Window
from nufilt_jax.output.state import CellRecord, StoredWindow


@dataclasses.dataclass
class Row:
    """How far a window is.

    Attributes:
      window: its layers.
      records: what each task did to it.
      kept: the window as it is on disk; None if nothing of it is.
    """

    window: Window
    records: list[CellRecord]
    kept: StoredWindow | None = None

    @property
    def n_kept(self) -> int:
        """Number of tasks that are merged into it on disk."""
        return self.kept.done if self.kept else self.window.done
