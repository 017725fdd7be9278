"""Decides whether a GPT-NeoX tree loads a checkpoint, and what it prints if it does not.

The settings are those in the checkpoint's configs. The messages were copied from runs of the real
code on CPU. GPT-NeoX and DeepSpeed check in this order: the yml, the number of files, the kind of
layout, each layer's state dict, ``args``.
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import INV_FREQ, ModelConfig
from neox_bridge.architectures.neox_config import number, refuse_era, round_up
from neox_bridge.doctor.causes import BUFFER_LINKS, NAMES_LINKS, buffer_cause, names_cause
from neox_bridge.doctor.neox_folder import stray_cases
from neox_bridge.doctor.verdict import Case, another_model, case, failure, fix_command, near
from neox_bridge.findings import Command, Details
from neox_bridge.formats.yml import duplicate_finding
from neox_bridge.frameworks.changes import CHANGES, change_named, since
from neox_bridge.frameworks.eras import FLAG, mlp_biases, span_of
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.layouts.checkpoint import Checkpoint, NeoxState
from neox_bridge.layouts.file_names import STEP
from neox_bridge.layouts.missing_files import missing_ranks_finding
from neox_bridge.layouts.unknown_keys import reason_of
from neox_bridge.layouts.untrusted import mapping
from neox_bridge.planning.era_checks import fails_in_era
from neox_bridge.planning.vocabulary import FIRST_MULTIPLE, padded_size
from neox_bridge.stores.paths import is_local, isfile
from neox_bridge.wording import sentence

# GPT-NeoX's defaults for missing yml keys (megatron/neox_arguments/neox_args.py)
_DEFAULTS: dict[str, Any] = {
    "make_vocab_size_divisible_by": FIRST_MULTIPLE,
    "model_parallel_size": 1,
    "tokenizer_type": "GPT2BPETokenizer",
}
_LONGEST_VALUE = 100  # shown characters
# of a value that is not in a Literal of neox_args.py
_WRONG_TYPES = "ValueError: NeoXArgs.__post_init__() NeoXArgs types cannot be validated"
_GQA_WORDS = {"grouped": "as all q, all k, all v", "interleaved": "by query head"}


def judge_neox(checkpoint: Checkpoint, facts: TreeFacts, resharding: str = "") -> Iterator[Case]:
    """The cases of loading a checkpoint in a tree, in the order in which the tree checks them.

    Args:
        checkpoint: The checkpoint.
        facts: What the tree expects.
        resharding: The command that writes the run for the tree with its optimizer states, if the
            tree cannot resume from them as they are; "" otherwise. It also fixes other cases, so
            it is the fix of those too: one command is enough.
    """
    norm = str(checkpoint.raw.get("norm"))
    if refuse_era({"norm": {norm}}, facts.name.removeprefix("neox@")):
        # no other case matters: no fix makes such a tree run the model
        yield failure(
            "norm-unknown",
            f"norm: {norm}: this GPT-NeoX does not have it",
            "load it in neox@today",
            _WRONG_TYPES if set(checkpoint.raw) <= facts.keys else "",
            subject="norm",
        )
        return
    fix = resharding or fix_for(checkpoint, facts)
    yield from _yml(checkpoint, facts, fix)
    yield from _flat(checkpoint.neox_state, fix)
    yield from _latest(checkpoint.neox_state)
    yield from _rank_files(checkpoint.neox_state)
    yield from _layout_kind(checkpoint)
    yield from _zero_stage(checkpoint)
    yield from _state_dicts(checkpoint, facts, fix)
    yield from _args(checkpoint, facts)
    yield from _unsupported(checkpoint, facts)
    yield from _silent(checkpoint, facts)


def _yml(checkpoint: Checkpoint, facts: TreeFacts, fix: str) -> Iterator[Case]:
    for duplicate in checkpoint.neox_state.duplicate_keys:
        if not duplicate.refused:
            yield Case(replace(duplicate_finding(duplicate), severity="info"))
            continue
        yield failure(
            "yml-key-twice",
            f"{duplicate.key} is in {duplicate.first} and in {duplicate.second}; GPT-NeoX rejects "
            "a key that is in two yml files, even with the same value",
            fix,
            f"ValueError: Conf file {duplicate.second} has the following duplicate keys with "
            f"previously loaded file: {duplicate.key}",
            subject="duplicate keys",
        )
    unknown = sorted(set(checkpoint.raw) - facts.keys)
    if unknown:
        places = facts.places.get("keys", "")
        risky = {key.name: key for key in checkpoint.unknown_keys if key.effect == "model"}
        why = "".join(f". {reason_of(risky[key])}" for key in unknown if key in risky)
        if why:
            why += ". A copy without it may be another model"
        text = "the yml has keys that this GPT-NeoX does not know and rejects: "
        yield failure(
            "yml-key-unknown",
            text + ", ".join(unknown) + (f" ({places})" if places else "") + why,
            fix,
            f"TypeError: NeoXArgs.__init__() got an unexpected keyword argument "
            f"'{next(key for key in checkpoint.raw if key in unknown)}'",
            details=Details(
                wrong=tuple(f"{key}: {checkpoint.raw[key]!r}"[:_LONGEST_VALUE] for key in unknown),
                where=places,
                why=sentence(text + ", ".join(unknown) + why),
                more=tuple(change.link for change in CHANGES if change.keys & set(unknown)),
            ),
        )


def fix_for(checkpoint: Checkpoint, facts: TreeFacts, *, drop_optimizer: bool = False) -> str:
    """The command that fixes a checkpoint for a tree, with the options that it needs.

    Optimizer states can only be kept if their parameters keep their names and files. A stored
    inv_freq that does not follow from the settings is lost when files are rewritten. See ``fixes``.
    """
    state = checkpoint.neox_state
    if state.missing_ranks:
        return "copy the checkpoint again"  # a fixed copy would not be complete either
    stored = stores_inv_freq(checkpoint, facts)
    moved = stored is not None and stored != (state.inv_freq == "store")
    rows = expected_rows(checkpoint) not in (None, checkpoint.config.dims["vocab"])
    rewritten = facts.mlp_names != state.mlp_names or rows
    parted = rewritten or (moved and state.layout == "ranks")
    parted = parted or state.args.get("model_parallel_size", state.tp) != state.tp
    drop_optimizer = drop_optimizer or (parted and checkpoint.has_optimizer)
    flags = ["--drop-optimizer"] * drop_optimizer
    deviates = state.inv_freq == "store" and checkpoint.inv_freq_mismatch is not None
    flags += ["--recompute"] * (deviates and (rewritten or moved))
    return fix_command(checkpoint, facts, *flags)


def patch_command(tree: str) -> Command:
    """The command that lets a tree load checkpoints with and without the buffer."""
    command = shlex.join(["neox-bridge", "patch", tree])
    return Command(f"{command}   # lets the tree load both kinds")


def _flat(state: NeoxState, fix: str) -> Iterator[Case]:
    """A case: a step without its run's folder (load_checkpoint in megatron/checkpointing.py)."""
    if not state.flat:
        return
    yield failure(
        "flat-folder",
        f"{state.folder} contains the files of one step. In the folder that `load` names, GPT-NeoX "
        f"looks for a file `latest` and a folder such as {state.step}. It finds neither, prints a "
        "warning and trains from random weights",
        fix,
        no_latest(state.folder),
    )


