"""A model's tokenizer, from the files beside its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from nufilt_jax.errors import CheckpointError, MissingExtraError, Problem

_FILE = "tokenizer.json"
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)  # what transformers raises for a bad one


@runtime_checkable
class Tokenizer(Protocol):
    """What this package asks of a tokenizer of `transformers`."""

    def __call__(self, text: list[str], /, *, truncation: bool, max_length: int) -> Mapping[str, Any]:
        """Tokens of each text, under `input_ids`, no more than `max_length`."""
        ...

    def batch_decode(self, sequences: Any, /, *, skip_special_tokens: bool) -> list[str]:
        """The text of each row of tokens."""
        ...

    def __len__(self) -> int:
        """Number of tokens that it knows."""
        ...


def open_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a model folder.

    Raises:
      CheckpointError: the folder has none, or it cannot be read.
      MissingExtraError: `transformers` is not installed.
    """
    fix = "copy the tokenizer's files of the pre-trained model into the folder"
    if not (folder / _FILE).is_file():  # without it, transformers makes up an empty one
        raise CheckpointError(Problem(str(folder), f"has no {_FILE}", fix))
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        what, install = "its tokenizer needs transformers, which is not installed", "pip install 'nufilt_jax[eval]'"
        raise MissingExtraError(Problem(str(folder), what, install)) from error
    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, _UNREADABLE):  # tokenizers raises the bare class
            raise
        what = f"cannot be read: {type(error).__name__}: {error}"
        raise CheckpointError(Problem(str(folder / _FILE), what, fix)) from error
