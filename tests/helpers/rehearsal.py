"""Runs the commands of a page as printed, in a prepared folder, against stand-ins for servers.

The Hub is a stub, S3 is moto's server, a Ray cluster is a local one. What a page names is there
under that name: a small model, a run, a source tree.

``python tests/helpers/pages.py --update docs/how-to/verify.md ...`` writes what the commands print
into the pages. Read the diff: a line that is printed in other words is replaced.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from hub_stub import WRITE, Stub, serving
from pages import ROOT, Command, commands, difference, update
from published import PUBLISHED
from stand_in_trees import write_tree

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(250)}, "unk_token": "w0"},
}
RAW, TWIN = "EleutherAI/neox-ckpt-pythia-160m", "EleutherAI/pythia-160m"
RAW_STEPS = (0, 512, 1000, 2000, 143000)
RUN_OF_TWO_RANKS = ROOT / "tests" / "data" / "reshard" / "bf16_tp2_dp2"
RUN_STEPS = (0, 1000, 2000)
RUNS = ("run", "old-run", "run-a", "run-b", "suite")
PYTHIA = "docs/how-to/pythia.md"
ANY_MODEL = "docs/how-to/any-model.md"
RAW_CHECKPOINT = PUBLISHED / "v1_dp4_intervals" / "flat"
RANKS, MICRO_BATCH = 64, 16  # those of Pythia-160M
# Pages that say how everything that they name is made: their folder is empty at first.
SELF_CONTAINED = (
    "docs/index.md",
    "docs/how-to/convert.md",
    "docs/how-to/fine-tune.md",
    PYTHIA,
)
# Commands that end with another exit code than 0, by how they begin: they show an error or a
# difference, or the stand-in is no such case.
EXITS = {
    "neox-bridge audit run\n": 3,
    "neox-bridge convert pythia-12b": 130,
    "neox-bridge convert run hf --ignore-key rope_scaling": 2,
    "neox-bridge diff glm-4 glm-4-tuned": 3,
    "neox-bridge diff hf://EleutherAI/pythia-70m@step1000": 3,
    "neox-bridge diff run/global_step1000": 3,
    "neox-bridge doctor olmo-2": 1,
    "neox-bridge doctor pythia-neox --error traceback.txt --for": 4,
    "neox-bridge doctor pythia-neox --for neox": 4,
    "neox-bridge doctor pythia-neox --for neox@2024-03 --fix": 0,
    "neox-bridge inspect --security downloaded.bin": 1,
    "neox-bridge inspect downloaded.bin --security": 1,
    "neox-bridge reshard run new --dp 3": 4,
    "neox-bridge verify llama-bf16": 3,
    "neox-bridge verify glm-4 glm-4-tuned": 3,
    "neox-bridge verify run/global_step1000": 3,
}
# Other programs that pages call, and that run too. All others are marked in the page with what they
# need: ``# needs a cluster``.
ALSO_RUN = ("cat traceback.txt", "hf download", "python benchmarks/simulate.py")
# What is run instead of what takes long, or is somewhere else on this machine.
REPLACED = {
    "python benchmarks/simulate.py --checkpoints 10000": (
        f"python {ROOT}/benchmarks/simulate.py --checkpoints 20"
    ),
    "seq 20": "seq 3",
}


# Line by line, as on a terminal, so that stdout and stderr keep their order.
_PROGRAM = """
import sys
sys.stdout.reconfigure(line_buffering=True)
from neox_bridge.__main__ import main
main()
"""
# A pickle that makes an OrderedDict and calls os.system.
_HOSTILE = b"\x80\x02(ccollections\nOrderedDict\n)Rcos\nsystem\nX\x04\x00\x00\x00true\x85Rt."
# What GPT-NeoX of March 2024 prints for a checkpoint of today.
TRACEBACK = """\
Traceback (most recent call last):
  File "train.py", line 35, in main
    pretrain(neox_args=neox_args)
RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:
	Missing key(s) in state_dict: "attention.rotary_emb.inv_freq", "mlp.dense_h_to_4h.weight", \
"mlp.dense_4h_to_h.weight".
	Unexpected key(s) in state_dict: "mlp.linear1.weight", "mlp.linear2.weight".
