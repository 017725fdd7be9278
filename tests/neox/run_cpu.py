"""Loads checkpoints strictly in the real GPT-NeoX on CPU and saves the logits that it computes.

torchrun --nproc_per_node=TP*PP run_cpu.py TREE JOBS.json, where each job has
    yml: the settings, from which GPT-NeoX builds its tokenizer, its model and its engine
    drop: keys to leave out of them
    logits: where to write logits.npz, or null
    tokens: a file with the tokens to compute them for, or left out
    optimizer: the start of the names of files for what the optimizer holds after loading, one for
        each model-parallel rank, or left out
    reference: a file for the logits of the reference model too, which are computed when both are
        loaded, or left out
    training: whether they are computed in training mode, as a Mamba's must; left out: not
    steps: steps to train before, with random tokens, or 0
    set: keys to change in them, or left out
    losses: steps to train before, with tokens that are the same for the same step of any layout, of
        which the losses are told, or left out
    alike: whether each data-parallel rank has all of them, so that no sum is rounded otherwise
    averages: whether the pipeline engine averages micro-batches' gradients, as DeepSpeed's does
        before 0.16.0 and since 0.19.3
    freeze: a part of the names of parameters that are not trained, or left out; GPT-NeoX itself
        freezes all but its soft prompt
    save: a folder for GPT-NeoX's own checkpoint of the model, or left out
    save_every: after how many of the steps of ``losses`` it saves too, or left out
The model, the DeepSpeed engine and the loading are GPT-NeoX's own; only what needs CUDA or apex is
replaced. Prints one line of JSON for each job on rank 0: {"job": n, "error": null or text,
"losses": [...]}.
"""

import contextlib
import functools
import importlib
import json
import os
import sys
import traceback
import types

TREE, JOBS = sys.argv[1:3]
sys.path[:0] = [TREE, os.path.dirname(os.path.abspath(__file__))]

import cpu_only  # noqa: F401  (before GPT-NeoX)
import numpy as np
import torch

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LOCAL = int(os.environ.get("LOCAL_RANK", RANK))
import deepspeed
import yaml
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron import initialize, mpu, training

for extension in os.environ.get("RUN_CPU_IMPORTS", "").split():
    importlib.import_module(extension)  # before GPT-NeoX's functions are imported by name
from megatron.checkpointing import save_checkpoint
from megatron.neox_arguments import NeoXArgs
from megatron.tokenizer import build_tokenizer
from megatron.training import forward_step, get_batch_pipe, setup_model_and_optimizer
from megatron.utils import get_attn_mask


def read(job):
    """The job's yml as it stands, through GPT-NeoX's own reader of files."""
    path = job["yml"]
    if job["drop"] or job.get("set"):
        with open(path) as file:
            kept = {k: v for k, v in yaml.safe_load(file).items() if k not in job["drop"]}
        kept |= job.get("set", {})
        path = f"{os.path.dirname(JOBS)}/changed-{RANK}-{job['number']}.yml"
        with open(path, "w") as file:
            yaml.safe_dump(kept, file)
    here = {"rank": RANK, "local_rank": LOCAL, "world_size": WORLD, "global_num_gpus": WORLD}
    here |= {"deepspeed": True, "distributed_backend": "gloo", "user_script": "run_cpu"}
    return NeoXArgs.from_ymls([path], here)


def run(job) -> list[float]:
    args = read(job)
    args.tokenizer = build_tokenizer(args)
    stages = max(1, args.pipe_parallel_size)
    if not mpu.model_parallel_is_initialized():
        tp = args.model_parallel_size
        topology = PipeModelDataParallelTopology(
            num_pp=stages, num_mp=tp, num_dp=WORLD // (stages * tp)
        )
        mpu.initialize_model_parallel(tp, topology=topology)
    initialize.setup_deepspeed_random_and_activation_checkpointing(args)
    mpu.model_parallel_cuda_manual_seed(1)
    args.iteration = 0
    with freezing(job.get("freeze")):
        model, _, _, *reference = setup_model_and_optimizer(args, use_cache=False)
    if job.get("reference"):
        save_logits(args, reference[0], stages, job["reference"], False)
    if job.get("averages"):
        model._backward_prologue = types.MethodType(
            averaging(type(model)._backward_prologue), model
        )
    if job.get("optimizer"):
        save_optimizer(model, job["optimizer"])
    if job["logits"] and job.get("tokens"):
        save_logits(args, model, stages, job["logits"], False, job["tokens"])
    for _ in range(job["steps"]):
        train(args, model)
    first = args.iteration or 0
    if job.get("save"):
        args.save = job["save"]
    told, every = [], job.get("save_every", 0)
    for number in range(first, first + job.get("losses", 0)):
        told.append(step(args, model, number, job.get("alike", False)))
        if every and (number + 1) % every == 0:
            save_checkpoint(args, number + 1, model, None, None)
    if job.get("save") and not every:
        save_checkpoint(args, first + len(told) or 1, model, None, None)
    if job["logits"] and not job.get("tokens"):
        save_logits(args, model, stages, job["logits"], job.get("training", False))
    return told


