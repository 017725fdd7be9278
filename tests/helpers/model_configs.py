"""A ModelConfig of one layer."""

from neox_bridge.architectures.base import ModelConfig


def config(head: int = 64, fraction: float = 0.25, base: float = 10000.0) -> ModelConfig:
    return ModelConfig(
        layers=1,
        heads=2,
        dims={"hidden": 2 * head},
        max_positions=32,
        norm_eps=1e-5,
        rotary_pct=fraction,
        rotary_base=base,
        activation="gelu",
        parallel_residual=True,
        tied_norms=False,
        tied_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        dtype="float32",
    )
