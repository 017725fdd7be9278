"""Writes the settings with which GPT-NeoX loads a converted checkpoint and starts fine-tuning."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from neox_bridge.architectures.base import Architecture, ModelConfig
from neox_bridge.findings import Finding
from neox_bridge.formats.yml import dump_yml
from neox_bridge.frameworks.eras import Era, InvFreq, known_keys
from neox_bridge.frameworks.setting_defaults import COLUMN, COMPUTED_KEYS, OUTPUT_LAYER
from neox_bridge.layouts.origin import COMMENT as ORIGIN
from neox_bridge.layouts.transformer_engine import KEYS as TE_KEYS
from neox_bridge.wording import plain

LAYOUT = (
    "pipe_parallel_size",
    "model_parallel_size",
    "make_vocab_size_divisible_by",
    "rotary_save_freqs_buffer",
)
_PRECISION = ("precision", "fp16", "bf16", "fp32_allreduce")
_FILES = ("tokenizer_type", "vocab_file", "merge_file", "load", "save", "finetune", "data_path")
# settings that are only valid on one machine or in one run: paths, accounts, where to resume
_ELSEWHERE = re.compile(
    r".*_data_(paths?|weights)|wandb_.*|comet_.*|tensorboard_.*|log_dir|hostfile|include|exclude|"
    r"launcher.*|deepspeed_slurm|deepspeed_mpi|deepspeed_jsrun|no_ssh_check|master_.*|account|"
    r"comment|force_multi|detect_nvlink_pairs|num_nodes|num_gpus|node_rank|autotuning.*|"
    r"iteration|user_script|git_hash|s3_.*|.*_dir|no_load_.*|config_files|config|"
    r"checkpoint_validation_.*|global_num_gpus|rank|local_rank|world_size|dynamic_loss_scale|"
    r"(train_)?batch_size|text_gen_type|sample_.*|eval_tasks|eval_results_prefix|params_dtype|"
    r"is_pipe_parallel|deepspeed|lr|optimizer_type|padded_vocab_size"
)
_HALF = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12}
_HALF |= {"hysteresis": 2, "min_loss_scale": 1}
# the defaults for a run whose yml does not set these keys
START: dict[str, Any] = {
    "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8}},
    "min_lr": 1e-6,
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "overlap_comm": True,
        "reduce_scatter": True,
        "contiguous_gradients": True,
    },
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "weight_decay": 0.1,
    "train_iters": 1000,
    "lr_decay_iters": 1000,
    "lr_decay_style": "cosine",
    "warmup": 0.01,
    "checkpoint_factor": 500,
    "eval_interval": 500,
    "eval_iters": 10,
    "log_interval": 10,
    "data_impl": "mmap",
    "num_workers": 1,
    "distributed_backend": "nccl",
    OUTPUT_LAYER: COLUMN,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The keys of a yml by purpose, and the settings of the source that it does not contain.

    Attributes:
        unknown: Keys that a tree of the era would refuse.
        carried: Keys that no known GPT-NeoX has, for the fork that wrote them.
        origin: See ``layouts.origin``.
    """

    model: dict[str, Any]
    layout: dict[str, Any]
    precision: dict[str, Any]
    training: dict[str, Any]
    unknown: tuple[str, ...]
    carried: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)


def settings(
    architecture: Architecture,
    config: ModelConfig,
    era: Era,
    inv_freq: InvFreq,
    layout: Mapping[str, int],
    raw: Mapping[str, Any],
    *,
    same_model: bool,
    same_dtype: bool,
    old_names: bool,
    carried: Mapping[str, Any] = MappingProxyType({}),
) -> Settings:
    """Compute the settings for a target.

    Args:
        layout: pipe_parallel_size, model_parallel_size, make_vocab_size_divisible_by.
        raw: The merged yml of the run that the source comes from; empty if there was none.
        same_model: Whether raw describes exactly this model, so that its spelling is kept.
        same_dtype: Whether the target has the precision of raw.
        old_names: Whether the MLP is that of a tree before 2024-09.
        carried: Keys of raw to keep although no known GPT-NeoX has them.
    """
    known = known_keys(era)
    model = architecture.write_neox(config, old_names)
    if same_model:
        again = {k: v for k, v in model.items() if k in architecture.era_keys}
        kept_keys = architecture.model_keys - architecture.era_keys
        model = {**{k: v for k, v in raw.items() if k in kept_keys}, **again}
    model.setdefault("seq_length", raw.get("seq_length", config.max_positions))
    placed: dict[str, Any] = dict(layout)
    if inv_freq == "store" and era.inv_freq_key:
        placed["rotary_save_freqs_buffer"] = True
    kept = {key: value for key, value in raw.items() if key in _PRECISION}
    precision = kept if same_dtype and kept else _precision(config.dtype)
    skipped = {*architecture.model_keys, *LAYOUT, *_PRECISION, *_FILES, *TE_KEYS, *COMPUTED_KEYS}
    skipped.add("seq_length")
    training = {
        key: value
        for key, value in raw.items()
        if key not in skipped and not _ELSEWHERE.fullmatch(key)
    }
    training = {**START, **training, OUTPUT_LAYER: COLUMN}
    unknown = sorted((set(model) | set(training)) - known)
    return Settings(
        {k: v for k, v in model.items() if k in known},
        placed,
        precision,
        {k: v for k, v in training.items() if k in known},
        tuple(key for key in unknown if key in raw and key not in carried),
        dict(carried),
    )


