"""The torch reference agrees with logits that the real GPT-NeoX computed, and sees wrong models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
yaml = pytest.importorskip("yaml")

from neox_bridge.verification import reference  # noqa: E402  torch is an extra

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
RECORDED = sorted(path.parent.name for path in FIXTURES.glob("*/logits.npz"))
VOCABULARY = 300  # rows beyond it are padding

# trees of before 2024-11 and of before 2025-05
OLDER: dict[str, dict[str, str]] = {
    "llama_gqa_fp32_2024_10_old_order_tp1": {"gqa_order": "interleaved", "rms_eps": "outside"},
    "llama_fp32_2024_09_w123_tp2": {"rms_eps": "outside"},
}

Rank = dict[str, Any]
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no fixtures at {FIXTURES}")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forward(
    ranks: list[Rank],
    config: dict[str, Any],
    tokens: Any,
    *,
    gqa_order: str = "grouped",
    rms_eps: str = "inside",
) -> Any:
    """The logits alone."""
    config = {**config, "gqa_order": gqa_order, "rms_eps": rms_eps}
    *_, last = reference.stages(ranks, config, tokens)
    return last.output


def load_config(step: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for path in sorted((step / "configs").glob("*.yml")):
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        config.update({key.replace("-", "_"): value for key, value in loaded.items()})
    return config


def load_ranks(step: Path) -> list[Rank]:
    """Read either layout as one mapping per tensor-parallel rank, "<layer index>.<name>"."""
    ranks: dict[int, Rank] = {}
    for path in sorted(step.glob("layer_*-model_*-model_states.pt")):
        layer, rank = (int(part.split("_")[1]) for part in path.name.split("-")[:2])
        tensors = torch.load(path, map_location="cpu", weights_only=False)
        ranks.setdefault(rank, {}).update({f"{layer}.{k}": v for k, v in tensors.items()})
    if not ranks:
        for path in sorted(step.glob("mp_rank_*_model_states.pt")):
            module = torch.load(path, map_location="cpu", weights_only=False)["module"]
            named = {name.removeprefix("sequential."): tensor for name, tensor in module.items()}
            ranks[int(path.name.split("_")[2])] = named
    return [ranks[rank] for rank in sorted(ranks)]


def load(name: str) -> tuple[list[Rank], dict[str, Any], Any, Any]:
    """A fixture's ranks, config, tokens and recorded logits."""
    step = next((FIXTURES / name / "checkpoints").glob("global_step*"))
    with np.load(FIXTURES / name / "logits.npz") as recorded:
        tokens = torch.from_numpy(recorded["tokens"])
        logits = torch.from_numpy(recorded["logits"])
    return load_ranks(step), load_config(step), tokens, logits


def largest_difference(
    name: str,
    change: Callable[[list[Rank], dict[str, Any]], None] = lambda ranks, config: None,
    **options: str,
) -> float:
    """How far the reference of the changed fixture is from the logits recorded for it."""
    ranks, config, tokens, logits = load(name)
    change(ranks, config)
    computed = forward(ranks, config, tokens, **{**OLDER.get(name, {}), **options})
    return float((computed[..., :VOCABULARY] - logits).abs().max())


def row_biases(rank: Rank) -> list[str]:
    ends = ("attention.dense.bias", "mlp.linear2.bias", "mlp.dense_4h_to_h.bias")
    return [name for name in rank if name.endswith(ends)]


def sum_row_biases(ranks: list[Rank], config: dict[str, Any]) -> None:
    for name in row_biases(ranks[0]):
        total = sum(rank[name] for rank in ranks)
        for rank in ranks:
            rank[name] = total


@pytest.mark.parametrize("name", RECORDED)
def test_agrees_with_gpt_neox(name: str) -> None:
    ranks, config, tokens, logits = load(name)
    computed = forward(ranks, config, tokens, **OLDER.get(name, {}))
    padded = sum(rank["0.word_embeddings.weight"].shape[0] for rank in ranks)
    assert computed.shape == (*tokens.shape, padded)
    assert computed.dtype == torch.float32
    difference = float((computed[..., :VOCABULARY] - logits).abs().max())
    largest = float(logits.abs().max())
    fp32 = ranks[0]["0.word_embeddings.weight"].dtype == torch.float32
    assert difference <= (1e-5 if fp32 else 0.01 * largest)


# gpt_j_residual: each rank adds its bias, so the whole bias on each rank counts twice;
# without it the whole bias stands on each rank, so their sum is twice the bias
@pytest.mark.parametrize(
    "name",
    ["pythia_fp32_pp1_tp2", "pythia_fp32_2024_09_old_mlp_pp0_tp2", "sequential_residual_fp32_tp2"],
)
def test_sees_biases_counted_twice(name: str) -> None:
    assert largest_difference(name, sum_row_biases) > 1e-4


