"""The paper's tables from one command each, our numbers beside its own (arXiv:2509.21413v2).

python -m benchmarks.study.tables --table 1 --on study   ACC and BWT of every method
python -m benchmarks.study.tables --table 4 --on study   the ablation
python -m benchmarks.study.tables --table 5 --on study   iterations, seconds, parameters
python -m benchmarks.study.tables --table 10 --on study  accuracy on every task
python -m benchmarks.study.tables --table 1 --on paper   the paper's checkpoints and data, from the Hub (2: Flan-T5)

On the study every method is run with the paper's settings, ranks scaled to the width, and with those chosen on the
validation draw (benchmarks/study/study_settings.py). All orders of a row run through the same compiled programs. What
the results file holds already is not merged again, unless --again says so.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import measure, paper_tables, records, script
from benchmarks.common.records import Json
from benchmarks.common.runs import Setting, find_run, merge, references
from benchmarks.common.streams import ORDERS, PaperStream, Stream, StudyStream
from benchmarks.study import study_settings, table_forms
from benchmarks.study.study_settings import CLOSED_FORM
from nufilt_jax import methods
from nufilt_jax.methods import RULES
from nufilt_jax.presets import FLAN_T5, Preset
from nufilt_jax.zoo import STUDY

ABLATION = ("sum", "null_space", "adapter_only", "nufilt")
METHODS = (*(name for name in RULES if name not in ABLATION), "nufilt", CLOSED_FORM)
GLUE_METHODS = ("task_arithmetic", "ties", "adamerging", "wemoe", "wudi", "opcm", "nufilt", CLOSED_FORM)
OVERHEAD = ("task_arithmetic", "opcm", "adamerging", "wemoe", "wudi", CLOSED_FORM, "nufilt")
LABELS = {1: METHODS, 2: GLUE_METHODS, 4: ABLATION, 5: OVERHEAD, 10: METHODS}
STEPS = (25, 50, 100)  # of Table 5
AS_PUBLISHED, CHOSEN = "as published", "chosen by validation"


def main() -> None:
    """Parses the command line."""
    script.prepare_process()
    parser = script.Parser(__doc__, "study.json, or paper_MODEL_GROUP.json")
    parser.add_argument("--table", type=int, choices=sorted(LABELS), required=True)
    parser.add_argument("--on", choices=("study", "paper"), default="study")
    parser.add_argument(
        "--model", choices=paper_tables.BACKBONES, default="vit-b32", help="on paper (default: vit-b32)"
    )
    parser.add_argument("--group", type=int, choices=(8, 14, 20), default=8, help="on paper: tasks (default: 8)")
    parser.add_argument("--orders", type=script.at_least(1), nargs="+", default=list(ORDERS), help="default: 1 to 5")
    parser.add_argument("--images", type=script.at_least(1), default=500, help="on study: per task (default: 500)")
    parser.add_argument(
        "--data", type=Path, help="on paper: examples for adamerging and wemoe, as merge --data takes them"
    )
    parser.add_argument("--again", action="store_true", help="merge anew what the results file holds")
    options = parser.parse_args()
    if options.table == 2 and options.on == "study":
        parser.error("--table 2 is of Flan-T5, which the study does not have: say --on paper")
    with parser.refusals():
        document, path = run(options)
    records.finish(document, path)


def run(options: argparse.Namespace) -> tuple[Json, Path]:
    """Merges what is missing, stores every run as soon as it is done, and makes the table."""
    stream, columns = study(options) if options.on == "study" else paper(options)
    path = options.json or records.RESULTS / f"{stream.name}.json"
    stored = json.loads(path.read_text()) if path.is_file() and not options.again else {}
    if stored.get("of", stream.identity) != stream.identity:
        raise SystemExit(f"{path}: holds runs of {stored['of']}, not of {stream.identity}: say --json or --again")
    document: Json = {"benchmark": "tables", "of": stream.identity}
    document["environment"] = stored.get("environment") or measure.environment()
    document |= {"runs": stored.get("runs", []), "references": stored.get("references") or references(stream)}
    for setting in dict.fromkeys(setting for rows in columns.values() for setting in rows):
        for order in options.orders:
            if find_run(document["runs"], setting, order) is None:
                script.say(f"{setting.label}: order {order}")
                document["runs"].append(merge(stream, setting, order))
                document["environment"] = measure.environment()
                records.write_json(document, path)
    others = [table for table in stored.get("tables", []) if not table["title"].startswith(f"Table {options.table}:")]
    document["tables"] = sorted(others + table_forms.make(document, columns, options), key=lambda table: table["title"])
    return document, path


def study(options: argparse.Namespace) -> tuple[Stream, Mapping[str, Sequence[Setting]]]:
    """The study, and the rows of a table by where their settings are from."""
    width, labels = STUDY.config["hidden_size"], LABELS[options.table]
    published = study_settings.published(width)
    rows = [published[label] for label in labels]
    if options.table == 5:
        rows += [_with_steps(published["nufilt"], steps) for steps in STEPS if steps != 50]
        return StudyStream(n_images=options.images), {AS_PUBLISHED: rows}
    chosen = study_settings.chosen(width)
    columns = {AS_PUBLISHED: rows, CHOSEN: [chosen[label] for label in labels]}
    return StudyStream(n_images=options.images), columns


def paper(options: argparse.Namespace) -> tuple[Stream, Mapping[str, Sequence[Setting]]]:
    """The paper's checkpoints, and the rows of a table with its settings."""
    model = FLAN_T5 if options.table == 2 else options.model
    stream = PaperStream(model, options.group, options.data)
    rows = [_on_paper(label, stream.preset) for label in LABELS[options.table]]
    if options.table == 5:
        rows += [_with_steps(rows[-1], steps) for steps in STEPS if steps != 50]
    kept = [row for row in rows if options.data is not None or not RULES[row.method].needs_data]
    return stream, {AS_PUBLISHED: kept}


def _on_paper(label: str, preset: Preset) -> Setting:
    method = "nufilt" if label == CLOSED_FORM else label
    config = methods.find(method).config(**preset.settings.get(method, {}))
    if label == CLOSED_FORM:
        config = dataclasses.replace(config, solver="closed_form")
    return Setting(method, config, label=label)


def _with_steps(setting: Setting, steps: int) -> Setting:
    config = dataclasses.replace(setting.config, **{"steps": steps})  # pyright: ignore
    return dataclasses.replace(setting, config=config, label=f"{setting.label}, {steps} steps")


if __name__ == "__main__":
    main()
