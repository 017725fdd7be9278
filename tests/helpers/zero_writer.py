"""Writes checkpoints with ZeRO states as DeepSpeed of 2021 and 2022 does, by rules written anew.

Nothing here is shared with the package: these are DeepSpeed's rules once more, on whole tensors.
Sources: DeepSpeed 0.3.16 runtime/zero/stage1.py, 0.4.5 and 0.5.8 runtime/zero/stage2.py, 0.5.10
runtime/zero/stage_1_and_2.py, and runtime/engine.py of these; GPT-NeoX v1.0
megatron/model/utils.py.
"""

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch

Parameter = tuple[int, str]
States = dict[str, Any]  # fp32, exp_avg, exp_avg_sq: arrays
Form = Literal["v1", "v1 rigid", "lean", "rigid"]
SCALERS = "deepspeed.runtime.fp16.loss_scaler"
SCALER = {
    "cur_scale": 4096,
    "cur_iter": 8,
    "last_overflow_iter": -1,
    "scale_factor": 2.0,
    "scale_window": 1000,
    "min_scale": 1,
    "delayed_shift": 2,
    "cur_hysteresis": 2,
    "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
}
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
LR_SCHEDULER = {
    "start_lr": 0.01,
    "warmup_iter": 1.0,
    "num_iters": 8,
    "decay_style": "cosine",
    "end_iter": 100,
    "min_lr": 0.001,
}


@dataclass(frozen=True)
class Model:
    """A model's sizes, and its optimizer's states by tensor-parallel rank."""

    hidden: int
    heads: int
    layers: int
    rows: int
    ranks: list[dict[Parameter, States]]
    tied: bool = False


@dataclass(frozen=True)
class Save:
    """How a checkpoint is saved.

    stages: the layers of each pipeline stage; empty for pipe_parallel_size 0. bucket:
    reduce_bucket_size. shapes: what the files record of the parameters. align: elements, times the
    ranks, to which newer forms pad. version: ds_version, "" for none. change: of the settings.
    """

    dp: int = 2
    form: Form = "v1"
    bucket: int = 500_000_000
    stages: list[range] = field(default_factory=lambda: [range(100)])
    weight_decay: float = 0.1
    shapes: Literal["one", "groups", "none"] = "one"
    underscore: bool = True
    zipped: bool = False
    iteration: int = 8
    skipped: int = 0
    stage: int = 1
    align: int = 1
    version: str = ""
    schedule: dict[str, Any] = field(default_factory=lambda: dict(LR_SCHEDULER))


