"""`--method help`: what every method does, asks for and costs.

The table is read from the methods' own files, not from what they make: that would start JAX for a page of text.
"""

import ast
import dataclasses
import importlib.metadata
import importlib.resources
import re
import textwrap
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from nufilt_jax.commands import text
from nufilt_jax.commands.process import loading
from nufilt_jax.commands.spelling import spelt
from nufilt_jax.commands.text import MOST_COLUMNS
from nufilt_jax.config import ENTRY_POINTS

_WIDEST = 27  # cells of a formula in the table
_TOLD = ("update", "touches", "needs", "cost", "source")


def show_methods(asked: str, console: Console, *, as_json: bool) -> int:
    """Shows all methods in a table, or all about one.

    Args:
      asked: `help` or `help=NAME`, of a rule of the user's own `help=MODULE:RULE`.
      console: where to.
      as_json: as one JSON document with all that is known, in either case.

    Raises:
      ConfigError: there is no such method, or it cannot be imported.
    """
    name = asked.partition("=")[2]
    if as_json or name:
        with loading():
            from nufilt_jax.methods import RULES, find, load_own

        known = load_own if ":" in name else find
        documents = [_document(rule) for rule in ([known(name)] if name else RULES.values())]
        if as_json:
            text.show_json(console, {"methods": documents})
        else:
            for line in _lines(documents[0]):
                text.show_line(console, line)
        return 0
    console.print(_table(), width=MOST_COLUMNS)
    text.show_line(console, "θ: merged so far; θ0: the base; D: their difference; τ: the new task's vector.")
    text.show_line(console, "*: learns from the examples of --data.")
    text.show_line(console, "--method help=NAME: all about one, with its settings for --method-args.")
    return 0


def _table() -> Table:
    table = Table("--method", "θ after the step", "source", box=box.SIMPLE_HEAD, pad_edge=False)
    for rule in stated_rules():
        star = " *" if rule.get("needs_data") else ""
        table.add_row(rule["name"] + star, _short(rule["update"]), rule["source"].split("arXiv:")[-1])
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        table.add_row(point.name, "", point.value)
    return table


def _short(update: str) -> str:
    """The formula of a rule's line, without what explains it."""
    formula = re.split(r"; ", update)[0]
    return formula if cell_len(formula) <= _WIDEST else formula.split(": ")[0]


def stated_rules() -> list[dict[str, Any]]:
    """What the files of `methods/` say of their rules, in the registry's order, as far as it is plain values."""
    folder = importlib.resources.files("nufilt_jax") / "methods"
    registry = _assigned(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")), "RULES")
    modules = next(node for node in ast.walk(registry) if isinstance(node, ast.Tuple))
    names = [module.id for module in modules.elts if isinstance(module, ast.Name)]
    return [_stated(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) for name in names]


def _stated(module: ast.Module) -> dict[str, Any]:
    call = _assigned(module, "RULE")
    assert isinstance(call, ast.Call)
    return {word.arg: word.value.value for word in call.keywords if word.arg and isinstance(word.value, ast.Constant)}


def _assigned(module: ast.Module, name: str) -> ast.expr:
    """What a module assigns to a name."""
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            return node.value
    raise LookupError(name)


def _document(rule: Any) -> dict[str, Any]:
    """A method with its needs and default settings, as JSON."""
    told = {key: getattr(rule, key) for key in ("name", *_TOLD)}
    return told | {"settings": dataclasses.asdict(rule.config())}


def _lines(document: dict[str, Any]) -> list[str]:
    """The same as text, with a line per setting."""
    lines = [document["name"]]
    for key in _TOLD:
        lines += textwrap.wrap(f"  {key:<9}{document[key]}", MOST_COLUMNS, subsequent_indent=" " * 11)
    settings = [f"  {key}={spelt(value)}" for key, value in document["settings"].items()]
    return [*lines, "settings, for --method-args" if settings else "no settings", *settings]
