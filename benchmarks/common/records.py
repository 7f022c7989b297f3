"""Results as files hold them, and as Markdown shows them.

python -m benchmarks.common.records RESULTS.json ...    prints the Markdown tables of stored results
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Json = dict[str, Any]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Json:
    """A table as the results files hold it."""
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def rows(document: Json, title: str) -> list[Json]:
    """The rows of one of a document's tables, each by column."""
    [found] = [part for part in document["tables"] if part["title"] == title]
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def write_json(document: Json, path: Path) -> None:
    """Writes results in a form that changes no more than the results do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def markdown(document: Json, only: str = "") -> str:
    """The tables of a results file whose titles begin so, and under them where the numbers come from."""
    at = document["environment"]
    commit = (at["commit"] or "unknown")[:8] + (" with changes" if at["uncommitted_changes"] else "")
    lines = [
        part for one in _titled(document, only) for part in ("**" + one["title"] + "**", "", markdown_table(one), "")
    ]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items() if version)
    lines.append(f"{where(at)}, Python {at['python']}, {versions}; commit {commit}, {at['date'][:10]}.")
    return "\n".join(lines)


def _titled(document: Json, start: str) -> list[Json]:
    return [one for one in document["tables"] if one["title"].startswith(start)]


def where(environment: Json) -> str:
    """The device in a few words."""
    if environment["platform"] != "cpu":
        return environment["device"]
    return f"{environment['cpu_count']} cores of {environment['cpu']}"


def markdown_table(one: Json) -> str:
    """One table in Markdown: numbers to four figures, and to the right."""
    numeric = [all(isinstance(row[i], int | float | None) for row in one["rows"]) for i in range(len(one["columns"]))]
    lines = [one["columns"], ["---:" if right else "---" for right in numeric]]
    lines += [[_cell(value) for value in row] for row in one["rows"]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if f"{value:.4g}" == "1" and value < 1 - 1e-7:  # a share, of which four figures would not tell what is missing
        return f"1 - {1 - value:.1e}"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.1e}"


def finish(document: Json, path: Path) -> None:
    """Stores results and prints their tables."""
    write_json(document, path)
    Console(highlight=False).print(markdown(document), soft_wrap=True, markup=False)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results files")
    paths = parser.parse_args().results
    if missing := [str(path) for path in paths if not path.is_file()]:
        parser.exit(1, f"{parser.prog}: there is no {', '.join(missing)}\n")
    documents = {path: json.loads(path.read_text()) for path in paths}
    if others := [str(path) for path, found in documents.items() if not {"tables", "environment"} <= found.keys()]:
        fix = "python -m benchmarks.study.tiny --markdown prints those of tiny.json"
        parser.exit(1, f"{parser.prog}: no tables are stored in {', '.join(others)} ({fix})\n")
    for document in documents.values():
        Console(highlight=False).print(markdown(document), soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
