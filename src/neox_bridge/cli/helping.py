"""Help with the options in named groups, without rich (which takes longer than all the rest)."""

from typing import Any

from typer.core import TyperCommand


class GroupedCommand(TyperCommand):
    """A command whose help shows its options by ``rich_help_panel``, in the order of the code."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and groups of options; typer's own does so with rich only."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                argument = param.param_type_name == "argument"
                other = "Arguments" if argument else "Other options"
                group = getattr(param, "rich_help_panel", None) or other
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