"""


class Failed(AssertionError):
    """A command ended with another exit code than expected. output: what it printed."""

    def __init__(self, command: str, code: int, output: str) -> None:
        super().__init__(f"exit code {code}: {command}\n{output}")
        self.output = output


class Shell:
    """Runs commands in a folder, where the Hub is a stub.

    places: paths and addresses of this machine, by what a page shows for them.
    """

    def __init__(self, folder: Path, hub_url: str) -> None:
        for name in ("bin", "home", "cwd"):
            (folder / name).mkdir(parents=True)
        self.cwd, self.home = folder / "cwd", folder / "home"
        tool = folder / "bin" / "neox-bridge"
        tool.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{_PROGRAM}' \"$@\"\n")
        tool.chmod(0o755)
        path = (str(tool.parent), str(Path(sys.executable).parent), os.environ["PATH"])
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(path),
            "HF_ENDPOINT": hub_url,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(self.home),
            "HOME": str(self.home),
        }
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "XDG_CACHE_HOME", "RAY_ADDRESS"):
            self.environment.pop(name, None)
        self.places = {
            "https://huggingface.co": hub_url,
            "/home/me": str(self.home),
            "/data": str(self.cwd),
        }

    def run(self, command: str, exit_code: int = 0, interrupt: bool = False) -> str:
        """What a command prints, with the paths that a page shows.

        interrupt: press Ctrl-C when the first file is finished.
        """
        for shown, real in (REPLACED | self.places).items():
            command = re.sub(rf"(?<![\w/]){re.escape(shown)}\b", lambda _, real=real: real, command)
        process = subprocess.Popen(
            ["bash", "-e", "-c", f"exec {command}" if interrupt else command],
            cwd=self.cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        if interrupt:
            self._wait_for_a_file()
            process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=300)
        for shown, real in self.places.items():
            output = output.replace(real, shown)
        if process.returncode != exit_code:
            raise Failed(command, process.returncode, output)
        return output.replace("interrupted:", "^Cinterrupted:") if interrupt else output

    def _wait_for_a_file(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for journal in self.cwd.glob(".*.neox-bridge/journal"):
                if len(journal.read_text().splitlines()) > 1:
                    return
            time.sleep(0.002)


# What is in the folders


def materials(folder: Path) -> Path:
    """A folder with the small models, runs and trees that pages name."""
    import torch
    from common import make_hf

    model = make_hf(folder / "pythia-410m", torch.float16)
    (model / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    make_hf(folder / "pythia-20b", torch.float16, hidden_size=64, num_attention_heads=8)
    shell = Shell(folder / "shell", "http://127.0.0.1:9")
    shell.cwd = folder
    shell.run("neox-bridge convert pythia-410m pythia-neox --tp 2 -q")
    run = write_run(folder / "run")
    for name in RUNS[1:]:
        shutil.copytree(run, folder / name)
    shell.run("neox-bridge convert run exported --step 1000 -q")
    shutil.rmtree(folder / "shell")
    (folder / "downloaded.bin").write_bytes(_HOSTILE)
    return folder


def write_run(folder: Path) -> Path:
    """A run with a global batch of 8, and more steps, whose weights differ a little."""
    import torch

    shutil.copytree(RUN_OF_TWO_RANKS, folder)
    step = folder / (folder / "latest").read_text().strip()
    for path in (step / "configs").iterdir():
        path.write_text(path.read_text().replace('_per_gpu": 2', '_per_gpu": 4'))
    for path in step.glob("mp_rank*"):
        value = torch.load(path, weights_only=False)
        value["ds_config"] |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4}
        torch.save(value, path)
    for number in RUN_STEPS:
        at_step(step, number, folder / f"global_step{number}")
    return folder


def at_step(source: Path, number: int, folder: Path) -> Path:
    """A copy that says that it is another step, with slightly larger weights."""
    import torch

    shutil.copytree(source, folder)
    for path in folder.glob("*model_states.pt"):
        value = torch.load(path, weights_only=False)
        if path.name.startswith("mp_rank"):
            value |= {"iteration": number, "global_steps": number, "global_samples": number * 1024}
        else:
            value = type(value)(
                (name, tensor * (1 + (number + 500) / 2**15)) for name, tensor in value.items()
            )
        torch.save(value, path)
    return folder


def saved_by_many_ranks(folder: Path) -> Path:
    """The raw checkpoint as 64 data-parallel ranks save it, and its yml with their micro-batch."""
    setting = '"train_micro_batch_size_per_gpu": 2'
    text = (RAW_CHECKPOINT / "160M.yml").read_text()
    assert setting in text
    shell = Shell(folder, "http://127.0.0.1:9")
    larger = shutil.copytree(RAW_CHECKPOINT, shell.cwd / "larger")
    total = RANKS * MICRO_BATCH // 4
    (larger / "160M.yml").write_text(text.replace(setting, setting[:-1] + str(total)))
    shell.run(f"neox-bridge reshard larger run --dp {RANKS} -q")
    flat = shutil.copytree(shell.cwd / "run" / "global_step8", shell.cwd / "flat")
    shutil.rmtree(flat / "configs")
    (flat / "neox_bridge.json").unlink()
    (flat / "160M.yml").write_text(text.replace(setting, setting[:-1] + str(MICRO_BATCH)))
    return flat


def put_suite(stub: Stub, flat: Path, folder: Path) -> None:
    """A raw suite on the Hub, and its twin for transformers, with a tokenizer on ``main``."""
    shell = Shell(folder / "suite", "http://127.0.0.1:9")
    stub_model = shell.cwd / "model"
    shell.run(f"neox-bridge convert {flat} model -q")
    (stub_model / "neox_bridge.json").unlink()
    stub.put_files(TWIN, "main", stub_model)
    stub.put(TWIN, "main", **{"tokenizer.json": json.dumps(TOKENIZER).encode()})
    for step in RAW_STEPS:
        stub.put_files(RAW, f"step{step}", said_to_be(step, flat, shell.cwd / f"step{step}"))
        stub.put_files(TWIN, f"step{step}", stub_model)


def said_to_be(step: int, flat: Path, folder: Path) -> Path:
    """A copy of a raw checkpoint that says that it is another step."""
    import torch

    shutil.copytree(flat, folder)
    path = folder / "mp_rank_00_model_states.pt"
    value = torch.load(path, weights_only=False)
    value |= {"iteration": step, "global_steps": step, "global_samples": step * 1024}
    torch.save(value, path)
    return folder


# What happens before a command: a training, an accident


def train(cwd: Path) -> None:
    """Save a step where the run's settings say, with a copy of them, as GPT-NeoX does."""
    run = cwd / "pythia-neox"
    settings = yaml.safe_load((run / "finetune.yml").read_text())
    step = Path(settings["save"]) / "global_step0"
    shutil.copytree(run / "global_step0", step)
    (step / "neox_bridge.json").unlink()
    shutil.rmtree(step / "configs")
    (step / "configs").mkdir()
    shutil.copy(run / "finetune.yml", step / "configs")
    (step.parent / "latest").write_text(step.name)


