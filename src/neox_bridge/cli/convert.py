"""``neox-bridge convert``."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from neox_bridge.cli import values
from neox_bridge.cli.asked import asked_of
from neox_bridge.cli.errors import writing
from neox_bridge.cli.publish import CreatePr, Private, Upload, WorkIn, publish_plan, root_of
from neox_bridge.cli.run_plan import How, Progress, carry_out

_SOURCE = "Where it comes from"
_WHAT = "What is written"
_NEOX = "GPT-NeoX targets"
_HF = "Hugging Face targets"


def convert(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A Hugging Face or GPT-NeoX folder, its URL (s3://…), or a model of the Hub "
            "(org/name).",
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="The folder or URL to write, or a place on the Hub: hf://ORG/NAME[@BRANCH].",
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            **values.one_of("hf", "neox"),
            rich_help_panel=_WHAT,
            help="The format to write. Default: the other one than SRC's. From GPT-NeoX to "
            "GPT-NeoX, the layout or the era changes.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            **values.dtype(),
            rich_help_panel=_WHAT,
            help="Cast the weights; fp32, fp16 and bf16 are understood too.",
        ),
    ] = "keep",
    weights: Annotated[
        str,
        typer.Option(
            **values.one_of("stored", "masters"),
            rich_help_panel=_HF,
            help="masters: the optimizer's fp32 master weights instead of the rounded 16-bit ones.",
        ),
    ] = "stored",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            rich_help_panel=_WHAT,
            help="A tokenizer.json, a folder with one, or a model of the Hub (ORG/NAME), in place "
            "of the source's.",
        ),
    ] = None,
    vocab_rows: Annotated[
        str,
        typer.Option(
            **values.vocab_rows(),
            rich_help_panel=_WHAT,
            help="Rows of the vocabulary. keep: without padding that a conversion is known to have "
            "added. all: every row. tokenizer: those that an entry of the tokenizer has. N: the "
            "first N.",
        ),
    ] = "keep",
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            **values.one_of("transformers", "mamba_ssm"),
            rich_help_panel=_HF,
            help="The library whose format is written; mamba_ssm is for Mamba. Default: "
            "transformers.",
        ),
    ] = None,
    shard_size: Annotated[
        int,
        typer.Option(
            **values.size(),
            rich_help_panel=_HF,
            show_default=False,
            help="The most that a safetensors file holds: 500MB, 2GiB, bytes.  [default: 5GB]",
        ),
    ] = 5_000_000_000,
    shards: Annotated[
        str,
        typer.Option(
            **values.one_of("size", "clone"),
            rich_help_panel=_HF,
            help="clone: into each safetensors file what can share blocks with SRC's files, where "
            "the file system can (XFS, btrfs): DST is there at once and takes no room.",
        ),
    ] = "size",
    tp: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_NEOX,
            help="Tensor-parallel ranks (model_parallel_size); 1, or the GPT-NeoX source's.",
        ),
    ] = None,
    pp: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_NEOX,
            help="Pipeline stages (pipe_parallel_size); 0 is the same as --layout ranks.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            **values.one_of("layers", "ranks"),
            rich_help_panel=_NEOX,
            help="One file a layer and rank (pipe_parallel_size 1 or more), or one a rank (0).",
        ),
    ] = None,
    era: Annotated[
        Any,
        typer.Option(
            "--for",
            **values.era(),
            rich_help_panel=_WHAT,
            help="What will load the result: a GPT-NeoX source tree, neox@v1.0, neox@2024-03 or "
            "another date or commit, or a version of transformers. Decides names, buffers and "
            "settings. A model that it does not have is refused.",
        ),
    ] = None,
    inv_freq: Annotated[
        str | None,
        typer.Option(
            **values.one_of("omit", "store"),
            rich_help_panel=_NEOX,
            help="Whether the rotary buffer is in the files.",
        ),
    ] = None,
    mlp_names: Annotated[
        str | None,
        typer.Option(
            **values.one_of("linear", "dense"),
            rich_help_panel=_NEOX,
            help="mlp.linear1 (since 2024-09), or mlp.dense_h_to_4h; for Llama w1, w2, w3.",
        ),
    ] = None,
    te: Annotated[
        bool | None,
        typer.Option(
            "--te/--no-te",
            rich_help_panel=_NEOX,
            show_default=False,
            help="Transformer Engine's names, for te_mha and te_layernorm_mlp; else as SRC has it.",
        ),
    ] = None,
    gqa_order: Annotated[
        str | None,
        typer.Option(
            **values.one_of("grouped", "interleaved"),
            rich_help_panel=_NEOX,
            help="Rows of grouped-query attention in the GPT-NeoX side's files, SRC's where both "
            "are: grouped since 2024-11, interleaved before. The files don't tell.",
        ),
    ] = None,
    row_bias: Annotated[
        str,
        typer.Option(
            **values.one_of("whole", "split"),
            rich_help_panel=_NEOX,
            help="Biases that ranks add up: all on rank 0, which is exact, or a part on each.",
        ),
    ] = "whole",
    vocab_multiple: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_NEOX,
            help="make_vocab_size_divisible_by; 128, doubled until every row has room.",
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            **values.one_of("none", "fresh"),
            rich_help_panel=_NEOX,
            help="fresh: masters from the weights and zero moments, to train on at a step without "
            "finetune.",
        ),
    ] = "none",
    dp: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_NEOX,
            help="Data-parallel ranks for --optimizer fresh. Default: 1.",
        ),
    ] = None,
    iteration: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_NEOX,
            help="The step that DST is at; the source's, else 0.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            **values.one_of("keep", "tie"),
            rich_help_panel=_SOURCE,
            help="For a tied SRC whose output head differs from the embeddings. keep: write both, "
            "untied; tie: leave the head out.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_SOURCE, metavar="REV", help="Branch, tag or commit of a Hub model."
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            rich_help_panel=_SOURCE,
            help="global_stepN of a GPT-NeoX folder, in place of the one in `latest`.",
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_SOURCE,
            help="A yml of a GPT-NeoX source that has no configs folder; may be repeated.",
        ),
    ] = None,
    ignore_key: values.IgnoreKeys = None,
    private: Private = False,
    create_pr: CreatePr = False,
    work: WorkIn = None,
    dry_run: values.DryRun = False,
    overwrite: values.Overwrite = False,
    max_workers: values.Movers = None,
    crc: Annotated[
        bool,
        typer.Option(
            "--crc",
            rich_help_panel=values.RUN,
            help="The CRC-32 of every tensor in a .pt file, also of those that the kernel moves "
            "unseen. torch doesn't look at it; unzip does.",
        ),
    ] = False,
    hash_name: Annotated[
        str | None,
        typer.Option(
            "--hash",
            **values.one_of("xxh3", "sha256", "none"),
            rich_help_panel=values.RUN,
            help="The hash of every file in neox_bridge.json, which `verify DST` checks. Default: "
            "xxh3. With --no-verify, files that share blocks with SRC are not hashed unless --hash "
            "is given.",
        ),
    ] = None,
    no_verify: values.NoVerify = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel=values.RUN,
            help="Print the result, or with --dry-run the plan, as JSON on stdout. Errors stay "
            "on stderr, and stdout is then empty.",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", rich_help_panel=values.RUN, help="Say nothing but errors (and --json)."
        ),
    ] = False,
) -> None:
    """Convert a checkpoint between Hugging Face and GPT-NeoX, or between GPT-NeoX layouts.

    The format of SRC is detected automatically. DST appears whole or not at all.

    SRC may be ORG/NAME@REVISION of the Hub. GPT-NeoX's files are read there by ranges, over plain
    HTTP; the optimizer's only with --weights masters. A model for transformers is downloaded as a
    whole by huggingface_hub, which uses hf_xet where it is installed.

    \b
    Examples:
      neox-bridge convert EleutherAI/pythia-410m pythia-neox --tp 2
      neox-bridge convert pythia-neox pythia-hf
      neox-bridge convert EleutherAI/neox-ckpt-pythia-160m@step1000 pythia-160m-step1000
      neox-bridge convert pythia-neox pythia-tp4 --to neox --tp 4 --dry-run
      neox-bridge convert pythia-neox hf://my-org/pythia@step3000 --private

    Exit codes: 0 done, 1 error, 2 usage, 3 the result isn't the source, 4 refused (DST can't
    express SRC), 130 interrupted.
    """
    asked = asked_of(locals())
    upload = Upload(private, create_pr, work)
    on_hub = target.startswith("hf://")
    upload.check(target)
    with writing(target):
        from neox_bridge.api import open_checkpoint
        from neox_bridge.api import plan as make_plan
        from neox_bridge.planning.option_checks import check_options
        from neox_bridge.stores.paths import is_url

        checkpoint = open_checkpoint(
            source,
            revision=revision,
            step=step,
            configs=config or (),
            gqa_order=gqa_order,  # type: ignore[arg-type]
            masters=asked.masters,
        )
        if asked.options.tokenizer is None:
            from neox_bridge.layouts.hub_tokenizer import with_published_tokenizer

            checkpoint = with_published_tokenizer(checkpoint)
        check_options(checkpoint, asked.options, asked.given)
        plan = make_plan(checkpoint, asked.options, root_of(target))
        if asked.version is not None:
            from neox_bridge.architectures.transformers_limits import refuse_version

            refuse_version(checkpoint.architecture.name, checkpoint.config, asked.version)
        how = How(dry_run, overwrite, max_workers, no_verify, as_json, quiet)

        def check(progress: Progress) -> Callable[[str], None]:
            from neox_bridge.verification.verify import checker

            found = checker(checkpoint, workers=max_workers, progress=progress)
            if optimizer == "fresh":
                from neox_bridge.verification.optimizer import fresh_checker

                found = fresh_checker(checkpoint, found, workers=max_workers)
            return found

        more: dict[str, Any] = {
            "every_crc": asked.every_crc,
            "hash_name": asked.hash_name,
            # in an object store no file shares blocks with the source: all are hashed
            "hash_shared": asked.hash_shared and (on_hub or not is_url(target)),
        }
        if on_hub:
            publish_plan(plan, target, how, check, upload, **more)
        else:
            carry_out(plan, target, "converting", how, check, **more)
