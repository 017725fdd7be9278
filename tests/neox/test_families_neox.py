"""Llama and its relatives load strictly in the real GPT-NeoX, which computes the same logits."""

from pathlib import Path
from typing import Any

import pytest
import real_neox
from common import convert, make_hf

pytestmark = pytest.mark.neox
GROUPED = {"num_key_value_heads": 2}
# the epsilon of the others; the default of the class is 1e-5, and older trees add it elsewhere
PHI3 = {**GROUPED, "rms_norm_eps": 1e-6}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", GROUPED),
    ("llama", {**GROUPED, "attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"mlp_bias": True}),
    *(("llama", {"hidden_act": name}) for name in ("gelu", "relu", "sigmoid", "linear")),
    ("mistral", {**GROUPED, "sliding_window": 5}),
    ("qwen2", GROUPED),
    ("stablelm", {}),
    ("stablelm", {**GROUPED, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    ("phi3", {**PHI3, "sliding_window": 5}),
    ("phi3", {**PHI3, "partial_rotary_factor": 0.5}),
    ("glm", GROUPED),
    ("glm", {**GROUPED, "attention_bias": False, "partial_rotary_factor": 0.25}),
    ("olmo", {}),
    ("olmo", {**GROUPED, "attention_bias": True, "tie_word_embeddings": True}),
    ("starcoder2", {}),
    ("starcoder2", {**GROUPED, "sliding_window": 5, "rope_theta": 500000}),
    ("starcoder2", {**GROUPED, "hidden_act": "gelu", "tie_word_embeddings": False}),
]
# 1e-3 where RMSNorm has its epsilon elsewhere (before 4c9f1081)
TREES = {"today": ("gpt-neox", 1e-5)}
TREES |= {name: (f"neox-{name}", 1e-3) for name in ("2024-03", "2024-09", "2024-10")}


def layouts(config: dict[str, Any]) -> tuple[int, ...]:
    """Without stages GPT-NeoX has no window, so such a model is refused there."""
    return (1,) if "sliding_window" in config else (0, 1)


def runs(family: str, config: dict[str, Any], era: str) -> bool:
    """Whether GPT-NeoX of an era has this MLP, and these norms."""
    if config.get("mlp_bias") or family == "olmo":
        return era == "today"
    if family == "starcoder2":  # its MLP is plain
        return True
    activation = config.get("hidden_act", "silu")
    # with these, trees of 2024-10 add biases without asking
    return (
        activation == "silu"
        or era == "today"
        or (activation in ("gelu", "relu") and era != "2024-10")
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("tree", TREES)
def test_loads(tree: str, tp: int, neox_python: str, tmp_path: Path) -> None:
    jobs, sources = [], []
    era = real_neox.era(tree)
    for number, (family, config) in enumerate(CASES):
        if not runs(family, config, era.name):
            continue  # refused
        hf = make_hf(tmp_path / f"hf{number}", family=family, **config)
        sources.append((real_neox.with_tokenizer(hf), number))
        for pp in layouts(config):
            target = tmp_path / f"neox{number}-{pp}"
            convert(hf, target, tp=tp, pp=pp, era=era)
            logits = str(tmp_path / f"{number}-{pp}.npz")
            jobs.append({"yml": str(target / "finetune.yml"), "logits": logits})
    folder, allowed = TREES[tree]
    assert real_neox.run(neox_python, folder, tp, jobs, tmp_path) == [None] * len(jobs)
    for hf, number in sources:
        for pp in layouts(CASES[number][1]):
            assert real_neox.agree(tmp_path / f"{number}-{pp}.npz", hf) <= allowed
