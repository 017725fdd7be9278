"""Checkpoints that try to break their reader or to lead it elsewhere; each with its name.

All but the pickles, which are in attack_pickles.py. A change is made to the folder of a good
checkpoint; SECRET is what lies outside of it and must not come into any output.
"""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]
SECRET = {"password": "hunter2-hunter2", "model": {"vocab": {"hunter2-hunter2": 0}}}
MARKER = "ran-something"  # what an executed attack would leave in the current folder


# --- safetensors -----------------------------------------------------------------------------


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(*offsets: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    """An entry of one dimension, unless it is told otherwise."""
    if shape is None:
        shape = [offsets[1] - offsets[0]]
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def of(data: int = 16, **entries: Any) -> Callable[[], bytes]:
    return lambda: packed(json.dumps(entries).encode(), bytes(data))


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: b"\x01" + bytes(6),
    "length only": lambda: packed(b"", length=2),
    "length 2**63": lambda: packed(b"{}", length=2**63),
    "length 2**64-1": lambda: packed(b"{}", length=2**64 - 1),
    "length of all": lambda: packed(b"{}" + bytes(14), length=16),
    "overlapping": of(a=entry(0, 12), b=entry(8, 16)),
    "the same bytes twice": of(a=entry(0, 16), b=entry(0, 16)),
    "one inside another": of(a=entry(0, 16), b=entry(4, 8)),
    "a hole": of(a=entry(0, 4), b=entry(8, 16)),
    "a hole at the start": of(a=entry(4, 16)),
    "a rest at the end": of(a=entry(0, 12)),
    "out of range": of(a=entry(0, 16), b=entry(16, 32)),
    "far out of range": of(a=entry(0, 16), b=entry(2**60, 2**60 + 8)),
    "misaligned": of(a=entry(0, 15, dtype="F32", shape=[4]), b=entry(15, 16)),
    "not a multiple": of(a=entry(0, 15, dtype="F32", shape=[3, 1]), b=entry(15, 16)),
    "end before start": of(a=entry(16, 0, shape=[16])),
    "negative": of(a=entry(-16, 0)),
    "both negative": of(a=entry(-16, -16, shape=[0]), b=entry(0, 16)),
    "negative sizes": of(a=entry(0, 16, shape=[-4, -4])),
    "huge offsets": of(a=entry(10**30, 10**30 + 16)),
    "4000 digits": lambda: packed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b"]}}"),
    "a million digits": lambda: packed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 10**6 + b"]}}"),
    "float offsets": of(a=entry(0.0, 16.0, shape=[16])),
    "exponents": lambda: packed(
        b'{"a":{"dtype":"U8","shape":[1e1],"data_offsets":[0,1e1]}}', bytes(10)
    ),
    "bool offsets": of(1, a=entry(False, True, shape=[1])),
    "text offsets": of(a=entry("0", "16", shape=[16])),
    "three offsets": of(a=entry(0, 8, 16, shape=[16])),
    "no offsets": of(a={"dtype": "U8", "shape": [16]}),
    "null": of(a=None),
    "a list": lambda: packed(b"[1]", bytes(1)),
    "no object": lambda: packed(b"null"),
    "shape that overflows": of(a=entry(0, 0, shape=[2**32, 2**32])),
    "shape that overflows to its size": of(a=entry(0, 16, shape=[2**60 + 1, 16])),
    "shape that overflows beside a zero": of(0, a=entry(0, 0, shape=[2**63, 2, 0])),
    "many dimensions": of(a=entry(0, 16, shape=[16] + [1] * 100_000)),
    "huge dimensions": of(0, a=entry(0, 0, shape=[10**39] * 100_000 + [0])),
    "shape is text": of(a=entry(0, 2, shape="12")),
    "shape is an object": of(a=entry(0, 1, shape={"1": 1})),
    "dtype is a list": of(a=entry(0, 16, dtype=["U8"])),
    "dtype is long": of(a=entry(0, 16, dtype="U8" * 1_000_000)),
    "a name twice": lambda: packed(
        b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 16)).encode(),) * 2), bytes(16)
    ),
    "a key twice": lambda: packed(
        b'{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16],"shape":[16]}}', bytes(16)
    ),
    "metadata is a list": lambda: packed(b'{"__metadata__":["a"]}'),
    "metadata is an empty list": lambda: packed(b'{"__metadata__":[]}'),
    "metadata is text": lambda: packed(b'{"__metadata__":"a"}'),
    "metadata nests": lambda: packed(b'{"__metadata__":{"a":{"b":"c"}}}'),
    "metadata has numbers": lambda: packed(b'{"__metadata__":{"a":1}}'),
    "nan": lambda: packed(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'),
    "infinity": lambda: packed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}'),
    "bad utf-8": lambda: packed(b'{"\xff":1}'),
    "utf-16": lambda: packed("{}".encode("utf-16")),
    "a byte order mark": lambda: packed(b"\xef\xbb\xbf{}"),
    "spaces in front": lambda: packed(b"  {}"),
    "zeros behind": lambda: packed(b"{}\0\0"),
    "two objects": lambda: packed(b"{}{}"),
    "half a header": lambda: packed(b'{"a":'),
    "deep lists": lambda: packed(b'{"a":' + b"[" * 1_000_000),
    "deep objects": lambda: packed(b'{"a":' * 1_000_000),
    "deep metadata": lambda: packed(b'{"__metadata__":' + b"[" * 500 + b"]" * 500 + b"}"),
    "100 MB of spaces": lambda: packed(b"{}".ljust(100_000_000)),
    "just under 100 MB": lambda: packed(b'{"a":"' + b"a" * 99_999_990 + b'"}'),
    "32 MB of lists": lambda: packed(b'{"a":[' + b"[]," * (31 << 20 // 3) + b"0]}"),
    "30 MB of text": lambda: packed('{"😀":"'.encode() + b"a" * (30 << 20) + b'"}'),
    "a million entries": lambda: packed(
        b"{%s}" % b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n
                            for n in range(1_000_000))
    ),
    "100 000 twice": lambda: packed(
        b"{%s}" % b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % (n % 99_999)
                            for n in range(100_000))
    ),
}  # fmt: skip
NAMES = {
    "slash": "../../etc/passwd",
    "nul": "a\0b",
    "line end": "a\nerror: all is well",
    "carriage return": "a\rerror: all is well",
    "escape": "\x1b[2J\x1b]0;title\x07",
    "c1": "\x9b31m",
    "right to left": "a\u202egnp.exe",
    "long": "a" * 100_000,
    "empty": "",
    "surrogate": "\ud800",
    "layer of a billion": "gpt_neox.layers.999999999.input_layernorm.weight",
    "layer of 5000 digits": f"gpt_neox.layers.{'9' * 5000}.input_layernorm.weight",
    "other digits": "gpt_neox.layers.\u0661.input_layernorm.weight",
}


