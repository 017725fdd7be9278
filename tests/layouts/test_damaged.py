"""Damaged checkpoints: the error names the file and the key, and what to do about it."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_torch import tensor, zipped
from common import step_of
from safetensors.numpy import save_file
from tiny import convert, plan_of, write_hf

from neox_bridge.api import open_checkpoint
from neox_bridge.errors import BridgeError, Refused, Unreachable, UsageError
from neox_bridge.layouts import hub_source
from neox_bridge.layouts.hub_source import HubSource
from neox_bridge.layouts.known_files import foreign
from neox_bridge.layouts.text_files import list_folder
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.stores.paths import open_file, states, walk
from neox_bridge.verification.runs import find_runs

Change = Callable[[Path], object]
LAYER, RANK = "layer_05-model_00-model_states.pt", "mp_rank_00_model_states.pt"
ARGS = {"num_layers": 1, "model_parallel_size": 1}


def text(value: str) -> bytes:
    """The opcode of a text in a pickle."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def saved(name: str, value: object) -> Change:
    """A file of torch.save in which nothing is a tensor."""
    return lambda step: (step / name).write_bytes(zipped(pickle.dumps(value, 2)))


def meta(**values: Any) -> Change:
    return saved(RANK, {"module": None, "args": ARGS, "iteration": 0, **values})


def by_ranks(module: bytes) -> Change:
    """A checkpoint without files by layer. module: the opcodes of what its mp_rank file has."""

    def change(step: Path) -> None:
        for path in step.glob("layer_*"):
            path.unlink()
        (step / RANK).write_bytes(zipped(b"\x80\x02}" + text("module") + module + b"s."))

    return change


def universal(meta_change: Change, *more: Change) -> Change:
    """What makes a universal checkpoint of a step's folder: zero/optimizer_state.pt."""

    def change(step: Path) -> None:
        (step / "zero").mkdir()
        for one in (saved("zero/optimizer_state.pt", {}), meta_change, *more):
            one(step)

    return change


def joined(tp: int) -> Change:
    """A parameter of 4 elements, one behind the other as the parts of ranks."""

    def change(step: Path) -> None:
        name = "5.norm.weight"
        (step / "zero" / name).mkdir()
        values = text("cat_dim") + b"K\0s" + text("param") + tensor() + b"s"
        (step / "zero" / name / "fp32.pt").write_bytes(zipped(b"\x80\x02}" + values + b"."))
        value = {"args": {"model_parallel_size": tp}, "param_shapes": [{name: (4,)}]}
        for rank in range(tp):
            saved(f"mp_rank_{rank:02d}_model_states.pt", value)(step)

    return change


def without_layer_count(step: Path) -> None:
    path = step / "configs" / "neox_bridge.yml"
    path.write_text(re.sub(r'.*"?num.layers.*\n', "", path.read_text()))
    meta(args={})(step)


def record(**values: Any) -> Change:
    return lambda step: (step / "neox_bridge.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return convert(write_hf(folder / "hf"), folder / "neox", to="neox")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (saved(LAYER, [1]), f"{LAYER} is not a file of a GPT-NeoX checkpoint: it does not contain"),
        (saved(RANK, [1]), f"{RANK} is not a file of a GPT-NeoX checkpoint: it does not contain"),
        (saved(LAYER, {"norm.weight": 7}), f"{LAYER}: not a tensor: norm.weight"),
        (saved(LAYER, {7: 7}), f"{LAYER} has a key of the type int instead of a tensor name"),
        (saved(LAYER, {"a\x1b[2J": 7}), r"has a tensor with the name 'a\\x1b\[2J'"),
        (saved(LAYER.replace("00", "99999999"), {}), "declares 1 layer on 100,000,000 ranks but"),
        (by_ranks(b"N"), f"{RANK} contains no weights"),
        (
            by_ranks(b"}" + text("transformer.h.0.attn") + tensor() + b"s"),
            r"transformer\.h\.0\.attn is not a GPT-NeoX tensor name",
        ),
        (meta(args=[1]), "args does not map names to settings"),
        (meta(args={"comment": "a" * (2 << 20)}), "args is larger than the settings of any run"),
        (without_layer_count, "/configs: num_layers is missing, and the args in the mp_rank"),
        (record(tokenizer_size="many"), "neox_bridge.json: tokenizer_size: 'many' is not a value"),
        (universal(lambda step: (step / RANK).unlink()), "is incomplete: mp_rank_.* is missing"),
        (universal(meta()), "param_shapes is missing from an mp_rank file"),
        (universal(joined(3)), r"fp32\.pt: its shape \[4\] cannot be split over 3 tensor"),
        (universal(meta(buffer_names=7)), f"{RANK}: buffer_names is 7, not a list"),
    ],
)
def test_gpt_neox(change: Change, message: str, run: Path, tmp_path: Path) -> None:
    step = step_of(Path(shutil.copytree(run, tmp_path / "run")))
    change(step)
    with pytest.raises(BridgeError, match=message) as raised:
        open_checkpoint(str(tmp_path / "run"))
    assert str(step) in str(raised.value)
    assert raised.value.exit_code == 1


