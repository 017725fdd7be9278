"""GPT-NeoX's checkpoints, and Meta's, that try to break their reader; each with its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack_files import KINDS, SECRET, Change, instead, linked, outside, sparse, written

MARKER = "ran-something"  # what an executed attack would leave in the current folder


def step_of(root: Path) -> Path:
    return next(root.glob("global_step*"))


def in_step(name: str, change: Callable[[str], Change]) -> Change:
    return lambda root: change(name)(step_of(root))


def yml(content: str | bytes, name: str = "zz.yml") -> Change:
    return lambda root: written(name, content)(step_of(root) / "configs")


def copied(name: str, new: str) -> Change:
    return lambda root: (
        (step_of(root) / new).write_bytes((step_of(root) / name).read_bytes()) and (None)
    )


def linked_through_a_folder(folder: Path) -> None:
    """No file is a link; the folder that holds the tokenizer is."""
    home = outside(folder).parent
    (home / "tokenizer.json").write_text(json.dumps(SECRET))
    (folder / "tokenizer").symlink_to(home)


def configs_linked(root: Path) -> None:
    """The folder of the settings lies elsewhere, among other ymls."""
    home = outside(root).parent
    (home / "secret.yml").write_text("comment: hunter2-hunter2")
    folder = step_of(root) / "configs"
    folder.rename(root / "configs")
    folder.symlink_to(home)


def _laughs(first: str, grown: str) -> str:
    """Nine times as much with every line."""
    lines = [f"a: &a {first}"]
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{other}: &{other} {grown}" % ",".join([f"*{one}"] * 9))
    return "\n".join(lines)


_RUN = f"os.system ['touch {MARKER}']"
_RANK = "mp_rank_00_model_states.pt"
_LAYER = "layer_02-model_00-model_states.pt"
NEOX: dict[str, Change] = {
    "yml that runs": yml(f"a: !!python/object/apply:{_RUN}"),
    "yml that runs, new": yml(f"a: !!python/object/new:{_RUN}"),
    "yml that imports": yml("a: !!python/module:this"),
    "yml with a tuple": yml("a: !!python/tuple [1]"),
    "yml with an unknown tag": yml("a: !secret b"),
    "yml with a set": yml("a: !!set {b, c}"),
    "yml with bytes": yml("a: !!binary aGVsbG8="),
    "yml with pairs": yml("a: !!pairs [b: c]"),
    "yml with a wrong tag": yml("a: !!int b"),
    "yml with a wrong date": yml("a: 2024-99-99"),
    "yml with laughs": yml(_laughs("[lol]", "[%s]")),
    "yml with merges": yml(_laughs("{k: v}", "{<<: [%s]}")),
    "yml that holds itself": yml("a: &a [*a]"),
    "yml that merges what is none": yml("<<: 1"),
    "deep yml": yml("[" * 200_000),
    "deep yml of mappings": yml("{a: " * 100_000),
    "deep yml of lines": yml("".join(" " * n + "a:\n" for n in range(400))),
    "deep yml of dashes": yml("- " * 100_000),
    "wide yml": yml("a: [" + "[]," * 300_000 + "]"),
    "yml of 1 GB": lambda root: sparse("zz.yml", 1 << 30)(step_of(root) / "configs"),
    "yml of 3 MB": yml("a: " + "b" * (3 << 20)),
    "yml with a long number": yml("num_layers: " + "9" * 10_000),
    "yml with a long hexadecimal": yml("num_layers: 0x" + "f" * 100_000),
    "yml with a long number to base 60": yml("num_layers: 1" + ":1" * 100_000),
    "yml with a number and a tag": yml(f'num_layers: !!int "{"9" * 10_000}"'),
    "yml is a list": yml("[1, 2]"),
    "yml is text": yml("hello"),
    "yml of two documents": yml("a: 1\n---\nb: 2"),
    "binary yml": yml(bytes(range(256))),
    "utf-16 yml": yml("a: 1".encode("utf-16")),
    "key with an escape": yml('"\\e[2J": 1'),
    "key with a line end": yml('"a\\nb": 1'),
    "key is a list": yml("? [a, b]\n: 1"),
    "key is a mapping": yml("? {a: b}\n: 1"),
    "long key": yml("a" * 500 + ": 1"),
    "a billion layers": yml("num_layers: 1000000000"),
    "negative layers": yml("num_layers: -1"),
    "layers are a list": yml("num_layers: [1]"),
    "infinite layers": yml("num_layers: .inf"),
    "heads are nan": yml("num_attention_heads: .nan"),
    "no heads": yml("num_attention_heads: 0"),
    "hidden size is a mapping": yml("hidden_size: {a: 1}"),
    "a switch is text": yml("gpt_j_residual: maybe"),
    "rotary fraction of a billion": yml("rotary_pct: 1e+9"),
    "rotary base of zero": yml("rotary_emb_base: 0"),
    "norm is a list": yml("norm: [layernorm]"),
    "activation with a line end": yml('activation: "gelu\\nerror: all is well"'),
    "soft prompt is a list": yml("soft_prompt_tuning: [1]"),
    "experts are text": yml("moe_num_experts: many"),
    "multiple of rows is text": yml("make_vocab_size_divisible_by: many"),
    **{
        f"zz.yml is a {kind}": lambda root, kind=kind: instead("zz.yml", kind)(
            step_of(root) / "configs"
        )
        for kind in KINDS
    },
    "zz.yml is a link that leads out": lambda root: linked(f"{step_of(root).name}/configs/zz.yml")(
        root
    ),
    "configs are elsewhere": configs_linked,
    **{
        f"{name} is a {kind}": in_step(name, lambda n, kind=kind: instead(n, kind))
        for kind in KINDS
        for name in (_LAYER, _RANK)
    },
    "latest above": written("latest", "../../x"),
    "latest absolute": written("latest", "/etc"),
    "latest empty": written("latest", b""),
    "latest with nul": written("latest", b"global_step2\0"),
    "latest binary": written("latest", bytes(range(256))),
    "latest of 1 GB": sparse("latest", 1 << 30),
    "latest of 1 MB": written("latest", b"a" * (1 << 20)),
    "latest with lines": written("latest", "a\nerror: all is well"),
    "latest with an escape": written("latest", "\x1b[2J"),
    "latest is a pipe": instead("latest", "pipe"),
    "latest is a folder": instead("latest", "folder"),
    "latest is a device": instead("latest", "device"),
    "latest is a link that leads out": linked("latest"),
    "record is a link that leads out": lambda root: linked(
        f"{step_of(root).name}/neox_bridge.json"
    )(root),
    "record is a pipe": lambda root: instead("neox_bridge.json", "pipe")(step_of(root)),
    "record with a text as rows": lambda root: written(
        "neox_bridge.json", b'{"tokenizer_size":"many"}'
    )(step_of(root)),
    "record with another's config": lambda root: written(
        "neox_bridge.json", b'{"config":{"model_type":"gpt_neox","num_hidden_layers":"a"}}'
    )(step_of(root)),
    "tokenizer is a folder of links": linked_through_a_folder,
    "layer of a billion": copied(_LAYER, "layer_999999999-model_00-model_states.pt"),
    "layer of 200 digits": copied(_LAYER, f"layer_{'9' * 200}-model_00-model_states.pt"),
    "rank of a billion": copied(_LAYER, "layer_02-model_999999999-model_states.pt"),
}


def ranks_only(root: Path) -> None:
    """No files by layer, so that those by rank have to hold the weights; and a rank too many."""
    copied(_RANK, f"mp_rank_{'9' * 200}_model_states.pt")(root)
    for path in step_of(root).glob("layer_*"):
        path.unlink()


NEOX["rank of 200 digits, no layers"] = ranks_only


# --- Meta's folder ---------------------------------------------------------------------------


PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}


def params(**changes: Any) -> Change:
    return written("params.json", json.dumps({**PARAMS, **changes}))


RAW_LLAMA: dict[str, Change] = {
    "params are a pipe": instead("params.json", "pipe"),
    "params are a link that leads out": linked("params.json"),
    "params are a list": written("params.json", b"[]"),
    "deep params": written("params.json", b'{"a":' * 100_000),
    "dim is text": params(dim="many"),
    "dim is a list": params(dim=[64]),
    "heads are negative": params(n_heads=-4),
    "no heads": params(n_heads=0),
    "a billion heads": params(n_heads=10**9),
    "infinite epsilon": params(norm_eps=float("inf")),
    "nan as base": params(rope_theta=float("nan")),
    "null as dim": params(dim=None),
    "file of a billion": written("consolidated.999999999.pth", b""),
    "file of 200 digits": written(f"consolidated.{'9' * 200}.pth", b""),
    "file is a pipe": instead("consolidated.00.pth", "pipe"),
    "file is a folder": instead("consolidated.00.pth", "folder"),
    "file is a device": instead("consolidated.00.pth", "device"),
}
