"""What ``neox-bridge inspect --stats`` prints."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.output import print_table
from neox_bridge.cli.progress import progress_bar

if TYPE_CHECKING:
    from neox_bridge.findings import Finding
    from neox_bridge.layouts.checkpoint import Checkpoint
    from neox_bridge.layouts.stored_model import StoredModel
    from neox_bridge.verification.statistics import Statistics


def measure(
    checkpoint: "Checkpoint | StoredModel", pattern: str, workers: int | None
) -> tuple[list["Statistics"], list["Finding"]]:
    """Compute the statistics of a checkpoint's tensors, with a progress bar, and findings."""
    from neox_bridge.verification.statistics import findings, statistics

    with progress_bar(checkpoint.size, "reading", False) as progress:
        stats = statistics(checkpoint, pattern=pattern, workers=workers, progress=progress)
    return stats, findings(stats, checkpoint)


def stats_json(stats: Sequence["Statistics"]) -> list[dict[str, Any]]:
    """Statistics as plain data. null replaces NaN and infinities, which JSON does not support."""
    return [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(tensor).items()
        }
        for tensor in stats
    ]


def print_stats(stats: Sequence["Statistics"]) -> None:
    """Print an aligned table on stdout, without columns that contain only zeros."""
    head = ("tensor", "dtype", "shape", "min", "max", "mean", "std", "norm", "zeros")
    rare = ("NaN", "Inf", "dead rows", "padding rows")
    rows = []
    for s in stats:
        numbers = (s.minimum, s.maximum, s.mean, s.std, s.norm)
        counts = (s.nans, s.infs, s.dead_rows, s.padding_rows)
        shape = "x".join(map(str, s.shape))
        shares = (*map(_number, numbers), f"{s.zeros:.1%}")
        if not s.decoded:
            shares = ("not decoded", "", "", "", "", "")
        cells = [s.name, s.dtype, shape, *shares]
        rows.append([*cells, *(f"{count:,}" for count in counts)])
    table = [[*head, *rare], *rows]
    kept = [i for i in range(len(table[0])) if i < len(head) or any(row[i] != "0" for row in rows)]
    print()
    print_table([[row[i] for i in kept] for row in table], right=range(3, len(kept)))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
