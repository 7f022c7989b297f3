"""One self-contained HTML page of a merge: no script, no link, no file beside it; for a screen, a phone or paper."""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nufilt_jax.analysis.forecast import QUANTITIES
from nufilt_jax.analysis.layers import LAYER_GROUPS
from nufilt_jax.analysis.pictures import RELATIVE, affinity_picture
from nufilt_jax.analysis.style import POLICY, STYLE
from nufilt_jax.analysis.verdict import MEASURES, verdict
from nufilt_jax.evaluation.metrics import of_examples

# Where a long name may go on in the next line; a number may not.
_BREAKS = re.compile(r"(?<=[^\W\d])\.(?=\w)|(?<=\w)\.(?=[^\W\d])|/(?=\w)")
# Of settings without a value; others of them are not told.
_LEFT_OUT = {"layers": "the method's own choice", "format": "the base's", "dtype": "the base's"}
_LOSSES = {"stability": "stability", "plasticity": "plasticity", "harmonic": "harmonic mean"}
_CHECKS = {
    "drift_and_stability": "drift with measured stability loss, over layers",
    "added_share_and_stability": "share of τ added (1 - removed + restored) with measured stability loss, over layers",
    "removed_share_and_plasticity": "removed share with measured plasticity loss, over layers",
    "drift_and_accuracy_lost": "mean drift with accuracy lost on earlier tasks, over steps",
}


class Told(NamedTuple):
    """What the page tells of the recipe of a merge.

    Attributes:
      steps: task, seconds, and seconds by what they were spent on.
      timings: seconds besides the steps, by what they were spent on.
      compiled: number of programs, and seconds; None if that is not known.
      inputs: base and tasks: name, source, revision of a Hub model, SHA-256 by file.
      settings: all, with versions and `device`.
      compared: rows of `evaluation.json`, of this merge and of other models; empty where there are none.
    """

    steps: Sequence[tuple[str, float, Mapping[str, float]]]
    timings: Mapping[str, float]
    compiled: tuple[int, float] | None
    inputs: Sequence[tuple[str, str, str | None, Mapping[str, str]]]
    settings: Mapping[str, Any]
    compared: Sequence[Mapping[str, Any]] = ()


def report_page(document: Mapping[str, Any], recipe: Told, pictures: Mapping[str, bytes]) -> str:
    """The report as HTML; a part that is not known says so.

    Args:
      document: of `document.make_document`.
      recipe: what to tell of it.
      pictures: PNG files of `pictures.draw_pictures`; may be empty.
    """
    title = f"{document['method']}: {len(document['tasks'])} tasks merged"
    sections = (
        _verdict(document, recipe),
        _comparison(document, recipe),
        _accuracy(document, recipe, pictures),
        _forecast(document, pictures),
        _losses(document, pictures),
        _affinity(document, pictures),
        _check(document),
        _time(recipe),
        _recipe(recipe),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n{_paragraph(_summary(document, recipe))}{''.join(sections)}</body>\n</html>\n"
    )


def _summary(document: Mapping[str, Any], recipe: Told) -> str:
    told = [f"Merged one after another into {recipe.inputs[0][1]}: {', '.join(document['tasks'])}."]
    accuracy = document["accuracy"]
    if accuracy and accuracy["acc"] is not None:
        some = f",{found} of each task" if (found := of_examples(document["limit"])) else ""
        told.append(f"ACC {100 * accuracy['acc']:.1f} %, BWT {100 * accuracy['bwt']:+.1f} points{some}.")
    platform, _, kind = recipe.settings["device"].partition(": ")
    device = platform if kind in ("", platform) else f"{platform} ({kind})"
    compiling = sum(timings.get("compile", 0.0) for _, _, timings in recipe.steps)
    told.append(
        f"The steps took {sum(seconds for _, seconds, _ in recipe.steps):.1f} s on {device}, "
        f"{compiling:.1f} s of them compiling."
    )
    return " ".join(told)


