"""Models, conversions and readings that several tests share.

torch and transformers are imported by the functions that need them: other tests start without.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from neox_bridge.api import open_checkpoint
from neox_bridge.api import plan as make_plan
from neox_bridge.execution.execute import execute
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan

if TYPE_CHECKING:
    import torch

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
FIXTURES = TESTS / "data" / "fixtures"
# Llama and its relatives, and the others
_RELATIVES = ("llama", "olmo", "phi3", "starcoder2")
LLAMA = sorted(p.name for p in FIXTURES.iterdir() if p.name.startswith(_RELATIVES))
GPT_NEOX = sorted({path.name for path in FIXTURES.iterdir()} - set(LLAMA))
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "max_position_embeddings": 32,
    "rotary_pct": 0.5,
    "hidden_act": "gelu",
}
TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}
# of families with the names of GPT-2
TINY_GPT2: dict[str, Any] = {
    "vocab_size": 300,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 12,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TINY_OPT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "ffn_dim": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "max_position_embeddings": 32,
}
# the class has a padding token that is not in this vocabulary
TINY_PHI3: dict[str, Any] = {**TINY_LLAMA, "eos_token_id": 2, "pad_token_id": None}
# trees before 2024-09 have no plain MLP of another width
TINY_STARCODER2 = {**TINY_LLAMA, "intermediate_size": 256, "bos_token_id": 0, "eos_token_id": 0}
TINY_GLM: dict[str, Any] = {**TINY_PHI3, "head_dim": 16}
TINY_MAMBA: dict[str, Any] = {"vocab_size": 300, "hidden_size": 40, "num_hidden_layers": 2}
# by family; TINY_LLAMA for others
TINY_MODELS = {
    "gpt_neox": TINY,
    "gpt2": TINY_GPT2,
    "opt": TINY_OPT,
    "gpt_bigcode": TINY_GPT2,
    "mamba": TINY_MAMBA,
    "phi3": TINY_PHI3,
    "glm": TINY_GLM,
    "starcoder2": TINY_STARCODER2,
}


def make_hf(
    folder: Path,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    family: str = "gpt_neox",
    **config: Any,
) -> Path:
    """A model made and saved by transformers, with every tensor random; float32 by default."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoConfig.for_model(family, **{**TINY_MODELS.get(family, TINY_LLAMA), **config})
    model = AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype or torch.float32).save_pretrained(folder)
    return folder


def plan_of(source: Path, target: Path, **options: Any) -> Plan:
    return make_plan(open_checkpoint(str(source)), Options(**options), str(target))


def convert(source: Path, target: Path, **options: Any) -> Plan:
    plan = plan_of(source, target, **options)
    execute(plan, str(target))
    return plan


def fixture(name: str) -> Path:
    return FIXTURES / name / "checkpoints"


def recorded(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of the real GPT-NeoX."""
    import torch

    with np.load(FIXTURES / name / "logits.npz") as file:
        return torch.from_numpy(file["tokens"]), torch.from_numpy(file["logits"])


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(tokens).logits.float()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert sorted(a) == sorted(b)
    assert [name for name in a if not same_bits(a[name], b[name])] == []


def step_of(root: Path) -> Path:
    return root / (root / "latest").read_text().strip()


def neox_config(root: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for path in sorted((step_of(root) / "configs").glob("*.yml")):
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        merged.update({key.replace("-", "_"): value for key, value in loaded.items()})
    return merged


def neox_files(root: Path) -> dict[str, Any]:
    """Every .pt file of the latest step by name, as torch reads it."""
    import torch

    files = sorted(step_of(root).glob("*model_states.pt"))
    return {path.name: torch.load(path, weights_only=False) for path in files}


def neox_ranks(root: Path) -> list[dict[str, torch.Tensor]]:
    """Either layout as one mapping a tensor-parallel rank: "<layer>.<name>" to tensor."""
    ranks: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in neox_files(root).items():
        parts = name.replace("-", "_").split("_")
        if name.startswith("layer"):
            assert isinstance(value, OrderedDict)
            mine = ranks.setdefault(int(parts[3]), {})
            mine.update({f"{int(parts[1])}.{key}": tensor for key, tensor in value.items()})
        elif value["module"] is not None:
            named = {k.removeprefix("sequential."): v for k, v in value["module"].items()}
            ranks[int(parts[2])] = named
    return [ranks[rank] for rank in sorted(ranks)]
