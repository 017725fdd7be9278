"""Small source trees that stand in for GPT-NeoX's of four dates.

They have the forms that the tree reader (frameworks/source_tree.py) and the patcher
(patch/patcher.py) look at: names, signatures, calls and flags as in GPT-NeoX, with their neighbors
that must not be mistaken for them. The bodies are our own. tests/neox/test_stand_ins_neox.py
compares them with the real trees.

A template's line that ends in a mark belongs to some dates alone: ``#@ until 2024-03``, ``#@ since
2024-10`` or ``#@ only 2024-09``, each inclusive.
"""

import re
from pathlib import Path
from textwrap import indent

from neox_bridge.frameworks.deepspeed import DEEPERSPEED_VERSIONS
from neox_bridge.frameworks.eras import era_named
from neox_bridge.frameworks.keys import neox_keys

NAMES = ("2024-03", "2024-09", "2024-10", "today")
_MARK = re.compile(r"(?P<code>.*?)  #@ (?P<word>until|since|only) (?P<name>\S+)")

POSITIONS = """\
import torch
import math


class SinusoidalPositionalEmbedding(torch.nn.Module):
    def __init__(self, dim, base=10000, precision=torch.half):
        super().__init__()
        inv_freq = frequencies(dim, base)
        self.register_buffer("inv_freq", inv_freq)

    def forward(self, x, seq_dim=1):
        angles = turned(x.shape[seq_dim], self.inv_freq)
        return torch.cat([angles.sin(), angles.cos()], -1).unsqueeze(0)


class RotaryEmbedding(torch.nn.Module):
    def __init__(
        self,
        dim,
        max_seq_len,
        base=10000,
        precision=torch.half,
        save_inv_freqs=False,  #@ since 2024-09
    ):
        super().__init__()
        inv_freq = frequencies(dim, base)
        self.register_buffer("inv_freq", inv_freq)  #@ until 2024-03
        self.register_buffer("inv_freq", inv_freq, persistent=save_inv_freqs)  #@ since 2024-09
        self.dim = dim
        *tables, inv_freq = self._prepare_cache(max_seq_len, precision, base)
        self.register_buffer("inv_freq", inv_freq)  #@ until 2024-03
        self.register_buffer("inv_freq", inv_freq, persistent=save_inv_freqs)  #@ since 2024-09
        self.tables = tables

    def _prepare_cache(self, seq_len, precision, base):
        single = frequencies(self.dim, base)
        angles = turned(seq_len, single).repeat(1, 2)
        return [part.to(precision) for part in (angles.cos(), angles.sin(), single)]

    def forward(self, x, seq_dim=0, seq_len=None):
        rows = x.shape[seq_dim] if seq_len is None else seq_len
        return tuple(table[:rows].to(x.device) for table in self.tables)


def frequencies(dim, base):
    return torch.exp(torch.arange(0, dim, 2) * (-math.log(base) / dim))


def turned(rows, inv_freq):
    return torch.outer(torch.arange(rows).to(inv_freq), inv_freq)


class AliBi(torch.nn.Module):
    def __init__(self, num_heads, mp_size=1, mp_rank=1):
        super().__init__()
        every = torch.exp2(-8 * torch.arange(1, num_heads + 1) / num_heads)
        slopes = every.view(mp_size, -1)[mp_rank]
        self.register_buffer("slopes", slopes)

    def forward(self, x):
        rows, columns = (torch.arange(size) for size in x.shape[-2:])
        return x + self.slopes.view(-1, 1, 1) * (columns - rows[:, None])
"""

NORMS = """\
import torch


class ScaleNorm(torch.nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True).clamp(min=self.eps)


class RMSNorm(torch.nn.Module):
    def __init__(self, dim, p=-1.0, eps=1e-8, bias=False):
        super().__init__()
        self.eps = eps
        self.scale = torch.nn.Parameter(torch.ones(dim))

    def forward(self, x):
        rms = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5  #@ until 2024-10
        return self.scale * (x / (rms + self.eps))  #@ until 2024-10
        variance = x.float().square().mean(-1, keepdim=True)  #@ since today
        return self.scale * (x * torch.rsqrt(variance + self.eps)).to(x)  #@ since today
"""