def make_sick(cwd: Path) -> None:
    """A NaN and two rows of zeros in the run's latest step."""
    import torch

    step = cwd / "run" / (cwd / "run" / "latest").read_text().strip()
    path = step / "layer_02-model_00-model_states.pt"
    value = torch.load(path, weights_only=False)
    value["mlp.linear1.weight"][0, 0] = float("nan")
    value["mlp.linear2.weight"][3:5] = 0
    torch.save(value, path)
    other = step / "layer_02-model_01-model_states.pt"
    value = torch.load(other, weights_only=False)
    value["mlp.linear2.weight"][3:5] = 0
    torch.save(value, other)


def mix_up(cwd: Path) -> None:
    """A run in which a step misses a file, and another has a file of a third."""
    run = cwd / "run"
    shutil.rmtree(run)
    shutil.copytree(cwd / "old-run", run)
    first = run / (run / "latest").read_text().strip()
    shutil.rmtree(run / "global_step0")
    for number in (3000, 4000, 5000):
        at_step(first, number, run / f"global_step{number}")
    shutil.rmtree(first)
    (run / "latest").write_text("global_step5000")
    (run / "global_step3000" / "layer_02-model_00-model_states.pt").unlink()
    name = "layer_03-model_01-model_states.pt"
    shutil.copy(run / "global_step5000" / name, run / "global_step2000" / name)


