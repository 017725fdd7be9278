"""What one writes by hand, for TP 1: torch.load and save_file, or load_file and torch.save.

by_hand.py to-hf|to-neox SOURCE TARGET
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OUTSIDE = {
    "word_embeddings.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "final_linear.weight": "embed_out.weight",
}
INSIDE = (("mlp.linear1.", "mlp.dense_h_to_4h."), ("mlp.linear2.", "mlp.dense_4h_to_h."))


def to_hf(source: Path, target: Path) -> None:
    state = {}
    for path in sorted(source.glob("global_step*/layer_*-model_00-model_states.pt")):
        block = int(path.name.split("-")[0][len("layer_") :]) - 2
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
            full = OUTSIDE.get(name, f"gpt_neox.layers.{block}.{name}")
            for neox, hf in INSIDE:
                full = full.replace(neox, hf)
            state[full] = tensor
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})


def to_neox(source: Path, target: Path) -> None:
    state = load_file(source / "model.safetensors")
    layers = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    numbers = {"gpt_neox.embed_in": 0, "gpt_neox.final_layer_norm": layers + 3}
    names = {hf: neox for neox, hf in OUTSIDE.items()}
    files: dict[int, dict[str, torch.Tensor]] = {}
    for full, tensor in state.items():
        if ".layers." in full:
            block, name = full.split(".layers.")[1].split(".", 1)
            number = int(block) + 2
            for neox, hf in INSIDE:
                name = name.replace(hf, neox)
        else:
            number, name = numbers.get(full.rpartition(".")[0], layers + 4), names[full]
        # a tensor that is a view would take all that it is a view of into its file
        files.setdefault(number, {})[name] = tensor.clone()
    for number, tensors in files.items():
        torch.save(tensors, target / f"layer_{number:02}-model_00-model_states.pt")


if __name__ == "__main__":
    way, source, target = sys.argv[1:]
    Path(target).mkdir()
    {"to-hf": to_hf, "to-neox": to_neox}[way](Path(source), Path(target))
