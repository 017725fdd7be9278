"""``reshard``: a run with its optimizer on other ranks, held against DeepSpeed's own files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from common import FIXTURES, assert_same, hf_tensors, same_bits
from resharding import (
    DATA,
    FP16,
    RANDOM,
    SOURCES,
    compare_states,
    compared,
    data,
    differences,
    files,
    go_on,
    logical,
    reshard,
    rewritten,
    tensor,
    without_moments,
    write,
)

from neox_bridge.api import open_checkpoint
from neox_bridge.architectures.pipeline_stages import stage_bounds
from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.context import Context
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.optimizer.global_batch import Batch, spread
from neox_bridge.optimizer.mp_rank import buffer_names
from neox_bridge.optimizer.options import Resharding
from neox_bridge.optimizer.read_files import read_optimizer
from neox_bridge.optimizer.read_stage0 import read_stage0
from neox_bridge.optimizer.reshard import plan_reshard
from neox_bridge.optimizer.states import Optimizer
from neox_bridge.planning.random_states import cuda_state, model_parallel_seed, of_rank
from neox_bridge.planning.vocabulary import Vocabulary
from neox_bridge.tensors.flat import boxes_of
from neox_bridge.tensors.pieces import OutputTensor
from neox_bridge.tensors.tensor_ref import TensorRef

TARGETS: list[dict[str, Any]] = [
    {"tp": 1, "pp": 1, "dp": 1},
    {"tp": 2, "pp": 1, "dp": 2},
    {"tp": 1, "pp": 2, "dp": 2},
    {"tp": 4, "pp": 0, "dp": 1},
]


# --- against DeepSpeed's own files ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "asked", "target"),
    [
        ("bf16_tp2", {"dp": 2}, "bf16_tp2_dp2"),
        ("bf16_tp2_dp2", {"dp": 1, "micro_batch": 4}, "bf16_tp2"),
        ("fp32", {"pp": 0, "dp": 2}, "fp32_pp0_dp2"),
        ("fp32_pp0_dp2", {"pp": 1, "dp": 1, "micro_batch": 4}, "fp32"),
        ("fp32", {}, "fp32"),
        ("fp32_dp3", {}, "fp32_dp3"),
        ("fp32_stage0", {}, "fp32_stage0"),
        ("fp16_stage0", {}, "fp16_stage0"),
        ("bf16_accumulated_dp3", {}, "bf16_accumulated_dp3"),
        ("fp32_stage0", {"zero": 1}, "fp32"),
        ("fp32_stage0", {"zero": 1, "pp": 0, "dp": 2}, "fp32_pp0_dp2"),
        ("fp32", {"zero": 0}, "fp32_stage0"),
        ("fp32_pp0_dp2", {"zero": 0, "pp": 1, "dp": 1, "micro_batch": 4}, "fp32_stage0"),
    ],
)
def test_the_files_are_deepspeeds(
    source: str, asked: dict[str, Any], target: str, tmp_path: Path
) -> None:
    """The same run, saved by DeepSpeed on the other layout: every key, shape, bit, padding."""
    reshard(DATA / source, tmp_path / "new", **asked)
    assert compared(tmp_path / "new", DATA / target, ("global_samples", *RANDOM)) == []


def test_another_number_of_stages(tmp_path: Path) -> None:
    """Keys and shapes as DeepSpeed's; values as near as two runs of GPT-NeoX are.

    The keys' biases are left out: softmax doesn't see them, so that their gradients are rounding
    noise, which Adam makes as large as any other.
    """
    reshard(DATA / "fp32", tmp_path / "two", pp=2)
    reshard(DATA / "fp32_pp2", tmp_path / "one", pp=1)
    for new, genuine in (("two", "fp32_pp2"), ("one", "fp32")):
        assert compared(tmp_path / new, DATA / genuine, RANDOM, values=False) == []
    for key, tensors in logical(DATA / "fp32_pp2").items():
        for name, want in tensors.items():
            mine = logical(tmp_path / "two")[key][name]
            if name.endswith("query_key_value.bias"):
                mine, want = (t.reshape(4, 3, -1)[:, [0, 2]] for t in (mine, want))
            assert torch.allclose(mine, want, rtol=1e-5, atol=1e-6), (key, name)


TRANSFORMER, MAMBA = "ParallelTransformerLayerPipe", "ParallelMambaResidualLayerPipe"
COUNTS = {0: 100, **dict.fromkeys(range(2, 8), 30), 9: 2, 10: 100}


@pytest.mark.parametrize(
    ("method", "layers", "stages", "block", "cuts"),
    [
        ("type:transformer|mlp", 6, 2, TRANSFORMER, [0, 5, 11]),
        ("type:transformer|mlp", 6, 4, TRANSFORMER, [0, 3, 5, 7, 11]),
        ("type:transformer|mlp", 12, 3, TRANSFORMER, [0, 6, 11, 17]),
        ("type:transformer|mlp", 24, 8, TRANSFORMER, [0, 5, 9, 12, 15, 18, 21, 24, 29]),
        ("type:transformer|mlp", 5, 3, TRANSFORMER, [0, 4, 6, 10]),
        ("type:mlp", 6, 2, MAMBA, [0, 10, 11]),
        ("uniform", 24, 4, TRANSFORMER, [0, 8, 15, 22, 29]),
        ("parameters", 6, 3, TRANSFORMER, [0, 3, 7, 11]),
    ],
)
def test_stages_are_deepspeeds(
    method: str, layers: int, stages: int, block: str, cuts: list[int]
) -> None:
    """cuts: what partition_uniform and partition_balanced of DeepSpeed 0.16.5 gave."""
    bounds = stage_bounds(method, [block] * layers, stages, COUNTS, tied=False)
    assert [part.start for part in bounds] + [bounds[-1].stop] == cuts


def test_methods_that_deepspeed_has_not() -> None:
    with pytest.raises(Refused, match="profile is unknown to DeepSpeed"):
        stage_bounds("profile", [TRANSFORMER] * 6, 2, {}, tied=False)


def test_buffers_of_a_stage() -> None:
    name = "attention.rotary_emb.inv_freq"
    metas: list[dict[str, Any]] = [
        {"buffer_names": [f"2.{name}"]},
        {"buffer_names": [f"3.{name}", f"12.{name}"]},
    ]
    assert buffer_names(metas, range(3, 13), "sequential.") == [
        f"sequential.3.{name}",
        f"sequential.12.{name}",
    ]


def test_stage_2_is_written_as_deepspeed_does(tmp_path: Path) -> None:
    """It says which parameters are frozen, none, where stage 1 says nothing."""
    reshard(DATA / "fp32_pp0_dp2", tmp_path / "two", zero=2)
    value: Any = read_torch(str(files(tmp_path / "two")["mp_rank_00_model_states.pt"]))
    assert (value["frozen_param_shapes"], value["frozen_param_fragments"]) == ({}, {})
    assert value["ds_config"]["zero_optimization"]["stage"] == 2
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    inner: Any = read_torch(str(files(tmp_path / "two")[name]))
    assert inner["optimizer_state_dict"]["zero_stage"].args == (2,)
    assert read_optimizer(open_checkpoint(str(tmp_path / "two"))).stage == 2
    reshard(tmp_path / "two", tmp_path / "one", zero=1)
    assert compared(tmp_path / "one", DATA / "fp32_pp0_dp2") == []


def test_stage_0_in_half_precision(tmp_path: Path) -> None:
    """The loss scaler as an object, as stage 1 has it; and back the same files."""
    reshard(DATA / "fp16_stage0", tmp_path / "one", zero=1, dp=1)
    scalers = []
    for root in (tmp_path / "one", FP16):
        (name,) = (name for name in files(root) if name.startswith("zero_pp_rank_0"))
        inner: Any = read_torch(str(files(root)[name]))
        scalers.append(inner["optimizer_state_dict"]["loss_scaler"])
    mine, genuine = scalers
    assert mine.factory == genuine.factory
    assert list(mine.state) == list(genuine.state)
    counted = ("cur_iter", "cur_scale")
    assert {k: v for k, v in mine.state.items() if k not in counted} == {
        k: v for k, v in genuine.state.items() if k not in counted
    }
    assert (mine.state["cur_iter"], mine.state["cur_scale"]) == (4, 256)
    reshard(tmp_path / "one", tmp_path / "zero", zero=0)
    assert compared(tmp_path / "zero", DATA / "fp16_stage0") == []
    reshard(FP16, tmp_path / "other", zero=0)
    reshard(tmp_path / "other", tmp_path / "back", zero=1)
    assert compared(tmp_path / "back", FP16) == []


def test_stage_0_of_what_has_none(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="In bfloat16, only stages 1, 2 and 3 can be converted"):
        reshard(DATA / "bf16_tp2", tmp_path / "new", zero=0)
    with pytest.raises(Refused, match="only at ZeRO stages 1 and 2"):
        reshard(DATA / "fp32_stage0", tmp_path / "new", universal=True)


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_there_and_back(source: Path, target: dict[str, Any], tmp_path: Path) -> None:
    """Every tensor of every file; random states of ranks that the way has fewer of can't be.

    The accumulation stays 1, so that no state is scaled.
    """
    checkpoint = open_checkpoint(str(source))
    optimizer, state = read_optimizer(checkpoint), checkpoint.neox
    assert state is not None
    there, back = tmp_path / "there", tmp_path / "back"
    dp = 3 if optimizer.dp == 3 and target["dp"] == 2 else target["dp"]  # as the batch allows
    reshard(source, there, **{**target, "dp": dp}, micro_batch=2 * optimizer.dp // dp)
    own = {"tp": state.tp, "pp": state.pp, "dp": optimizer.dp, "micro_batch": 2}
    reshard(there, back, **own, row_bias="split")
    ranks, stages = target["tp"] < state.tp, max(1, target["pp"]) < state.pp
    leave = RANDOM if ranks or stages else ()
    assert compared(back, source, ("make_vocab_size_divisible_by", *leave)) == []
    one, other = open_checkpoint(str(there)), read_optimizer(open_checkpoint(str(there)))
    assert compare_states((checkpoint, optimizer), (one, other)) == []


def test_biases_that_ranks_add_up(tmp_path: Path) -> None:
    """The value whole on rank 0 and -0.0 elsewhere, the moments on every rank, unchanged."""
    name = "attention.dense.bias"
    one = read_optimizer(open_checkpoint(str(DATA / "fp32"))).shards[0, (2, name)]
    reshard(DATA / "fp32", tmp_path / "two", tp=2)
    new = read_optimizer(open_checkpoint(str(tmp_path / "two")))
    for rank in (0, 1):
        mine = {key: tensor(whole) for key, whole in new.shards[rank, (2, name)].items()}
        master = tensor(one["master"])
        assert same_bits(mine["master"], master if rank == 0 else torch.full_like(master, -0.0))
        assert same_bits(mine["exp_avg"], tensor(one["exp_avg"]))
        assert same_bits(mine["exp_avg_sq"], tensor(one["exp_avg_sq"]))
    two = read_optimizer(open_checkpoint(str(DATA / "bf16_tp2"))).shards
    reshard(DATA / "bf16_tp2", tmp_path / "one", tp=1)
    back = read_optimizer(open_checkpoint(str(tmp_path / "one"))).shards[0, (2, name)]
    parts = [tensor(two[rank, (2, name)]["master"]) for rank in (0, 1)]
    assert same_bits(tensor(back["master"]), parts[0] + parts[1])
    assert same_bits(tensor(back["exp_avg"]), tensor(two[0, (2, name)]["exp_avg"]))


def test_moments_that_ranks_disagree_on_are_averaged_and_told(tmp_path: Path) -> None:
    """Also where a data-parallel boundary cuts the tensor."""
    reshard(DATA / "bf16_tp2_dp2", tmp_path / "old", dp=4)
    old = read_optimizer(open_checkpoint(str(tmp_path / "old")))
    name = "post_attention_layernorm.weight"
    whole = old.shards[1, (2, name)]["exp_avg"]
    assert len(whole.pieces) == 2
    first = whole.pieces[-1].source
    assert first is not None
    write(first, torch.ones(1).numpy().tobytes())
    a, b = (tensor(old.shards[rank, (2, name)]["exp_avg"]) for rank in (0, 1))
    assert not torch.equal(a, b)
    _, result = reshard(tmp_path / "old", tmp_path / "new", tp=1, dp=1, micro_batch=4)
    mine = read_optimizer(open_checkpoint(str(tmp_path / "new"))).shards[0, (2, name)]["exp_avg"]
    assert torch.equal(tensor(mine), ((a.double() + b.double()) / 2).float())
    assert [f.code for f in result.findings] == ["replicas-differ"]


def test_rows_of_padding_have_no_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the run's step of rows isn't a multiple of the new TP."""
    made = Vocabulary(48, 64, 32, None)
    monkeypatch.setattr("neox_bridge.optimizer.reshard_target.keep", lambda *_: made)
    plan, _ = reshard(DATA / "fp32", tmp_path / "new", tp=2)
    assert "padding-rows" in [finding.code for finding in plan.findings]
    old, new = logical(DATA / "fp32"), logical(tmp_path / "new")
    for key in ("master", "exp_avg", "exp_avg_sq"):
        for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
            assert same_bits(new[key][name][:48], old[key][name])
            assert not new[key][name][48:].any()


