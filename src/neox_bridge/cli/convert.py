"""``neox-bridge convert``."""

from functools import partial

from neox_bridge.cli.command import Argument, command, only
from neox_bridge.cli.conversion import conversion_of
from neox_bridge.cli.errors import writing
from neox_bridge.cli.execution import run_plan
from neox_bridge.cli.options import Details, Execution, Source, Upload
from neox_bridge.cli.publish import check_upload, publish_plan, root_of
from neox_bridge.planning.options import Options


@command(
    "convert",
    Argument(
        "source",
        "SRC",
        "A Hugging Face or GPT-NeoX checkpoint: a folder, a URL (s3://…) or a Hub model "
        "(ORG/NAME).",
    ),
    Argument(
        "target",
        "DST",
        "The folder or URL to write to, or a Hub repository (hf://ORG/NAME[@BRANCH]).",
    ),
    Options,
    Details,
    only(Source, "revision", "step", "configs"),
    Upload,
    Execution,
)
def convert(
    source: str,
    target: str,
    options: Options,
    details: Details,
    reading: Source,
    upload: Upload,
    execution: Execution,
) -> None:
    """Convert a checkpoint between Hugging Face and GPT-NeoX, or between GPT-NeoX layouts.

    The format of SRC is detected automatically. DST is written atomically: it is complete or does
    not exist.

    SRC can be a Hub model at a revision (ORG/NAME@REVISION). GPT-NeoX files on the Hub are read in
    ranges over plain HTTP; optimizer files are read only with --weights masters. Models for
    transformers are downloaded by huggingface_hub, which uses hf_xet if it is installed.

    \b
    Examples:
      neox-bridge convert EleutherAI/pythia-410m pythia-neox --tp 2
      neox-bridge convert pythia-neox pythia-hf
      neox-bridge convert EleutherAI/neox-ckpt-pythia-160m@step1000 pythia-160m-step1000
      neox-bridge convert pythia-neox pythia-tp4 --to neox --tp 4 --dry-run
      neox-bridge convert pythia-neox hf://my-org/pythia@step3000 --private

    Exit codes: 0 done, 1 error, 2 usage error, 3 the result differs from the source, 4 refused (DST
    cannot express SRC), 130 interrupted.
    """
    conversion = conversion_of(options, details)
    options = conversion.options
    check_upload(upload, target)
    with writing(target):
        from neox_bridge.conversion import conversion_check, open_checkpoint, plan_conversion
        from neox_bridge.stores.folder import is_hub
        from neox_bridge.stores.paths import is_local

        checkpoint = open_checkpoint(
            source,
            revision=reading.revision,
            step=reading.step,
            configs=reading.configs,
            gqa_order=options.gqa_order,
            masters=conversion.masters,
        )
        plan = plan_conversion(
            checkpoint,
            options,
            root_of(target),
            given=conversion.given,
            version=conversion.version,
        )
        checker = partial(conversion_check, plan, workers=execution.max_workers)
        asked_hash = details.hash_name is not None or not execution.no_verify
        # files in an object store never share blocks with the source, so all are hashed
        in_store = not is_local(target) and not is_hub(target)
        hashing = {
            "every_crc": details.crc,
            "hash_name": conversion.hash_name,
            "hash_shared": asked_hash and not in_store,
        }
        if is_hub(target):
            publish_plan(plan, source, target, execution, checker, upload, **hashing)
        else:
            run_plan(plan, source, target, execution, checker, **hashing)
