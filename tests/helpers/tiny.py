"""A model of a few hundred numbers, written without torch: tests of it take milliseconds."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.api import plan as make_plan
from neox_bridge.execution.execute import execute
from neox_bridge.planning.options import Options
from neox_bridge.planning.plan import Plan

CONFIG: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "rotary_pct": 0.5,
    "rotary_emb_base": 10000,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def tensors(seed: int = 0) -> dict[str, Any]:
    """The tensors of the model, random."""
    hidden, inner, rows = 8, 16, 16
    shapes: dict[str, tuple[int, ...]] = {
        "gpt_neox.embed_in.weight": (rows, hidden),
        "embed_out.weight": (rows, hidden),
        "gpt_neox.final_layer_norm.weight": (hidden,),
        "gpt_neox.final_layer_norm.bias": (hidden,),
    }
    block = "gpt_neox.layers.0."
    for name, shape in {
        "attention.query_key_value.weight": (3 * hidden, hidden),
        "attention.query_key_value.bias": (3 * hidden,),
        "attention.dense.weight": (hidden, hidden),
        "attention.dense.bias": (hidden,),
        "mlp.dense_h_to_4h.weight": (inner, hidden),
        "mlp.dense_h_to_4h.bias": (inner,),
        "mlp.dense_4h_to_h.weight": (hidden, inner),
        "mlp.dense_4h_to_h.bias": (hidden,),
        "input_layernorm.weight": (hidden,),
        "input_layernorm.bias": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "post_attention_layernorm.bias": (hidden,),
    }.items():
        shapes[block + name] = shape
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_hf(folder: Path, seed: int = 0, changed: Any = None, **config: Any) -> Path:
    """A Hugging Face folder. changed: tensors that take the place of the random ones."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({**tensors(seed), **(changed or {})}, folder / "model.safetensors", {"format": "pt"})
    return folder


def plan_of(source: Path, target: Path, **options: Any) -> Plan:
    return make_plan(open_checkpoint(str(source)), Options(**options), str(target))


def convert(source: Path, target: Path, overwrite: bool = False, **options: Any) -> Path:
    execute(plan_of(source, target, **options), str(target), overwrite=overwrite, workers=1)
    return target


class Inline:
    """A pool that makes each call in this process, with as many slots as it is given."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self.stopped = threading.Event()

    def submit(self, call: Callable[..., Any], /, *args: Any) -> Any:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        return