def _latest(state: NeoxState) -> Iterator[Case]:
    """The case of a missing ``latest`` (DeepSpeed runtime/engine.py, load_checkpoint)."""
    if state.flat or state.universal or not STEP.fullmatch(state.step):
        return
    if isfile(latest := os.path.join(state.root, "latest")):
        return
    message = (
        f"{latest} is missing. GPT-NeoX reads there which step to load. Without it, GPT-NeoX "
        "prints a warning and trains from random weights"
    )
    remedy = f"write {state.step} into it"
    if is_local(state.root):
        remedy = Command(f"echo {state.step} > {shlex.quote(near(latest))}")
    yield case("latest-missing", "warning", message, remedy, no_latest(state.root))


def no_latest(folder: str) -> str:
    """What DeepSpeed prints for a folder without ``latest``."""
    return (
        f"Unable to find latest file at {folder}/latest, if trying to load latest checkpoint "
        "please ensure this file exists or pass an explicit checkpoint tag when loading a "
        "checkpoint."
    )


def _rank_files(state: NeoxState) -> Iterator[Case]:
    """The case of mp_rank files that are missing or left over from another layout."""
    strays = list(stray_cases(state.folder))
    yield from strays
    if state.missing_ranks and not strays:
        finding = missing_ranks_finding(state.folder, state.missing_ranks)
        yield Case(replace(finding, severity="error"))


