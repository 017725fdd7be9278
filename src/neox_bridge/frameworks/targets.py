"""What ``--for`` names: a GPT-NeoX source tree or one of some time; a version of transformers."""

import datetime
import os
import re
from dataclasses import replace

from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.eras import ERAS, era_named, known_keys
from neox_bridge.frameworks.facts import TransformersFacts, TreeFacts
from neox_bridge.frameworks.source_tree import looks_like_tree, read_tree

Target = TreeFacts | TransformersFacts

# What a checkpoint's args hold, the same in all four trees (megatron/checkpointing.py)
ARGS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "tokenizer_type",
    "model_parallel_size",
)
# the commits that changed what a checkpoint must be, oldest first, and the fields that they changed
# (dates: of the commits in GPT-NeoX's history; each field's source is in frameworks/source_tree.py)
_OLDEST = TreeFacts(
    path="",
    inv_freq="always",
    mlp_names="dense",
    gqa_order="interleaved",
    rms_eps="outside",
    gated_biases="none",
    plain_mlp_4h=True,
    rope_tables_fp32=False,
    transformer_engine=False,
    args_checked=ARGS,
    keys=frozenset(),
    states="sub-partitions",
)
_CHANGES: tuple[tuple[str, str, dict[str, object]], ...] = (
    (
        "9610391ab319403cef079b438edd016a2443af54",
        "2023-03-09",
        {"states": "partitions"},
    ),
    ("3bfedf47cc86679c305e6430b71f82ae99a2a265", "2023-09-25", {"rope_tables_fp32": True}),
    ("e109bf5e068bd64bfd08e5ade4191a7ba3e796e3", "2024-03-04", {"inv_freq": "flag"}),
    (
        "0d4bdb965e3bd9eed6df8f5a4f024f9ff310601c",
        "2024-09-06",
        {"mlp_names": "linear", "plain_mlp_4h": False, "gated_biases": "by activation"},
    ),
    ("96c242ebfc61935ea17868b3dec3847da7dfe071", "2024-11-13", {"gqa_order": "grouped"}),
    ("f5325805678c2b9e35aae4528283e0132c5f5bbc", "2024-11-27", {"gated_biases": "optional"}),
    ("8900d05c8df1f2f5728a5305b5a1447697b548ac", "2024-12-19", {"transformer_engine": True}),
    ("4c9f10816d15a8173fc8779a4c261c3f7dff5155", "2025-05-09", {"rms_eps": "inside"}),
    ("ea7aefd8f8e183256992d9fede4d7c71a46d67a5", "2026-05-19", {}),
)
# the DeeperSpeed that requirements/requirements.txt names, by the date of the commit: 9610391a (any
# DeepSpeed, of which 0.8.3 was the newest), 9283effb, df8cf244, 62aded2e
_DEEPSPEED = (
    ("", "0.3.15"),
    ("2023-03-09", "0.8.3"),
    ("2023-12-20", "0.9.3"),
    ("2024-03-04", "0.12.4"),
    ("2025-03-06", "0.16.5"),
)
# the last state of each era: how many of the changes it has
_ERA_STATE = {"v1.0": 0, "2024-03": 2, "2024-09": 3, "2024-10": 4, "today": len(_CHANGES)}
_HEX = re.compile(r"[0-9a-f]{7,40}")
_DATE = re.compile(r"(\d{4})-(\d\d)(?:-(\d\d))?")


def target_named(text: str) -> Target:
    """What ``--for TEXT`` names.

    ``neox:TREE`` (a folder), ``neox@2024-03`` or another date or a commit, ``today``,
    ``transformers@4.48``, ``transformers`` (the one installed here). Raises BridgeError.
    """
    if text.startswith("neox:"):
        return read_tree(os.path.expanduser(text.removeprefix("neox:")))
    if text == "transformers" or text.startswith("transformers@"):
        return _transformers(text.removeprefix("transformers").removeprefix("@"))
    if looks_like_tree(text):
        return read_tree(text)
    return _neox(text.removeprefix("neox@"), text)