def start_yml(
    settings: Settings, root: str, tokenizer_file: str | None, *, fresh: bool
) -> tuple[str, bytes, tuple[str, ...]]:
    """The yml in the root of the target, its name, and the keys that the user must still fill in.

    Args:
        settings: Its settings.
        root: The absolute path of the target.
        tokenizer_file: The path of the tokenizer, relative to root.
        fresh: Whether there is an optimizer to start with.
    """
    name = "resume.yml" if fresh else "finetune.yml"
    what = "Trains on from" if fresh else "Fine-tunes"
    comes = "a new optimizer, and the schedule at its step" if fresh else "no optimizer states"
    blanks = ["data_path"] if tokenizer_file else ["data_path", "vocab_file"]
    vocab_file = in_yml(f"{root}/{tokenizer_file}") if tokenizer_file else None
    if unnameable(root):
        blanks += ["load", "save", *(["vocab_file"] if tokenizer_file else [])]
    sections: list[tuple[str, Mapping[str, Any]]] = [
        (
            f"{what} this checkpoint with GPT-NeoX: python deepy.py train.py {name}\n"
            f"Fill in: {', '.join(blanks)} (the prefix of the preprocessed data, without .bin)",
            {"data_path": None},
        ),
        (
            f"the checkpoint: its weights are loaded, {comes}",
            {
                "load": in_yml(root),
                "save": in_yml(root if fresh else f"{root}/finetuned"),
                "finetune": not fresh,
                "tokenizer_type": "HFTokenizer",
                "vocab_file": vocab_file,
            },
        ),
        ("its layout: must stay as it is", settings.layout),
        ("the model: must stay as it is", settings.model),
        ("precision", settings.precision),
        ("training: yours to choose", settings.training),
        *_carried(settings),
    ]
    return name, dump_yml(sections), tuple(blanks)


def is_elsewhere(key: str) -> bool:
    """Whether a key is only valid on one machine or in one run, such as a host or a path."""
    return _ELSEWHERE.fullmatch(key) is not None


def unnameable(path: str) -> bool:
    """Whether a path cannot be written into a yml, which is UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return True
    return False


def in_yml(path: str) -> str | list[str]:
    """The path, or a list if it cannot be written: with a list GPT-NeoX fails immediately.

    With null or another folder it would silently train from scratch.
    """
    return [f"fill in: {plain(path)}, which is not UTF-8"] if unnameable(path) else path


def unnameable_finding(file: str, keys: Sequence[str]) -> Finding:
    """The finding about a yml that cannot contain the path of its folder."""
    return Finding(
        "path-not-utf8",
        "warning",
        f"the path of this folder is not UTF-8, so it cannot be written into {file}. "
        f"{', '.join(keys)} are not filled in, and GPT-NeoX cannot start like this",
        "rename the folder to a UTF-8 name and write its path into the yml",
    )


def step_yml(settings: Settings) -> bytes:
    """The yml in global_stepN/configs: the same settings without files and paths."""
    return dump_yml(
        [
            ("layout", {**settings.layout, "tokenizer_type": "HFTokenizer"}),
            ("model", settings.model),
            ("precision", settings.precision),
            ("training", settings.training),
            *_carried(settings),
        ]
    )


def _carried(settings: Settings) -> list[tuple[str, Mapping[str, Any]]]:
    """The keys of a fork, written unchanged, and the origin of the model."""
    comment = "keys of the source that neox-bridge does not know, unchanged"
    sections = ((comment, settings.carried), (ORIGIN, settings.origin))
    return [(comment, keys) for comment, keys in sections if keys]


def _precision(dtype: str) -> dict[str, Any]:
    if dtype == "float16":
        return {"precision": "fp16", "fp16": dict(_HALF)}
    if dtype == "bfloat16":
        return {"precision": "bfloat16"}
    return {"precision": "fp32"}


def resume_yml(
    raw: Mapping[str, Any], changed: Mapping[str, Any], root: str
) -> tuple[bytes, bytes]:
    """A yml that resumes a run from ``root``, and the same without files, for configs.

    raw: the settings of the run. changed: the layout, the batch and other settings that change.
    """
    left_out = {"load", "save", "finetune", *COMPUTED_KEYS}
    rest = {
        key: value
        for key, value in raw.items()
        if not _ELSEWHERE.fullmatch(key) and key not in left_out
    }
    data = {
        key: value
        for key, value in raw.items()
        if re.fullmatch(".*_data_(paths?|weights)|data_path", key)
    }
    for key in changed:
        rest.pop(key, None)
    files = {"load": in_yml(root), "save": in_yml(root), "finetune": False}
    comment = "the run goes on from here: weights, optimizer, schedule, random states"
    layout = ("its layout and batch: must stay as they are", changed)
    run = ("the run's own settings", {**rest, **data})
    return dump_yml([(comment, files), layout, run]), dump_yml([layout, run])
