"""The JSON schema with which editors validate a batch file.

``python -m neox_bridge.cli.batch_schema > docs/reference/batch-file.schema.json``
"""

import json
from typing import Any

from neox_bridge.cli.batch import batch
from neox_bridge.cli.command import Parameter
from neox_bridge.option import flag_of


def batch_file_schema() -> dict[str, Any]:
    """The schema: a key for each option of ``batch``, and for the paths."""
    keys: dict[str, Any] = {
        "sources": {"description": "Runs or checkpoints.", "type": ["string", "array"]},
        "target": {"description": "The folder or URL to write to.", "type": "string"},
    }
    for param in batch.params:
        if isinstance(param, Parameter):
            key = flag_of(str(param.name), param.declared).lstrip("-")
            keys[key] = {"description": param.declared.text, **_type_of(param)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A batch file for neox-bridge",
        "type": "object",
        "properties": keys,
        "required": ["sources", "target"],
        "additionalProperties": False,
    }


def _type_of(param: Parameter) -> dict[str, Any]:
    declared = param.declared
    if param.is_flag:
        return {"type": "boolean"}
    if param.multiple:
        return {"type": ["string", "array"], "items": {"type": "string"}}
    if declared.choices:
        return {"enum": [*declared.choices, *declared.aliases]}
    if declared.minimum is not None:
        kind = "integer" if isinstance(declared.minimum, int) else "number"
        return {"type": kind, "minimum": declared.minimum}
    return {"type": ["string", "integer", "array"]}


if __name__ == "__main__":
    print(json.dumps(batch_file_schema(), indent=2))