@contextlib.contextmanager
def freezing(part):
    """While it is entered, new models have parameters that are not trained."""
    built = training.get_model

    def get_model(*args, **kwargs):
        model = built(*args, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = part not in name
        return model

    training.get_model = get_model if part else built
    yield
    training.get_model = built


def averaging(prologue):
    """DeepSpeed's ``_backward_prologue``, with the loss divided by the accumulation."""

    def averaged(self, loss, scale_wrt_gas=True):
        return prologue(self, loss / self.gradient_accumulation_steps(), scale_wrt_gas)

    return averaged


def step(args, model, number, alike) -> float:
    """One step on the global batch of that number, of which each data-parallel rank has its part.

    alike: each has all of it. Returns the mean loss over the batch.
    """
    micro, passes = args.train_micro_batch_size_per_gpu, args.gradient_accumulation_steps
    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    seed = torch.Generator().manual_seed(number)
    shape = (passes, 1 if alike else ranks, micro, args.seq_length + 1)
    tokens = torch.randint(0, args.tokenizer.vocab_size, shape, generator=seed)
    mine = tokens[:, 0 if alike else rank]
    batches = iter([{"text": tokens} for tokens in mine])
    if args.is_pipe_parallel:
        model.set_batch_fn(functools.partial(get_batch_pipe, neox_args=args))
        return float(model.train_batch(data_iter=batches))
    total = torch.zeros(())
    for _ in range(passes):
        loss = forward_step(batches, model, args, None, is_train=True)
        loss = loss[0] if isinstance(loss, tuple) else loss  # trees before 2024-10 return it alone
        model.backward(loss)
        model.step()
        total += loss.detach().float() / passes
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group())
    return float(total) / ranks


def train(args, model) -> None:
    seed = torch.Generator().manual_seed(1)
    shape = (args.train_micro_batch_size_per_gpu, args.seq_length + 1)
    tokens = torch.randint(0, args.tokenizer.vocab_size, shape, generator=seed)
    model.set_batch_fn(functools.partial(get_batch_pipe, neox_args=args))
    loss = model.train_batch(data_iter=iter([{"text": tokens}]))
    assert torch.isfinite(torch.as_tensor(float(loss)))


def save_optimizer(model, path) -> None:
    """Every parameter's master weights, moments and step, as DeepSpeed's ZeRO optimizer has them.

    The partitions of the data-parallel ranks are put together here.
    """
    zero, ranks = model.optimizer, mpu.get_data_parallel_world_size()
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    values = {}
    for index, parameters in enumerate(zero.round_robin_bit16_groups):
        master = zero.single_partition_of_fp32_groups[index]
        state = zero.optimizer.state[master]
        # before the first step, there are no moments
        moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        parts = {"fp32": master, **moments}
        for key, part in parts.items():
            flats = [torch.empty_like(part) for _ in range(ranks)]
            torch.distributed.all_gather(flats, part.detach(), group=mpu.get_data_parallel_group())
            flat, at = torch.cat(flats), 0
            for parameter in parameters:
                layer, _, rest = names[id(parameter)].removeprefix("sequential.").partition(".")
                values[f"sequential.{layer}.{rest}/{key}"] = (
                    flat[at : at + parameter.numel()].view(parameter.shape).numpy()
                )
                at += parameter.numel()
        values[f"state_step/{index}"] = np.array(float(state.get("step", 0)))
        group = zero.optimizer.param_groups[index]
        values[f"group_step/{index}"] = np.array(float(group.get("step", -1)))
    if mpu.get_data_parallel_rank() == 0:
        np.savez(f"{path}-{RANK}.npz", **values)


def save_logits(args, model, stages, path, training, given="") -> None:
    was = model.module.training
    model.module.train(training)
    seed = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, args.tokenizer.vocab_size, (2, 24), generator=seed)
    if given:
        with np.load(given) as file:
            tokens = torch.from_numpy(file["tokens"]).long()
    length = tokens.shape[1]
    positions = torch.arange(length)[None].expand_as(tokens)
    mask = get_attn_mask(length, tokens.device, args.sliding_window_width)
    with torch.no_grad():
        out = (tokens, positions, mask)
        if args.is_pipe_parallel:
            assert stages == 1
            for function in model.module.forward_funcs:
                out = function(out)
        else:
            out = model.module(out)
        out = out[0] if isinstance(out, tuple) else out
        if out.shape[-1] != args.padded_vocab_size:
            out = mpu.gather_from_model_parallel_region(out)
    if RANK == 0:
        np.savez(path, tokens=tokens.numpy(), logits=out.float().numpy())
    model.module.train(was)


deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
with open(JOBS) as jobs:
    for number, job in enumerate(json.load(jobs)):
        error, losses = None, []
        try:
            with contextlib.redirect_stdout(sys.stderr):
                losses = run({**job, "number": number})
        except (Exception, SystemExit) as caught:
            traceback.print_exc()
            error = f"{type(caught).__name__}: {caught}"
        if RANK == 0:
            result = {"job": number, "error": error, "losses": losses}
            # other ranks print too: a line of its own, before and after
            print("\nRESULT " + json.dumps(result) + "\n", flush=True)
        torch.distributed.barrier()
os._exit(0)
