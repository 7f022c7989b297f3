"""`nufilt extract`: an adapter out of a whole model."""

from pathlib import Path
from typing import cast

from rich.console import Console

from nufilt_jax.checkpoints.dtypes import OUTPUT_DTYPES
from nufilt_jax.commands import console as show
from nufilt_jax.commands.extract_arguments import ExtractArguments
from nufilt_jax.commands.failures import traceback_beside, traceback_kept
from nufilt_jax.config import option, problem
from nufilt_jax.engine.extraction import extract_adapter as run
from nufilt_jax.errors import ConfigError, Problem, UsageError, raise_all

MOST_LOST = 0.05  # share of the change that no factor holds, beyond which that is warned about


def extract(source: str, arguments: ExtractArguments, stdout: Console, stderr: Console) -> int:
    """Extracts, and says how much of the change every layer's factors hold.

    Raises:
      NufiltError: what the command refuses.
    """
    missing = [option(name) for name in ("base", "rank", "out") if getattr(arguments, name) is None]
    raise_all(UsageError, [Problem(", ".join(missing), "missing", "give all three")] if missing else [])
    base, rank, out = cast(str, arguments.base), cast(int, arguments.rank), cast(Path, arguments.out)
    if arguments.dtype is not None and arguments.dtype not in OUTPUT_DTYPES:
        raise ConfigError(problem("dtype", f"must be one of {', '.join(OUTPUT_DTYPES)}, got {arguments.dtype!r}"))
    watcher = show.ProgressWatcher(stderr, quiet=arguments.quiet or arguments.json)
    how = {"layers": arguments.layers, "dtype": arguments.dtype, "offline": arguments.offline}
    with traceback_kept(traceback_beside(out.absolute())), watcher.progress:
        found = run(source, base, out, rank=rank, watch=watcher.phase, **how)
    show.show_warnings(stderr, found.notices)
    if found.outside > MOST_LOST:
        what = f"{source}: {found.outside:.1%} of its squared change is in tensors that the adapter does not hold"
        show.show_warnings(stderr, (f"{what} (select more with --layers)",))
    if arguments.json:
        show.show_json(stdout, {"out": str(out), **found.to_json()})
    elif not arguments.quiet:
        columns = {
            "layer": [layer.module for layer in found.layers],
            "shape": ["{} x {}".format(*layer.shape) for layer in found.layers],
            "rank": [str(layer.rank) for layer in found.layers],
            "energy kept": [f"{layer.kept:.2%}" for layer in found.layers],
        }
        show.show_table(stdout, columns, texts=("layer",))
        show.show_line(stdout, f"energy kept: {found.kept:.2%} of the change of these layers")
        show.show_line(stdout, f"adapter: {out}")
    return 0