def _neox(name: str, text: str) -> TreeFacts:
    if name in _ERA_STATE:
        return replace(
            _state(_ERA_STATE[name], f"neox@{name}"), deepspeed=era_named(name).deepspeed
        )
    if _HEX.fullmatch(name):
        for count, (commit, date, _) in enumerate(_CHANGES, 1):
            if commit.startswith(name):
                return replace(_state(count, f"neox@{name}"), deepspeed=_deepspeed_on(date))
        raise BridgeError(
            f"--for {text}: this commit isn't one of those known to change checkpoints, so its "
            "time can't be told. Name its date (neox@2024-05-01) or the tree (neox:FOLDER)."
        )
    if (match := _DATE.fullmatch(name)) and _is_date(name):
        year, month, day = match[1], match[2], match[3]
        first = f"{year}-{month}-{day or '01'}"
        last = first if day else f"{year}-{month}-31"
        between = [(c, d) for c, d, fields in _CHANGES if fields and first <= d <= last]
        if between:
            commit, date = between[0]
            raise BridgeError(
                f"--for {text}: checkpoints changed then, by {commit[:8]} on {date}. Name a day "
                f"before or after it, or neox@{commit[:8]} for the tree that has it."
            )
        count = sum(date <= first for _, date, _ in _CHANGES)
        return replace(_state(count, f"neox@{name}"), deepspeed=_deepspeed_on(first))
    known = ", ".join(f"neox@{era.name}" for era in ERAS)
    raise BridgeError(
        f"--for {text}: not known. Say neox:FOLDER for a source tree, {known}, a date "
        "(neox@2024-05-01), a commit, transformers@VERSION, or transformers for the installed one."
    )


def _deepspeed_on(date: str) -> str:
    """The version that GPT-NeoX required on a day."""
    return next(version for since, version in reversed(_DEEPSPEED) if since <= date)


def _is_date(text: str) -> bool:
    """Whether a year and month, or a day, is in the calendar."""
    try:
        datetime.date.fromisoformat(text if len(text) > len("2024-05") else f"{text}-01")
    except ValueError:
        return False
    return True


def _state(count: int, name: str) -> TreeFacts:
    """The tree with the first ``count`` changes; the keys are those of its era's last tree."""
    facts = _OLDEST
    for _, _, fields in _CHANGES[:count]:
        facts = replace(facts, **fields)  # type: ignore[arg-type]
    era = next(era for era in ERAS if _ERA_STATE[era.name] >= count)
    return replace(facts, path=name, keys=known_keys(era))


def _transformers(version: str) -> TransformersFacts:
    """The facts of a version; "" is the installed one."""
    if not version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        try:
            version = installed("transformers")
        except PackageNotFoundError:
            raise BridgeError(
                "--for transformers: it isn't installed here. Name a version: transformers@4.48."
            ) from None
    if re.match(r"\d+\.\d+", version) is None:
        raise BridgeError(f"--for transformers@{version}: not a version. Write transformers@4.48.")
    number = version_number(version)
    if number < (4, 20):
        raise BridgeError(
            f"--for transformers@{version}: GPTNeoXForCausalLM came with transformers 4.20."
        )
    return TransformersFacts(
        version=version,
        persistent_inv_freq=number < (4, 35),
        rope_parameters=number >= (5, 0),
        loses_rotary_pct=(5, 0) <= number < (5, 5),
    )


def version_number(version: str) -> tuple[int, int]:
    """(4, 48) of ``4.48.3``, to compare."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def knows_attention_bias(facts: TransformersFacts) -> bool:
    """gpt_neox's ``attention_bias: false`` came with 4.37 (modeling_gpt_neox.py)."""
    return version_number(facts.version) >= (4, 37)


def keeps_stored_head(facts: TransformersFacts) -> bool:
    """A tied model's head that differs is kept since 5.0 (modeling_utils.py, tie_weights)."""
    return version_number(facts.version) >= (5, 0)


def name_of(target: Target) -> str:
    """How ``--for`` spells a target."""
    if isinstance(target, TransformersFacts):
        return f"transformers@{target.version}"
    return target.path if target.path.startswith("neox@") else f"neox:{target.path}"
