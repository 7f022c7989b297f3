"""From runs to the forms of the paper's tables, with the paper's own numbers beside ours."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.common import paper_tables, records
from benchmarks.common.records import Json
from benchmarks.common.runs import Setting, find_run

Columns = Mapping[str, Sequence[Setting]]  # rows, by where their settings are from


def make(document: Json, columns: Columns, options: argparse.Namespace) -> list[Json]:
    """The tables that `options.table` asks for."""
    form = _FORMS[options.table]
    return form(document, columns, options)


def _of_scores(document: Json, columns: Columns, options: argparse.Namespace) -> list[Json]:
    """Tables 1 and 4: ACC and BWT, mean and standard deviation over the orders."""
    group, backbone = options.group, paper_tables.BACKBONES[options.model]
    theirs = paper_tables.ablation(group) if options.table == 4 else paper_tables.main_results(backbone, group)
    metrics = ("ACC", "BWT")
    rows = [
        [label, *([f"{_percent(scores.values()):.1f}", ""] * len(columns)), *_theirs(theirs, label, metrics)]
        for label, scores in _references(document)
    ]
    for settings in zip(*columns.values(), strict=True):
        label = settings[0].label
        ours = [_spread(_runs(document, one, options.orders), metric) for one in settings for metric in metrics]
        rows.append([label, *ours, *_theirs(theirs, label, metrics)])
    titles = [f"{metric} %, {choice}" for choice in columns for metric in metrics]
    titles += [
        f"{metric} %, paper: {backbone if options.table == 1 else 'ViT-B/32'}, {group} tasks" for metric in metrics
    ]
    what = {1: "every method", 4: "the ablation"}[options.table]
    return [records.table(_title(options, what, document), ("method", *titles), rows)]


def _of_overhead(document: Json, columns: Columns, options: argparse.Namespace) -> list[Json]:
    """Table 5: seconds of all updates of one merge, compilation apart, and the parameters of the merged model."""
    rows = []
    for setting in columns[next(iter(columns))]:
        runs = _runs(document, setting, options.orders)
        total = statistics.median(sum(run["seconds"]) for run in runs)
        steps = None if "steps" in setting.config.idle else getattr(setting.config, "steps", None)
        rows.append([setting.label, steps, total, runs[0]["parameters"] / 1e6, _spread(runs, "ACC"), "here"])
    for one in paper_tables.overhead():
        rows.append([one.model, one.iterations, one.total_s, one.parameters, one.acc, "paper: ViT-B/32, 8 tasks"])
    titles = ("method", "steps", "s per merge", "10^6 parameters", "ACC %", "where")
    return [records.table(_title(options, "overhead", document), titles, rows)]


def _of_tasks(document: Json, columns: Columns, options: argparse.Namespace) -> list[Json]:
    """Tables 2 and 10: accuracy on every task after the last, mean over the orders."""
    tasks = document["of"]["tasks"]
    found = []
    for choice, settings in columns.items():
        rows = [
            [label, *(round(100 * scores[name], 1) for name in tasks), round(_percent(scores.values()), 1)]
            for label, scores in _references(document)
        ]
        for setting in settings:
            runs = [run["scores"]["test"] for run in _runs(document, setting, options.orders)]
            means = [_percent(run["at_the_end"][name] for run in runs) for name in tasks]
            rows.append([setting.label, *(round(mean, 1) for mean in means), round(statistics.mean(means), 1)])
        title = _title(options, f"accuracy in % on every task, settings {choice}", document)
        found.append(records.table(title, ("method", *tasks, "ACC"), rows))
    theirs = paper_tables.glue() if options.table == 2 else paper_tables.per_task(paper_tables.BACKBONES[options.model])
    names = list(dict.fromkeys(task for _, task in theirs))
    labels = dict.fromkeys(label for label, _ in theirs)
    rows = [[label, *(theirs.get((label, name)) for name in names)] for label in labels]
    of = "Flan-T5-base" if options.table == 2 else f"{paper_tables.BACKBONES[options.model]}, 20 tasks"
    found.append(records.table(f"Table {options.table}: the paper's, {of}", ("method", *names), rows))
    return found


_FORMS: Mapping[int, Callable[[Json, Columns, argparse.Namespace], list[Json]]] = {
    1: _of_scores,
    2: _of_tasks,
    4: _of_scores,
    5: _of_overhead,
    10: _of_tasks,
}


def _title(options: argparse.Namespace, what: str, document: Json) -> str:
    orders = "order " + str(options.orders[0]) if len(options.orders) == 1 else f"{len(options.orders)} orders"
    return f"Table {options.table}: {what}; {document['of']['name']}, {len(document['of']['tasks'])} tasks, {orders}"


def _references(document: Json) -> list[tuple[str, Mapping[str, float]]]:
    return [(label, document["references"][label]) for label in ("pre-trained", "individual")]


def _runs(document: Json, setting: Setting, orders: Sequence[int]) -> list[Json]:
    return [run for order in orders if (run := find_run(document["runs"], setting, order)) is not None]


def _percent(values: Iterable[float]) -> float:
    return 100 * statistics.mean(values)


def _spread(runs: Sequence[Json], metric: str) -> str:
    """Mean ± standard deviation over the orders, in percent."""
    values = [100 * run["scores"]["test"][metric.lower()] for run in runs]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def _theirs(scores: Mapping[tuple[str, str], paper_tables.Score], label: str, metrics: Sequence[str]) -> list[str]:
    found = (scores.get((label, metric)) for metric in metrics)
    return ["" if one is None else f"{one[0]}" + ("" if one[1] is None else f" ± {one[1]}") for one in found]
