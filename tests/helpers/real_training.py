"""Training runs of the real GPT-NeoX in several layouts, and how far apart their losses are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import real_neox
import yaml
from resharding import reshard


@dataclass(frozen=True)
class Layout:
    tp: int
    pp: int
    dp: int

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp} DP{self.dp}"

    @property
    def processes(self) -> int:
        return self.tp * max(1, self.pp) * self.dp


LAYOUTS = [
    Layout(1, 1, 1),
    Layout(2, 1, 1),
    Layout(2, 1, 2),
    Layout(1, 2, 1),
    Layout(1, 0, 2),
    Layout(4, 0, 1),
    Layout(2, 2, 1),
]
PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "fp32_allreduce": True},
    "bf16": {"precision": "bfloat16"},
    "fp16": {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 8,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    },
}
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 2e-3}
BATCH = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "no_weight_tying": True,
    "output_layer_parallelism": "column",
    "norm": "layernorm",
    "scaled_upper_triang_masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "min_lr": 0.0001,
    "lr_decay_style": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "data_impl": "mmap",
    "train_iters": 30,
    "lr_decay_iters": 30,
    "checkpoint_factor": 1000,
    "tokenizer_type": "HFTokenizer",
    "checkpoint_activations": False,
}


def start(folder: Path, layout: Layout, settings: dict[str, Any]) -> Path:
    """A yml to start a run with, whose checkpoint will be in ``folder / "run"``."""
    folder.mkdir(parents=True)
    words = real_neox.with_tokenizer(folder) / "tokenizer.json"
    made = {
        **BASE,
        "pipe_parallel_size": layout.pp,
        "model_parallel_size": layout.tp,
        "make_vocab_size_divisible_by": 64 // layout.tp,
        **BATCH,
        "vocab_file": str(words),
        **settings,
    }
    path = folder / "start.yml"
    path.write_text(yaml.safe_dump(made))
    return path


def losses(
    python: str, layout: Layout, jobs: list[dict[str, Any]], folder: Path
) -> list[list[float]]:
    folder.mkdir(parents=True, exist_ok=True)
    found = real_neox.results(python, "gpt-neox", layout.processes, jobs, folder)
    errors = {job["yml"]: result["error"] for job, result in zip(jobs, found, strict=True)}
    assert {yml: error for yml, error in errors.items() if error} == {}
    return [result["losses"] for result in found]


def asked(source: Layout, target: Layout) -> dict[str, int]:
    """A target with the source's accumulation, which the jobs set, so that nothing is scaled."""
    micro = BATCH["train_micro_batch_size_per_gpu"] * source.dp // target.dp
    return {"tp": target.tp, "pp": target.pp, "dp": target.dp, "micro_batch": micro}


def apart(a: float, b: float) -> float:
    return abs(a - b) / abs(a)


def resuming(run: Path) -> dict[str, Any]:
    """A job of three steps, from the yml of a resharded run."""
    return {"yml": str(run / "resume.yml"), "losses": 3, "alike": True, "set": BATCH}


def differing(
    python: str,
    moves: Iterable[tuple[str, Layout, Layout, int]],
    wanted: Mapping[str, list[float]],
    folder: Path,
    allowed: float,
) -> list[tuple[str, list[float], list[float]]]:
    """Reshard runs and resume them. Returns those with other losses than the run itself.

    moves: the name of a run, which is in a folder of this name, its layout, and the layout and ZeRO
    stage of the target. wanted: the losses of each run, by its name.
    """
    by_layout: dict[Layout, list[tuple[str, Path]]] = {}
    for name, source, target, zero in moves:
        new = folder / f"{name} to {zero} on {target}"
        reshard(folder / name / "run", new, zero=zero, **asked(source, target))
        by_layout.setdefault(target, []).append((name, new))
    wrong = []
    for layout, runs in by_layout.items():
        jobs = [resuming(new) for _, new in runs]
        continued = losses(python, layout, jobs, folder / f"jobs {layout}")
        for (name, new), have in zip(runs, continued, strict=True):
            pairs = zip(wanted[name], have, strict=True)
            if any(apart(a, b) > allowed for a, b in pairs):
                wrong.append((new.name, wanted[name], have))
    return wrong
