"""The JSON schemas of the package."""

import json
from importlib.resources import files
from typing import Any


def plan_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a plan, and of what ``convert --json`` prints."""
    text = files("neox_bridge.planning").joinpath("plan.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