def change_gelu(cwd: Path) -> None:
    """Another activation than the run's in the exported model."""
    path = cwd / "exported" / "config.json"
    path.write_text(path.read_text().replace('"gelu"', '"gelu_fast"'))


BEFORE: Mapping[str, Callable[[Path], None]] = {
    "neox-bridge convert pythia-neox/finetuned pythia-finetuned": train,
    "neox-bridge inspect run/ --stats --tensor '*layers.0.mlp*.weight'": make_sick,
    "neox-bridge audit run": mix_up,
    "neox-bridge verify run/global_step1000 exported --logits": change_gelu,
}


# A page


@contextmanager
def stage(name: str, folder: Path, source: Path) -> Iterator[Shell]:
    """A shell in the prepared folder of a page. source: what ``materials`` wrote."""
    text = (ROOT / name).read_text(encoding="utf-8")
    stub = Stub()
    stub.writable += ("my-org/",)
    model = source / "pythia-410m"
    for repo in [repo for repo in ("pythia-70m", "pythia-410m") if f"EleutherAI/{repo}" in text]:
        for revision in ("main", "step0", "step1000", "step100000", "step143000"):
            stub.put_files(f"EleutherAI/{repo}", revision, model)
    if name == ANY_MODEL:
        import hf_families

        stub.put_files("Qwen/Qwen3-0.6B", "main", hf_families.make("qwen3", folder / "qwen3"))
    with ExitStack() as stack:
        if RAW in text:
            flat = saved_by_many_ranks(folder / "flat") if name == PYTHIA else RAW_CHECKPOINT
            put_suite(stub, flat, folder / "raw")
        stack.enter_context(serving(stub))
        if "s3://" in text:
            import s3_server
            import store_files

            stack.enter_context(s3_server.server())
            for path in ("run", "pythia-410m"):
                store_files.upload(source / path, store_files.s3(path))
        shell = Shell(folder / "page", stub.url)
        shell.environment["HF_TOKEN"] = WRITE
        if "/path/to/gpt-neox" in text:
            tree = write_tree("2024-09", folder / "gpt-neox")
            shell.places["/path/to/gpt-neox"] = str(tree)
        if name not in SELF_CONTAINED:
            shutil.copytree(source, shell.cwd, dirs_exist_ok=True)
            prepare(name, shell)
        yield shell


def write_overflow(cwd: Path) -> None:
    """A Llama with a value that float16 cannot hold, and its cast."""
    import torch
    from common import make_hf
    from safetensors.torch import load_file, save_file

    model = make_hf(cwd / "llama-bf16", torch.bfloat16, family="llama")
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e6
    save_file(tensors, path, {"format": "pt"})


