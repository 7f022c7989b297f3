"""The options of `extract`, as parsed and not yet understood. Imports nothing heavy."""

import dataclasses

from cyclopts import Parameter

from nufilt_jax.commands.arguments import AnyPath, Flag, Whole


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractArguments:
    """The options of `extract`.

    Attributes:
      base: The model that it was fine-tuned from: a folder or Hub id, as PATH_OR_HUB[@REV]. [required]
      rank: Rank of the adapter. [required]
      out: The folder to write. [required]
      layers: Take the matrices in whose names this regular expression is found. Without it, the blocks' linear layers.
      dtype: Type of the factors: float32, bfloat16 or float16. Without it, float32.
      offline: Never ask the Hub; use its local cache.
      json: One JSON document on stdout and nothing else there.
      quiet: Nothing but warnings and errors.
    """

    base: str | None = None
    rank: Whole = None
    out: AnyPath = None
    layers: str | None = None
    dtype: str | None = None
    offline: Flag = False
    json: Flag = False
    quiet: Flag = False