TRANSFORMER = """\
import torch
from torch import nn

from megatron import mpu
from megatron.model.positional_embeddings import AliBi, RotaryEmbedding


class ParallelMLP(nn.Module):
    def __init__(self, neox_args, init_method, output_layer_init_method):
        super().__init__()
        size = neox_args.hidden_size
        wide = 4 * size  #@ until 2024-09
        wide = neox_args.intermediate_size or 4 * size  #@ since 2024-10
        self.dense_h_to_4h = mpu.ColumnParallelLinear(neox_args, size, wide)  #@ until 2024-09
        self.dense_4h_to_h = mpu.RowParallelLinear(neox_args, wide, size)  #@ until 2024-09
        self.linear1 = mpu.ColumnParallelLinear(neox_args, size, wide)  #@ since 2024-10
        self.linear2 = mpu.RowParallelLinear(neox_args, wide, size)  #@ since 2024-10


class LLaMAParallelMLP(nn.Module):  #@ until 2024-09
    def __init__(self, neox_args, init_method, output_layer_init_method):  #@ until 2024-09
        super().__init__()  #@ until 2024-09
        size, wide = neox_args.hidden_size, neox_args.intermediate_size  #@ until 2024-09
        self.w1 = mpu.ColumnParallelLinear(neox_args, size, wide)  #@ until 2024-09
        self.w3 = mpu.ColumnParallelLinear(neox_args, size, wide)  #@ until 2024-09
        self.w2 = mpu.RowParallelLinear(neox_args, wide, size)  #@ until 2024-09


class ParallelSelfAttention(nn.Module):
    def __init__(self, neox_args, rotary=False):
        super().__init__()
        if neox_args.pos_emb == "alibi":
            self.alibi_embed = AliBi(neox_args.num_attention_heads)
        self.rotary_emb = RotaryEmbedding(
            neox_args.hidden_size // neox_args.num_attention_heads,
            base=neox_args.rotary_emb_base,
            max_seq_len=neox_args.seq_length,
            precision=neox_args.params_dtype,
            save_inv_freqs=neox_args.rotary_save_freqs_buffer,  #@ since 2024-09
        )

    def gqa_project(self, hidden_states, attention_mask, layer_past=None):
        kv_heads = self.num_kv_heads_per_partition
        share = kv_heads / self.num_attention_heads_per_partition  #@ until 2024-10
        split_sizes = (
            self.hidden_size_per_attention_head,  #@ until 2024-10
            int(share * self.hidden_size_per_attention_head),  #@ until 2024-10
            int(share * self.hidden_size_per_attention_head),  #@ until 2024-10
            self.num_attention_heads_per_partition  #@ since today
            * self.hidden_size_per_attention_head,  #@ since today
            kv_heads * self.hidden_size_per_attention_head,  #@ since today
            kv_heads * self.hidden_size_per_attention_head,  #@ since today
        )
        return self.query_key_value(hidden_states)[0].split(split_sizes, -1)


class ParallelTransformerLayer(nn.Module):
    def __init__(self, neox_args, attention_mask_func, init_method, rotary=False):
        super().__init__()
        self.mlp = ParallelMLP(neox_args, init_method, init_method)
        if neox_args.te_layernorm_mlp:  #@ since today
            from megatron.model.transformer_engine import TELayerNormMLP  #@ since today
            self.mlp = TELayerNormMLP(neox_args)  #@ since today

    def forward(self, x, attention_mask, layer_past=None):
        mlp_output, mlp_bias = self.mlp(x)
        if self.gpt_j_residual:
            return x + mlp_output + mlp_bias
        if self.mlp_type == "llama":  #@ only 2024-03
        if self.mlp_type == "llama" or self.moe_type == "deepspeed":  #@ only 2024-09
        if self.activation == "swiglu" or self.moe_type == "deepspeed":  #@ only 2024-10
        if mlp_bias == None or self.num_experts > 1:  #@ since today
            assert mlp_bias is None
            return x + mlp_output
        return x + mlp_output + mlp_bias
"""

CHECKPOINTING = """\
import os


def check_checkpoint_args(neox_args, checkpoint_args):
    for key, value in checkpoint_args.items():
        assert getattr(neox_args, key) == value, key


def save_ds_checkpoint(iteration, model, neox_args):
    settings = {"separate": neox_args.no_save_rng}
    state = {
        "iteration": iteration,
        "args": {
            "num_layers": neox_args.num_layers,
            "hidden_size": neox_args.hidden_size,
            "num_attention_heads": neox_args.num_attention_heads,
            "max_position_embeddings": neox_args.max_position_embeddings,
            "make_vocab_size_divisible_by": neox_args.make_vocab_size_divisible_by,
            "padded_vocab_size": neox_args.padded_vocab_size,
            "tokenizer_type": neox_args.tokenizer_type,
            "model_parallel_size": neox_args.model_parallel_size,
        },
    }
    model.save_checkpoint(os.fspath(neox_args.save), client_state={**settings, **state})
"""