def test_files_that_only_the_optimizer_needs(run: Path, tmp_path: Path) -> None:
    """The mp_rank files behind the first one are not read for the weights."""
    step = step_of(Path(shutil.copytree(run, tmp_path / "run")))
    meta(mp_world_size=2, args={**ARGS, "pipe_parallel_size": 2})(step)
    saved("mp_rank_01_model_states.pt", [1])(step)
    checkpoint = open_checkpoint(str(tmp_path / "run"))
    with pytest.raises(BridgeError, match=r"mp_rank_01_model_states\.pt is not a file of"):
        read_optimizer(checkpoint)


def test_rows_that_do_not_fit_the_hidden_size(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value"
    rows = {f"{name}.weight": np.ones((16, 8), "f4"), f"{name}.bias": np.ones(16, "f4")}
    with pytest.raises(BridgeError, match="has 16 rows, but 3 x the hidden size 8 is 24"):
        open_checkpoint(str(write_hf(tmp_path / "hf", changed=rows)))


def test_rows_of_another_number_of_key_value_heads(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16}
    config |= {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = {
        "embed_tokens": 16,
        "norm": 0,
        "layers.0.input_layernorm": 0,
        "layers.0.mlp.up_proj": 16,
    }
    rows |= {"layers.0.post_attention_layernorm": 0, "layers.0.mlp.gate_proj": 16}
    rows |= {f"layers.0.self_attn.{name}_proj": 8 for name in "qkvo"}
    tensors = {
        f"model.{name}.weight": np.ones((n, 8) if n else 8, "f4") for name, n in rows.items()
    }
    tensors["model.layers.0.mlp.down_proj.weight"] = np.ones((8, 16), "f4")
    save_file({**tensors, "lm_head.weight": np.ones((16, 8), "f4")}, tmp_path / "model.safetensors")
    with pytest.raises(BridgeError, match="2 of 2 rows each do not match the 8 rows of k and v"):
        open_checkpoint(str(tmp_path))


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    saved("pytorch_model.bin", [1])(folder)
    with pytest.raises(BridgeError, match=r"pytorch_model\.bin does not contain a state dict"):
        open_checkpoint(str(folder))


# --- Meta's form -----------------------------------------------------------------------------

PARAMS = {"dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "max_seq_len": 8}
WQ = "layers.0.attention.wq.weight"


def meta_shard(name: str, shape: tuple[int, ...]) -> bytes:
    """A file with one tensor. Its storage has 32 elements, which is enough for all of them."""
    strides = tuple(int(np.prod(shape[place + 1 :])) for place in range(len(shape)))
    opcodes = tensor(shape, strides, numel=32)
    pickled = b"\x80\x02}" + text(name) + opcodes + b"s."
    return zipped(pickled, {"0": bytes(128)})


@pytest.mark.parametrize(
    ("params", "shards", "message"),
    [
        ({}, [(WQ, (8,))], r"wq\.weight has the shape \[8\]. Its tensors of this name have 2"),
        ({}, [(WQ, (2, 8)), ("norm.weight", (8,))], "is missing from some of the 2 files"),
        ({}, [(WQ, (2, 8)), (WQ, (4, 8))], "does not have the same shape and dtype in all files"),
        ({}, [(WQ, (2, 8))] * 4, "splits a head over two files"),
        ({"n_layers": None}, [(WQ, (8, 4))], r"params\.json does not .* Missing: n_layers\."),
        ({"quantization": {"bits": 8}}, [(WQ, (8, 4))], r"params\.json: quantization: the weights"),
    ],
)
def test_files_of_meta(
    params: dict[str, Any], shards: list[tuple[str, tuple[int, ...]]], message: str, tmp_path: Path
) -> None:
    settings = {k: v for k, v in {**PARAMS, **params}.items() if v is not None}
    (tmp_path / "params.json").write_text(json.dumps(settings))
    for number, shard in enumerate(shards):
        (tmp_path / f"consolidated.{number:02d}.pth").write_bytes(meta_shard(*shard))
    with pytest.raises(BridgeError, match=message):
        open_checkpoint(str(tmp_path))


def test_a_tensor_in_two_files_of_mistral(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    for number in (1, 2):
        path = tmp_path / f"consolidated-{number:05d}-of-00002.safetensors"
        save_file({"norm.weight": np.ones(8, np.float32)}, path)
    with pytest.raises(BridgeError, match=r"norm\.weight is in two files") as raised:
        open_checkpoint(str(tmp_path))
    assert str(tmp_path / "consolidated-00001-of-00002.safetensors") in str(raised.value)


# --- files and folders -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "is not a JSON object"),
        (b'{"a": "\xff"}', "is not a text file in UTF-8"),
        (b'"' + b"a" * (4 << 20) + b'"', "is larger than 4,194,304 bytes"),
    ],
)
def test_settings_that_cannot_be_read(content: bytes, message: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf") / "config.json"
    path.write_bytes(content)
    with pytest.raises(BridgeError, match=message) as raised:
        open_checkpoint(str(path.parent))
    assert str(raised.value).startswith(str(path))


READS: dict[str, tuple[Callable[[str], object], str]] = {
    "open": (open_file, "cannot be read"),
    "state": (lambda path: states([path]), "cannot be read"),
    "list": (list_folder, "cannot be listed"),
    "files of others": (lambda path: list(foreign(path)), "cannot be listed"),
    "walk": (lambda path: list(walk(path)), "cannot be listed"),
}


@pytest.mark.parametrize("name", READS)
def test_a_link_that_leads_to_itself(name: str, tmp_path: Path) -> None:
    """Like a folder without permissions, it is there, and the system does not let us in."""
    read, message = READS[name]
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(BridgeError, match=f"link {message}: Too many levels of symbolic links"):
        read(str(tmp_path / "link"))


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    (tmp_path / "words").mkdir()
    message = f"`tokenizer={tmp_path}/words`: this folder contains no tokenizer.json"
    with pytest.raises(BridgeError, match=message):
        plan_of(hf, tmp_path / "out", tokenizer=str(tmp_path / "words"))


# --- what is not a folder --------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets what the Hub says of a model: an exception, or the place of its files."""

    def answer(value: Any) -> None:
        def ask(*_: object, by_ranges: bool = False) -> HubSource:
            if isinstance(value, Exception):
                raise value
            return HubSource(str(value), "org/name@main")

        monkeypatch.setattr(hub_source, "find_source", ask)
        monkeypatch.setattr("neox_bridge.stores.hub_revisions.revisions", ask)

    return answer


@pytest.mark.parametrize("read", [open_checkpoint, lambda path: find_runs([path])])
@pytest.mark.parametrize("error", [BridgeError, Unreachable, Refused])
def test_a_name_that_the_hub_does_not_have(
    error: type[BridgeError], read: Any, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub(error("org/name: nothing there."))
    with pytest.raises(error) as raised:
        read("org/name")
    assert type(raised.value) is error
    words = "" if error is Refused else " There is no local folder org/name either."
    assert str(raised.value).startswith(f"org/name: nothing there.{words}")
    offers_toy = error is Unreachable and read is open_checkpoint
    assert ("neox-bridge toy" in str(raised.value)) is offers_toy


def test_a_model_beside_other_models_is_read_from_the_hub(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(write_hf(tmp_path / "cache"))
    (tmp_path / "org" / "else").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("org/name")
    (finding,) = [f for f in checkpoint.findings if f.code == "read-from-hub"]
    assert "there is no local folder org/name" in finding.message
    monkeypatch.chdir(tmp_path / "org")
    assert "read-from-hub" not in [f.code for f in open_checkpoint("org/name").findings]


def test_a_revision_that_is_named_twice() -> None:
    with pytest.raises(UsageError) as raised:
        open_checkpoint("org/name@step1", revision="step2")
    assert raised.value.parameters == ("revision",)


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(BridgeError, match=f"is a link to {tmp_path}/gone, which does not exist"):
        open_checkpoint(str(tmp_path / "link"))