def _verdict(document: Mapping[str, Any], recipe: Told) -> str:
    means = [MEASURES] if document["accuracy"] or recipe.compared else []
    return _section("verdict", "Verdict", *map(_paragraph, verdict(document, recipe.compared) + means))


def _comparison(document: Mapping[str, Any], recipe: Told) -> str:
    title, tasks = "Beside other models", document["tasks"]
    if not recipe.compared:
        return _section("comparison", title, _missing(document, "comparison", "no other model was evaluated"))
    rows = [
        [
            row["name"],
            *(_percent(row["accuracy"].get(task)) for task in tasks),
            _percent(row["acc"]),
            _percent(row["bwt"]),
        ]
        for row in recipe.compared
    ]
    return _section("comparison", title, _table([_scores_head(document), *tasks, "ACC", "BWT"], rows))


def _accuracy(document: Mapping[str, Any], recipe: Told, pictures: Mapping[str, bytes]) -> str:
    title, tasks, found = "Accuracy after each step", document["tasks"], document["accuracy"]
    if not found:
        why = (
            "the model was not measured after each step (merge --evaluate)"
            if recipe.compared
            else "nothing was evaluated"
        )
        return _section("accuracy", title, _missing(document, "accuracy", why))
    rows = [[task, *(_percent(x) for x in row)] for task, row in zip(tasks, found["matrix"], strict=True)]
    rows.append(["lost by earlier tasks, points", *(_percent(x) for x in found["lost"])])
    table = _table([_scores_head(document), *(f"{t}. {task}" for t, task in enumerate(tasks, 1))], rows)
    return _section("accuracy", title, _picture(pictures, "accuracy", "Heat map of the table below"), table)


def _scores_head(document: Mapping[str, Any]) -> str:
    return f"test accuracy{of_examples(document['limit'])}, %"