ARGUMENTS = '''\
from dataclasses import dataclass

LIMIT: int = 1


@dataclass
class {first}:
    """Settings."""

{settings}

    def calculated(self):
        total: int = 0
        return total


@dataclass
class {second}:
{more}
'''
_DEEPSPEED_KEYS = frozenset(
    "deepspeed train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
    "optimizer scheduler fp16 bf16 amp gradient_clipping zero_optimization steps_per_print "
    "hostfile num_nodes num_gpus master_port".split()
)
_RUNNER_KEYS = frozenset("hostfile num_nodes num_gpus master_port".split())
_MODEL_KEYS = frozenset("num_layers hidden_size num_attention_heads use_qk_layernorm".split())


_NEOX_TO_HF = """\
parser.add_argument("--input_dir", type=str, help="the folder of a step")
parser.add_argument("--config_file", type=str)
parser.add_argument("--output_dir", type=str)
parser.add_argument("--precision", type=str, default="auto")
parser.add_argument("--no_save_tokenizer", action="store_true")
"""
_MAIN = """\
import argparse

import {library}


def main({parameters}):
    import os

    parser = argparse.ArgumentParser(
        description="a stand-in",
    )
{options}
    args = parser.parse_args({words})
    raise SystemExit(f"{{os.getpid()}} reached the code of the script: {{args}}")


if __name__ == "__main__":
    main()
"""
_SEQUENTIAL = '''\
"""A stand-in for the script that writes a GPT-NeoX checkpoint."""

from __future__ import annotations

import argparse
import os

import deepspeed

SEVERAL = "--hf-model-name tiny --config layout.yml"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--revision", type=int, default=143000)
    parser.add_argument("--output-dir", type=str)
    parser.add_argument(
        "--config",
        nargs="*",
        default=[],
        help="the ymls, of which the layout is taken",
    )
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--download-only", action="store_true")

    parser.add_argument("--ckpt-tmp-dir", default="/tmp/ckpt_tmp_dir")
    parser.add_argument("--hf-model-name", type=str)
    parser.add_argument("--cache-dir", default="/gpfs/alpine/csc499/proj-shared/hf_checkpoints")
    try:
        if int(os.environ["WORLD_SIZE"]) > 1:
            args = parser.parse_args(SEVERAL.split())
        else:
            args = parser.parse_args()
    except KeyError:
        args = parser.parse_args()
    raise SystemExit("reached the code of the script")
'''
_LLAMA = """\
import argparse

import tqdm


def convert_model(state_dict, config, ranks):
    return [dict(state_dict) for _ in range(ranks)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=0)
    parser.add_argument("--model", type=str, default="gpt2")
    parser.add_argument("--model_path", type=str, default=None)
    args = parser.parse_args()
    raise SystemExit("reached the code of the script")
"""
_RAW = """\
parser.add_argument("--input_dir")
parser.add_argument("--model_size", choices=["7B", "tokenizer_only"])
parser.add_argument("--output_dir")
parser.add_argument("--num_output_shards", type=int, default=1)
parser.add_argument("--pipeline_parallel", action="store_true")
"""
_MERGE = """\
parser.add_argument("--input_dir", type=str)
parser.add_argument("--output_dir", type=str)
"""


_INFERENCE = """\
#!/usr/bin/env python
from megatron.utils import setup_for_inference_or_eval


def main(input_args=None, overwrite_values=None):
    setup_for_inference_or_eval(
        use_cache={cache}, input_args=input_args, overwrite_values=overwrite_values
    )


if __name__ == "__main__":
    main()
"""
# what the launcher and the ranks run; today's and the others are alike
TRAIN = {
    "train.py": '''\
#!/usr/bin/env python
"""Train"""
from megatron.neox_arguments import NeoXArgs
from megatron.training import pretrain


def main(input_args=None, overwrite_values=None):
    neox_args = NeoXArgs.consume_neox_args(input_args, overwrite_values)
    pretrain(neox_args=neox_args)


if __name__ == "__main__":
    main()
''',
    "eval.py": _INFERENCE.format(cache=False),
    "generate.py": _INFERENCE.format(cache=True),
    "deepy.py": """\
#!/usr/bin/env python
import os

import deepspeed.launcher.runner


def main(input_args=None):
    from megatron.neox_arguments import NeoXArgs

    neox_args = NeoXArgs.consume_deepy_args(input_args)
    deepspeed.launcher.runner.main(neox_args.get_deepspeed_main_args())


if __name__ == "__main__":
    main()
""",
}


