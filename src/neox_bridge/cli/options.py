"""Groups of options that several commands have. Each option is declared here only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from neox_bridge.option import (
    HUB,
    HUGGING_FACE,
    PRINTED,
    RUN,
    SOURCE,
    flag_of,
    inherited,
    option,
    options_of,
)
from neox_bridge.planning.options import Options

if TYPE_CHECKING:
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.tensors.fused import GqaOrder


@dataclass(frozen=True, slots=True)
class Source:
    """Options for opening a checkpoint."""

    revision: str | None = option(
        None,
        "Branch, tag or commit of a Hub model.",
        group=SOURCE,
        common=True,
        metavar="REV",
    )
    step: int | None = option(
        None,
        "Read global_stepN instead of the step that the file `latest` names.",
        group=SOURCE,
        common=True,
        minimum=0,
    )
    configs: tuple[str, ...] = option(
        (),
        "The yml of the training run, if the GPT-NeoX checkpoint does not contain one. May be "
        "repeated.",
        "--config",
        group=SOURCE,
        value="path",
        metavar="FILE",
    )
    gqa_order: GqaOrder | None = inherited(
        Options,
        "gqa_order",
        text="Row order of grouped-query attention in a GPT-NeoX checkpoint. grouped since "
        "2024-11, interleaved before; the files do not say which.",
        group=SOURCE,
    )
    ignore_keys: tuple[str, ...] = inherited(Options, "ignore_keys", ())

    def open(self, path: str, **more: bool) -> Checkpoint:
        """Open the checkpoint. more: other arguments of ``open_checkpoint``."""
        from neox_bridge.layouts.open import open_checkpoint

        return open_checkpoint(
            path,
            revision=self.revision,
            step=self.step,
            configs=self.configs,
            gqa_order=self.gqa_order,
            **more,
        )

    def open_any(self, path: str, **how: bool) -> Checkpoint | StoredModel:
        """Open the checkpoint, or the weights as they are stored if they are of no known family.

        how: by_ranges and always_configs of ``open_any``.
        """
        from neox_bridge.layouts.open_stored import open_any

        return open_any(
            path,
            revision=self.revision,
            step=self.step,
            configs=self.configs,
            gqa_order=self.gqa_order,
            **how,
        )


@dataclass(frozen=True, slots=True)
class Upload:
    """Options for publishing files on the Hub."""

    private: bool = option(
        False, "Create the repository as private if it does not exist.", group=HUB
    )
    create_pr: bool = option(
        False,
        "Open a pull request instead of committing to the branch, which must exist.",
        group=HUB,
    )
    work: str | None = option(
        None,
        "The folder in which files are written before they are uploaded. Default: $TMPDIR, "
        "otherwise the current folder.",
        group=HUB,
        value="path",
        metavar="DIR",
    )


@dataclass(frozen=True, slots=True)
class Details:
    """Options of ``convert`` and ``batch`` in addition to ``Options``."""

    weights: Literal["stored", "masters"] = option(
        "stored",
        "Which weights of a GPT-NeoX source to read. masters: the optimizer's fp32 master weights "
        "instead of the rounded 16-bit ones.",
        group=HUGGING_FACE,
        choices=("stored", "masters"),
    )
    crc: bool = option(
        False,
        "Compute the CRC-32 of every tensor in .pt files. By default, tensors that the kernel "
        "copies have none. torch does not check it; unzip does.",
        group=RUN,
    )
    hash_name: Literal["xxh3", "sha256", "none"] | None = option(
        None,
        "The hash to record for each file in neox_bridge.json. `verify DST` checks it. Default: "
        "xxh3. With --no-verify, files that share blocks with SRC are not hashed unless --hash is "
        "given.",
        "--hash",
        group=RUN,
        choices=("xxh3", "sha256", "none"),
    )


@dataclass(frozen=True, slots=True)
class Output:
    """Options for the output."""

    as_json: bool = option(
        False,
        "Print JSON on stdout. Errors go to stderr.",
        "--json",
        group=PRINTED,
        common=True,
    )
    quiet: bool = option(
        False,
        "Print only errors and, with --json, the JSON document.",
        "--quiet",
        "-q",
        group=PRINTED,
        common=True,
    )


@dataclass(frozen=True, slots=True)
class Execution(Output):
    """Options for the execution of a plan, and for the output."""

    dry_run: bool = option(False, "Print the plan and write nothing.", group=RUN, common=True)
    overwrite: bool = option(False, "Replace DST if it exists.", group=RUN, common=True)
    max_workers: int | None = option(None, "Number of worker threads.", group=RUN, minimum=1)
    no_verify: bool = option(
        False, "Do not read the result back and compare it with the source.", group=RUN
    )


# the flag of each parameter that library errors name
FLAGS = {
    name: flag_of(name, declared)
    for group in (Options, Source, Upload, Details, Execution)
    for name, declared in options_of(group).items()
}
