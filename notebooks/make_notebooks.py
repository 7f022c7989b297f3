"""Runs the notebooks' text form and writes it with all pictures as .ipynb: `python notebooks/make_notebooks.py`."""

import base64
import io
import os
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).resolve().parent
NAMES = ("merge_and_evaluate", "merge_your_own", "merge_lora", "subspace_alignment")
CELL_SECONDS = 300  # several times what the slowest cell takes


def execute(name: str, folder: Path, *, is_fast: bool) -> NotebookNode:
    """Runs a notebook from its text, top to bottom, with the package of this checkout and an empty cache.

    Args:
      name: one of `NAMES`.
      folder: an empty one, for the files that it writes, Jupyter's own too.
      is_fast: with few images.

    Returns:
      The notebook with its outputs, free of execution times.

    Raises:
      CellExecutionError: a cell failed.
    """
    notebook = jupytext.read(HERE / f"{name}.py")
    work = folder / "work"
    work.mkdir(parents=True)
    places = ("NUFILT_CACHE", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
    env = {**os.environ, **{place: str(folder / place.lower()) for place in places}}
    paths = [str(HERE.parent), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "NOTEBOOK_FAST": "1" if is_fast else ""}
    how = {"kernel_name": "python3", "record_timing": False, "timeout": CELL_SECONDS}
    NotebookClient(notebook, resources={"metadata": {"path": str(work)}}, **how).execute(env=env)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # else drawn at random
    return notebook


def shrink_pictures(notebook: NotebookNode) -> None:
    """Takes pictures down to 256 colours, a third of the bytes: the repository keeps every version of them."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    for data in (output.get("data", {}) for output in outputs):
        if "image/png" in data:
            file = io.BytesIO()
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            picture.quantize(256, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
            data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Writes all notebooks."""
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(name, Path(folder), is_fast=False)
        shrink_pictures(notebook)
        notebook.metadata.pop("language_info", None)  # the version of this Python
        text = nbformat.writes(notebook)
        (HERE / f"{name}.ipynb").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
