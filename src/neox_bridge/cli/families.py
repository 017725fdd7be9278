"""``neox-bridge families``."""

from typing import Annotated

import typer

from neox_bridge.cli.output import print_json


def families(
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON on stdout.")] = False,
) -> None:
    """List the families of models that are converted, and how each is proved.

    \b
    Example:
      neox-bridge families
    """
    from dataclasses import asdict

    from neox_bridge.architectures import CANNOT
    from neox_bridge.architectures.page import rows

    if as_json:
        found = [asdict(row) for row in rows()]
        print_json({"schema_version": 1, "families": found, "refused": CANNOT})
        return
    for row in rows():
        print(f"{row.family}  {row.hf_class}")
        for word, text in (("models", row.models), ("eras", row.eras), ("proof", row.proof)):
            print(f"  {word:<8}{text}")
        print(f"  {'to know':<8}{row.note}")
    for name, reason in CANNOT.items():
        print(f"{name}  refused\n  why     {reason}")
