"""What ``neox-bridge inspect`` prints for weights of no known family, as they are stored."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from neox_bridge.cli.output import print_line, print_table
from neox_bridge.documents import SCHEMA_VERSION
from neox_bridge.findings import finding_json
from neox_bridge.wording import KINDS, human, plain, plural

if TYPE_CHECKING:
    from neox_bridge.layouts.stored_model import StoredModel

_BY_NAMES = "names, shapes and dtypes as stored, not by a family"
BY_NAMES = f"read by {_BY_NAMES}"  # the line of commands that compare
_MOST_PATTERNS = 60  # lines of names
# settings of config.json that say most about a model; families have other names for some
_SETTINGS = (
    *("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
)


def describe_stored(model: "StoredModel") -> dict[str, Any]:
    """The facts about stored weights, with the keys of ``inspect --json`` that need no family."""
    from neox_bridge.layouts.quantized import way_out
    from neox_bridge.layouts.stored_model import elements_by_stored_dtype, patterns
    from neox_bridge.stores.paths import size

    quantization = model.quantization
    refusal = {"key": "family", "reason": model.reason, "way_out": ""}
    if quantization is not None:
        reason = "its weights are quantized, so it cannot be converted"
        refusal = {"key": "quantized", "reason": reason, "way_out": way_out(quantization)}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": model.kind,
        "path": model.path,
        "revision": model.revision or None,
        "read_by": "names",
        "family": model.family,
        "settings": {key: model.raw[key] for key in _SETTINGS if key in model.raw},
        "parameters": sum(tensor.elements for tensor in model.stored.values()),
        "dtypes": dict(elements_by_stored_dtype(model).most_common()),
        "tensor_count": len(model.stored),
        "components": [
            {
                "name": component.name,
                "folder": component.folder,
                "files": list(component.files),
                "index": component.index or None,
                "tensors": len(component.tensors),
                "bytes": component.nbytes,
                "model": _class_of(component.config),
            }
            for component in model.components
        ],
        "patterns": [asdict(pattern) for pattern in patterns(model)],
        "files": list(model.files),
        "bytes": sum(size(file) for file in model.files),
        "tokenizer": list(model.tokenizer),
        "findings": [finding_json(finding) for finding in model.findings],
        "refusals": [refusal],
        "quantization": quantization
        and {
            "method": quantization.method,
            "bits": quantization.bits,
            "evidence": list(quantization.evidence),
            "original": quantization.original or None,
        },
    }


def stored_tensors(model: "StoredModel") -> list[dict[str, Any]]:
    """Every tensor, for ``inspect --tensors --json``."""
    return [
        {
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "decoded": tensor.decoded,
            "shards": [
                {
                    "file": tensor.ref.file,
                    "offset": tensor.ref.offset,
                    "bytes": tensor.ref.nbytes,
                    "shape": list(tensor.shape),
                }
            ],
        }
        for name, tensor in model.stored.items()
    ]


def print_stored(
    model: "StoredModel", facts: dict[str, Any], *, tensors: bool, patterns: bool
) -> None:
    """Print the facts of ``describe_stored``.

    tensors: print every tensor. patterns: if not, print the patterns of their names.
    """
    for key, text in stored_lines(facts):
        print_line(f"{key:<12}{text}")
    if tensors:
        _print_tensors(model)
    elif patterns:
        _print_patterns(facts["patterns"])


def stored_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines for the facts of ``describe_stored``: a label and a text."""
    quantization, refusal = facts["quantization"], facts["refusals"][0]
    kind = KINDS[facts["kind"]]
    if quantization is not None:
        bits = f", {plural(quantization['bits'], 'bit')}" if quantization["bits"] else ""
        kind += f", quantized ({quantization['method']}{bits})"
    kind += f", {facts['revision']}" if facts["revision"] else ""
    lines = [
        ("path", facts["path"]),
        ("kind", kind),
        ("family", facts["family"] or "unknown"),
        ("read by", _BY_NAMES),
    ]
    settings = [f"{key} {value}" for key, value in facts["settings"].items()]
    lines += [("config", ", ".join(settings))] if settings else []
    parts = facts["components"]
    for part in parts if len(parts) > 1 else ():
        model = f" ({part['model']})" if part["model"] else ""
        what = f"{plural(part['tensors'], 'tensor')}, {human(part['bytes'])}"
        lines.append(("component", f"{part['name'] or '.'}{model}: {what}"))
    packed = "" if quantization is None else " stored"
    lines += [
        ("parameters", f"{facts['parameters']:,}{packed}"),
        ("tensors", f"{facts['tensor_count']:,}"),
        (
            "dtypes",
            ", ".join(f"{name} ({plural(n, 'element')})" for name, n in facts["dtypes"].items()),
        ),
        ("files", f"{plural(len(facts['files']), 'file')}, {human(facts['bytes'])}"),
    ]
    if quantization is not None:
        lines.append(("evidence", "; ".join(quantization["evidence"])))
    for finding in facts["findings"]:
        remedy = f" ({finding['remedy']})" if finding["remedy"] else ""
        lines.append((finding["severity"], finding["message"] + remedy))
    way = f"; {refusal['way_out']}" if refusal["way_out"] else ""
    if refusal["reason"]:
        lines.append(("refused", f"by every conversion: {refusal['reason']}{way}"))
    return lines


def _class_of(config: Any) -> str | None:
    """What a config says that its weights are."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return plain(names[0])
    for key in ("_class_name", "model_type", "peft_type"):
        if isinstance(config.get(key), str):
            return plain(config[key])
    return None


def _print_tensors(model: "StoredModel") -> None:
    rows = []
    for name, tensor in model.stored.items():
        file = tensor.ref.file.removeprefix(model.path).lstrip("/")
        where = plain(f"{file} @ {tensor.ref.offset}")
        rows.append((plain(name), str(list(tensor.shape)), tensor.dtype, where))
    print()
    print_table(rows)


def _print_patterns(patterns: list[dict[str, Any]]) -> None:
    rows = [
        (
            plain(row["name"]),
            str(list(row["shape"])),
            row["dtype"],
            f"x {row['count']:,}",
            human(row["nbytes"]),
        )
        for row in patterns[:_MOST_PATTERNS]
    ]
    print()
    print_table(rows, right=(3, 4))
    if left := len(patterns) - len(rows):
        print_line(f"and {left:,} more names; --tensors lists every tensor")