def _layout_kind(checkpoint: Checkpoint) -> Iterator[Case]:
    setting = checkpoint.raw.get("pipe_parallel_size", 0) or 0
    stages = number("pipe_parallel_size", setting, int)
    state = checkpoint.neox_state
    if (stages > 0) == (state.layout == "layers"):
        return
    held, read_with, wanted, error = "one file per rank", "0", 0, "KeyError: 'module'"
    if state.layout == "layers":
        held, read_with, wanted = "one file per layer", "1 or more", max(1, state.pp)
        error = "TypeError: Expected state_dict to be dict-like, got <class 'NoneType'>."
    yield failure(
        "layout-kind",
        f"the yml says pipe_parallel_size: {stages}, and the checkpoint has {held}, which "
        f"GPT-NeoX reads only with {read_with}",
        f"set pipe_parallel_size: {wanted} in the yml",
        error,
        details=Details(wrong=(f"pipe_parallel_size: {stages} in the yml",)),
    )


def _zero_stage(checkpoint: Checkpoint) -> Iterator[Case]:
    """The case of a yml that makes DeepSpeed look for files of another stage."""
    zero = mapping(checkpoint.raw, "zero_optimization", "the yml")
    stage, saved_at_3 = number("stage", zero.get("stage") or 0, int), checkpoint.neox_state.is_zero3
    if (stage == 3) == saved_at_3 or checkpoint.neox_state.universal:
        return
    kind, wanted = ("ZeRO stage 3", 3) if saved_at_3 else ("another stage than 3", 1)
    yield failure(
        "zero-stage",
        f"the yml says zero_optimization.stage: {stage}, and the checkpoint has the files of "
        f"{kind}. DeepSpeed looks for others (runtime/state_dict_factory.py, check_ckpt_list)",
        f"set stage: {wanted} in zero_optimization of the yml",
        "AssertionError",
        details=Details(wrong=(f"zero_optimization.stage: {stage} in the yml",)),
    )


def expected_rows(checkpoint: Checkpoint) -> int | None:
    """The number of vocabulary rows that GPT-NeoX computes; None if the tokenizer is unknown."""
    if checkpoint.tokenizer_size is None:
        return None
    multiple = _setting(checkpoint, "make_vocab_size_divisible_by")
    tp = _setting(checkpoint, "model_parallel_size")
    return padded_size(checkpoint.tokenizer_size, multiple, tp)