def test_whole_bias_on_one_rank_is_the_same_parallel_residual() -> None:
    def move(ranks: list[Rank], config: dict[str, Any]) -> None:
        sum_row_biases(ranks, config)
        for rank in ranks[1:]:
            rank.update({name: torch.zeros_like(rank[name]) for name in row_biases(rank)})

    assert largest_difference("pythia_fp32_pp1_tp2", move) <= 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pythia_fp32_fused_gelu_tp1", {"bias_gelu_fusion": False}),
        ("pythia_fp32_pp0_tp1", {"bias_gelu_fusion": True}),
        ("pythia_fp32_pp1_tp2", {"rotary_pct": 1.0}),
        ("llama_fp32_tp2", {"rotary_pct": 0.25}),
        ("llama_fp32_tp2", {"rotary_emb_base": 500000}),
        ("pythia_fp32_pp1_tp2", {"pos_emb": "none"}),
        ("pythia_fp32_pp1_tp2", {"gpt_j_residual": False}),
        ("sequential_residual_fp32_tp2", {"gpt_j_residual": True}),
        ("tied_norms_fp32_pp0_tp2", {"gpt_j_tied": False}),
        ("llama_fp32_tp2", {"activation": "geglu"}),
        ("llama_fp32_tp2", {"rms_norm_epsilon": 1e-3}),
    ],
)
def test_sees_a_wrong_config(name: str, change: dict[str, Any]) -> None:
    assert largest_difference(name, lambda _, config: config.update(change)) > 1e-4


@pytest.mark.parametrize(
    ("name", "order"),
    [("llama_gqa_fp32_tp2", "interleaved"), ("llama_gqa_fp32_2024_10_old_order_tp1", "grouped")],
)
def test_sees_the_wrong_gqa_order(name: str, order: str) -> None:
    assert largest_difference(name, gqa_order=order) > 1e-4


def test_sees_gate_and_up_swapped() -> None:
    def swap(ranks: list[Rank], config: dict[str, Any]) -> None:
        for rank in ranks:
            for name in [name for name in rank if name.endswith("mlp.linear1.weight")]:
                rank[name] = torch.cat(rank[name].chunk(2)[::-1])

    assert largest_difference("llama_fp32_tp2", swap) > 1e-4


def test_sees_swapped_ranks() -> None:
    assert largest_difference("pythia_fp32_pp1_tp2", lambda ranks, _: ranks.reverse()) > 1e-4


def test_epsilon_outside_the_root_is_seen() -> None:
    name = "llama_gqa_fp32_2024_10_old_order_tp1"
    assert 1e-5 < largest_difference(name, rms_eps="inside") < 1e-3


def test_norms_may_be_named_weight() -> None:
    def rename(ranks: list[Rank], config: dict[str, Any]) -> None:
        for rank in ranks:
            for name in [name for name in rank if name.endswith(".scale")]:
                rank[f"{name.removesuffix('scale')}weight"] = rank.pop(name)

    assert largest_difference("llama_fp32_tp2", rename) <= 1e-5


def test_stored_inv_freq_is_ignored() -> None:
    def spoil(ranks: list[Rank], config: dict[str, Any]) -> None:
        for name in [name for name in ranks[0] if name.endswith("inv_freq")]:
            ranks[0][name] = torch.zeros_like(ranks[0][name])

    assert largest_difference("pythia_fp32_2024_03_inv_freq", spoil) <= 1e-5


def test_softmax_in_fp32_changes_only_the_rounding() -> None:
    name = "pythia_bf16_pp1_tp2_dp2"
    settings = {"attention_softmax_in_fp32": True, "fp32_allreduce": True}
    largest = float(load(name)[3].abs().max())
    assert largest_difference(name, lambda _, config: config.update(settings)) < 0.02 * largest


def test_attention_is_lost_without_the_mlp_bias() -> None:
    """What today's GPT-NeoX does with gpt_j_residual and use_bias_in_mlp: false."""
    ranks, config, tokens, _ = load("llama_fp32_tp2")
    config["gpt_j_residual"] = True
    before = forward(ranks, config, tokens)
    for rank in ranks:
        for name in [name for name in rank if name.endswith("attention.dense.weight")]:
            rank[name] = rank[name] * 50
    assert torch.equal(before, forward(ranks, config, tokens))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"pos_emb": "alibi"}, "pos_emb"),
        ({"norm": "scalenorm"}, "norm"),
        ({"activation": "unknown"}, "activation"),
        ({"attention_config": [[["local", "global"], 1]]}, "attention_config"),
        ({"use_qk_layernorm": True}, "use_qk_layernorm"),
        ({"moe_num_experts": 4}, "moe_num_experts"),
        ({"rotary_pct": 1.5}, "rotary_pct"),
        ({"rotary_pct": 0.4}, "rotary_pct"),
        ({"num_attention_heads": 5}, "hidden_size"),
        ({"num_kv_heads": 1}, "num_kv_heads"),
    ],
)
def test_refuses_what_it_does_not_cover(change: dict[str, Any], key: str) -> None:
    ranks, config, tokens, _ = load("pythia_fp32_pp1_tp2")
    with pytest.raises(ValueError, match=f"^{key}: "):
        forward(ranks, {**config, **change}, tokens)


def test_refuses_wrong_arguments() -> None:
    ranks, config, tokens, _ = load("pythia_fp32_pp1_tp2")
    with pytest.raises(ValueError, match=r"^ranks: "):
        forward([], config, tokens)
    with pytest.raises(ValueError, match=r"^gqa_order: "):
        forward(ranks, config, tokens, gqa_order="mixed")
    with pytest.raises(ValueError, match=r"^rms_eps: "):
        forward(ranks, config, tokens, rms_eps="none")
    with pytest.raises(ValueError, match=r"^tokens: "):
        forward(ranks, config, tokens + 10_000)
    del ranks[1]["6.final_linear.weight"]
    with pytest.raises(KeyError, match=r"6\.final_linear\.weight"):
        forward(ranks, config, tokens)