# --- the run goes on -----------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"dp": 2}, {"pp": 2}, {"pp": 0, "dp": 2}, {"pp": 2, "dp": 2}])
def test_adam_goes_on_as_before(asked: dict[str, Any], tmp_path: Path) -> None:
    reshard(DATA / "fp32", tmp_path / "new", **asked)
    want, mine = go_on(DATA / "fp32"), go_on(tmp_path / "new")
    assert sorted(mine) == sorted(want)
    assert [name for name in want if not same_bits(mine[name], want[name])] == []
    without_moments(tmp_path / "new")
    cold = go_on(tmp_path / "new")
    assert all(not torch.equal(cold[name], want[name]) for name in want)


# --- masters for Hugging Face --------------------------------------------------------------------


def test_masters_as_a_hugging_face_model(tmp_path: Path) -> None:
    """In fp32, and rounded they are the weights; also where a boundary cuts what ranks share."""
    reshard(DATA / "bf16_tp2_dp2", tmp_path / "old", dp=4)
    for target, more in (("hf", ["--weights", "masters"]), ("stored", [])):
        command = ["convert", str(tmp_path / "old"), str(tmp_path / target), *more]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "verified bit by bit" in done.output
    want = logical(DATA / "bf16_tp2")["master"]
    found, stored = hf_tensors(tmp_path / "hf"), hf_tensors(tmp_path / "stored")
    assert_same(found, want)
    sums = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")  # of rounded ones, or rounded sums
    for name, tensor_ in stored.items():
        if not name.endswith(sums):
            assert same_bits(found[name].bfloat16(), tensor_), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