def named(name: str) -> Change:
    """One more tensor, of this name."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        header[name] = entry(len(raw) - end, len(raw) - end + 4)
        path.write_bytes(packed(json.dumps(header).encode(), raw[end:] + bytes(4)))

    return change


LARGE = ("100 MB of spaces", "just under 100 MB", "32 MB of lists", "30 MB of text",
         "a million entries", "100 000 twice", "deep objects", "many dimensions")  # fmt: skip


# --- files that are something else -----------------------------------------------------------


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _linked_pipe(path: Path) -> None:
    os.mkfifo(f"{path}.pipe")
    path.symlink_to(f"{path.name}.pipe")


KINDS: dict[str, Change] = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": _socket,
    "device": _device,
    "folder": lambda path: path.mkdir(),
    "link to a pipe": _linked_pipe,
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


def instead(name: str, kind: str) -> Change:
    """Something else in place of a file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        KINDS[kind](path)

    return change


def written(name: str, content: bytes | str) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def sparse(name: str, size: int) -> Change:
    def change(folder: Path) -> None:
        with open(folder / name, "ab") as file:
            file.truncate(size)

    return change


def outside(folder: Path) -> Path:
    """A file with a secret, outside of the checkpoint."""
    path = folder.parent / f"{folder.name}-home" / "secret.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(SECRET))
    return path


