"""Names of files of weights, and of those that GPT-NeoX and DeepSpeed write for a step."""

import re
from collections.abc import Iterable

# small files that describe the components of a repository
_MODEL_TEXTS = ("model_index.json", "modules.json", "adapter_config.json")
# of transformers
HF_WEIGHTS = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?")
STEP = re.compile(r"global_step(\d+)")  # the folder
LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
ZERO3 = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
# DeepSpeed before 0.3.14 (10c0bea6, #865) left out the underscore before "optim"; the loader of
# later versions still tries that name (runtime/engine.py)
OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")


def layer_file(layer: int, rank: int) -> str:
    """The name of a layer's file of a tensor-parallel rank."""
    return f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"


def rank_file(number: int) -> str:
    """The name of an mp_rank file; number: stage x tensor-parallel size + rank."""
    return f"mp_rank_{number:02d}_model_states.pt"


def states_file(rank: int, number: int) -> str:
    """The name of a file of optimizer states. rank: data-parallel. number: of the mp_rank file."""
    return f"zero_pp_rank_{rank}_mp_rank_{number:02d}_optim_states.pt"


def zero3_file(rank: int, number: int) -> str:
    """The name of a model file of ZeRO stage 3. rank: data-parallel. number: model-parallel."""
    return f"zero_pp_rank_{rank}_mp_rank_{number:02d}_model_states.pt"


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights: a layer's, or a rank's."""
    return any(form.fullmatch(name) for form in (LAYER, RANK, ZERO3))


def is_step_file(name: str) -> bool:
    """Whether GPT-NeoX or DeepSpeed gives this name to a file of a step."""
    return is_weights(name) or OPTIMIZER.fullmatch(name) is not None


def optimizer_files(names: Iterable[str]) -> tuple[str, ...]:
    """The files of optimizer states among these names, by model-parallel, then data-parallel rank.

    The numbers of the data-parallel ranks have no leading zeros, so that as text rank 10 comes
    before rank 2.
    """
    ranked = [(int(m[3]), int(m[2]), m[0]) for name in names if (m := OPTIMIZER.fullmatch(name))]
    return tuple(name for _, _, name in sorted(ranked))


def is_model_text(path: str) -> bool:
    """Whether a file of a repository describes weights: a config or an index in any folder."""
    name = path.rpartition("/")[2]
    return name in _MODEL_TEXTS or name == "config.json" or name.endswith(".index.json")
