"""``neox-bridge families``."""

from typing import Annotated

import typer

from neox_bridge.cli.output import print_json


def families(
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON on stdout.")] = False,
) -> None:
    """List the families of models that are converted, how each is proved, and published suites.

    The suites are published training runs in GPT-NeoX's own files, which every command takes by
    their names on the Hub.

    \b
    Example:
      neox-bridge families
    """
    from dataclasses import asdict

    from neox_bridge.architectures import CANNOT
    from neox_bridge.architectures.page import rows
    from neox_bridge.frameworks.suites import SUITES

    if as_json:
        found = [asdict(row) for row in rows()]
        suites = [asdict(suite) for suite in SUITES]
        print_json({"schema_version": 1, "families": found, "refused": CANNOT, "suites": suites})
        return
    for row in rows():
        print(f"{row.family}  {row.hf_class}")
        for word, text in (("models", row.models), ("eras", row.eras), ("proof", row.proof)):
            print(f"  {word:<8}{text}")
        print(f"  {'to know':<8}{row.note}")
    for name, reason in CANNOT.items():
        print(f"{name}  refused\n  why     {reason}")
    print("published suites, in GPT-NeoX's own files")
    for suite in SUITES:
        count = f"{suite.checkpoints} steps" if suite.checkpoints else ""
        twin = f"for transformers: {suite.twin}" if suite.twin else ""
        print(f"  {suite.repo:<44}{count:<11}{twin}".rstrip())