def linked(name: str) -> Change:
    """A link to the secret in place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside(folder))

    return change


def index_linked(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    linked(_INDEX)(folder)


def linked_through_a_folder(folder: Path) -> None:
    """No file is a link; the folder that holds the tokenizer is."""
    home = outside(folder).parent
    (home / "tokenizer.json").write_text(json.dumps(SECRET))
    (folder / "tokenizer").symlink_to(home)


# --- Hugging Face's folder -------------------------------------------------------------------


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def index(target: Any, name: str = "model.safetensors") -> Change:
    """An index that says of every tensor that it lies there."""

    def change(folder: Path) -> None:
        whole = folder / "model.safetensors"
        raw = whole.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        home = outside(folder).parent
        (home / "x.safetensors").write_bytes(raw)
        (folder / "sub").symlink_to(home)
        whole.unlink()
        where = target.format(home=home) if isinstance(target, str) else target
        told = {key: where for key in header if key != "__metadata__"}
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": told}))

    return change


_INDEX = "model.safetensors.index.json"
HF: dict[str, Change] = {
    **{
        f"safetensors: {name}": lambda folder, name=name: written(  # type: ignore[misc]
            "model.safetensors", SAFETENSORS[name]()
        )(folder)
        for name in LARGE
    },
    **{f"name: {name}": named(text) for name, text in NAMES.items()},
    **{
        f"{name} is a {kind}": instead(name, kind)
        for kind in KINDS
        for name in ("config.json", "model.safetensors")
    },
    **{
        f"{name} is a {kind}": instead(name, kind)
        for kind in ("pipe", "device", "folder")
        for name in ("generation_config.json", "neox_bridge.json", "tokenizer.json", "merges.txt")
    },
    **{
        f"{name} is a link that leads out": linked(name)
        for name in (
            "config.json generation_config.json neox_bridge.json tokenizer.json "
            "tokenizer_config.json special_tokens_map.json chat_template.jinja vocab.json"
        ).split()
    },
    "index above": index("../{home.name}/x.safetensors"),
    "index absolute": index("{home}/x.safetensors"),
    "index through a linked folder": index("sub/x.safetensors"),
    "index of bin files above": index("../x.bin", "pytorch_model.bin"),
    "index of nothing": index(""),
    "index of the folder": index("."),
    "index of the folder above": index(".."),
    "index of a missing file": index("model-00001-of-00001.safetensors"),
    "index with nul": index("a\0b.safetensors"),
    "index with a line end": index("a\nb.safetensors"),
    "index with half a pair": index("\ud800.safetensors"),
    "index of numbers": index(1),
    "index of lists": index(["x.safetensors"]),
    "index of null": index(None),
    "index of itself": index(_INDEX),
    "index of the config": index("config.json"),
    "index is a link that leads out": index_linked,
    "config of 1 GB": sparse("config.json", 1 << 30),
    "config of 4 MB of lists": written("config.json", b"[" + b"[]," * (4 << 20 // 3) + b"0]"),
    "config of 3 MB of keys": written(
        "config.json", b"{%s}" % b",".join(b'"%x":0' % n for n in range(300_000))
    ),
    "deep config": written("config.json", b'{"a":' * 100_000),
    "config of depth 900": written("config.json", b'{"a":' * 900 + b"0" + b"}" * 900),
    "binary config": written("config.json", bytes(range(256))),
    "config is a list": written("config.json", b"[]"),
    "config is text": written("config.json", b'"config"'),
    "empty config": written("config.json", b""),
    "number of a million digits": written("config.json", b'{"a":' + b"9" * 10**6 + b"}"),
    "deep generation config": written("generation_config.json", b'{"a":' * 999),
    "generation config of depth 500": written(
        "generation_config.json", b'{"a":' * 500 + b"0" + b"}" * 500
    ),
    "record is a list": written("neox_bridge.json", b"[]"),
    "record with a list of rows": written("neox_bridge.json", b'{"vocab_size":[1]}'),
    "record with negative rows": written("neox_bridge.json", b'{"vocab_size":-5}'),
    "record with a text as config": written("neox_bridge.json", b'{"config":"a"}'),
    "record with a list as settings": written("neox_bridge.json", b'{"neox":{"yml":[1]}}'),
    "record with a text as iteration": written("neox_bridge.json", b'{"neox":{"iteration":"1"}}'),
    "tokenizer of depth 100 000": written("tokenizer.json", b'{"model":' + b"[" * 100_000),
    "tokenizer of 40 MB": written("tokenizer.json", b'{"model":[' + b"[]," * 14_000_000 + b"0]}"),
    "tokenizer of 1 GB": sparse("tokenizer.json", 1 << 30),
    "tokenizer of numbers": written("tokenizer.json", b'{"model":{"vocab":[1,2]}}'),
    "tokenizer of texts": written("tokenizer.json", b'{"model":{"vocab":["","a"]}}'),
    "tokenizer is a list": written("tokenizer.json", b"[]"),
    "added tokens are numbers": written(
        "tokenizer.json", b'{"model":{"vocab":{"a":0}},"added_tokens":[1]}'
    ),
    "unhashable tokens": written("tokenizer.json", b'{"model":{"vocab":[[[1],2]]}}'),
    "a billion layers": config(num_hidden_layers=10**9),
    "layers are text": config(num_hidden_layers="2"),
    "negative layers": config(num_hidden_layers=-1),
    "heads are a list": config(num_attention_heads=[4]),
    "a billion heads": config(num_attention_heads=10**9),
    "no heads": config(num_attention_heads=0),
    "infinite heads": config(num_attention_heads=float("inf")),
    "nan": config(layer_norm_eps=float("nan")),
    "rotary base of zero": config(rotary_emb_base=0, rope_parameters=None),
    "rotary fraction of a billion": config(rotary_pct=1e9, rope_parameters=None),
    "negative rotary fraction": config(rope_parameters={"partial_rotary_factor": -1}),
    "rope is a list": config(rope_parameters=[1]),
    "rope is text": config(rope_scaling="linear"),
    "positions are a mapping": config(max_position_embeddings={}),
    "a switch is text": config(tie_word_embeddings="false"),
    "activation is a list": config(hidden_act=["gelu"]),
    "activation with an escape": config(hidden_act="\x1b[2J"),
    "model type is a mapping": config(model_type={"gpt_neox": 1}),
}

# --- GPT-NeoX's root -------------------------------------------------------------------------


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
