"""The command `push`: a merged model to the Hugging Face Hub, through its own library."""

import re
from pathlib import Path

from rich.console import Console

from nufilt_jax.checkpoints.peft.config import CONFIG
from nufilt_jax.checkpoints.upload import upload_folder
from nufilt_jax.commands import console as show
from nufilt_jax.commands import text
from nufilt_jax.commands.arguments import PushArguments
from nufilt_jax.commands.failures import traceback_beside, traceback_kept
from nufilt_jax.engine.job import finished_recipe
from nufilt_jax.errors import OutputError, Problem, UsageError
from nufilt_jax.output.documents import read_json
from nufilt_jax.output.place import RECIPE, STATE, OutputPlace

_NEVER = re.compile(r"/\.git/|/\.cache/huggingface/")  # the Hub's library leaves these out
_SMALL = 10_000  # bytes, below which two decimals of a MB say little
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def push(folder: Path, repo: str, arguments: PushArguments, stdout: Console, stderr: Console) -> int:
    """Uploads the output folder of a merge, without its state unless that is asked for.

    Raises:
      NufiltError: there is no finished merge, or the Hub refuses.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UsageError(Problem(repo, "is no name of a Hub repository", "give USER/NAME"))
    place = OutputPlace(folder)
    if not (place.out / RECIPE).is_file():
        raise OutputError(Problem(str(folder), "holds no finished merge", "give the output folder of a merge"))
    recipe = finished_recipe(place.out)
    sizes = _files(place.out, with_state=arguments.with_state)
    show.show_warnings(stderr, _warnings(place.out))
    message = arguments.message or f"{recipe.settings.method}: {', '.join(recipe.task_names)}"
    document = {"out": str(place.out), "repo": repo, "files": sizes, "bytes": sum(sizes.values()), "message": message}
    if arguments.dry_run:
        url = None
    else:
        with traceback_kept(traceback_beside(place.out)), place.locked():
            url = upload_folder(place.out, repo, list(sizes), message=message, private=arguments.private)
    if arguments.json:
        text.show_json(stdout, {**document, "dry_run": arguments.dry_run, "url": url})
    elif not arguments.quiet:
        for name, size in sizes.items():
            text.show_line(stdout, f"{_sized(size)}  {name}")
        told = f"would be uploaded to {repo}" if url is None else f"uploaded: {url}"
        text.show_line(stdout, f"{_sized(document['bytes'])} in {len(sizes)} files {told}")
    return 0


def _sized(n_bytes: int) -> str:
    """A size in MB, or of a small file in kB."""
    return f"{n_bytes / 1e6:10.2f} MB" if n_bytes >= _SMALL else f"{n_bytes / 1e3:10.2f} kB"


def _warnings(folder: Path) -> tuple[str, ...]:
    """An adapter of a local base names it by its full path, as peft needs it on this machine and on no other."""
    if not (folder / CONFIG).is_file():
        return ()
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not Path(base).is_absolute():
        return ()
    what = f"names its base by a folder of this machine, {base}"
    return (
        str(Problem(CONFIG, what, "nobody else has that: put the base's Hub id there, or merge with --base HUB_ID")),
    )


def _files(folder: Path, *, with_state: bool) -> dict[str, int]:
    """What is uploaded, with bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {
        name: size
        for name, size in names.items()
        if (with_state or not name.startswith(f"{STATE}/")) and not _NEVER.search(f"/{name}")
    }