def _setting(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.raw.get(key)
    return max(1, number(key, _DEFAULTS[key] if value is None else value, int))


def stores_inv_freq(checkpoint: Checkpoint, facts: TreeFacts) -> bool | None:
    """Whether the tree, with the checkpoint's yml, expects the buffer; None: it loads both."""
    if facts.buffer == "either":
        return None
    if checkpoint.raw.get("pos_emb") != "rotary":
        return False
    if facts.buffer == "flag":
        return bool(checkpoint.raw.get(FLAG, False))
    return facts.buffer == "always"


def _state_dicts(checkpoint: Checkpoint, facts: TreeFacts, fix: str) -> Iterator[Case]:
    """The cases that the strict load_state_dict reports about the embeddings and the blocks."""
    state, rows = checkpoint.neox_state, expected_rows(checkpoint)
    have = checkpoint.config.dims["vocab"]
    sizes = _sizes(checkpoint, facts)
    if rows is not None and rows != have:
        hidden, tp = checkpoint.config.hidden, state.tp
        multiple = _setting(checkpoint, "make_vocab_size_divisible_by")
        line = _mismatch(
            _key(state, 0, "word_embeddings.weight"), [have // tp, hidden], [rows // tp, hidden]
        )
        yield failure(
            "vocabulary-rows",
            f"the embeddings have {have} rows, and GPT-NeoX computes {rows} from the tokenizer's "
            f"{checkpoint.tokenizer_size} entries, make_vocab_size_divisible_by: {multiple} and TP "
            f"{_setting(checkpoint, 'model_parallel_size')}",
            fix_for(checkpoint, facts),
            _strict(state, "EmbeddingPipe", [], [], [line]),
            details=Details(wrong=(f"vocabulary: {have} rows, {rows} expected",)),
        )
    missing, unexpected, codes = _key_drift(checkpoint, facts)
    if not (missing or unexpected or sizes):
        return
    details = Details(
        missing=tuple(missing), unexpected=tuple(unexpected), layers=checkpoint.config.layers
    )
    # One message names the layers of one file, or of the whole rank.
    layers = range(2, 3 if state.layout == "layers" else checkpoint.config.layers + 2)
    prints = _strict(
        state,
        "ParallelTransformerLayerPipe",
        [_key(state, n, key) for n in layers for key in missing],
        [_key(state, n, key) for n in layers for key in unexpected],
        [_mismatch(_key(state, n, key), *sizes[key]) for n in layers for key in sizes],
    )
    for code, message, remedy, known in codes:
        details = replace(
            details, where=known.where, why=known.why, others=known.others, more=known.more
        )
        yield failure(code, message, remedy or fix, prints, details=details)
    if sizes:
        wrong = tuple(f"{key}: {have}, {want} expected" for key, (have, want) in sizes.items())
        details = Details(wrong=wrong, layers=checkpoint.config.layers)
        yield failure("mlp-width", *_width_words(checkpoint, facts), prints, details=details)


def _key_drift(
    checkpoint: Checkpoint, facts: TreeFacts
) -> tuple[list[str], list[str], list[tuple[str, str, str, Details]]]:
    """A block's missing and unexpected keys, and (code, message, remedy, details) of each cause."""
    want, have = _wanted_block_keys(checkpoint, facts), stored_block_keys(checkpoint)
    missing = [key for key in want if key not in have]
    unexpected = [key for key in have if key not in want]
    has_names = checkpoint.neox_state.mlp_names
    same = facts.mlp_names == has_names
    codes: list[tuple[str, str, str, Details]] = []
    where = facts.places.get("inv_freq", "")
    place = f" ({where})" if where else ""
    by_flag = facts.buffer == "flag"
    details = Details(
        where=where,
        why=buffer_cause("store" if INV_FREQ in missing else "omit", by_flag),
        others=() if facts.name.startswith("neox@") or not same else (patch_command(facts.name),),
        more=BUFFER_LINKS,
    )
    if INV_FREQ in missing:
        text = f"this GPT-NeoX stores inv_freq{place}, and the checkpoint does not contain it"
        if by_flag:
            text = f"the yml says {FLAG}: true, and the checkpoint does not contain inv_freq"
        codes.append(("inv-freq-missing", f"{text}: loading is strict", "", details))
    if INV_FREQ in unexpected:
        text = f"the checkpoint contains inv_freq, and this GPT-NeoX does not store it{place}"
        flag = f" (unless the yml says {FLAG}: true)" if by_flag else ""
        codes.append(("inv-freq-unexpected", f"{text}{flag}: loading is strict", "", details))
    if not same:
        names = {"linear": "linear1 and linear2", "dense": "dense_h_to_4h and dense_4h_to_h"}
        gated = checkpoint.architecture.has_llama_mlp(old=True)
        if gated:
            names["dense"] = "w1, w2 and w3"
        text = (
            f"this GPT-NeoX names the MLP {names[facts.mlp_names]}, and the checkpoint "
            f"{names[has_names]} (renamed in {since('neox-mlp-names')})"
        )
        details = Details(
            where=facts.places.get("mlp_names", ""),
            why=names_cause(facts.mlp_names, gated),
            more=NAMES_LINKS,
        )
        codes.append(("mlp-names", text, "", details))
    rest = [k for k in (*missing, *unexpected) if k.endswith(".bias")]
    rest = [k for k in rest if same or not k.startswith("mlp.")]
    if rest or (not same and _mlp_bias(checkpoint, facts) is None):
        way = "correct the yml"
        if any(key.startswith("mlp.") for key in rest):
            way = "use a GPT-NeoX since 2024-10, and name it with `era=`"
        text = "the biases differ from those of the yml in this GPT-NeoX: "
        codes.append(("biases", f"{text}{', '.join(rest) or 'the MLP has none'}", way, Details()))
    return missing, unexpected, codes


def _mlp_bias(checkpoint: Checkpoint, facts: TreeFacts) -> bool | None:
    """Whether the tree's MLP has biases; None if it always has them and the checkpoint does not.

    use_bias_in_mlp was added by neox-mlp-type. LLaMAParallelMLP had no biases before.
    """
    old = facts.mlp_names == "dense"
    if checkpoint.architecture.has_llama_mlp(old=old) and facts.gated_biases == "none":
        return False
    if "use_bias_in_mlp" in facts.keys:
        return checkpoint.raw.get("use_bias_in_mlp", True) is not False
    return True if checkpoint.config.mlp_bias else None


def _wanted_block_keys(checkpoint: Checkpoint, facts: TreeFacts) -> list[str]:
    """The names of a block's tensors as the tree expects them, in the order of its modules."""
    config = replace(
        checkpoint.config,
        norm_bias=True,
        mlp_bias=_mlp_bias(checkpoint, facts) is not False,
        attention_bias=checkpoint.raw.get("use_bias_in_attn_linear", True) is not False,
    )
    stored = stores_inv_freq(checkpoint, facts)
    inv_freq = checkpoint.neox_state.inv_freq == "store" if stored is None else stored
    dense = facts.mlp_names == "dense"
    return _named_keys(checkpoint, config, dense=dense, inv_freq=inv_freq)


def stored_block_keys(checkpoint: Checkpoint) -> list[str]:
    """The names of the tensors that every block of a GPT-NeoX checkpoint has."""
    state = checkpoint.neox_state
    return _named_keys(
        checkpoint,
        checkpoint.config,
        dense=state.mlp_names == "dense",
        inv_freq=state.inv_freq == "store",
    )


def _named_keys(
    checkpoint: Checkpoint, config: ModelConfig, *, dense: bool, inv_freq: bool
) -> list[str]:
    names = [
        weight.named(dense)
        for weight in checkpoint.architecture.weights
        if weight.place == "block" and weight.is_in(config) and weight.blocks is None
        if weight.split != "derived" or inv_freq
    ]
    return list(dict.fromkeys(names))


def _sizes(checkpoint: Checkpoint, facts: TreeFacts) -> dict[str, tuple[list[int], list[int]]]:
    """(shape in the checkpoint, in the tree) of an MLP of another width, if its names match."""
    have, want, state = (
        checkpoint.config.dims["ffn"],
        mlp_width(checkpoint, facts),
        checkpoint.neox_state,
    )
    if (
        have == want
        or checkpoint.architecture.gated
        or not checkpoint.architecture.has_mlp
        or facts.mlp_names != state.mlp_names
    ):
        return {}
    hidden, tp = checkpoint.config.hidden, state.tp
    first, second = ("linear1", "linear2")
    if facts.mlp_names == "dense":
        first, second = ("dense_h_to_4h", "dense_4h_to_h")
    shapes = {f"mlp.{first}.weight": ([have // tp, hidden], [want // tp, hidden])}
    if checkpoint.config.mlp_bias:
        shapes[f"mlp.{first}.bias"] = ([have // tp], [want // tp])
    shapes[f"mlp.{second}.weight"] = ([hidden, have // tp], [hidden, want // tp])
    return shapes


def mlp_width(checkpoint: Checkpoint, facts: TreeFacts) -> int:
    """How wide the tree builds a plain MLP (megatron/model/transformer.py, ParallelMLP)."""
    hidden, raw = checkpoint.config.hidden, checkpoint.raw
    width = 4 * hidden
    if facts.plain_mlp_4h:
        return width
    if raw.get("intermediate_size"):
        width = number("intermediate_size", raw["intermediate_size"], int)
    elif raw.get("expansion_factor"):
        width = int(number("expansion_factor", raw["expansion_factor"], float) * hidden)
    step = 2 * number("mlp_multiple_of", raw.get("mlp_multiple_of") or 1, int)
    return round_up(width, step)


def _width_words(checkpoint: Checkpoint, facts: TreeFacts) -> tuple[str, str]:
    have, want = checkpoint.config.dims["ffn"], mlp_width(checkpoint, facts)
    if facts.plain_mlp_4h:
        return (
            f"the MLP is {have} wide, and this GPT-NeoX always builds plain MLPs four times as "
            f"wide as the model, here {want} (until {since('neox-mlp-width')})",
            "use a GPT-NeoX since 2024-10, and name it with `era=`: this one cannot run the model",
        )
    return (
        f"the MLP is {have} wide, and {want} wide by the yml",
        f"set intermediate_size: {have} in the yml",
    )


def _args(checkpoint: Checkpoint, facts: TreeFacts) -> Iterator[Case]:
    """Cases of check_checkpoint_args, which compares ``args`` with the settings after loading."""
    for key, have in checkpoint.neox_state.args.items():
        setting = checkpoint.raw.get(key, _DEFAULTS.get(key, have))
        if key == "padded_vocab_size":
            setting = expected_rows(checkpoint) or have
        if setting != have and key in facts.args_checked:
            yield failure(
                "args-differ",
                f"{key}: the checkpoint's args say {have}, and the settings say {setting}; "
                "GPT-NeoX compares them when it loads",
                fix_for(checkpoint, facts),
                f"AssertionError: {key} value from checkpoint ({have}) is not equal to the "
                f"currently set argument value ({setting}).",
                details=Details(wrong=(f"{key}: {have} in the checkpoint, {setting} now",)),
            )


def _silent(checkpoint: Checkpoint, facts: TreeFacts) -> Iterator[Case]:
    """The cases that no framework reports."""
    raw = checkpoint.raw
    if raw.get("norm") == "rmsnorm" and facts.rms_eps == "outside":
        yield case(
            "rms-epsilon",
            "warning",
            "this GPT-NeoX adds RMSNorm's epsilon outside the root, x / (rms + eps); since "
            f"{since('neox-rms-epsilon')} it is inside, sqrt(var + eps). The logits of a model "
            "that was trained with the other form differ by about 1e-4, and no conversion can "
            "change that",
            subject="RMSNorm epsilon",
            details=Details(
                where=facts.places.get("rms_eps", ""), more=(change_named("neox-rms-epsilon").link,)
            ),
        )
    if raw.get("num_kv_heads") not in (None, raw.get("num_attention_heads")):
        yield from _gqa(checkpoint.neox_state, facts)
    yield from _mlp_biases(checkpoint, facts)
    if not facts.rope_tables_fp32 and raw.get("pos_emb") == "rotary":
        yield case(
            "rope-tables",
            "info",
            "this GPT-NeoX computes the rotary tables from a rounded inv_freq; since "
            f"{since('neox-rope-fp32')} it computes them in fp32",
        )


def _unsupported(checkpoint: Checkpoint, facts: TreeFacts) -> Iterator[Case]:
    """The cases that the tree cannot build or run, although it knows the keys."""
    tp = checkpoint.neox_state.tp
    reasons = checkpoint.architecture.refuse_shape(tp, span_of(facts))
    for reason in (*reasons, *fails_in_era(checkpoint, facts)):
        yield failure(
            "model-unsupported",
            f"{reason.key}: {reason.reason}",
            "use a newer GPT-NeoX, and name it with `era=`: this one cannot run the model",
            subject="model",
        )


def _mlp_biases(checkpoint: Checkpoint, facts: TreeFacts) -> Iterator[Case]:
    """The cases that load and then fail in the first forward pass (Era.gated_biases)."""
    config = checkpoint.config
    gated = checkpoint.architecture.has_llama_mlp(old=facts.mlp_names == "dense")
    if not checkpoint.architecture.has_mlp or "mlp" in checkpoint.neox_state.te:
        return
    activation = str(checkpoint.architecture.write_neox(config, False)["activation"])
    wanted = mlp_biases(
        facts.gated_biases, activation, gated=gated, parallel=config.parallel_residual
    )
    newer = f"use a GPT-NeoX since {since('neox-gated-biases')}, and name it with `era=`"
    if wanted == "required" and not config.mlp_bias:
        error = "AttributeError: 'NoneType' object has no attribute 'expand_as'"
        if not gated:
            newer = ""
            error = "TypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType'"
        yield failure(
            "mlp-biases",
            f"the MLP has no biases, and with activation: {activation} this GPT-NeoX always adds "
            "them: the checkpoint loads, and the first forward pass fails",
            newer,
            error,
        )
    elif wanted == "none" and config.mlp_bias and facts.gated_biases != "none":
        yield failure(
            "mlp-biases",
            f"the MLP has biases, and with activation: {activation} this GPT-NeoX asserts that it "
            "has none: the checkpoint loads, and the first forward pass fails",
            newer,
            "AssertionError",
        )


def _gqa(state: NeoxState, facts: TreeFacts) -> Iterator[Case]:
    order = state.gqa_order if state.gqa_order_known else None
    change = change_named("neox-gqa-order")
    details = Details(where=facts.places.get("gqa_order", ""), more=(change.link,))
    reads = f"reads them {_GQA_WORDS[facts.gqa_order]}"
    same_shapes = "The shapes are the same, so it loads as another model"
    if state.mlp_names == "dense" and facts.gqa_order == "grouped":
        yield another_model(
            "gqa-order",
            "the checkpoint is from before 2024-09, when the rows of grouped-query attention were "
            f"{_GQA_WORDS['interleaved']}, and this GPT-NeoX {reads} (since {change.since}). "
            f"{same_shapes}",
            "load it in a GPT-NeoX of neox@2024-10 or older",
            subject="GQA row order",
            details=details,
        )
    elif order is not None and order != facts.gqa_order:
        yield another_model(
            "gqa-order",
            f"the rows of grouped-query attention are {_GQA_WORDS[order]}, and this GPT-NeoX "
            f"{reads} (changed in {change.since}). {same_shapes}",
            "convert it with `to=neox` and this GPT-NeoX as `era=`",
            subject="GQA row order",
            details=details,
        )
    elif order is None:
        yield case(
            "gqa-order-unknown",
            "warning",
            f"the order of the rows of grouped-query attention changed in {change.since}, and the "
            "checkpoint does not record which order it has, because the shapes are the same. This "
            f"GPT-NeoX {reads}. If that is wrong, it computes another model without a message",
            "compare the logits, or the loss on some text, with those of the run that wrote it",
            subject="GQA row order",
            details=details,
        )


def _key(state: NeoxState, number: int, key: str) -> str:
    return key if state.layout == "layers" else f"sequential.{number}.{key}"


def _strict(
    state: NeoxState, module: str, missing: list[str], unexpected: list[str], sizes: list[str]
) -> str:
    """torch's message of a strict load (torch/nn/modules/module.py, load_state_dict)."""
    name = module if state.layout == "layers" else "SequentialWrapper"
    lines = [f"RuntimeError: Error(s) in loading state_dict for {name}:"]
    for word, keys in (("Missing", missing), ("Unexpected", unexpected)):
        if keys:
            quoted = ", ".join(f'"{key}"' for key in keys)
            lines.append(f"{word} key(s) in state_dict: {quoted}. ")
    return "\n\t".join([*lines, *sizes])


def _mismatch(key: str, have: list[int], want: list[int]) -> str:
    return (
        f"size mismatch for {key}: copying a param with shape torch.Size({have}) from checkpoint, "
        f"the shape in current model is torch.Size({want})."
    )
