"""GPT-NeoX's package ``megatron`` as far as neox_bridge.training wraps it, without DeepSpeed.

The names, signatures and calls are those of GPT-NeoX (megatron/training.py, checkpointing.py,
neox_arguments/arguments.py); the bodies are our own.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Megatron:
    """The modules, and what was called. engine: what setup creates, with ``module``."""

    def __init__(self, tree: Path, engines: list[Any]) -> None:
        self.calls: list[Any] = []
        self.engines = engines
        self.modules = {name: ModuleType(name) for name in _MODULES}
        self.modules["megatron"].__path__ = [str(tree / "megatron")]
        for name in ("get_model_parallel_rank", "get_data_parallel_rank"):
            self.modules["megatron.mpu"].__dict__[name] = lambda: 0
        self._arguments()
        self._training()

    def __getattr__(self, name: str) -> Any:
        return self.modules[f"megatron.{name}"]

    @property
    def arguments(self) -> Any:
        return self.modules["megatron.neox_arguments.arguments"]

    def _arguments(self) -> None:
        @dataclass
        class NeoXArgsModel:
            num_layers: int = None  # type: ignore[assignment]

        @dataclass
        class NeoXArgsTraining:
            """What a run trains."""

            load: str = None  # type: ignore[assignment]
            save: str = None  # type: ignore[assignment]
            finetune: bool = False

        @dataclass
        class NeoXArgs(NeoXArgsModel, NeoXArgsTraining):
            def __post_init__(self) -> None:
                for name, field in self.__dataclass_fields__.items():
                    value = getattr(self, name)
                    assert value is None or isinstance(value, field.type), name

        for cls in (NeoXArgsModel, NeoXArgsTraining, NeoXArgs):
            setattr(self.arguments, cls.__name__, cls)

    def _training(self) -> None:
        checkpointing, training = self.checkpointing, self.training
        calls = self.calls

        def load_checkpoint(neox_args, model, optimizer, lr_scheduler, iteration=None):  # type: ignore[no-untyped-def]
            """Load a model checkpoint and return the iteration."""
            calls.append(("load", neox_args.load, neox_args.finetune))
            return 0 if neox_args.finetune else 7

        def save_checkpoint(neox_args, iteration, model, optimizer, lr_scheduler):  # type: ignore[no-untyped-def]
            calls.append(("save", iteration))

        def setup_model_and_optimizer(neox_args, use_cache=False, iteration=None):  # type: ignore[no-untyped-def]
            for number, engine in enumerate(self.engines):
                loaded = training.load_checkpoint(
                    neox_args=neox_args,
                    model=engine,
                    optimizer=None,
                    lr_scheduler=None,
                    iteration=iteration,
                )
                if number == 0:
                    neox_args.iteration = loaded
            return self.engines[0], None, None

        def pretrain(neox_args):  # type: ignore[no-untyped-def]
            training.setup_model_and_optimizer(neox_args=neox_args, use_cache=False)
            for iteration in self.saves:
                training.save_checkpoint(
                    neox_args=neox_args,
                    iteration=iteration,
                    model=self.engines[0],
                    optimizer=None,
                    lr_scheduler=None,
                )

        def setup_for_inference_or_eval(neox_args):  # type: ignore[no-untyped-def]
            return training.setup_model_and_optimizer(neox_args=neox_args, use_cache=True)

        self.saves: list[int] = []
        self.utils.setup_for_inference_or_eval = setup_for_inference_or_eval
        checkpointing.load_checkpoint = training.load_checkpoint = load_checkpoint
        checkpointing.save_checkpoint = training.save_checkpoint = save_checkpoint
        training.setup_model_and_optimizer = setup_model_and_optimizer
        training.pretrain = pretrain


_MODULES = (
    "megatron",
    "megatron.mpu",
    "megatron.utils",
    "megatron.training",
    "megatron.checkpointing",
    "megatron.neox_arguments",
    "megatron.neox_arguments.arguments",
)


class Engine:
    """A DeepSpeed engine without pipeline stages. refreshed: how often its masters were."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.module = SimpleNamespace(state_dict=lambda: parameters)
        self.optimizer = SimpleNamespace(refresh_fp32_params=self._refresh)
        self.parameters, self.refreshed = parameters, 0

    def _refresh(self) -> None:
        self.refreshed += 1


def use(megatron: Megatron, monkeypatch: pytest.MonkeyPatch) -> Megatron:
    """Let this process import the stand-in."""
    for name, module in megatron.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return megatron