def test_masters_without_an_optimizer(tmp_path: Path) -> None:
    source = str(FIXTURES / "pythia_fp32_pp0_tp1" / "checkpoints")
    done = CliRunner().invoke(
        app, ["convert", source, str(tmp_path / "hf"), "--weights", "masters"]
    )
    assert done.exit_code == 1
    assert "contains no optimizer states" in done.output
    assert done.output.rstrip().endswith("Leave out --weights.")


# --- the batch, the random states ----------------------------------------------------------------


def test_the_global_batch_stays() -> None:
    assert spread(Batch(1024, 4, 32), 16, None) == Batch(1024, 4, 16)
    assert spread(Batch(1024, 4, 32), 512, None) == Batch(1024, 2, 1)
    assert spread(Batch(1024, 4, 32), 16, 8) == Batch(1024, 8, 8)
    with pytest.raises(Refused, match=r"over 3 data-parallel ranks.* Valid values: 1, 2, 4, 8\."):
        spread(Batch(8, 4, 1), 3, None)
    with pytest.raises(Refused, match=r"micro-batches of 3\. Valid values: 1, 2, 4\."):
        spread(Batch(8, 4, 1), 2, 3)


def test_random_states_of_new_ranks() -> None:
    """On a GPU what that rank would have had; on a CPU another one, the same each time."""
    first = cuda_state(model_parallel_seed(1234, 0))
    drawn = first[:8] + (4096).to_bytes(8, "little")
    want = cuda_state(model_parallel_seed(1234, 3))[:8] + drawn[8:]
    assert of_rank(drawn, 3) == (want, True)
    assert of_rank(b"\xff" * 800 + drawn, 3) == (b"\xff" * 800 + want, True)
    cpu = bytes(5056)
    assert of_rank(cpu, 0) == (cpu, True)
    one, two = of_rank(cpu, 1), of_rank(cpu, 2)
    assert len(one[0]) == 5056
    assert not one[1]
    assert one == of_rank(cpu, 1)
    assert one != two
    torch.random.set_rng_state(torch.frombuffer(bytearray(one[0]), dtype=torch.uint8))