def scripts_of(name: str) -> dict[str, str]:
    """The conversion scripts of the tree of a date, by their names in tools/ckpts."""
    options = _NEOX_TO_HF
    if name in ("2024-10", "today"):
        options += 'parser.add_argument("--vocab-is-hf-tokenizer", action="store_true")\n'
        options += 'parser.add_argument("--pad-token-id", type=int, default=-1)\n'
    options += 'parser.add_argument("--architecture", type=str, default="neox")\n'
    both = "input_args=None, overwrite_values=None"
    scripts = {
        "convert_neox_to_hf.py": _main("json", options, both),
        "convert_hf_to_sequential.py": _SEQUENTIAL,
        "convert_raw_llama_weights_to_neox.py": _main("deepspeed", _RAW),
        "merge20b.py": _main("deepspeed", _MERGE),
    }
    if name != "2024-03":
        scripts["convert_hf_llama_to_neox.py"] = _LLAMA
        scripts["convert_neox_to_mamba_ssm.py"] = _main("mamba_ssm", _NEOX_TO_HF, both)
    return scripts


def _main(library: str, options: str, parameters: str = "") -> str:
    return _MAIN.format(
        library=library,
        options=indent(options, " " * 4),
        parameters=parameters,
        words="input_args" if parameters else "",
    )


def write_tree(name: str, folder: Path) -> Path:
    """Write the stand-in for the tree of a date into ``folder``, and return it."""
    keys = neox_keys(name)
    other = keys - _DEEPSPEED_KEYS - _MODEL_KEYS
    scripts = {f"../tools/ckpts/{script}": text for script, text in scripts_of(name).items()}
    files = {
        **scripts,
        "model/positional_embeddings.py": _of_date(name, POSITIONS),
        "model/norms.py": _of_date(name, NORMS),
        "model/transformer.py": _of_date(name, TRANSFORMER),
        "checkpointing.py": CHECKPOINTING,
        "neox_arguments/neox_args.py": ARGUMENTS.format(
            first="NeoXArgsModel",
            settings=_fields(keys & _MODEL_KEYS),
            second="NeoXArgsTraining",
            more=_fields(other),
        ),
        "neox_arguments/deepspeed_args.py": ARGUMENTS.format(
            first="NeoXArgsDeepspeedConfig",
            settings=_fields(keys & _DEEPSPEED_KEYS - _RUNNER_KEYS),
            second="NeoXArgsDeepspeedRunner",
            more=_fields(keys & _RUNNER_KEYS),
        ),
    }
    for path, text in files.items():
        target = folder / "megatron" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for script, text in TRAIN.items():
        (folder / script).write_text(text)
    requirements = folder / "requirements" / "requirements.txt"
    requirements.parent.mkdir(exist_ok=True)
    commit = next(c for c, v in DEEPERSPEED_VERSIONS.items() if v == era_named(name).deepspeed)
    url = f"git+https://github.com/EleutherAI/DeeperSpeed.git@{commit}"
    requirements.write_text(f"numpy\ndeepspeed @ {url}#egg=deepspeed\n")
    return folder


def _fields(keys: frozenset[str]) -> str:
    return "\n".join(f"    {key}: int = None" for key in sorted(keys))


def _of_date(name: str, template: str) -> str:
    """The lines of a template that the tree of a date has."""
    lines = []
    for line in template.splitlines():
        mark = _MARK.fullmatch(line)
        if mark is None:
            lines.append(line)
            continue
        here, there = NAMES.index(name), NAMES.index(mark["name"])
        if {"until": here <= there, "since": here >= there, "only": here == there}[mark["word"]]:
            lines.append(mark["code"])
    return re.sub(r"\n{3,}", "\n\n\n", "\n".join(lines)) + "\n"