def made_up(
    tp: int = 1, hidden: int = 16, heads: int = 4, layers: int = 4, *, tied: bool = False
) -> Model:
    """A model of random states, with the shapes of each tensor-parallel rank."""
    random = np.random.default_rng(hidden + tp)
    rows = 32
    shapes: dict[Parameter, tuple[int, ...]] = {(0, "word_embeddings.weight"): (rows // tp, hidden)}
    for layer in range(2, layers + 2):
        for name, out, into, split in (
            ("input_layernorm", hidden, 0, "norm"),
            ("attention.query_key_value", 3 * hidden, hidden, "rows"),
            ("attention.dense", hidden, hidden, "columns"),
            ("post_attention_layernorm", hidden, 0, "norm"),
            ("mlp.dense_h_to_4h", 4 * hidden, hidden, "rows"),
            ("mlp.dense_4h_to_h", hidden, 4 * hidden, "columns"),
        ):
            if split == "norm":
                shapes |= {(layer, f"{name}.{leaf}"): (hidden,) for leaf in ("weight", "bias")}
                continue
            out_here, in_here = (out // tp, into) if split == "rows" else (out, into // tp)
            shapes[layer, f"{name}.weight"] = (out_here, in_here)
            shapes[layer, f"{name}.bias"] = (out_here,)
    shapes |= {(layers + 3, f"norm.{leaf}"): (hidden,) for leaf in ("weight", "bias")}
    if not tied:
        shapes[layers + 4, "final_linear.weight"] = (rows // tp, hidden)
    ranks: list[dict[Parameter, States]] = [
        {
            place: {kind: random.normal(size=shape).astype("f4") * 0.1 for kind in KINDS}
            for place, shape in shapes.items()
        }
        for _ in range(tp)
    ]
    for rank in ranks[1:]:  # what every rank holds alike
        for place in rank:
            if "norm" in place[1]:
                rank[place] = ranks[0][place]
    return Model(hidden, heads, layers, rows, ranks, tied)


def write(model: Model, save: Save, folder: Path) -> Path:
    """All files of one step, flat in a folder, with the yml beside them."""
    folder.mkdir(parents=True)
    (folder / "run.yml").write_text(_yml(model, save))
    stages = save.stages or [range(100)]
    for rank, states in enumerate(model.ranks):
        for stage, layers in enumerate(stages):
            number = stage * len(model.ranks) + rank
            named = _named(model, save, states, layers, last=stage == len(stages) - 1)
            groups = _groups(named, save.weight_decay)
            _save(folder / f"mp_rank_{number:02d}_model_states.pt", save, _meta(model, save, rank))
            underscore = "_" if save.underscore else ""
            for dp_rank, value in enumerate(_zero_files(groups, named, save)):
                name = f"zero_pp_rank_{dp_rank}_mp_rank_{number:02d}{underscore}optim_states.pt"
                _save(folder / name, save, value)
        if save.stages:
            _layer_files(model, save, rank, folder)
    return folder


def bucket_rule(count: int, dp: int, bucket: int) -> tuple[int, int]:
    """(intervals, elements of a part) of a group of ``count`` elements in DeepSpeed 0.3.16."""
    fewer = count // bucket
    if fewer:
        extra = math.ceil(count / (dp * fewer))
        if bucket * math.ceil(count / bucket) - count > extra:
            bucket += extra
    of_group, of_bucket = math.ceil(count / dp), bucket // dp
    if of_group <= of_bucket:
        return 1, of_group
    return math.ceil(of_group / of_bucket), of_bucket


def _yml(model: Model, save: Save) -> str:
    settings = {
        "pipe-parallel-size": len(save.stages),
        "model-parallel-size": len(model.ranks),
        "num-layers": model.layers,
        "hidden-size": model.hidden,
        "num-attention-heads": model.heads,
        "seq-length": 64,
        "max-position-embeddings": 64,
        "pos-emb": "rotary",
        "rotary-pct": 0.25,
        "no-weight-tying": "false" if model.tied else "true",
        "gpt-j-residual": "false",
        "optimizer": '{"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8}}',
        "zero_optimization": f'{{"stage": {save.stage}, "reduce_bucket_size": {save.bucket}}}',
        "weight-decay": save.weight_decay,
        "train_micro_batch_size_per_gpu": 2,
        "fp16": '{"enabled": true}',
        "train-iters": 100,
        "make-vocab-size-divisible-by": model.rows // len(model.ranks),
    }
    return "".join(f"{key}: {value}\n" for key, value in settings.items())


def args_of(model: Model) -> dict[str, Any]:
    """What GPT-NeoX compares at load, in an mp_rank file."""
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "max_position_embeddings": 64,
        "make_vocab_size_divisible_by": model.rows // len(model.ranks),
        "padded_vocab_size": model.rows,
        "tokenizer_type": "HFTokenizer",
        "model_parallel_size": len(model.ranks),
    }


def _meta(model: Model, save: Save, rank: int) -> dict[str, Any]:
    module = None
    if not save.stages:
        module = OrderedDict(
            (f"sequential.{layer}.{name}", torch.from_numpy(states["fp32"]).half())
            for (layer, name), states in model.ranks[rank].items()
        )
        module |= {
            f"sequential.{layer}.attention.rotary_emb.inv_freq": _inv_freq(model)
            for layer in range(2, model.layers + 2)
        }
    config = {"zero_optimization": {"stage": save.stage}}
    return {
        "module": module,
        "optimizer": None,
        "lr_scheduler": save.schedule,
        "csr_tensor_module_names": set(),
        "skipped_steps": save.skipped,
        "global_steps": save.iteration,
        "global_samples": 8 * save.iteration,
        "dp_world_size": save.dp,
        "mp_world_size": len(model.ranks) * max(1, len(save.stages)),
        "iteration": save.iteration,
        "args": args_of(model),
        **({"ds_config": config, "ds_version": save.version} if save.version else {}),
    }


def _inv_freq(model: Model) -> torch.Tensor:
    dim = model.hidden // model.heads // 4
    return (1 / 10000 ** (torch.arange(0, dim, 2).float() / dim)).half()


def _layer_files(model: Model, save: Save, rank: int, folder: Path) -> None:
    files: dict[int, dict[str, torch.Tensor]] = {}
    for (layer, name), states in model.ranks[rank].items():
        files.setdefault(layer, {})[name] = torch.from_numpy(states["fp32"]).half()
    for layer, tensors in files.items():
        if 2 <= layer < model.layers + 2:
            tensors["attention.rotary_emb.inv_freq"] = _inv_freq(model)
        _save(folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt", save, tensors)


def _named(
    model: Model, save: Save, states: dict[Parameter, States], layers: range, *, last: bool
) -> dict[str, States]:
    """A stage's parameters by the names and in the order of ``named_parameters``."""
    named = {}
    for (layer, name), held in states.items():
        if model.tied and layer == 0 and save.stages:
            if 0 in layers or last:
                named[f"tied_modules.embed.{name}"] = held
        elif layer in layers:
            named[f"{layer}.{name}" if save.stages else f"sequential.{layer}.{name}"] = held
    return named


def _groups(named: dict[str, States], weight_decay: float) -> list[dict[str, States]]:
    if weight_decay == 0:
        return [named]
    still = {n: s for n, s in named.items() if n.endswith(".bias") or "norm" in n.split(".")[-2]}
    return [{n: s for n, s in named.items() if n not in still}, still]


def _param_groups(save: Save, numbers: list[list[int]]) -> list[dict[str, Any]]:
    rest = {"lr": 0.009, "bias_correction": True, "betas": [0.9, 0.95], "eps": 1e-8, "step": 9}
    decays = [save.weight_decay, 0.0] if len(numbers) == 2 else [save.weight_decay]
    return [
        {**rest, "weight_decay": decay, "params": params}
        for decay, params in zip(decays, numbers, strict=True)
    ]


def _zero_files(
    groups: list[dict[str, States]], named: dict[str, States], save: Save
) -> Iterator[dict[str, Any]]:
    """The value of each data-parallel rank's file."""
    outer: dict[str, Any] = {}
    shapes = [
        OrderedDict((name, torch.Size(states["fp32"].shape)) for name, states in group.items())
        for group in groups
    ]
    if save.shapes == "groups":
        outer["param_shapes"] = shapes
    elif save.shapes == "one":
        together = OrderedDict((n, torch.Size(s["fp32"].shape)) for n, s in named.items())
        outer["param_shapes"] = together
    if save.version:
        config = {"zero_optimization": {"stage": save.stage}}
        outer |= {"ds_config": config, "ds_version": save.version}
    for rank in range(save.dp):
        inner: dict[str, Any] = {
            "loss_scaler": DynamicLossScaler(),
            "dynamic_loss_scale": True,
            "overflow": False,
        }
        if save.form in ("v1", "v1 rigid"):
            inner |= _sub_partitions(groups, save, rank)
        else:
            inner |= _partitions(groups, save, rank)
        yield {"optimizer_state_dict": inner, **outer}


def _sub_partitions(groups: list[dict[str, States]], save: Save, rank: int) -> dict[str, Any]:
    masters, base, counts = [], [], []
    for group in groups:
        flat = {k: np.concatenate([s[k].reshape(-1) for s in group.values()]) for k in KINDS}
        count = flat["fp32"].size
        intervals, size = bucket_rule(count, save.dp, save.bucket)
        padded = {k: np.zeros(intervals * size * save.dp, "f4") for k in KINDS}
        for kind, values in flat.items():
            padded[kind][:count] = values
        parts: dict[str, list[torch.Tensor]] = {k: [] for k in KINDS}
        for interval in range(intervals):
            number = interval * save.dp + rank
            padding = min(size, max(0, (number + 1) * size - count)) if save.form == "v1" else 0
            for kind in KINDS:
                part = torch.from_numpy(padded[kind][number * size : (number + 1) * size].copy())
                parts[kind].append(part[: size - padding])
        masters.append(parts["fp32"])
        base.append([{k: parts[k][n] for k in KINDS[1:]} for n in range(intervals)])
        counts.append(intervals)
    if save.form == "v1":
        return {
            "base_optimizer_state": base,
            "zero_stage": 1,
            "partition_count": save.dp,
            "num_comm_intervals_per_group": counts,
            "local_sub_partitions_of_fp32_groups": masters,
        }
    every = [state for group in base for state in group]
    ends = np.cumsum(counts).tolist()
    numbers = [list(range(end - n, end)) for n, end in zip(counts, ends, strict=True)]
    torch_state = {"state": dict(enumerate(every)), "param_groups": _param_groups(save, numbers)}
    return {
        "base_optimizer_state": torch_state,
        "local_sub_partitions_of_fp32_groups": masters,
    }


def _partitions(groups: list[dict[str, States]], save: Save, rank: int) -> dict[str, Any]:
    masters, base = [], []
    for group in groups:
        members = list(group.values())
        if save.version and (0, 3, 17) <= tuple(map(int, save.version.split("."))) < (0, 4, 4):
            members = _round_robin(members, save.dp)
        flat = {k: np.concatenate([s[k].reshape(-1) for s in members]) for k in KINDS}
        count, step = flat["fp32"].size, save.align * save.dp
        size = math.ceil(count / step) * step // save.dp
        # the padding that DeepSpeed subtracts: to a multiple of the ranks, of the last rank only
        padding = -count % save.dp if rank == save.dp - 1 else 0
        states = {}
        for kind in KINDS:
            padded = np.zeros(size * save.dp, "f4")
            padded[:count] = flat[kind]
            part = torch.from_numpy(padded[rank * size : (rank + 1) * size].copy())
            cut = save.form == "lean" or kind == "fp32"
            states[kind] = part[: size - padding] if cut else part
        masters.append(states.pop("fp32"))
        base.append(states)
    torch_state: Any = base
    if save.form == "rigid":
        numbers = [[n] for n in range(len(base))]
        torch_state = {"state": dict(enumerate(base)), "param_groups": _param_groups(save, numbers)}
    return {
        "base_optimizer_state": torch_state,
        "zero_stage": 2,
        "partition_count": save.dp,
        **({"ds_version": save.version} if save.version else {}),
        "single_partition_of_fp32_groups": masters,
    }


def _round_robin(members: list[States], dp: int) -> list[States]:
    """The order of 0.3.17 to 0.4.3 (runtime/zero/stage2.py, _round_robin_reorder)."""
    by_rank: dict[int, list[States]] = {}
    for number, member in enumerate(members):
        by_rank.setdefault(number % dp, []).append(member)
    return [member for rank in by_rank.values() for member in rank]


class DynamicLossScaler:
    """DeepSpeed's, by its name in pickles."""

    def __init__(self) -> None:
        self.__dict__ |= SCALER


DynamicLossScaler.__module__ = SCALERS


@contextmanager
def scaler_module() -> Iterator[None]:
    """While it is entered, pickle finds the loss scaler by the name that DeepSpeed gives it."""
    parts = SCALERS.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    modules = {name: ModuleType(name) for name in names}
    modules[SCALERS].DynamicLossScaler = DynamicLossScaler  # type: ignore[attr-defined]
    with patch.dict(sys.modules, modules):
        yield


def _save(path: Path, save: Save, value: Any) -> None:
    with scaler_module():
        torch.save(value, path, _use_new_zipfile_serialization=save.zipped)


STAGES = [range(4), range(4, 100)]
FORMS = {
    "v1": Save(),
    "v1 rigid": Save(form="v1 rigid"),
    "0.4.0": Save(form="lean", version="0.4.0"),
    "0.4.5": Save(form="lean", version="0.4.5"),
    "0.5.4": Save(form="lean", version="0.5.4", shapes="groups", align=2),
    "stage 2 of 0.3.16": Save(form="lean", stage=2, stages=[]),
    "stage 2 of 0.5.8": Save(form="lean", version="0.5.8", stage=2, stages=[], shapes="groups"),
    "0.5.10": Save(form="rigid", version="0.5.10", shapes="groups", align=2),
    "0.5.10 elastic": Save(form="lean", version="0.5.10", shapes="groups", align=2),
    "legacy_stage1 of 0.4.5": Save(form="v1", version="0.4.5"),
}
