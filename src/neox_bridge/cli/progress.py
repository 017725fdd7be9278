"""A progress bar on a terminal, and nothing elsewhere."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from neox_bridge.cli.streams import for_progress
from neox_bridge.wording import plain

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bar(
    total: int | None, what: str, quiet: bool
) -> Iterator[Callable[[int], None] | None]:
    """Yields what to call with the bytes of each written block, or None where no bar is shown.

    HF_HUB_DISABLE_PROGRESS_BARS turns it off, as in Hugging Face's own tools.
    """
    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    if quiet or off or not sys.stderr.isatty():
        yield None
        return
    with bars() as display:
        task = display.add_task(plain(what), total=total)
        yield lambda count: display.update(task, advance=count)


def bars() -> "Progress":
    """Bars on stderr with rate and the time that is left, which vanish at the end."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(file=for_progress()),
        transient=True,
    )