def _forecast(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    title, found = "Forecast without data", document["forecast"]
    if not found:
        return _section("forecast", title, _missing(document, "forecast", "this method has no filter to tell of"))
    means = zip(*found["mean"].values(), found["near_equal_cuts"], strict=True)
    rows = [
        [task, *(_number(x, 4) for x in row[:-1]), str(row[-1])]
        for task, row in zip(document["tasks"], means, strict=True)
    ]
    words = "Means over layers. At a near-equal cut the choice of directions is arbitrary."
    table = _table(["task", *(QUANTITIES[name] for name in found["mean"]), "layers with a near-equal cut"], rows)
    picture = _picture(pictures, "forecast", "Heat maps of the forecast, layers by block")
    return _section("forecast", title, _paragraph(words), picture, table)


def _losses(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    title, found = "Stability and plasticity losses", document["losses"]
    if not found:
        return _section("losses", title, _missing(document, "losses", "they need images of the tasks"))
    steps = found["methods"][document["method"]]["relative"]
    groups = [group for group in LAYER_GROUPS if any(x is not None for x in steps[group]["plasticity"])]
    rows = [
        [task, *(_number(steps[group][name][t], 4) for group in groups for name in steps[group])]
        for t, task in enumerate(document["tasks"])
    ]
    words = (
        f"Squared change of the layers' answers on {document['images']} images of each task, mean over tokens and "
        f"layers, as {RELATIVE}. Stability: what a step changes for the tasks before it. Plasticity: what the merged "
        "model lacks of the task's own model. Inputs are those of the task's own model (arXiv:2509.21413v2, Eqs. 3, 4)."
    )
    header = ["task", *(f"{_LOSSES[name]}, {group}" for group in groups for name in steps[group])]
    picture = _picture(pictures, "losses", "Losses after every step")
    return _section("losses", title, _paragraph(words), picture, _table(header, rows))


def _affinity(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    title, found = "Affinity of data and task vectors", document["affinity"]
    if not found:
        return _section("affinity", title, _missing(document, "affinity", "it needs images of the tasks"))
    words = (
        "Share of the directions in which a task's inputs are largest that lies in the span of those on which a task "
        f"vector acts most (arXiv:2509.21413v2, Eq. 5). Random subspaces have {found['random']:.3f}."
    )
    means = ((name, group["own_mean"], group["cross_mean"]) for name, group in found["groups"].items())
    rows = [[name, _number(own, 3), _number(cross, 3)] for name, own, cross in means]
    names = [affinity_picture(group) for group in LAYER_GROUPS]
    shown = [_picture(pictures, name, f"Heat maps: {name.replace('_', ' ')}") for name in names]
    curves = _picture(pictures, "affinity_curves", "Distribution of affinities over layers")
    table = _table(["mean over layers", "own task", "other tasks"], rows)
    return _section("affinity", title, _paragraph(words), table, *shown, curves)


def _check(document: Mapping[str, Any]) -> str:
    title, found = "Does the forecast hold?", document["forecast_check"]
    if not found:
        return _section("check", title, _missing(document, "forecast_check", "too little was measured"))
    rows = [[_CHECKS[name], _number(check["pooled"], 2)] for name, check in found.items()]
    words = (
        "Spearman's rank correlations of what was forecast without data with what was measured: 1 is the same order, "
        "0 is none, -1 the reverse."
    )
    return _section("check", title, _paragraph(words), _table(["forecast with measurement", "correlation"], rows))


def _time(recipe: Told) -> str:
    parts = list(dict.fromkeys(part for _, _, timings in recipe.steps for part in timings))
    rows = [
        [task, _number(seconds, 2), *(_number(timings.get(part), 2) for part in parts)]
        for task, seconds, timings in recipe.steps
    ]
    named = ["compile (of solve)" if part == "compile" else part for part in parts]
    steps = _table(["seconds", "step", *named], rows)
    whole = [[name, _number(seconds, 2)] for name, seconds in recipe.timings.items()]
    if recipe.compiled is not None:
        programs, seconds = recipe.compiled
        whole.append([f"compiling {programs} programs", _number(seconds, 2)])
    return _section("time", "Where the time went", steps, _table(["besides the steps", "seconds"], whole))


def _recipe(recipe: Told) -> str:
    rows = [
        [name, source, revision or "", " ".join(f"{file}: {digest}" for file, digest in sha256.items())]
        for name, source, revision, sha256 in recipe.inputs
    ]
    settings = {key: _LEFT_OUT.get(key) if value is None else value for key, value in recipe.settings.items()}
    told = [[key, str(value)] for key, value in settings.items() if value is not None]
    inputs = _table(["model", "source", "revision", "SHA-256"], rows, is_text=True)
    return _section("recipe", "Recipe", inputs, _table(["setting", "value"], told, is_text=True))


def _section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}">\n<h2>{_text(title)}</h2>\n{"".join(parts)}</section>\n'


def _missing(document: Mapping[str, Any], part: str, otherwise: str) -> str:
    return f'<p class="missing">Not known: {_text(document["missing"].get(part, otherwise))}.</p>\n'


def _paragraph(text: str) -> str:
    """Sentences, in which a number stays with its unit."""
    return f"<p>{_breakable(text).replace(' %', '&nbsp;%')}</p>\n"


def _picture(pictures: Mapping[str, bytes], name: str, words: str) -> str:
    if name not in pictures:
        return ""
    data = base64.b64encode(pictures[name]).decode()
    return f'<div class="scroll"><img alt="{_text(words)}" src="data:image/png;base64,{data}"></div>\n'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, is_text: bool = False) -> str:
    kind = ' class="text"' if is_text else ""
    head = "".join(f'<th scope="col"{kind}>{_text(cell)}</th>' for cell in header)
    told = _breakable if is_text else _text
    body = "".join(f"<tr>{''.join(f'<td{kind}>{told(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'


def _breakable(text: object) -> str:
    return _BREAKS.sub(r"\g<0><wbr>", _text(text))


def _percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}"


def _number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def _text(text: object) -> str:
    return html.escape(str(text))
