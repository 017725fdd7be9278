"""``neox-bridge patch``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.command import Argument, command, only
from neox_bridge.cli.options import Output
from neox_bridge.cli.output import print_json, print_line
from neox_bridge.documents import document
from neox_bridge.errors import UsageError
from neox_bridge.option import option
from neox_bridge.wording import plural

if TYPE_CHECKING:
    from neox_bridge.patch.patcher import Patch


@dataclass(frozen=True, slots=True)
class PatchOptions:
    """Options for the patch."""

    scripts: bool = option(
        False,
        "Patch the conversion scripts in tools/ckpts instead: they call neox-bridge with their "
        "own command lines.",
        common=True,
    )
    train: bool = option(
        False,
        "Patch train.py, deepy.py, eval.py and generate.py instead: a yml can load Hugging Face "
        "models and save them (load, save_hf).",
        common=True,
    )
    dry_run: bool = option(False, "Print the changes as a diff and write nothing.", common=True)
    revert: bool = option(False, "Restore the original files, byte for byte.", common=True)


@command(
    "patch",
    Argument("tree", "TREE", "The root of a GPT-NeoX source tree."),
    PatchOptions,
    only(Output, "as_json"),
)
def patch(tree: str, options: PatchOptions, output: Output) -> None:
    """Patch a GPT-NeoX source tree to load checkpoints with and without inv_freq.

    Classes that compute inv_freq (or ALiBi slopes) no longer store it, unless a flag in the yml
    says so. They get a load hook that takes it from checkpoints that have it and fills it in for
    those that do not. Loading stays strict. Either all files are patched or none. A source tree in
    an unknown form is refused (exit code 4). --revert undoes all kinds of patches.

    \b
    Examples:
      neox-bridge patch ~/gpt-neox --dry-run
      neox-bridge patch ~/gpt-neox
      neox-bridge patch ~/gpt-neox --scripts
      neox-bridge patch ~/gpt-neox --train
      neox-bridge patch ~/gpt-neox --revert
    """
    from neox_bridge.patch import patcher, scripts, train_scripts

    if options.scripts and options.train:
        raise UsageError(
            ["train", "scripts"], "only one at a time", "Run the command once for each."
        )
    dry_run, revert = options.dry_run, options.revert
    if revert:
        plan = patcher.plan_revert(tree) if dry_run else patcher.revert(tree)
    else:
        if options.train:
            plan = train_scripts.plan_train(tree)
        else:
            plan = scripts.plan_scripts(tree) if options.scripts else patcher.plan_patch(tree)
        if not dry_run:
            patcher.apply(plan)
    if output.as_json:
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


def _facts(plan: Patch, revert: bool, dry_run: bool) -> dict[str, Any]:
    """The changes that were or would be made, as plain data."""
    return document(
        tree=plan.tree,
        action="revert" if revert else "patch",
        written=bool(plan.files) and not dry_run,
        files=[
            {
                "path": file.path,
                "changes": [{"line": c.line, "what": c.what} for c in file.changes],
                "diff": file.diff,
            }
            for file in plan.files
        ],
    )
