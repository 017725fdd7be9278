"""``verify --logits`` of Hugging Face models of any family, which transformers computes.

A process of its own computes, so that a crash, a lack of memory or a hang of it ends in a message.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from neox_bridge.errors import BridgeError, Refused
from neox_bridge.extras import missing
from neox_bridge.layouts.stored_model import StoredModel
from neox_bridge.stores.paths import is_local
from neox_bridge.verification.logits import (
    LAYER,
    LOGITS,
    Agreement,
    LoadChange,
    apart,
    describe_non_finite,
    measure,
)
from neox_bridge.verification.transformers_run import ANSWER, STAGE, Answer, Loaded, Request
from neox_bridge.wording import human, one_line

# The search path of this process, so that the current folder is not searched for modules.
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from neox_bridge.verification.transformers_run import main; main()"
)
_ENVIRONMENT = {
    **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    **{"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
}
BASE_SECONDS = 3600  # a process may take this long, and
_BYTES_PER_SECOND = 20_000_000  # the time to read and compute this much, twice


def compare_stored_logits(
    first: StoredModel, second: StoredModel, tokens: str | None, device: str = "cpu"
) -> dict[str, Agreement]:
    """Compare the logits of two repositories, by "logits".

    If the tokens come with recorded logits, those of the first are compared with them as well, by
    "recorded". tokens: as of ``read_tokens``.

    Raises:
        Refused: transformers has no class for one of them that computes logits, or the class is in
            the repository.
        BridgeError: transformers is missing, or cannot compute one of them.
    """
    models = first, second
    for model in models:
        if not is_local(model.path):
            raise Refused(
                f"{model.path}: transformers computes only models on the local disk. Download it, "
                "and name the folder."
            )
    if find_spec("transformers") is None:
        raise missing("`logits=True` computes models with transformers, which is missing", "verify")
    with tempfile.TemporaryDirectory(prefix="neox-bridge-") as folder:
        paths = first.path, second.path
        safetensors = _has_safetensors(first), _has_safetensors(second)
        tokenizers = first.tokenizer, second.tokenizer
        request = Request(paths, tokenizers, safetensors, tokens, device, folder)
        answer = answer_of(request, models)
        changes = tuple(_changes(answer, paths))
        agreements = {"logits": _compared(answer, folder, models, changes)}
        if answer.recorded:
            agreements["recorded"] = _recorded(folder, first, changes)
        return agreements


def _has_safetensors(model: StoredModel) -> bool:
    """Whether the main weights are in safetensors files, and not in pickles."""
    return model.components[0].files[0].endswith(".safetensors")


def answer_of(request: Request, models: tuple[StoredModel, ...]) -> Answer:
    """What the process that computes the models answers.

    Raises Refused or BridgeError if it could not, also if it crashed or took too long.
    """
    program = [sys.executable, "-c", _PROGRAM, *sys.path]
    seconds = BASE_SECONDS + 2 * sum(model.size for model in models) / _BYTES_PER_SECOND
    try:
        done = subprocess.run(
            program,
            input=json.dumps(asdict(request)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
            timeout=seconds,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BridgeError(
            f"{_stage(request)[1]} with transformers took longer than {seconds / 3600:.1f} hours "
            "and was stopped. Use fewer tokens: `tokens=FILE`."
        ) from None
    file = os.path.join(request.folder, ANSWER)
    if done.returncode == 0 and os.path.isfile(file):
        with open(file, encoding="utf-8") as text:
            words = json.load(text)
        answer = Answer(**{**words, "sides": tuple(Loaded(**side) for side in words["sides"])})
        if answer.exit_code == Refused.exit_code:
            raise Refused(answer.error)
        if answer.error:
            raise BridgeError(answer.error)
        if not answer.out_of_memory:
            return answer
    side, stage = _stage(request)
    killed = done.returncode == -signal.SIGKILL
    if killed or (done.returncode == 0 and os.path.isfile(file)):
        why = "the system ended the process, most likely because" if killed else "the process says"
        wide = sum(tensor.elements for tensor in models[side].stored.values()) * 4
        raise BridgeError(
            f"{stage} with transformers needs more memory than there is ({why} memory ran out). In "
            f"float32 its weights have {human(wide)}. Use a machine with more memory, or compare "
            "the tensors alone, without `logits=True`."
        )
    lines = done.stderr.strip().splitlines()
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
    raise BridgeError(
        f"{stage} with transformers failed: the process ended with {how}"
        f"{f' ({one_line(lines[-1])})' if lines else ''}. Try another version of torch or "
        "transformers, or compare the tensors alone, without `logits=True`."
    )


def _stage(request: Request) -> tuple[int, str]:
    """The side with which the process was busy, and what it did, to begin a sentence."""
    try:
        with open(os.path.join(request.folder, STAGE), encoding="utf-8") as file:
            words = json.load(file)
    except (OSError, ValueError):
        return 0, f"Reading the configs of {' and '.join(request.paths)}"
    doing = {"loading": "Loading", "computing": "Computing"}[words["stage"]]
    return words["side"], f"{doing} {request.paths[words['side']]}"


def _changes(answer: Answer, paths: tuple[str, ...]) -> Iterator[LoadChange]:
    for path, side in zip(paths, answer.sides, strict=True):
        if side.missing:
            yield LoadChange(path, "initialized", side.missing)
        if side.unexpected:
            yield LoadChange(path, "ignored", side.unexpected)


def _compared(
    answer: Answer,
    folder: str,
    models: tuple[StoredModel, ...],
    changes: tuple[LoadChange, ...],
) -> Agreement:
    if changes:
        return Agreement(0, 0.0, 0.0, 0.0, 0.0, 0.0, load_changes=changes)
    logits = [_array(folder, f"logits-{side}") for side in range(2)]
    rows = min(one.shape[-1] for one in logits)
    a, b = (one[..., :rows].flatten(0, -2) for one in logits)
    measured = measure(a, b)
    if (odd := describe_non_finite(a, b, models)) is not None:
        differs = partial(_differ_in_finite, same_places=odd.same_places)
        return replace(measured, non_finite=odd, place=_first_module(answer, folder, differs)[0])
    if measured.relative <= LOGITS:
        return measured
    place, size = _first_module(answer, folder, lambda x, y: apart(x, y) > LAYER)
    if place == "logits" and measured.relative <= LAYER:
        return measured
    return replace(measured, place=place, apart=size if place != "logits" else measured.relative)


def _differ_in_finite(a: Tensor, b: Tensor, same_places: bool) -> bool:
    """Whether values are not finite: on both sides, or only on one side."""
    bad = ~a.isfinite(), ~b.isfinite()
    if bad[0].shape != bad[1].shape or bool((bad[0] != bad[1]).any()):
        return True
    return same_places and bool(bad[0].any())


def _first_module(
    answer: Answer, folder: str, differs: Callable[[Tensor, Tensor], bool]
) -> tuple[str, float]:
    """The first module whose outputs differ, and by how much; "logits" if there is none."""
    first, second = (side.modules for side in answer.sides)
    for number, (name, other) in enumerate(zip(first, second, strict=False)):
        if name != other:
            break  # they are computed by other classes
        a, b = (_array(folder, f"{side}-{number}") for side in range(2))
        if differs(a, b):
            size = apart(a, b)
            return name, size if math.isfinite(size) else 0.0
    return "logits", 0.0


def _recorded(folder: str, model: StoredModel, changes: tuple[LoadChange, ...]) -> Agreement:
    """Compare the logits of the first model with the recorded ones."""
    changes = tuple(change for change in changes if change.path == model.path)
    if changes:
        return Agreement(0, 0.0, 0.0, 0.0, 0.0, 0.0, load_changes=changes)
    recorded, logits = _array(folder, "recorded"), _array(folder, "logits-0")
    if recorded.shape[:-1] != logits.shape[:-1]:
        raise BridgeError(
            f"`tokens=`: the recorded logits have the shape {list(recorded.shape)}, and the model "
            f"computes {list(logits.shape)}. They must contain one row of logits per token."
        )
    rows = min(recorded.shape[-1], logits.shape[-1])
    wanted, computed = (one[..., :rows].flatten(0, -2) for one in (recorded, logits))
    agreement = measure(wanted, computed)
    if (odd := describe_non_finite(computed, wanted, (model,))) is not None:
        return replace(agreement, non_finite=odd, place="the recorded logits")
    dtypes = {tensor.dtype for tensor in model.stored.values() if len(tensor.shape) > 1}
    # recorded logits of a half-precision model were computed in half precision
    if agreement.relative <= (LOGITS if dtypes <= {"float32", "float64"} else 0.02):
        return agreement
    return replace(agreement, place="the recorded logits", apart=agreement.relative)


def _array(folder: str, name: str) -> Tensor:
    return torch.from_numpy(np.load(os.path.join(folder, f"{name}.npy"), allow_pickle=False))
