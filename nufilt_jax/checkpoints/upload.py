"""A model folder to the Hugging Face Hub. Tokens are the Hub library's own matter."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from nufilt_jax.errors import OutputError, Problem

_PATTERN = re.compile(r"[*?\[]")  # what the Hub library would take for more than a name


def upload_folder(folder: Path, repo: str, names: Sequence[str], *, message: str, private: bool) -> str:
    """Uploads files of a folder in one commit, and returns the commit's address.

    Args:
      folder: where they are.
      repo: the Hub id; made if there is none.
      names: of the files, relative to the folder.
      message: of the commit.
      private: whether a repository that is made is private.

    Raises:
      OutputError: the Hub refuses, or does not answer.
    """
    from huggingface_hub import HfApi, errors

    # Of the network too, whichever client the library speaks through.
    http = cast(tuple[type[Exception], ...], errors.HfHubHTTPError.__bases__)
    failures = (*http, OSError, ValueError)
    patterns = [_PATTERN.sub(r"[\g<0>]", name) for name in names]
    try:
        made = HfApi().create_repo(repo, private=private or None, exist_ok=True)
        commit = HfApi().upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=patterns, commit_message=message
        )
    except failures as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        fix = "check the name and the network, and log in with: hf auth login"
        raise OutputError(Problem(repo, f"cannot be uploaded to: {reason}", fix)) from error
    return str(commit.commit_url)
