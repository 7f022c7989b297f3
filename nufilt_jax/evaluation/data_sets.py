"""Data sets of the Hub, of its local cache or of a folder, by the `datasets` library: metadata first, rows later."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from nufilt_jax.errors import ConfigError, MissingExtraError, Problem

if TYPE_CHECKING:
    import datasets

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 10.0  # seconds for the first answer of the Hub


class DataSet:
    """One split of a data set whose metadata are known.

    Attributes:
      columns: what each column holds, by name, as `datasets.Features` does.
      n_rows: how many rows the split has.
    """

    def __init__(self, builder: "datasets.DatasetBuilder", split: str, where: str, *, offline: bool) -> None:
        self._builder, self._split, self._where, self._offline = builder, split, where, offline
        if not builder.info.features or not builder.info.splits:
            self._prepare()
        splits = builder.info.splits or {}
        if split not in splits:
            what = f"there is no split {split!r}"
            raise ConfigError(Problem(where, what, f"choose from {', '.join(map(str, splits))}"))
        self.columns = cast("datasets.Features", builder.info.features)  # prepared, it has them
        self.n_rows = int(splits[split].num_examples)

    def rows(self) -> "datasets.Dataset":
        """The split itself, downloaded if need be.

        Raises:
          ConfigError: it cannot be had.
        """
        self._prepare()
        return cast("datasets.Dataset", self._builder.as_dataset(split=self._split))

    def _prepare(self) -> None:
        with _translated(self._where), _calm(offline=self._offline):
            self._builder.download_and_prepare()


def open_data_set(
    source: str, *, split: str, config: str | None = None, revision: str | None = None, where: str, offline: bool
) -> DataSet:
    """Finds a split and reads its metadata; where the data set has none, its rows too.

    Args:
      source: Hub id, or the absolute path of a folder.
      split: name of the split.
      config: of the data set, if it has several.
      revision: of the Hub id. Without network, a branch or tag means what was prepared last on this machine.
      where: what problems are said of, such as "task dtd".
      offline: use what is on this machine and nothing else, as with `HF_HUB_OFFLINE=1`.

    Raises:
      ConfigError: there is no such data set, config or split, or it cannot be fetched now: the line names the
        command that fetches it.
      MissingExtraError: `datasets` is not installed.
    """
    where = f"{where}: data set {source}"
    try:
        import datasets
    except ImportError as error:
        what = "reading it needs the library datasets, which is not installed"
        raise MissingExtraError(Problem(where, what, "pip install 'nufilt_jax[eval]'")) from error
    is_folder, unreachable, fix = source.startswith("/"), "", ""
    if is_folder and not os.path.isdir(source):
        raise ConfigError(Problem(where, "there is no such folder"))
    if not is_folder:
        unreachable = "it is not to be fetched now" if offline else _unreachable(source, revision, where)
        given = [repr(part) for part in (source, config) if part] + ([f"{revision=}"] if revision else [])
        fix = f'fetch it by: python -c "import datasets; datasets.load_dataset({", ".join(given)})"'
    with _translated(where, fix, unreachable), _calm(offline=bool(unreachable)):
        builder = datasets.load_dataset_builder(source, config, revision=revision)
    if not is_folder and _COMMIT.fullmatch(revision or "") and builder.hash != revision:
        raise ConfigError(Problem(where, f"this machine holds revision {builder.hash}, not {revision}", fix))
    return DataSet(builder, split, where, offline=bool(unreachable))


def _unreachable(source: str, revision: str | None, where: str) -> str:
    """Why the Hub cannot be asked, or nothing if it knows the data set. `datasets` itself asks for half a minute."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(source, revision=revision, timeout=_TIMEOUT)
    except errors.GatedRepoError:
        fix = f"accept its terms at https://huggingface.co/datasets/{source} and log in with: hf auth login"
        raise ConfigError(Problem(where, "is gated on the Hub", fix)) from None
    except errors.RepositoryNotFoundError:
        what = "the Hub has none of this name, or it is private"
        raise ConfigError(Problem(where, what, "check the name, or log in with: hf auth login")) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(Problem(where, f"there is no revision {revision!r}")) from None
    except (*_network_errors(), OSError, ValueError) as error:
        return f"the Hub could not be asked: {_first_line(error)}"
    return ""


@contextlib.contextmanager
def _translated(where: str, fix: str = "", unreachable: str = "") -> Iterator[None]:
    """Turns every failure of the library into one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, *_network_errors(), OSError, ValueError, RuntimeError) as error:
        is_missing = unreachable and isinstance(error, ConnectionError)
        what = f"is not on this machine, and {unreachable}" if is_missing else f"cannot be read: {_first_line(error)}"
        raise ConfigError(Problem(where, what, fix)) from error


def _network_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # Named by its subclass: it is httpx's in one release and httpx2's in another.
    return cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextlib.contextmanager
def _calm(*, offline: bool) -> Iterator[None]:
    """Keeps the library's progress bars and warnings off the terminal, and the library off the network if `offline`."""
    from datasets import config, utils
    from datasets.utils import logging

    level, bars_off, was_offline = logging.get_verbosity(), utils.are_progress_bars_disabled(), config.HF_HUB_OFFLINE
    logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
    utils.disable_progress_bars()
    config.HF_HUB_OFFLINE = was_offline or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = was_offline
        logging.set_verbosity(level)
        if not bars_off:
            utils.enable_progress_bars()
