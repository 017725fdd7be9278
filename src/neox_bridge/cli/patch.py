"""``neox-bridge patch``."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neox_bridge.cli import values
from neox_bridge.cli.output import print_json, print_line
from neox_bridge.wording import plural

if TYPE_CHECKING:
    from neox_bridge.patch.patcher import Patch


def patch(
    tree: Annotated[
        str, typer.Argument(metavar="TREE", help="The root of a GPT-NeoX source tree.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would change as a diff; write nothing.")
    ] = False,
    revert: Annotated[
        bool, typer.Option("--revert", help="Bring the original files back, byte for byte.")
    ] = False,
    as_json: values.AsJson = False,
) -> None:
    """Let a GPT-NeoX tree load checkpoints with and without inv_freq, strictly.

    Classes that compute inv_freq (or ALiBi's slopes) stop storing it, unless a flag says
    otherwise, and get a load hook that takes it from checkpoints or fills it in. Patches
    every file or none; a tree whose source isn't of a known form is refused (exit code 4).

    \b
    Examples:
      neox-bridge patch ~/gpt-neox --dry-run
      neox-bridge patch ~/gpt-neox
      neox-bridge patch ~/gpt-neox --revert
    """
    from neox_bridge.patch import patcher

    if revert:
        plan = patcher.plan_revert(tree) if dry_run else patcher.revert(tree)
    else:
        plan = patcher.plan_patch(tree)
        if not dry_run:
            patcher.apply(plan)
    if as_json:
        print_json(_facts(plan, revert, dry_run))
    elif not plan.files:
        print_line(f"nothing to do: {tree} {'is not patched' if revert else 'is patched already'}")
    elif dry_run:
        sys.stdout.write(plan.diff)
    else:
        for file in plan.files:
            for change in file.changes:
                print_line(f"{file.path}:{change.line}: {change.what}")
        count = plural(len(plan.files), "file")
        undo = f"; neox-bridge patch {tree} --revert undoes it"
        print_line(f"reverted {tree}: {count}" if revert else f"patched {tree}: {count}{undo}")


def _facts(plan: "Patch", revert: bool, dry_run: bool) -> dict[str, Any]:
    """What was done or would be, as plain data."""
    return {
        "schema_version": 1,
        "tree": plan.tree,
        "action": "revert" if revert else "patch",
        "written": bool(plan.files) and not dry_run,
        "files": [
            {
                "path": file.path,
                "changes": [{"line": c.line, "what": c.what} for c in file.changes],
                "diff": file.diff,
            }
            for file in plan.files
        ],
    }
