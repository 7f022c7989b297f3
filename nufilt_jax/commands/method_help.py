"""`--method help`: what every method does, asks for and costs."""

import dataclasses
from typing import Any

from nufilt_jax.methods import RULES
from nufilt_jax.methods.state import Rule


def method_documents() -> list[dict[str, Any]]:
    """All methods with their needs and default settings, as JSON."""
    return [
        {
            "name": rule.name,
            "update": rule.update,
            "needs": rule.needs,
            "touches": rule.touches,
            "cost": rule.cost,
            "source": rule.source,
            "settings": dataclasses.asdict(rule.config()),
        }
        for rule in RULES.values()
    ]


def method_lines() -> list[str]:
    """The same as text, a few lines each."""
    return [line for rule in RULES.values() for line in _lines(rule)]


def _lines(rule: Rule) -> list[str]:
    settings = " ".join(f"{key}={_spelt(value)}" for key, value in dataclasses.asdict(rule.config()).items())
    told = {
        "touches": rule.touches,
        "needs": rule.needs,
        "cost": rule.cost,
        "source": rule.source,
        "settings": settings or "none",
    }
    return [f"{rule.name}: {rule.update}", *(f"  {key:<9}{text}" for key, text in told.items())]


def _spelt(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
