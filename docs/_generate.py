"""Adds the generated pages to the site while it is built: commands, messages, JSON schemas."""

import json
import sys
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from neox_bridge.cli.app import COMMANDS, app

sys.path.insert(0, str(Path(__file__).parent))
from _messages import messages_page
from _schemas import schemas

_HEAD = """\
# Commands

```console
$ neox-bridge --help
{help}
```

This page has the full help of every command. `neox-bridge COMMAND -h` shows only the common
options.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs when it has listed the pages."""
    pages = {"reference/cli.md": commands_page(), "reference/messages.md": messages_page()}
    for name, schema in schemas().items():
        pages[f"reference/{name}.schema.json"] = json.dumps(schema, indent=2) + "\n"
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def commands_page() -> str:
    """The help of every command, as the command line prints it."""
    context = click.Context(app, info_name="neox-bridge", terminal_width=80)
    lines = [_HEAD.format(help=app.get_help(context).strip())]
    for name, summary in COMMANDS.items():
        command = app.get_command(context, name)
        assert command is not None
        inner = click.Context(command, parent=context, info_name=name, terminal_width=80)
        lines += [f"## {name}", "", summary, "", "```text", command.get_help(inner).strip(), "```"]
        lines.append("")
    lines.append("Next: [the Python API](python-api.md).")
    return "\n".join(lines) + "\n"