def test_new_ranks_have_generators_of_their_own(tmp_path: Path) -> None:
    plan, _ = reshard(DATA / "fp32", tmp_path / "new", tp=2)
    assert "random-states" in [finding.code for finding in plan.findings]
    values = [
        read_torch(str(files(tmp_path / "new")[f"mp_rank_0{n}_model_states.pt"])) for n in (0, 1)
    ]
    trackers = [data(v["rng_tracker_states"]["model-parallel-rng"]) for v in values]  # type: ignore[index]
    assert trackers[0] != trackers[1]
    old = read_torch(str(files(DATA / "fp32")["mp_rank_00_model_states.pt"]))
    for value in values:
        assert not list(differences(value["torch_rng_state"], old["torch_rng_state"], ""))  # type: ignore[index]


# --- flat partitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_boxes_of_a_range_are_that_range(shape: tuple[int, ...]) -> None:
    numel = int(torch.tensor(shape).prod()) if shape else 1
    places = torch.arange(numel).reshape(shape)
    for low in range(numel + 1):
        for high in range(low, numel + 1):
            found = [
                places[tuple(slice(s, s + n) for s, n in zip(start, box, strict=True))].reshape(-1)
                for start, box in boxes_of(shape, low, high)
            ]
            assert torch.cat([torch.arange(0), *found]).tolist() == list(range(low, high))


