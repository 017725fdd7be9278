"""Random checkpoints in the shape of a Pythia model, for tests and benchmarks."""

from dataclasses import replace
from hashlib import sha256

from neox_bridge.architectures.base import ModelConfig
from neox_bridge.architectures.gpt_neox import ARCHITECTURE
from neox_bridge.architectures.rows import model_rows
from neox_bridge.architectures.shapes import PYTHIA, TOKENIZER_SIZE, ModelSize
from neox_bridge.conversion import plan as make_plan
from neox_bridge.errors import BridgeError
from neox_bridge.layouts.checkpoint import Checkpoint, Kind
from neox_bridge.planning.common import text_file
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan
from neox_bridge.tensors.pieces import Whole

DTYPE = "float16"


def toy_checkpoint(name: str, seed: int = 0, layers: int | None = None) -> Checkpoint:
    """A source that no file holds: every weight is a seed.

    name: one of ``architectures.shapes.PYTHIA``. layers: another number of blocks than its own.
    Raises BridgeError for another name.
    """
    if name not in PYTHIA:
        raise BridgeError(f"{name!r} is no toy. There are {', '.join(PYTHIA)}.")
    shape = PYTHIA[name]
    config = _config(replace(shape, layers=layers or shape.layers))
    tensors = {}
    for row in model_rows(ARCHITECTURE, config):
        size = tuple(config.dims[dim] for dim in row.weight.shape)
        tensors[row.hf] = Whole(DTYPE, size, random=_seed(seed, row.hf))
    return Checkpoint(
        kind="hf",
        path=f"{name}-toy",
        architecture=ARCHITECTURE,
        config=config,
        raw=ARCHITECTURE.write_hf(config),
        tensors=tensors,
        files=(),
        tokenizer_size=TOKENIZER_SIZE,
    )


def plan_toy(name: str, target: str, kind: Kind, seed: int = 0, layers: int | None = None) -> Plan:
    """Everything that a toy consists of; as GPT-NeoX with TP 1, one file a layer."""
    plan = make_plan(toy_checkpoint(name, seed, layers), Options(to=kind), target)
    card = text_file("README.md", _card(name, seed))
    files = tuple(card if file.path == card.path else file for file in plan.files)
    return replace(plan, files=files, notes=())


def _config(shape: ModelSize) -> ModelConfig:
    dims = {
        "vocab": shape.rows,
        "hidden": shape.hidden,
        "qkv": 3 * shape.hidden,
        "ffn": 4 * shape.hidden,
    }
    return ModelConfig(
        layers=shape.layers,
        heads=shape.heads,
        dims=dims,
        max_positions=2048,
        norm_eps=1e-5,
        rotary_pct=0.25,
        rotary_base=10000.0,
        activation="gelu",
        parallel_residual=True,
        tied_norms=False,
        tied_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        dtype=DTYPE,
    )


def _seed(seed: int, name: str) -> int:
    """A seed of its own for each tensor, so that they can be made in any order."""
    return int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:6], "big")


def _card(name: str, seed: int) -> bytes:
    return (
        f"# {name}, random\n\nWeights without meaning (seed {seed}), in the shape of {name}: made "
        f"for trials and benchmarks by `neox-bridge toy`.\n"
    ).encode()