def write_other_families(cwd: Path) -> None:
    """Models of families that are not converted: copies, a quantized one, and a run."""
    import hf_families
    import torch

    model = hf_families.make("glm4_moe", cwd / "glm-4")
    for name in ("glm-4-copy", "glm-4-tuned", "glm-4-fp8"):
        shutil.copytree(model, cwd / name)

    def tune(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][0] += 0.01
        tensors["model.norm.weight"] *= 1.5

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "proj.weight" in name]:
            tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = torch.tensor([0.01])

    hf_families.changed(cwd / "glm-4-tuned", tune)
    hf_families.changed(cwd / "glm-4-fp8", quantize)
    config = json.loads((cwd / "glm-4-fp8" / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    text = json.dumps({**config, "quantization_config": settings}, indent=2)
    (cwd / "glm-4-fp8" / "config.json").write_text(text)
    for number in range(1000, 5000, 1000):
        step = hf_families.make("qwen3", cwd / "steps" / f"step{number}")
        scale = 1 + number / 10**5

        def train(tensors: dict[str, torch.Tensor], scale: float = scale) -> None:
            for tensor in tensors.values():
                tensor *= scale

        hf_families.changed(step, train)


def write_repositories(cwd: Path) -> None:
    """Models of families that are not converted: with damaged files, and with a wrong index."""
    from hf_families import make

    damaged = make("olmo2", cwd / "olmo-2", max_shard_size="30KB")
    first, *_, last = sorted(damaged.glob("model-*.safetensors"))
    shutil.copy(first, damaged / "model-00001-of-00009.safetensors")
    first.unlink()
    last.write_bytes(last.read_bytes()[:-100])
    index = make("qwen3", cwd / "qwen3", max_shard_size="30KB") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 4096
    index.write_text(json.dumps(content))


def prepare(name: str, shell: Shell) -> None:
    """What only one page has."""
    if "~/gpt-neox" in (ROOT / name).read_text(encoding="utf-8"):
        date = "today" if name == "docs/how-to/patch.md" else "2024-03"
        write_tree(date, shell.home / "gpt-neox")
    commands = {
        "README.md": "rm -r pythia-neox",
        "docs/how-to/doctor.md": (
            "rm -r pythia-neox; neox-bridge convert pythia-410m pythia-neox -q"
        ),
        "docs/explanation/writing.md": (
            "rm -r pythia-neox; cp -r pythia-410m hf; "
            "neox-bridge toy pythia-70m pythia-12b --as hf -q"
        ),
        "docs/how-to/verify.md": "neox-bridge convert llama-bf16 llama-fp16 --dtype float16 -q",
        "docs/how-to/batch.md": (
            "mkdir runs; cp -r run runs/pythia-70m; cp -r run runs/pythia-160m"
        ),
        "docs/how-to/publish.md": "neox-bridge convert pythia-neox pythia-hf -q",
        "docs/how-to/python.md": (
            "rm -r pythia-neox; mkdir steps; "
            "cp -r pythia-410m steps/step0; cp -r pythia-410m steps/step1000"
        ),
        "docs/reference/python-api.md": "rm -r pythia-neox",
        "docs/how-to/reshard.md": (
            "neox-bridge reshard run run-dp1 --dp 1 --micro-batch 8 -q; cp -r run run-dp2"
        ),
    }
    if name in (ANY_MODEL, "docs/how-to/verify.md"):
        write_other_families(shell.cwd)
    if name == "docs/how-to/verify.md":
        write_overflow(shell.cwd)
    if name == "docs/how-to/doctor.md":
        write_repositories(shell.cwd)
    (shell.cwd / "traceback.txt").write_text(TRACEBACK)
    if name in commands:
        shell.run(commands[name])


@contextmanager
def cluster(shell: Shell) -> Iterator[None]:
    """A Ray cluster of one node."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the node
    ray_cluster = Cluster()
    try:
        ray_cluster.add_node(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False)
        shell.environment["RAY_ADDRESS"] = ray_cluster.address
        shell.places["first:6379"] = ray_cluster.address
        yield
    finally:
        ray_cluster.shutdown()


def runs(command: Command) -> bool:
    """Whether there is a stand-in for everything that the command needs."""
    return "neox-bridge" in command.text or command.text.startswith(ALSO_RUN)


def is_for_ray(command: Command) -> bool:
    return "--executor ray" in command.text


def perform(command: Command, shell: Shell) -> str:
    """What a command of a page prints. Raises Failed."""
    if command.text in BEFORE:
        BEFORE[command.text](shell.cwd)
    starts = [start for start in EXITS if f"{command.text}\n".startswith(start)]
    code = EXITS[max(starts, key=len)] if starts else 0
    interrupt = any(line.startswith("^C") for line in command.shown)
    return shell.run(command.text, code, interrupt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", metavar="PAGE")
    parser.add_argument("--update", action="store_true", help="write the pages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = materials(folder / "materials")
        for number, page in enumerate(options.pages):
            name = Path(page).resolve().relative_to(ROOT).as_posix()
            outputs = []
            with stage(name, folder / str(number), source) as shell:
                for command in filter(runs, commands(ROOT / name)):
                    if is_for_ray(command):
                        continue
                    try:
                        output = perform(command, shell)
                    except Failed as error:
                        print(f"{name}: {error}")
                        output = error.output
                    if problem := difference(command, output):
                        print(f"{name}: {command.text}\n  {problem}")
                    outputs.append((command, output))
            if options.update and update(ROOT / name, outputs):
                print(f"updated {name}")
