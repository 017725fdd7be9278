"""``neox-bridge families``."""

from neox_bridge.cli.command import command, only
from neox_bridge.cli.options import Output
from neox_bridge.cli.output import print_json
from neox_bridge.documents import document


@command("families", only(Output, "as_json"))
def families(output: Output) -> None:
    """List the model families that can be converted, how each is tested, and published suites.

    A suite is a published training run in GPT-NeoX format. Every command accepts its name on the
    Hub.

    \b
    Example:
      neox-bridge families
    """
    from neox_bridge.architectures import CANNOT
    from neox_bridge.architectures.page import rows
    from neox_bridge.frameworks.suites import SUITES

    if output.as_json:
        print_json(document(families=list(rows()), refused=CANNOT, suites=SUITES))
        return
    for row in rows():
        print(f"{row.family}  {row.hf_class}")
        for word, text in (("models", row.models), ("eras", row.eras), ("proof", row.proof)):
            print(f"  {word:<8}{text}")
        print(f"  {'note':<8}{row.note}")
    for name, reason in CANNOT.items():
        print(f"{name}  refused\n  why     {reason}")
    print("published suites in GPT-NeoX format")
    for suite in SUITES:
        count = f"{suite.checkpoints} steps" if suite.checkpoints else ""
        twin = f"for transformers: {suite.twin}" if suite.twin else ""
        print(f"  {suite.repo:<44}{count:<11}{twin}".rstrip())
