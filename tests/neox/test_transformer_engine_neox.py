"""The real GPT-NeoX around a stand-in for Transformer Engine, which wants a GPU.

GPT-NeoX's own: te_mha and te_layernorm_mlp, the names and sizes that they make, the strict load.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import real_neox
from common import assert_same, convert, hf_tensors, make_hf
from real_training import PRECISION, TOLERANCE, Layout, differing, losses, start
from resharding import compared, reshard

pytestmark = pytest.mark.neox
GROUPED = {"num_key_value_heads": 2, "rms_norm_eps": 1e-8}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {"hidden_act": "gelu_fast", "use_parallel_residual": False}),
    ("gpt_neox", {"hidden_act": "gelu_fast"}),
    ("llama", {"rms_norm_eps": 1e-8}),
    ("llama", GROUPED),
    ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    ("qwen2", GROUPED),
    ("starcoder2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX finds the stand-in as Transformer Engine."""
    stand_in = str(Path(__file__).parent / "stand_in")
    monkeypatch.setenv("PYTHONPATH", stand_in + os.pathsep + os.environ.get("PYTHONPATH", ""))


@pytest.mark.parametrize("tp", [1, 2])
def test_loads(tp: int, neox_python: str, tmp_path: Path) -> None:
    jobs, sources = [], []
    for number, (family, config) in enumerate(CASES):
        if tp > 1 and family == "gpt_neox" and "use_parallel_residual" not in config:
            continue  # refused
        hf = make_hf(tmp_path / f"hf{number}", family=family, **config)
        sources.append(real_neox.with_tokenizer(hf))
        convert(hf, tmp_path / f"te{number}", tp=tp, te=True)
        job = {"yml": str(tmp_path / f"te{number}" / "finetune.yml")}
        jobs.append(
            {
                **job,
                "logits": str(tmp_path / f"{number}.npz"),
                "save": str(tmp_path / f"own{number}"),
            }
        )
    found = real_neox.run(neox_python, "gpt-neox", tp, jobs, tmp_path)
    assert found == [None] * len(jobs)
    for job, hf in zip(jobs, sources, strict=True):
        assert real_neox.agree(Path(job["logits"]), hf) <= 1e-5
        # what GPT-NeoX itself then saved, states and all, is the model
        back = Path(job["save"]).with_name("back" + hf.name)
        convert(Path(job["save"]), back)
        own, want = hf_tensors(back), hf_tensors(hf)
        # a Qwen 2 without this tool's record is a Llama, whose o_proj has a bias
        more = [name for name in own if name not in want]
        assert all(name.endswith("o_proj.bias") and not own[name].any() for name in more)
        for name in want:
            padded = "embed" in name or "lm_head" in name
            own[name] = own[name][: len(want[name])].contiguous() if padded else own[name]
        assert_same({name: own[name] for name in want}, want)


def test_only_rotary_positions_run(neox_python: str, tmp_path: Path) -> None:
    """So models with other positions are refused: the forward pass of te_mha needs rope_emb."""
    hf = real_neox.with_tokenizer(make_hf(tmp_path / "hf", hidden_act="gelu_fast"))
    convert(hf, tmp_path / "te", te=True)
    yml, logits = str(tmp_path / "te" / "finetune.yml"), str(tmp_path / "x.npz")
    jobs = [
        {"yml": yml, "logits": logits, "set": {"pos_emb": positions, "load": None}}
        for positions in ("learned", "none")
    ]
    errors = real_neox.run(neox_python, "gpt-neox", 1, jobs, tmp_path)
    assert ["has no attribute 'rope_emb'" in str(error) for error in errors] == [True, True]


MODELS: dict[str, dict[str, Any]] = {
    "plain": {"gpt_j_residual": False},
    "gated": {
        "norm": "rmsnorm",
        "rms_norm_epsilon": 1e-8,
        "activation": "swiglu",
        "intermediate_size": 192,
        "num_kv_heads": 2,
        "gpt_j_residual": False,
    },
}
TE = {"te_mha": True, "te_layernorm_mlp": True, **PRECISION["fp32"]}
SOURCES = {"stage 1": (Layout(2, 1, 1), 1), "stage 3": (Layout(1, 0, 2), 3)}
# the source, the target and its ZeRO stage
TARGETS = [
    ("stage 1", Layout(1, 2, 1), 1),
    ("stage 1", Layout(1, 0, 1), 0),
    ("stage 1", Layout(1, 0, 2), 3),
    ("stage 3", Layout(1, 0, 1), 3),
    ("stage 3", Layout(1, 0, 2), 2),
    ("stage 3", Layout(2, 1, 1), 1),
    ("stage 3", Layout(1, 0, 1), 0),
]


def test_runs_go_on(neox_python: str, tmp_path: Path) -> None:
    """Resumed runs compute the losses of the run that was not converted."""
    wanted: dict[str, list[float]] = {}
    for source, (layout, zero) in SOURCES.items():
        jobs = []
        for model, settings in MODELS.items():
            home = tmp_path / f"{model} {source}"
            made = {**TE, **settings, "zero_optimization": {"stage": zero}}
            yml, run = str(start(home, layout, made)), str(home / "run")
            jobs.append({"yml": yml, "losses": 9, "alike": True, "save": run})
            jobs.append({"yml": yml, "losses": 3, "alike": True, "set": {"load": run}})
        resumed = losses(neox_python, layout, jobs, tmp_path / f"jobs {source}")[1::2]
        wanted |= {f"{m} {source}": w for m, w in zip(MODELS, resumed, strict=True)}
    moves = [
        (f"{model} {source}", SOURCES[source][0], layout, zero)
        for source, layout, zero in TARGETS
        for model in MODELS
    ]
    assert differing(neox_python, moves, wanted, tmp_path, TOLERANCE["fp32"]) == []


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_the_same_layout_is_the_same_files(zero: int, neox_python: str, tmp_path: Path) -> None:
    layout = Layout(1, 0, 1)
    settings = {**TE, **MODELS["gated"], "zero_optimization": {"stage": zero}}
    yml, run = str(start(tmp_path / "home", layout, settings)), tmp_path / "home" / "run"
    losses(neox_python, layout, [{"yml": yml, "losses": 2, "save": str(run)}], tmp_path)
    reshard(run, tmp_path / "other", dp=2, micro_batch=1)
    reshard(tmp_path / "other", tmp_path / "back", dp=1, micro_batch=2)
    # its fp8 states are written as None
    assert compared(run, tmp_path / "back", ("_extra_state",)) == []
