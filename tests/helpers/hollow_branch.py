"""A raw Pythia branch at its full size, as GPT-NeoX v1.0 wrote it, with holes for all values.

Its files have the names, pickles and sizes of EleutherAI's neox-ckpt-pythia repositories: layers,
mp_rank files, elastic ZeRO stage 1 states in communication intervals (DeeperSpeed 0.3.15,
runtime/zero/stage1.py), and the yml beside them. Only padding is left out: a part of a group has
the bytes of its own elements, where the original also stores what is cut off of it.
"""

from collections import OrderedDict
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from neox_bridge.formats.pickle_writer import TensorSlot
from neox_bridge.formats.pickles import Global, Record
from neox_bridge.formats.torch_zip import layout_pt
from neox_bridge.tensors.pieces import OutputFile, OutputTensor

STEP = 1000
_RNG_BYTES = 5056  # torch's state of a generator
_BUCKET = 500_000_000  # reduce_bucket_size of Pythia's yml


@dataclass(frozen=True, slots=True)
class Shape:
    """A Pythia's sizes, and the ranks that it was trained on."""

    layers: int
    hidden: int
    heads: int
    rows: int
    tp: int
    dp: int

    def parameters(self) -> list[tuple[int, str, tuple[int, ...], bool]]:
        """(layer, name, shape on one rank, whether it is decayed), as named_parameters has them."""
        h, tp = self.hidden, self.tp
        block = [
            ("input_layernorm.weight", (h,), False),
            ("input_layernorm.bias", (h,), False),
            ("attention.query_key_value.weight", (3 * h // tp, h), True),
            ("attention.query_key_value.bias", (3 * h // tp,), False),
            ("attention.dense.weight", (h, h // tp), True),
            ("attention.dense.bias", (h,), False),
            ("post_attention_layernorm.weight", (h,), False),
            ("post_attention_layernorm.bias", (h,), False),
            ("mlp.dense_h_to_4h.weight", (4 * h // tp, h), True),
            ("mlp.dense_h_to_4h.bias", (4 * h // tp,), False),
            ("mlp.dense_4h_to_h.weight", (h, 4 * h // tp), True),
            ("mlp.dense_4h_to_h.bias", (h,), False),
        ]
        last = self.layers + 3
        found = [(0, "word_embeddings.weight", (self.rows // tp, h), True)]
        found += [(layer, *weight) for layer in range(2, self.layers + 2) for weight in block]
        found += [(last, "norm.weight", (h,), False), (last, "norm.bias", (h,), False)]
        found.append((last + 1, "final_linear.weight", (self.rows // tp, h), True))
        return found


SIZES = {
    "160m": Shape(12, 768, 12, 50304, 1, 64),
    "12b": Shape(36, 5120, 40, 50688, 4, 64),
}


def hollow_branch(shape: Shape, folder: Path) -> Path:
    """The branch's files; only their headers take room on the disk."""
    folder.mkdir(parents=True)
    for file in (*_layers(shape), *_metas(shape), *_states(shape)):
        with (folder / file.path).open("wb") as output:
            output.truncate(file.size)
            for offset, data in file.literals:
                output.seek(offset)
                output.write(data)
    (folder / "pythia.yml").write_text(_yml(shape))
    return folder


def weight_bytes(folder: Path) -> int:
    """What a conversion of the weights needs of a branch: layers, one mp_rank file, the yml."""
    files = [*folder.glob("layer_*.pt"), folder / "mp_rank_00_model_states.pt"]
    return sum(path.stat().st_size for path in (*files, *folder.glob("*.yml")))


def _layers(shape: Shape) -> list[OutputFile]:
    by_layer: dict[int, dict[str, OutputTensor]] = {}
    for layer, name, size, _ in shape.parameters():
        by_layer.setdefault(layer, {})[name] = OutputTensor(name, "float16", size)
        if name == "attention.query_key_value.bias":
            inv_freq = "attention.rotary_emb.inv_freq"
            length = shape.hidden // shape.heads // 8
            by_layer[layer][inv_freq] = OutputTensor(inv_freq, "float16", (length,))
    return [
        _file(f"layer_{layer:02d}-model_{rank:02d}-model_states.pt", tensors)
        for layer, tensors in by_layer.items()
        for rank in range(shape.tp)
    ]


def _file(path: str, tensors: dict[str, OutputTensor], value: Any = None) -> OutputFile:
    value = {name: TensorSlot(name) for name in tensors} if value is None else value
    return layout_pt(path, value, list(tensors.values()))


def _metas(shape: Shape) -> list[OutputFile]:
    args = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": 2048,
        "make_vocab_size_divisible_by": 128,
        "padded_vocab_size": shape.rows,
        "tokenizer_type": "HFTokenizer",
        "model_parallel_size": shape.tp,
    }
    meta: dict[str, Any] = {
        "module": None,
        "optimizer": None,
        "lr_scheduler": {
            **{"start_lr": 6e-4, "warmup_iter": 1430.0, "num_iters": STEP},
            **{"decay_style": "cosine", "end_iter": 143000, "min_lr": 6e-5},
        },
        "csr_tensor_module_names": set(),
        "skipped_steps": 16,
        "global_steps": STEP,
        "global_samples": STEP * 1024,
        "dp_world_size": shape.dp,
        "mp_world_size": shape.tp,
        "iteration": STEP,
        "args": args,
        "torch_rng_state": TensorSlot("torch"),
        "cuda_rng_state": TensorSlot("cuda"),
    }
    rng = {name: OutputTensor(name, "uint8", (_RNG_BYTES,)) for name in ("torch", "cuda")}
    names = (f"mp_rank_{rank:02d}_model_states.pt" for rank in range(shape.tp))
    return [_file(name, rng, meta) for name in names]


def _states(shape: Shape) -> list[OutputFile]:
    parameters = shape.parameters()
    shapes = OrderedDict(
        (f"{layer}.{name}", Record(Global("torch", "Size"), (size,)))
        for layer, name, size, _ in parameters
    )
    sizes = [
        sum(prod(size) for _, _, size, is_decayed in parameters if is_decayed == decayed)
        for decayed in (True, False)
    ]
    cuts = [_intervals(size, shape.dp) for size in sizes]
    found = []
    for number in range(shape.tp):
        for rank in range(shape.dp):
            tensors: dict[str, OutputTensor] = {}

            def put(key: str, count: int, tensors: dict[str, OutputTensor] = tensors) -> TensorSlot:
                tensors[key] = OutputTensor(key, "float32", (count,))
                return TensorSlot(key)

            parts = [
                [
                    (f"{group}.{interval}", _length(size, part, interval * shape.dp + rank))
                    for interval in range(count)
                ]
                for group, (size, (count, part)) in enumerate(zip(sizes, cuts, strict=True))
            ]
            scaler = Record(Global("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"))
            scaler.state = {
                **{"cur_scale": 4096.0, "cur_iter": STEP, "last_overflow_iter": 900},
                **{"scale_factor": 2.0, "scale_window": 1000, "min_scale": 1},
                **{"delayed_shift": 2, "cur_hysteresis": 2},
                **{"consecutive_hysteresis": False, "raise_error_at_min_scale": True},
            }
            inner = {
                "loss_scaler": scaler,
                "dynamic_loss_scale": True,
                "overflow": False,
                "base_optimizer_state": [
                    [
                        {state: put(f"{state} {key}", n) for state in ("exp_avg", "exp_avg_sq")}
                        for key, n in group
                    ]
                    for group in parts
                ],
                "zero_stage": 1,
                "partition_count": shape.dp,
                "num_comm_intervals_per_group": [count for count, _ in cuts],
                "local_sub_partitions_of_fp32_groups": [
                    [put(f"fp32 {key}", n) for key, n in group] for group in parts
                ],
            }
            name = f"zero_pp_rank_{rank}_mp_rank_{number:02d}_optim_states.pt"
            value = {"optimizer_state_dict": inner, "param_shapes": shapes}
            found.append(_file(name, tensors, value))
    return found


def _intervals(size: int, dp: int) -> tuple[int, int]:
    """(communication intervals, elements of a part) of a group; stage1.py of DeeperSpeed 0.3.15."""
    most, whole = _BUCKET, size // _BUCKET
    if whole >= 1:
        extra = ceil(size / (dp * whole))
        most += extra if _BUCKET * ceil(size / _BUCKET) - size > extra else 0
    part, limit = ceil(size / dp), most // dp
    return (1, part) if part <= limit else (ceil(part / limit), limit)


def _length(size: int, part: int, number: int) -> int:
    """Elements of a part without its padding."""
    return part - min(max((number + 1) * part - size, 0), part)


def _yml(shape: Shape) -> str:
    settings = {
        "pipe-parallel-size": 1,
        "model-parallel-size": shape.tp,
        "num-layers": shape.layers,
        "hidden-size": shape.hidden,
        "num-attention-heads": shape.heads,
        "seq-length": 2048,
        "max-position-embeddings": 2048,
        "pos-emb": "rotary",
        "rotary-pct": 0.25,
        "no-weight-tying": "true",
        "gpt-j-residual": "true",
        "output-layer-parallelism": "column",
        "bias-gelu-fusion": "true",
        "init_method": "small_init",
        "output_layer_init_method": "wang_init",
        "optimizer": '{"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95]}}',
        "min_lr": 0.00006,
        "zero_optimization": f'{{"stage": 1, "reduce_bucket_size": {_BUCKET}}}',
        "train_micro_batch_size_per_gpu": 16,
        "gas": 1,
        "gradient_clipping": 1.0,
        "weight-decay": 0.01,
        "hidden-dropout": 0,
        "attention-dropout": 0,
        "fp16": '{"fp16": true, "enabled": true, "loss_scale": 0}',
        "train-iters": 143000,
        "lr-decay-iters": 143000,
        "lr-decay-style": "cosine",
        "warmup": 0.01,
        "tokenizer-type": "HFTokenizer",
        "vocab-file": "/fsx/pile/20B_tokenizer.json",
    }
    text = {"pos-emb", "lr-decay-style", "tokenizer-type", "vocab-file", "init_method"}
    text |= {"output_layer_init_method", "output-layer-parallelism"}
    lines = [
        f'"{key}": "{value}",' if key in text else f'"{key}": {value},'
        for key, value in settings.items()
    ]
    return "{\n  " + "\n  ".join(lines) + "\n}\n"
