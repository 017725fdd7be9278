"""Models without a class in transformers move between layouts of GPT-NeoX.

Expected shards are cut by helpers/neox_parts.py. tests/neox/test_neox_only_neox.py runs such models
in the real GPT-NeoX.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import resharding
import torch
import yaml
from common import convert, plan_of
from neox_mixes import MIXES
from neox_parts import HEADS, HIDDEN, POSITIONS, Part, block, cut, model, read, write
from resharding import compare_states, reshard

from neox_bridge.api import diagnose, open_checkpoint, verify
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.frameworks.eras import ERAS, era_named, span_of
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.frameworks.targets import target_named
from neox_bridge.layouts.universal_folder import MASTER
from neox_bridge.optimizer import reshard_target
from neox_bridge.optimizer.masters import with_masters
from neox_bridge.optimizer.options import Resharding
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.reshard import plan_reshard
from neox_bridge.optimizer.zero_stage import at_stage

HEAD = HIDDEN // HEADS
FFN = 72
Parts = list[Part]


def _without(parts: Parts, *names: str) -> Parts:
    return [part for part in parts if not part.name.startswith(names)]


def _with(parts: Parts, *more: Part) -> Parts:
    return [*parts, *more]


def _blocks(*more: Part, norm: str = "weight") -> list[Parts]:
    return [_with(block(0, norm=norm), *more) for _ in range(2)]


def _gated(parts: Parts, names: tuple[str, ...] = ("mlp.linear1", "mlp.linear1")) -> Parts:
    """With a gated MLP without biases, whose up and gate are one tensor or two."""
    up, gate = (Part(0, f"{name}.weight", (FFN, HIDDEN), "rows") for name in names)
    down = "mlp.linear2.weight" if names[0] == names[1] else "mlp.w2.weight"
    return _with(_without(parts, "mlp."), up, gate, Part(0, down, (HIDDEN, FFN), "columns"))


def _grouped(parts: Parts, kv_heads: int) -> Parts:
    rows = (HIDDEN, kv_heads * HEAD, kv_heads * HEAD)
    name = "attention.query_key_value"
    weights = [Part(0, f"{name}.weight", (count, HIDDEN), "rows") for count in rows]
    biases = [Part(0, f"{name}.bias", (count,), "rows") for count in rows]
    return _with(_without(parts, name), *weights, *biases)


def _moe() -> Parts:
    experts = [Part(0, f"mlp.experts.mlp.{w}", (12 * 16, HIDDEN), "rows") for w in ("w1", "w2")]
    return _with(
        _without(block(0, norm="scale"), "mlp."),
        Part(0, "mlp.router.layer.weight", (12, HIDDEN)),
        *experts,
    )


def _rwkv() -> Parts:
    shapes = {
        "ln1.weight": (HIDDEN,),
        "ln1.bias": (HIDDEN,),
        "ln2.weight": (HIDDEN,),
        "att.time_maa_x": (1, 1, HIDDEN),
        "att.time_maa_w2": (5, 32, HIDDEN),
        "att.receptance.weight": (HIDDEN, HIDDEN),
        "att.ln_x.weight": (HIDDEN,),
        "ffn.time_maa_k": (1, 1, HIDDEN),
        "ffn.key.weight": (96, HIDDEN),
    }
    return [Part(0, name, shape) for name, shape in shapes.items()]


_POSITIONS = Part(0, "position_embeddings.weight", (POSITIONS, HIDDEN))
MODELS: dict[str, tuple[Parts, dict[str, Any]]] = {
    "rmsnorm gelu": (model(_blocks(norm="scale"), norm="scale"), {"norm": "rmsnorm"}),
    "scalenorm": (model(_blocks(norm="g"), norm="g"), {"norm": "scalenorm"}),
    "layernorm swiglu": (
        model([_gated(b) for b in _blocks()]),
        {"activation": "swiglu", "intermediate_size": 3 * FFN, "use_bias_in_mlp": False},
    ),
    "learned": (
        model(_blocks(norm="scale"), norm="scale", positions=_POSITIONS),
        {"pos_emb": "learned", "norm": "rmsnorm"},
    ),
    "sinusoidal": (
        model(_blocks(), positions=Part(0, "position_embeddings.inv_freq", (HIDDEN // 2,))),
        {"pos_emb": "sinusoidal"},
    ),
    "alibi": (
        model(_blocks(Part(0, "attention.alibi_embed.slopes", (HEADS,), "rows"))),
        {"pos_emb": "alibi"},
    ),
    "qk rmsnorm": (
        model(
            _blocks(Part(0, "attention.qk_layernorm.scale", (HEADS, HEAD), "rows"), norm="scale"),
            norm="scale",
        ),
        {"norm": "rmsnorm", "use_qk_layernorm": True},
    ),
    "grouped queries": (
        model([_grouped(b, 6) for b in _blocks()]),
        {"num_kv_heads": 6, "rotary_pct": 0.5},
    ),
    "grouped queries, learned positions": (
        model([_grouped(b, 6) for b in _blocks()], positions=_POSITIONS),
        {"num_kv_heads": 6, "pos_emb": "learned"},
    ),
    "MoE": (
        model([_moe(), block(0, norm="scale")], norm="scale"),
        {"norm": "rmsnorm", "moe_num_experts": 12, "moe_expert_interval": 2},
    ),
    "RWKV": (model([_rwkv(), _rwkv()]), {"attention_config": [[["rwkv"], 2]], "pos_emb": "none"}),
    "RWKV and attention": (
        model([_rwkv(), block(0)]),
        {"attention_config": [[["rwkv", "global"], 1]], "pos_emb": "none"},
    ),
}


@pytest.mark.parametrize(
    "layout", [(2, 1), (3, 0), (1, 1)], ids=lambda layout: "TP{} PP{}".format(*layout)
)
@pytest.mark.parametrize("name", MODELS)
def test_every_rank_has_its_part(name: str, layout: tuple[int, int], tmp_path: Path) -> None:
    parts, settings = MODELS[name]
    source = write(tmp_path / "source", parts, 2, settings)
    tp, pp = layout
    convert(source, tmp_path / "target", to="neox", tp=tp, pp=pp)
    ranks = read(tmp_path / "target")
    assert len(ranks) == tp
    for rank, layers in enumerate(ranks):
        expected = cut(parts, tp, rank)
        assert {n: sorted(t) for n, t in layers.items()} == {
            n: sorted(t) for n, t in expected.items()
        }
        for number, tensors in expected.items():
            for key, tensor in tensors.items():
                rows = len(tensor) if key.startswith(("word_", "final_")) else None
                assert torch.equal(layers[number][key][:rows], tensor), (number, key)
    yml = yaml.safe_load((tmp_path / "target" / "finetune.yml").read_text())
    assert {key: yml[key] for key in settings} == settings
    assert verify(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "target"))).holds


@pytest.mark.parametrize("name", MODELS)
def test_none_of_them_goes_to_hugging_face(name: str, tmp_path: Path) -> None:
    parts, settings = MODELS[name]
    source = write(tmp_path / "source", parts, 2, settings)
    with pytest.raises(Refused, match="--to neox writes it in another layout"):
        plan_of(source, tmp_path / "target", to="hf")


FIXED: dict[str, tuple[Parts, dict[str, Any], str]] = {
    "qk layernorm": (
        model(_blocks(Part(0, "attention.qk_layernorm.weight", (HEADS // 2, HEAD), "own"))),
        {"use_qk_layernorm": True},
        "normalizes all heads of a rank together",
    ),
    "qk fused rmsnorm": (
        model(_blocks(Part(0, "attention.qk_layernorm.weight", (HEADS // 2, HEAD), "own"))),
        {"use_qk_layernorm": True, "norm": "rmsnorm", "rmsnorm_fusion": True},
        "normalizes all heads of a rank together",
    ),
    "amlp": (
        model(
            [
                block(0),
                [Part(0, "norm.weight", (HIDDEN,)), Part(0, "sgu.attn.proj_qkv.bias", (9,), "own")],
            ]
        ),
        {"attention_config": [[["global", "amlp"], 1]], "pos_emb": "none"},
        "the channels of one rank",
    ),
    "qk scalenorm": (
        model(_blocks(Part(0, "attention.qk_layernorm.g", (1,), "own"), norm="g"), norm="g"),
        {"use_qk_layernorm": True, "norm": "scalenorm"},
        "a scale of its own",
    ),
    "Mamba and attention": (
        model(
            [
                [
                    Part(0, "norm.weight", (HIDDEN,)),
                    Part(0, "mixer.D", (HIDDEN,), "own"),
                    Part(0, "mixer.x_proj.weight", (35, HIDDEN), "own"),
                ],
                block(0),
            ]
        ),
        {"attention_config": [[["mamba", "global"], 1]], "pos_emb": "none"},
        "does not sum x_proj",
    ),
    "gMLP": (
        model(
            [
                block(0),
                [Part(0, "norm.weight", (HIDDEN,)), Part(0, "sgu.proj.weight", (9, 9), "own")],
            ]
        ),
        {"attention_config": [[["global", "gmlp"], 1]], "pos_emb": "none"},
        "the channels of one rank",
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_depends_on_the_ranks_keeps_their_number(name: str, tmp_path: Path) -> None:
    parts, settings, reason = FIXED[name]
    source = write(tmp_path / "source", parts, 2, settings)
    convert(source, tmp_path / "target", to="neox", pp=0)
    for rank, layers in enumerate(read(tmp_path / "target")):
        for number, tensors in cut(parts, 2, rank).items():
            for key, tensor in tensors.items():
                assert torch.equal(layers[number][key][: len(tensor)], tensor)
    with pytest.raises(Refused, match=rf"{reason}.*`tp=2`"):
        plan_of(source, tmp_path / "other", to="neox", tp=1)


def _relative(tmp_path: Path, *, alike: bool, stages: int) -> Path:
    """Relative positions: one parameter of all blocks of a stage. alike: in all stages."""
    blocks = _blocks(Part(0, "attention.rpe.weight", (32, HEADS), "columns"))
    source = write(tmp_path / "source", model(blocks), 2, {"pos_emb": "rpe"})
    step = source / "global_step5"
    for rank in range(2 if alike else 0):
        first, second = (step / f"layer_{n:02d}-model_{rank:02d}-model_states.pt" for n in (2, 3))
        name = "attention.rpe.weight"
        tensors = torch.load(second) | {name: torch.load(first)[name]}
        torch.save(tensors, second)
    for number in range(2, 2 * stages):
        meta = torch.load(step / "mp_rank_00_model_states.pt", weights_only=False)
        torch.save(
            {**meta, "mp_world_size": 2 * stages}, step / f"mp_rank_{number:02d}_model_states.pt"
        )
    return source


def test_relative_positions_of_one_stage_are_cut_by_heads(tmp_path: Path) -> None:
    source = _relative(tmp_path, alike=True, stages=1)
    convert(source, tmp_path / "target", to="neox", tp=3, pp=0)
    whole = torch.cat([r[2]["attention.rpe.weight"] for r in read(source)], dim=1)
    for rank, layers in enumerate(read(tmp_path / "target")):
        for number in (2, 3):
            part = layers[number]["attention.rpe.weight"]
            assert torch.equal(part, whole.chunk(3, dim=1)[rank])


def test_relative_positions_that_stages_trained_apart_stay_apart(tmp_path: Path) -> None:
    source = _relative(tmp_path, alike=False, stages=2)
    convert(source, tmp_path / "same", to="neox", tp=1)
    with pytest.raises(
        Refused, match=r"attention\.rpe\.weight of its pipeline stages differ.*`pp=2`"
    ):
        plan_of(source, tmp_path / "one", to="neox", pp=1)


def test_optimizer_states_of_relative_positions_stay_in_their_stages(tmp_path: Path) -> None:
    """Each stage has states of its own."""
    source = _relative(tmp_path, alike=False, stages=2)
    convert(source, tmp_path / "run", to="neox", optimizer="fresh")
    reshard(tmp_path / "run", tmp_path / "plain", zero=0, tp=1, dp=2)
    reshard(tmp_path / "plain", tmp_path / "back", zero=1, tp=2, dp=1)
    run, back = (open_checkpoint(str(tmp_path / n)) for n in ("run", "back"))
    assert compare_states((run, read_optimizer(run)), (back, read_optimizer(back))) == []
    masters = with_masters(back).tensors
    for number in (0, 1):
        stored = torch.cat([rank[2 + number]["attention.rpe.weight"] for rank in read(source)], 1)
        written = resharding.tensor(masters[f"layers.{number}.attention.rpe.weight"])
        assert torch.equal(written, stored)
    with pytest.raises(Refused, match=r"each pipeline stage of GPT-NeoX trains one.*`pp=2`"):
        reshard(tmp_path / "plain", tmp_path / "one", pp=1)


def test_optimizer_states_of_one_stage_stay_in_one(tmp_path: Path) -> None:
    source = _relative(tmp_path, alike=True, stages=1)
    convert(source, tmp_path / "run", to="neox", optimizer="fresh")
    with pytest.raises(Refused, match=r"each pipeline stage of GPT-NeoX trains one.*`pp=1`"):
        reshard(tmp_path / "run", tmp_path / "two", pp=2)
    # a new optimizer has states for each stage
    convert(source, tmp_path / "stages", to="neox", pp=2, optimizer="fresh")
    stages = open_checkpoint(str(tmp_path / "stages"))
    owners = [p for p in read_optimizer(stages).members if p[1] == "attention.rpe.weight"]
    assert owners == [(2, "attention.rpe.weight"), (3, "attention.rpe.weight")]


def test_stage_3_contains_a_shared_parameter_once(tmp_path: Path) -> None:
    source = _relative(tmp_path, alike=True, stages=1)
    convert(source, tmp_path / "run", to="neox", tp=1, optimizer="fresh")
    reshard(tmp_path / "run", tmp_path / "third", zero=3, pp=0, dp=2)
    third = open_checkpoint(str(tmp_path / "third"))
    assert verify(open_checkpoint(str(source)), third).holds
    meta = torch.load(
        tmp_path / "third/global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt",
        weights_only=False,
    )
    first, second = (f"sequential.{n}.attention.rpe.weight" for n in (2, 3))
    assert meta["shared_params"] == {second: first}
    assert meta["module"][second].numel() == 0
    assert [name for group in meta["param_shapes"] for name in group if "rpe" in name] == [first]
    reshard(tmp_path / "third", tmp_path / "back", zero=1, pp=1, dp=1)
    run, back = (open_checkpoint(str(tmp_path / n)) for n in ("run", "back"))
    assert compare_states((run, read_optimizer(run)), (back, read_optimizer(back))) == []


def test_universal_checkpoints_contain_a_shared_parameter_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _relative(tmp_path, alike=True, stages=1)
    convert(source, tmp_path / "run", to="neox", optimizer="fresh")
    with pytest.raises(Refused, match=r"trains one attention\.rpe\.weight.*contain it once"):
        reshard(tmp_path / "run", tmp_path / "target", universal=True)
    monkeypatch.setattr(reshard_target, "_check_names", lambda *_args, **_options: None)
    reshard(tmp_path / "run", tmp_path / "target", universal=True)
    with pytest.raises(Refused, match=r"a universal checkpoint contains it once"):
        open_checkpoint(str(tmp_path / "target" / "global_step5_universal"))


@pytest.mark.parametrize("name", ["alibi", "sinusoidal"])
def test_stage_3_stores_buffers_and_universal_checkpoints_cannot(name: str, tmp_path: Path) -> None:
    parts, settings = MODELS[name]
    source = write(tmp_path / "source", parts, 2, settings)
    convert(source, tmp_path / "run", to="neox", pp=0, tp=1, optimizer="fresh")
    reshard(tmp_path / "run", tmp_path / "third", zero=3, dp=2)
    third = open_checkpoint(str(tmp_path / "third"))
    assert verify(open_checkpoint(str(source)), third).holds
    run = open_checkpoint(str(tmp_path / "run"))
    with pytest.raises(Refused, match="a universal checkpoint has no buffers"):
        plan_reshard(run, read_optimizer(run), Resharding(universal=True), str(tmp_path / "u"))


@pytest.mark.parametrize("name", ["alibi", "sinusoidal"])
def test_buffers_get_no_masters_of_a_run_without_zero(name: str, tmp_path: Path) -> None:
    parts, settings = MODELS[name]
    source = write(tmp_path / "source", parts, 2, settings)
    convert(source, tmp_path / "run", to="neox", optimizer="fresh")
    reshard(tmp_path / "run", tmp_path / "plain", zero=0, tp=1)
    checkpoint = open_checkpoint(str(tmp_path / "plain"))
    _, given = at_stage(checkpoint, read_optimizer(checkpoint), 1)
    assert given is not None
    assert list(given) == [MASTER, "exp_avg", "exp_avg_sq"]
    assert {key for key, named in given.items() if set(named) != set(checkpoint.trained)} == set()


@pytest.mark.parametrize("name", ["learned", "sinusoidal", "alibi"])
def test_positions_without_their_tensor_are_refused(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", model(_blocks()), 2, {"pos_emb": name})
    with pytest.raises(Refused, match=f"pos_emb: {name}, but the checkpoint has no"):
        open_checkpoint(str(source))


def test_shared_layers_are_ignored_as_gpt_neox_ignores_them(tmp_path: Path) -> None:
    """No tree shares layers, whatever num_unique_layers says."""
    source = write(tmp_path / "source", model(_blocks()), 2, {"num_unique_layers": 1})
    assert open_checkpoint(str(source)).refusals == ()


def test_key_value_heads_that_the_tensors_do_not_have_are_refused(tmp_path: Path) -> None:
    settings = {"num_kv_heads": 6, "rotary_pct": 0.5}
    source = write(tmp_path / "source", model(_blocks()), 2, settings)
    with pytest.raises(BridgeError, match=r"heads of query_key_value are 6 wide.*another model"):
        open_checkpoint(str(source))


def test_a_tensor_without_a_rule_is_refused_by_name(tmp_path: Path) -> None:
    blocks = _blocks(Part(0, "attention.sinks", (HEADS,), "rows"), norm="scale")
    source = write(tmp_path / "source", model(blocks, norm="scale"), 2, {"norm": "rmsnorm"})
    with pytest.raises(BridgeError, match=r"layer 2: attention\.sinks"):
        plan_of(source, tmp_path / "target", to="neox", tp=1)


def test_blocks_of_another_kind_than_the_yml_says_are_refused(tmp_path: Path) -> None:
    settings = {"norm": "rmsnorm", "attention_config": [[["rwkv"], 2]]}
    source = write(tmp_path / "source", model(_blocks(norm="scale"), norm="scale"), 2, settings)
    with pytest.raises(Refused, match="attention_config: rwkv: the tensors belong to blocks of"):
        plan_of(source, tmp_path / "target", to="neox", tp=1)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("rmsnorm gelu", {"norm": "scalenorm"}, "norm: scalenorm, but the checkpoint has norm.sc"),
        ("alibi", {"pos_emb": "rotary", "rotary_pct": 1}, "pos_emb: rotary, but .* has attention"),
        ("qk rmsnorm", {"use_qk_layernorm": False}, "use_qk_layernorm: False, but .* has attent"),
        ("rmsnorm gelu", {"use_qk_layernorm": True}, "use_qk_layernorm: True, but .* has no att"),
        ("scalenorm", {"use_bias_in_attn_linear": False}, "False, but .* has attention.dense.bias"),
        ("MoE", {"moe_num_experts": 1}, "moe_num_experts: 1, but the checkpoint has mlp.router"),
        ("rmsnorm gelu", {"moe_num_experts": 12}, "but the checkpoint has no mlp.router.layer"),
    ],
)
def test_a_yml_by_which_gpt_neox_builds_other_tensors_is_refused(
    name: str, wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    parts, settings = MODELS[name]
    source = write(tmp_path / "source", parts, 2, {**settings, **wrong})
    with pytest.raises(Refused, match=message):
        open_checkpoint(str(source))


def test_heads_that_the_source_cannot_have_divided_are_refused(tmp_path: Path) -> None:
    blocks = [_grouped(b, 1) for b in _blocks(norm="scale")]
    settings = {"norm": "rmsnorm", "num_kv_heads": 1}
    source = write(tmp_path / "source", model(blocks, norm="scale"), 2, settings)
    with pytest.raises(BridgeError, match=r"num_kv_heads: GPT-NeoX cannot spread 1 head over"):
        open_checkpoint(str(source))


def test_experts_stay_whole(tmp_path: Path) -> None:
    parts, settings = MODELS["MoE"]
    source = write(tmp_path / "source", parts, 2, {**settings, "moe_num_experts": 6})
    with pytest.raises(Refused, match="moe_num_experts: 6 experts"):
        plan_of(source, tmp_path / "target", to="neox", tp=4)


def test_rows_that_ranks_cannot_share_are_refused(tmp_path: Path) -> None:
    """As many rows of experts as no MoE has."""
    parts, settings = MODELS["MoE"]
    odd = [replace(p, shape=(194, HIDDEN)) if p.name.endswith(".w2") else p for p in parts]
    source = write(tmp_path / "source", odd, 2, settings)
    with pytest.raises(Refused, match=r"mlp\.experts\.mlp\.w2 has the shape \[194, 48\]"):
        plan_of(source, tmp_path / "target", to="neox", tp=4)


# what trees before 2024-09 call an MLP that the yml of today calls so
def test_a_gated_mlp_gets_the_names_of_another_era(tmp_path: Path) -> None:
    parts, settings = MODELS["layernorm swiglu"]
    source = write(tmp_path / "source", parts, 2, settings)
    convert(source, tmp_path / "old", to="neox", tp=3, era=era_named("2024-03"))
    old = model([_gated(b, ("mlp.w3", "mlp.w1")) for b in _blocks()])
    for rank, layers in enumerate(read(tmp_path / "old")):
        named = {part.name for part in old if part.layer == 2}
        assert set(layers[2]) - {"attention.rotary_emb.inv_freq"} == named
        for name, index in (("mlp.w3.weight", "0"), ("mlp.w1.weight", "1")):
            part = Part(2, "mlp.linear1.weight", (FFN, HIDDEN), "rows")
            assert torch.equal(layers[2][name], part.of_rank(3, rank, index))
    yml = yaml.safe_load((tmp_path / "old" / "finetune.yml").read_text())
    assert (yml["mlp_type"], yml["activation"], yml["intermediate_size"]) == ("llama", "silu", FFN)
    convert(tmp_path / "old", tmp_path / "back", to="neox", tp=2, era=era_named("today"))
    for mine, theirs in zip(read(source), read(tmp_path / "back"), strict=True):
        assert torch.equal(mine[3]["mlp.linear1.weight"], theirs[3]["mlp.linear1.weight"])


@pytest.mark.parametrize(
    ("name", "era", "key"),
    [
        ("RWKV", "2024-03", "attention_config: rwkv"),
        ("qk rmsnorm", "v1.0", "use_qk_layernorm"),
        ("grouped queries", "v1.0", "num_kv_heads"),
        ("qk rmsnorm", "2024-10", "RMSNorm of GPT-NeoX .* fails with it"),
        ("MoE", "2024-10", "of GPT-NeoX of 2024-10 has other weights"),
    ],
)
def test_an_era_without_it_is_refused(name: str, era: str, key: str, tmp_path: Path) -> None:
    parts, settings = MODELS[name]
    source = write(tmp_path / "source", parts, 2, settings)
    with pytest.raises(Refused, match=key):
        plan_of(source, tmp_path / "target", to="neox", era=era_named(era))


@pytest.mark.parametrize(
    ("name", "tree", "key"),
    [
        ("RWKV", "neox@2023-12-01", "attention_config: rwkv"),
        ("MoE", "neox@2024-10", "moe_num_experts"),
        ("qk rmsnorm", "neox@2024-10", "use_qk_layernorm"),
        ("qk rmsnorm", "neox@2025-01-01", "use_qk_layernorm"),
    ],
)
def test_a_tree_that_cannot_run_it_is_named(name: str, tree: str, key: str, tmp_path: Path) -> None:
    parts, settings = MODELS[name]
    source = write(tmp_path / "source", parts, 2, settings)
    cases = diagnose(str(source), tree).findings
    assert [c.severity for c in cases if c.code == "model-unsupported" and key in c.message]
    facts = target_named(tree)
    assert isinstance(facts, TreeFacts)
    with pytest.raises(Refused, match=key):
        plan_of(source, tmp_path / "target", to="neox", era=facts)


def test_trees_of_each_date_belong_to_an_era() -> None:
    for era in ERAS:
        assert span_of(era) == era.name
    for day, name in (("2022-01-01", "v1.0"), ("2024-05-01", "2024-09"), ("2025-12-01", "today")):
        facts = target_named(f"neox@{day}")
        assert isinstance(facts, TreeFacts)
        assert span_of(facts) == name


@pytest.mark.parametrize(
    ("module", "key"),
    [("attention", "use_bias_in_attn_linear"), ("mlp", "use_bias_in_mlp")],
)
def test_parallel_blocks_need_biases_before_2024_10(module: str, key: str, tmp_path: Path) -> None:
    """bias.expand_as of None fails there; later trees ask for a bias first."""
    blocks = _blocks() if module == "attention" else [_gated(b) for b in _blocks()]
    parts = [p for p in model(blocks) if not (p.name.startswith(module) and "bias" in p.name)]
    gated = {"activation": "swiglu", "intermediate_size": 3 * FFN} if module == "mlp" else {}
    settings = {"pos_emb": "none", **gated, key: False, "gpt_j_residual": True}
    source = write(tmp_path / "source", parts, 2, settings)
    with pytest.raises(Refused, match=rf"{key}: .*parallel blocks.*require biases"):
        plan_of(source, tmp_path / "target", to="neox", era=era_named("2024-09"))
    plan_of(source, tmp_path / "target", to="neox", era=era_named("2024-10"))


def test_a_key_whose_false_changes_the_model_is_not_left_out(tmp_path: Path) -> None:
    names = ("attention.query_key_value.bias", "attention.dense.bias")
    parts = [p for p in model(_blocks(norm="scale"), norm="scale") if p.name not in names]
    settings = {"norm": "rmsnorm", "use_bias_in_attn_linear": False}
    source = write(tmp_path / "source", parts, 2, settings)
    with pytest.raises(Refused, match="use_bias_in_attn_linear: False"):
        plan_of(source, tmp_path / "target", to="neox", era=era_named("v1.0"))


def test_as_many_key_value_heads_as_heads_need_no_key(tmp_path: Path) -> None:
    settings = {"norm": "rmsnorm", "num_kv_heads": HEADS}
    source = write(tmp_path / "source", model(_blocks(norm="scale"), norm="scale"), 2, settings)
    convert(source, tmp_path / "target", to="neox", era=era_named("v1.0"))
    yml = yaml.safe_load((tmp_path / "target" / "finetune.yml").read_text())
    assert "num_kv_heads" not in yml


def test_a_gated_activation_without_an_old_word_is_refused(tmp_path: Path) -> None:
    parts, settings = MODELS["layernorm swiglu"]
    source = write(tmp_path / "source", parts, 2, {**settings, "activation": "glu"})
    with pytest.raises(Refused, match="no gated MLP with glu"):
        plan_of(source, tmp_path / "target", to="neox", era=era_named("2024-03"))


def test_a_summed_bias_is_whole_on_one_rank(tmp_path: Path) -> None:
    """With gpt_j_residual the ranks' biases are summed."""
    biases = ("attention.dense.bias", "mlp.linear2.bias")
    blocks = [
        [replace(p, how="own") if p.name in biases else p for p in parts]
        for parts in _blocks(norm="scale")
    ]
    settings = {"norm": "rmsnorm", "gpt_j_residual": True}
    source = write(tmp_path / "source", model(blocks, norm="scale"), 2, settings)
    convert(source, tmp_path / "target", to="neox", tp=1)
    first, second = read(source)
    (one,) = read(tmp_path / "target")
    for name in biases:
        assert torch.equal(one[2][name], first[2][name] + second[2][name])


def test_the_page_counts_the_mixes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "families.md").read_text()
    assert f"({len(MIXES)} mixes in trees of {len({mix.tree for mix in MIXES})}" in page.replace(
        "four", "4"
    )
