"""The sizes of the Pythia models, from their config files (EleutherAI/pythia, models/)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of a model. rows: of the published embeddings, with their padding."""

    layers: int
    hidden: int
    heads: int
    rows: int = 50304


TOKENIZER_SIZE = 50277  # entries of the Pythia tokenizer
PYTHIA = {
    "pythia-70m": ModelSize(6, 512, 8),
    "pythia-160m": ModelSize(12, 768, 12),
    "pythia-410m": ModelSize(24, 1024, 16),
    "pythia-1b": ModelSize(16, 2048, 8),
    "pythia-1.4b": ModelSize(24, 2048, 16),
    "pythia-2.8b": ModelSize(32, 2560, 32),
    "pythia-6.9b": ModelSize(32, 4096, 32, 50432),
    "pythia-12b": ModelSize(36, 5120, 40, 50688),
}
