"""What ``neox-bridge inspect`` prints for a quantized model, which no other command accepts."""

from typing import TYPE_CHECKING, Any

from neox_bridge.cli.output import print_json
from neox_bridge.documents import SCHEMA_VERSION
from neox_bridge.wording import KINDS, human, plain, plural

if TYPE_CHECKING:
    from neox_bridge.layouts.quantized import QuantizedFolder

_REASON = "its weights are quantized, so it cannot be converted"


def print_quantized(model: "QuantizedFolder", *, as_json: bool, tensors: bool) -> None:
    """Print the facts about the model and that it cannot be converted, as text or JSON."""
    facts = describe_quantized(model)
    rows = [
        {"name": name, "dtype": ref.dtype, "shape": list(ref.shape)}
        for name, ref in model.tensors.items()
    ]
    if as_json:
        print_json({**facts, **({"tensors": rows} if tensors else {})})
        return
    quantization, refusal = facts["quantization"], facts["refusals"][0]
    bits = f", {quantization['bits']} bits" if quantization["bits"] else ""
    lines = [
        ("path", facts["path"]),
        ("kind", f"{KINDS[facts['kind']]}, quantized ({quantization['method']}{bits})"),
        ("family", str(facts["family"] or "unknown")),
        ("dtypes", ", ".join(f"{name} ({n:,} elements)" for name, n in facts["dtypes"].items())),
        ("files", f"{plural(len(facts['files']), 'file')}, {human(facts['bytes'])}"),
        ("evidence", "; ".join(quantization["evidence"])),
        ("refused", f"{refusal['reason']}; {refusal['way_out']}"),
    ]
    for key, text in lines:
        print(f"{key:<12}{plain(text)}")
    for row in rows if tensors else ():
        print(f"{plain(str(row['name']))}  {row['shape']}  {row['dtype']}")


def describe_quantized(model: "QuantizedFolder") -> dict[str, Any]:
    """The facts as plain data, with the keys that ``inspect --json`` has for other models."""
    from neox_bridge.layouts.quantized import way_out
    from neox_bridge.layouts.sizes import elements_by_dtype
    from neox_bridge.stores.paths import size

    quantization = model.quantization
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": model.kind,
        "path": model.path,
        "family": model.config.get("model_type"),
        "dtypes": dict(elements_by_dtype(model.tensors.values()).most_common()),
        "files": list(model.files),
        "bytes": sum(size(file) for file in model.files),
        "findings": [],
        "refusals": [{"key": "quantized", "reason": _REASON, "way_out": way_out(quantization)}],
        "quantization": {
            "method": quantization.method,
            "bits": quantization.bits,
            "evidence": list(quantization.evidence),
            "original": quantization.original or None,
        },
    }