# --- what is refused -----------------------------------------------------------------------------


def damaged(root: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(DATA / "bf16_tp2_dp2", root)
    change(root / "global_step9")
    return root


def copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def test_a_file_is_missing(tmp_path: Path) -> None:
    name = "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
    root = damaged(tmp_path / "old", lambda step: (step / name).unlink())
    with pytest.raises(BridgeError, match=r"incomplete: bf16_zero_pp_rank_1_mp_rank_01.* missing"):
        read_optimizer(open_checkpoint(str(root)))


def test_a_file_of_another_model(tmp_path: Path) -> None:
    name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    other = FIXTURES / "pythia_bf16_pp1_tp2_dp2" / "checkpoints" / "global_step8" / name
    root = damaged(tmp_path / "old", lambda step: copy(other, step / name))
    with pytest.raises(BridgeError, match=r"param_slice_mappings put|has .* elements, but by the"):
        read_optimizer(open_checkpoint(str(root)))


def test_more_ranks_than_told(tmp_path: Path) -> None:
    old = "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
    new = "bf16_zero_pp_rank_2_mp_rank_01_optim_states.pt"
    root = damaged(tmp_path / "old", lambda step: copy(step / old, step / new))
    with pytest.raises(BridgeError, match=r"more ranks than the 2 .*: bf16_zero_pp_rank_2"):
        read_optimizer(open_checkpoint(str(root)))


def test_no_optimizer() -> None:
    source = FIXTURES / "pythia_fp32_pp0_tp1" / "checkpoints"
    with pytest.raises(BridgeError, match="contains no optimizer states"):
        read_optimizer(open_checkpoint(str(source)))


def elastic(value: Any) -> None:
    inner = value["optimizer_state_dict"]
    inner["base_optimizer_state"] = list(inner["base_optimizer_state"]["state"].values())


def round_robin(value: Any) -> None:
    value["ds_config"]["zero_optimization"]["round_robin_gradients"] = True


def without_shapes(value: Any) -> None:
    del value["param_shapes"]


def other_step(value: Any) -> None:
    value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = 3


def shifted(value: Any) -> None:
    address = next(iter(value["optimizer_state_dict"]["param_slice_mappings"][0].values()))
    address.state["start"] += 1


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("bf16_zero_pp_rank_1_mp_rank_00_optim", elastic, BridgeError, "from different saves"),
        ("mp_rank_01_model", round_robin, Refused, "round_robin_gradients was on"),
        ("mp_rank_00_model", without_shapes, Refused, "contain no list param_shapes"),
        ("bf16_zero_pp_rank_1_mp_rank_01_optim", other_step, BridgeError, "step differs between"),
        ("bf16_zero_pp_rank_0_mp_rank_01_optim", shifted, BridgeError, "param_slice_mappings put"),
    ],
)
def test_files_that_are_refused(
    name: str, change: Callable[[Any], None], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    root = damaged(tmp_path / "old", lambda step: rewritten(step / f"{name}_states.pt", change))
    with pytest.raises(kind, match=message):
        read_optimizer(open_checkpoint(str(root)))


def test_an_optimizer_that_is_not_flat() -> None:
    checkpoint = open_checkpoint(str(DATA / "fp16_stage0"))
    meta = dict(read_optimizer(checkpoint).metas[0])
    meta["optimizer"] = {**meta["optimizer"], "fp32_groups": []}
    del meta["optimizer"]["fp32_groups_flat"]
    with pytest.raises(Refused, match="FP16_UnfusedOptimizer"):
        read_stage0(checkpoint, "x", (meta,))


def test_what_cannot_be(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(DATA / "fp32"))
    optimizer: Optimizer = read_optimizer(checkpoint)
    for asked, message in (
        (Resharding(dp=3), "`dp=3`: the global batch of 2 sequences cannot be split evenly over 3"),
        (Resharding(zero=2), "not support ZeRO stage 2 with pipe_parallel_size 1"),
        (Resharding(pp=0, tp=2, zero=2), "exits at ZeRO stage 2 with more than one"),
        (Resharding(pp=4), "`pp=4`: the model has only 2 layers"),
    ):
        with pytest.raises(Refused, match=message):
            plan_reshard(checkpoint, optimizer, asked, str(tmp_path / "x"))


# --- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    run = CliRunner()
    new = str(tmp_path / "new")
    dry = run.invoke(app, ["reshard", str(DATA / "fp32"), new, "--tp", "2", "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["target"]["tensor_parallel"] == 2
    assert not Path(new).exists()
    done = run.invoke(app, ["reshard", str(DATA / "fp32"), new, "--tp", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verified"] is True
    yml = (Path(new) / "resume.yml").read_text()
    assert f"load: {new}\n" in yml
    assert "model_parallel_size: 2\n" in yml
    assert "finetune: false\n" in yml
    refused = run.invoke(app, ["reshard", str(DATA / "fp32"), new, "--dp", "3"])
    assert refused.exit_code == 4
    assert "Valid values: 1, 2." in refused.output


def test_what_was_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment that comes out otherwise ends the command, and the target isn't there."""
    import neox_bridge.execution.output as executor

    monkeypatch.setattr(executor, "SMALL_BYTES", -1)
    true = executor.write_tensor

    def wrong(made: OutputTensor, path: str, context: Context) -> None:
        true(made, path, context)
        if made.name.startswith("exp_avg.0") and path.endswith("optim_states.pt"):
            write(TensorRef(path, made.offset, "float32", (1,)), b"\x01\x02\x03\x04")

    monkeypatch.setattr(executor, "write_tensor", wrong)
    done = CliRunner().invoke(
        app, ["reshard", str(DATA / "fp32"), str(tmp_path / "new"), "--dp", "2"]
    )
    assert done.exit_code == 3
    assert "exp_avg: gpt_neox.embed_in.weight" in done.output
    assert not (tmp_path / "new").exists()


# --- values of other kinds than DeepSpeed writes -------------------------------------------------


def group_of_text(value: Any) -> None:
    value["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0] = "x"


def shape_of_number(value: Any) -> None:
    value["param_shapes"][0][next(iter(value["param_shapes"][0]))] = 3


def micro_batch_of_text(value: Any) -> None:
    value["ds_config"]["train_micro_batch_size_per_gpu"] = "x"


def many_ranks(value: Any) -> None:
    value["dp_world_size"] = 2**20


def state_of_integers(value: Any) -> None:
    state = value["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["exp_avg"] = replace(state["exp_avg"], dtype="int32")


def other_batch(value: Any) -> None:
    value["ds_config"]["train_batch_size"] = 7


OPTIM, META = "bf16_zero_pp_rank_1_mp_rank_00_optim", "mp_rank_00_model"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (OPTIM, group_of_text, "param_groups[0] is 'x', not a mapping of names to values"),
        (META, shape_of_number, "param_shapes: 0.word_embeddings.weight is 3, not a shape"),
        (META, micro_batch_of_text, "ds_config.train_micro_batch_size_per_gpu is 'x', not a whole"),
        (META, many_ranks, r"more missing, of 1048576 data-parallel ranks (dp_world_size of the"),
        (
            OPTIM,
            state_of_integers,
            "exp_avg beside single_partition_of_fp32_groups[0] has the dtype int32, but only "
            "floating-point optimizer states",
        ),
        (
            META,
            other_batch,
            "ds_config.train_batch_size is 7, which is not a multiple of train_micro",
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_values_of_another_kind(
    name: str, change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    """One line that names the file and the key, whichever command reads them."""
    root = damaged(tmp_path / "old", lambda step: rewritten(step / f"{name}_states.pt", change))
    commands = [["reshard", str(root), str(tmp_path / "new"), "--dp", "1"]]
    if change is not other_batch:
        commands += [
            ["export-optimizer", str(root), str(tmp_path / "new")],
            ["convert", str(root), str(tmp_path / "new"), "--weights", "masters"],
            ["inspect", str(root), "--optimizer", "--stats"],
            ["diff", str(root), str(DATA / "bf16_tp2"), "--optimizer"],
        ]
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1, (command, done.output)
        assert message in done.output
        assert str(root) in done.output
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization", float("nan")),
        ("zero_optimization", {"stage": "x"}),
        ("optimizer", {"type": ["Adam"]}),
        ("optimizer", {"type": "Adam", "params": {"eps": "x"}}),
        ("gradient_clipping", [1]),
        ("train_micro_batch_size_per_gpu", -4),
        ("checkpoint", "x"),
        ("pipe_partition_method", 3),
    ],
    ids=str,
)
def test_settings_of_another_kind(key: str, value: Any, tmp_path: Path) -> None:
    def set_key(step: Path) -> None:
        for path in (step / "configs").glob("*.yml"):
            kept = yaml.safe_load(path.read_text())
            path.write_text(json.dumps({k: v for k, v in kept.items() if k != key}))
        (step / "configs" / "zz.yml").write_text(yaml.safe_dump({key: value}))

    root = damaged(tmp_path / "old", set_key)
    done = CliRunner().invoke(app, ["reshard", str(root), str(tmp_path / "new"), "--dp", "1"])
    assert done.exit_code == 1, done.output
    assert f"{root}/global_step9/configs: {key}" in done.output
    assert "Correct it in the yml." in done.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("source", "words", "reason"),
    [
        ("bf16_tp2", ["--row-bias", "split"], "the number of tensor-parallel ranks stays 2"),
        ("bf16_tp2", ["--tp", "2", "--row-bias", "whole", "--dp", "2"], "ranks stays 2"),
        ("bf16_tp2", ["--tp", "1", "--row-bias", "split"], "that rank holds the sum"),
        ("fp32", ["--row-bias", "split"], "that rank holds the sum"),
        ("fp32", ["--tp", "2", "--row-bias", "split", "--universal"], "a universal checkpoint"),
    ],
)
def test_a_row_bias_that_would_change_nothing_is_a_usage_error(
    source: str, words: list[str], reason: str, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    done = CliRunner().invoke(app, ["reshard", str(DATA / source), str(new), *words])
    assert done.exit_code == 2, done.output
    assert "--row-bias" in done.stderr
    assert reason in " ".join(done.stderr.split())
    assert not new.exists()


def test_a_row_bias_of_a_model_without_summed_biases_is_a_usage_error(tmp_path: Path) -> None:
    root = Path(shutil.copytree(DATA / "bf16_tp2", tmp_path / "run"))
    (base,) = root.glob("global_step9/configs/base.yml")
    base.write_text(base.read_text().replace('"gpt_j_residual": true', '"gpt_j_residual": false'))
    command = ["reshard", str(root), str(tmp_path / "new"), "--tp", "4", "--row-bias", "split"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert "no biases that the ranks sum" in " ".join(done.stderr.split())


def test_a_row_bias_at_another_tp_is_written_as_asked(tmp_path: Path) -> None:
    name, module = "attention.dense.bias", "layer_02-model_{:02d}-model_states.pt"
    source = DATA / "bf16_tp2"
    parts = {}
    for form in ("whole", "split"):
        words = ["--tp", "4", "--row-bias", form]
        done = CliRunner().invoke(app, ["reshard", str(source), str(tmp_path / form), *words])
        assert done.exit_code == 0, done.output
        folder = tmp_path / form / "global_step9"
        parts[form] = [torch.load(folder / module.format(rank))[name] for rank in range(4)]
    assert not any(part.any() for part in parts["whole"][1:])
    assert all(torch.equal(part, parts["whole"][0] / 4) for part in parts["split"])
