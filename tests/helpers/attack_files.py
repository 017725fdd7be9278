"""Checkpoints that try to break their reader or to lead it elsewhere; each with its name.

Those of GPT-NeoX are in attack_neox.py, pickles in attack_pickles.py, safetensors in
attack_safetensors.py. A change is made to the folder of a good checkpoint; SECRET is what lies
outside of it and must not come into any output.
"""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack_safetensors import LARGE, SAFETENSORS, entry, packed

Change = Callable[[Path], None]
SECRET = {"password": "hunter2-hunter2", "model": {"vocab": {"hunter2-hunter2": 0}}}


# --- names of tensors -----------------------------------------------------------------------

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
        f"{name} is a symbolic link": linked(name)
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
    "index is a symbolic link": index_linked,
    "config of 1 GB": sparse("config.json", 1 << 30),
    "config of 4 MB of lists": written("config.json", b"[" + b"[]," * ((4 << 20) // 3) + b"0]"),
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
