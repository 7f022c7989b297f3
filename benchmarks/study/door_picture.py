"""Draws the picture of the README from the study's results: ten tasks arrive, and what is kept of each at the end.

python -m benchmarks.study.door_picture        writes docs/_static/tasks_arriving.svg

An SVG of its own text, so that it follows the reader's light or dark theme.
"""

import argparse
import json
from pathlib import Path

from benchmarks.common.records import RESULTS, ROOT, Json

STUDY, PICTURE = RESULTS / "study.json", ROOT / "docs" / "_static" / "tasks_arriving.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 380, 56, 18, 64, 64
METHODS = (("nufilt", "merged"), ("sum", "sum"))  # rows of the study with the published settings, and their classes
STYLE = """\
text{font:13px system-ui,sans-serif;fill:#333}.small{font-size:12px;fill:#57606a}.grid{stroke:#d0d7de}
.own{stroke:#57606a;stroke-width:2}.merged{fill:#0969da;stroke:#0969da}.sum{fill:#bc4c00;stroke:#bc4c00}
.base{fill:none;stroke:#8c959f;stroke-width:1.5}.fall{stroke-width:2;stroke-opacity:.45}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9da7b3}.grid{stroke:#30363d}.own{stroke:#9da7b3}
.merged{fill:#58a6ff;stroke:#58a6ff}.sum{fill:#f0883e;stroke:#f0883e}.base{stroke:#7d8590}}"""


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE, help="where to write it")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(picture(json.loads(STUDY.read_text())), encoding="utf-8")


def picture(study: Json) -> str:
    """The SVG, from the content of `study.json`: the first order, the published settings."""
    runs = {name: _run(study, name) for name, _ in METHODS}
    tasks, references = runs["nufilt"]["tasks"], study["references"]
    step = (WIDTH - LEFT - RIGHT) / len(tasks)
    parts = [_axis(percent) for percent in range(20, 101, 20)]
    for index, task in enumerate(tasks):
        x = LEFT + (index + 0.5) * step
        own = _y(references["individual"][task])
        parts += [f'<path class="own" d="M{x - 20:.1f} {own:.1f}h40"/>']
        parts += [f'<circle class="base" cx="{x:.1f}" cy="{_y(references["pre-trained"][task]):.1f}" r="4.5"/>']
        for (name, look), shift in zip(METHODS, (-7, 7), strict=True):
            scores = runs[name]["scores"]["test"]
            first, last = _y(scores["when_merged"][task]), _y(scores["at_the_end"][task])
            parts += [f'<path class="{look} fall" d="M{x + shift:.1f} {first:.1f}V{last:.1f}"/>']
            parts += [f'<circle class="{look}" cx="{x + shift:.1f}" cy="{last:.1f}" r="4.5"/>']
        parts += [f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{task}</text>']
    parts += [f'<text class="small" x="{LEFT}" y="{HEIGHT - 16}">tasks in the order in which they were merged →</text>']
    return "\n".join([_head(study, runs), *_legend(), *parts, "</svg>"]) + "\n"


def _run(study: Json, method: str) -> Json:
    """The method's run in the first order, with the published settings: the first that the file has."""
    return next(run for run in study["runs"] if run["method"] == method and run["order"] == 1)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (share - 0.1) / 0.9


def _axis(percent: int) -> str:
    y = _y(percent / 100)
    line = f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    return line + f'<text class="small" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>'


def _head(study: Json, runs: dict[str, Json]) -> str:
    told = ", ".join(f"{name} {100 * run['scores']['test']['acc']:.1f} %" for name, run in runs.items())
    title = f"Accuracy on {len(runs['nufilt']['tasks'])} tasks after all are merged: {told}"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n"
        f'<text x="{LEFT}" y="22" font-weight="600">{title}</text>'
    )


def _legend() -> list[str]:
    entries = (
        ('<path class="own" d="M0 -4h22"/>', "the task's own model"),
        ('<circle class="merged" cx="11" cy="-4" r="4.5"/>', "NUFILT at the end; line: since it was merged"),
        ('<circle class="sum" cx="11" cy="-4" r="4.5"/>', "plain sum"),
        ('<circle class="base" cx="11" cy="-4" r="4.5"/>', "pre-trained"),
    )
    places = (LEFT, LEFT + 170, LEFT + 500, LEFT + 610)
    return [
        f'<g transform="translate({x} 46)">{mark}<text class="small" x="28">{text}</text></g>'
        for (mark, text), x in zip(entries, places, strict=True)
    ]


if __name__ == "__main__":
    main()
