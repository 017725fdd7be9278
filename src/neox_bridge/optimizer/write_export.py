"""Plans the export of optimizer states: one safetensors file per state, and a JSON file."""

from math import prod

from neox_bridge.formats.safetensors import layout_safetensors
from neox_bridge.layouts.checkpoint import RECORD, Checkpoint
from neox_bridge.layouts.joined_tensors import to_stored
from neox_bridge.layouts.text_files import dump_json
from neox_bridge.layouts.unknown_keys import listed, warned
from neox_bridge.optimizer.read_export import SCALARS, scalars
from neox_bridge.optimizer.states import Optimizer, states
from neox_bridge.planning.common import text_file
from neox_bridge.planning.plan import Plan
from neox_bridge.planning.record import hf_record, source_summary
from neox_bridge.tensors.fragments import cut_reductions
from neox_bridge.tensors.pieces import OutputTensor
from neox_bridge.wording import plural


def plan_export(checkpoint: Checkpoint, optimizer: Optimizer) -> Plan:
    """``master.safetensors``, ``exp_avg.safetensors`` and so on, the scalars, and the record."""
    by_state = states(checkpoint, optimizer)
    files = []
    for key, wholes in by_state.items():
        stored = to_stored(checkpoint.architecture, checkpoint.config, wholes)
        tensors = [
            OutputTensor(name, whole.dtype, whole.shape, whole.pieces, whole.reduce)
            for name, whole in stored.items()
        ]
        files.append(cut_reductions(layout_safetensors(f"{key}.safetensors", tensors)))
    files.append(text_file(SCALARS, dump_json(scalars(checkpoint, optimizer))))
    record = {**hf_record(checkpoint), "optimizer": list(by_state)}
    files.append(text_file(RECORD, dump_json(record), seals=True))
    summary: dict[str, object] = {
        "kind": "hf",
        "architecture": checkpoint.architecture.name,
        "layout": plural(len(by_state), "optimizer state"),
        "dtype": next(iter(next(iter(by_state.values())).values())).dtype,
        "vocab_rows": checkpoint.config.dims["vocab"],
        "optimizer": list(by_state),
        "parameters": sum(prod(whole.shape) for whole in checkpoint.tensors.values()),
    }
    unknown = (*listed(checkpoint.unknown_keys), *warned(checkpoint.unknown_keys))
    findings = (*unknown, *optimizer.findings, *optimizer.derived_findings)
    return Plan(source_summary(checkpoint), summary, tuple(files), findings=findings)
