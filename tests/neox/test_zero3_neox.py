"""ZeRO stage 3 in the real GPT-NeoX: what it saves, what DeepSpeed gathers, and how runs go on."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_neox
import torch
import zero3_writer
from click.testing import CliRunner
from common import hf_tensors
from real_training import BATCH, PRECISION, TOLERANCE, Layout, apart, losses, resuming, start
from resharding import reshard, without_moments
from zero_writer import made_up

from neox_bridge.cli.app import app
from neox_bridge.formats.pickles import Record
from neox_bridge.formats.torch_file import read_torch
from neox_bridge.tensors.tensor_ref import TensorRef

pytestmark = pytest.mark.neox

STEPS = 9
ADAM = ("lr", "betas", "eps", "weight_decay", "name", "params")  # more depend on torch's version
GATHER = """\
import sys, torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
torch.save(get_fp32_state_dict_from_zero_checkpoint(sys.argv[1]), sys.argv[2])
"""


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def saved(
    python: str, home: Path, layout: Layout, settings: dict[str, Any], freeze: str = ""
) -> tuple[Path, list[float]]:
    """A run of nine steps, and the losses of the next three, unbroken and after loading it."""
    yml, run = str(start(home, layout, settings)), home / "run"
    jobs = [
        {"yml": yml, "losses": STEPS, "alike": True, "save": str(run)},
        {"yml": yml, "losses": 3, "alike": True, "set": {"load": str(run)}},
        {"yml": yml, "losses": STEPS + 3, "alike": True},
    ]
    jobs = [{**job, "freeze": freeze} for job in jobs]
    _, resumed, unbroken = losses(python, layout, jobs, home)
    assert resumed == unbroken[STEPS:]
    return run, resumed


@pytest.mark.parametrize("precision", PRECISION)
def test_runs_go_on_at_another_stage(precision: str, neox_python: str, tmp_path: Path) -> None:
    """From stage 3 to every stage and back, on another number of ranks too."""
    two, one = Layout(1, 0, 2), Layout(1, 0, 1)
    allowed, settings = TOLERANCE[precision], PRECISION[precision]
    # without pipeline stages, GPT-NeoX trains at stage 0 in fp32 only
    others = [0, 1] if precision == "fp32" else [1]
    sources = {
        stage: saved(neox_python, tmp_path / f"stage {stage}", two, {**settings, **zero(stage)})
        for stage in (3, *others)
    }
    sources[4] = saved(  # in sub-groups
        neox_python, tmp_path / "sub-groups", two, {**settings, **zero(3, sub_group_size=3000)}
    )
    targets = [(3, 3), (4, 3), *((3, stage) for stage in (*others, 2))]
    targets += [(stage, 3) for stage in others]
    wrong = []
    for layout in (two, one):
        jobs, wanted = [], []
        for source, stage in targets:
            run, want = sources[source]
            new = tmp_path / f"{source} to {stage} on {layout}"
            micro = BATCH["train_micro_batch_size_per_gpu"] * two.dp // layout.dp
            reshard(run, new, zero=stage, dp=layout.dp, micro_batch=micro)
            jobs.append(resuming(new))
            wanted.append(want)
        cold = tmp_path / f"cold {layout}"
        reshard(sources[3][0], cold, dp=layout.dp, micro_batch=micro)
        without_moments(cold)
        lost = {**jobs[0], "yml": str(cold / "resume.yml")}
        *resumed, forgetful = losses(neox_python, layout, [*jobs, lost], tmp_path / str(layout))
        for target, want, have in zip(targets, wanted, resumed, strict=True):
            if any(apart(a, b) > allowed for a, b in zip(want, have, strict=True)):
                wrong.append((target, layout, want, have))
        assert max(map(apart, sources[3][1], forgetful)) > allowed  # a run without its moments
    assert wrong == []


@pytest.mark.parametrize(
    ("precision", "freeze"), [*((p, "") for p in PRECISION), ("bf16", "attention.dense")]
)
def test_weights_are_those_that_deepspeed_gathers(
    precision: str, freeze: str, neox_python: str, tmp_path: Path
) -> None:
    settings = {**PRECISION[precision], **zero(3, sub_group_size=3000)}
    run, _ = saved(neox_python, tmp_path / "run", Layout(1, 0, 3), settings, freeze)
    gathered = tmp_path / "gathered.pt"
    subprocess.run([neox_python, "-c", GATHER, str(run), str(gathered)], check=True)
    want = torch.load(gathered, weights_only=False)
    names = {
        "gpt_neox.embed_in.weight": "sequential.0.word_embeddings.weight",
        "embed_out.weight": "sequential.6.final_linear.weight",
        "gpt_neox.final_layer_norm.bias": "sequential.5.norm.bias",
    }
    for hf, neox in {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "attention.query_key_value": "attention.query_key_value",
        "attention.dense": "attention.dense",
        "mlp.dense_h_to_4h": "mlp.linear1",
        "mlp.dense_4h_to_h": "mlp.linear2",
    }.items():
        for block in range(2):
            for leaf in ("weight", "bias"):
                names[f"gpt_neox.layers.{block}.{hf}.{leaf}"] = (
                    f"sequential.{block + 2}.{neox}.{leaf}"
                )
    # frozen parameters have no masters
    for weights in ((),) if freeze else ((), ("--weights", "masters")):
        new = tmp_path / f"hf {len(weights)}"
        done = CliRunner().invoke(app, ["convert", str(run), str(new), *weights])
        assert done.exit_code == 0, done.output
        tensors = hf_tensors(new)
        for hf, neox in names.items():
            assert torch.equal(tensors[hf], want[neox].to(tensors[hf].dtype)), hf


def test_tensor_parallel_ranks_of_2024_03(neox_python: str, tmp_path: Path) -> None:
    """Later trees end without a word where stage 3 meets several tensor-parallel ranks."""
    home, tree = tmp_path / "home", real_neox.TREES["2024-03"]
    four, two = Layout(2, 0, 2), Layout(2, 0, 1)
    settings = {**PRECISION["fp32"], **zero(3), "gpt_j_residual": False}
    yml, run = str(start(home, four, settings)), home / "run"
    jobs = [
        {"yml": yml, "losses": STEPS, "alike": True, "save": str(run)},
        {"yml": yml, "losses": 3, "alike": True, "set": {"load": str(run)}},
    ]
    first, want = real_neox.results(neox_python, tree, four.processes, jobs, home)
    assert (first["error"], want["error"]) == (None, None)
    targets = {"three": {}, "one": {"zero": 1}}
    jobs = []
    for name, options in targets.items():
        reshard(run, tmp_path / name, dp=1, micro_batch=4, **options)
        resume = str(tmp_path / name / "resume.yml")
        jobs.append({"yml": resume, "losses": 3, "alike": True, "set": BATCH})
    for result in real_neox.results(neox_python, tree, two.processes, jobs, tmp_path):
        assert result["error"] is None
        pairs = zip(want["losses"], result["losses"], strict=True)
        assert all(apart(a, b) <= TOLERANCE["fp32"] for a, b in pairs)


def described(value: Any) -> Any:
    """The kinds of a value and of what it contains, without numbers and shapes."""
    if isinstance(value, TensorRef):
        return value.dtype, len(value.shape), 0 in value.shape
    if isinstance(value, Record):
        return str(value.factory), described(value.args), described(value.state)
    if isinstance(value, dict):
        return {key: described(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [described(entry) for entry in value]
    return type(value).__name__


def test_the_stand_in_is_like_the_real_one(neox_python: str, tmp_path: Path) -> None:
    """tests/helpers/zero3_writer writes what GPT-NeoX does of a model with the same tensors."""
    settings = {
        **PRECISION["fp16"],
        **zero(3, sub_group_size=3000),
        "rotary_save_freqs_buffer": True,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8}},
    }
    real, _ = saved(neox_python, tmp_path / "real", Layout(1, 0, 2), settings)
    model = made_up(hidden=32, layers=2)
    today = {"dense_h_to_4h": "linear1", "dense_4h_to_h": "linear2"}
    (rank,) = model.ranks
    for layer, name in list(rank):
        states = rank.pop((layer, name))
        for old, new in today.items():
            name = name.replace(old, new)
        if "embed" in name or "final" in name:  # the rows of the tokenizer of the real run
            states = {key: np.resize(values, (320, 32)) for key, values in states.items()}
        rank[layer, name] = states
    save = zero3_writer.Zero3(dp=2, sub_group=3000, iteration=STEPS)
    ours = zero3_writer.write(model, save, tmp_path / "ours")
    checked = 0
    for path in sorted((ours / f"global_step{STEPS}").glob("*.pt")):
        want = described(read_torch(str(real / path.parent.name / path.name)))
        have = described(read_torch(str(path)))
        if "optim" in path.name:
            for value in (want, have):
                states = value["optimizer_state_dict"]["optimizer_state_dict"]
                states["param_groups"] = [
                    {key: group[key] for key in ADAM} for group in states["param_groups"]
                ]
        for key in have:
            if key in ("ds_config", "args", "lr_scheduler"):  # settings, of any kind
                continue
            assert have[key] == want[key], (path.name, key)
            checked += 1
        assert set(have) <= set(want)
    assert checked == 40
