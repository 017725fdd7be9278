"""Whether a GPT-NeoX tree loads a GPT-NeoX checkpoint, and what it prints if it doesn't.

The settings are those in the checkpoint's configs. The messages are those of the real code, seen by
running it on CPU; their order is that in which GPT-NeoX and DeepSpeed come to them: the yml, the
number of files, the kind of layout, each layer's state dict, ``args``.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from neox_bridge.architectures.base import INV_FREQ
from neox_bridge.architectures.gpt_neox import ARCHITECTURE as GPT_NEOX
from neox_bridge.architectures.neox_config import number, round_up
from neox_bridge.doctor.neox_folder import stray_cases
from neox_bridge.doctor.verdict import Case, case, failure, fix_command
from neox_bridge.formats.yml import duplicate_finding
from neox_bridge.frameworks.changes import since
from neox_bridge.frameworks.eras import FLAG, mlp_biases
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.layouts.checkpoint import Checkpoint, NeoxState
from neox_bridge.layouts.missing_files import missing_ranks_finding
from neox_bridge.layouts.unknown_keys import reason_of
from neox_bridge.planning.vocabulary import FIRST_MULTIPLE, padded_size

# what stands in for a key that the yml lacks (megatron/neox_arguments/neox_args.py)
_DEFAULTS: dict[str, Any] = {
    "make_vocab_size_divisible_by": FIRST_MULTIPLE,
    "model_parallel_size": 1,
    "tokenizer_type": "GPT2BPETokenizer",
}


def judge_neox(checkpoint: Checkpoint, facts: TreeFacts, resharding: str = "") -> Iterator[Case]:
    """The cases of loading a checkpoint in a tree, in the order in which it meets them.

    resharding: the command that writes the run for the tree with its optimizer states, where it
        cannot resume from them as they are; "" otherwise. It is the way out of the other cases that
        it settles too, so that one command is enough.
    """
    fix = resharding or fix_for(checkpoint, facts)
    yield from _yml(checkpoint, facts, fix)
    yield from _flat(checkpoint.neox_state, fix)
    yield from _rank_files(checkpoint.neox_state)
    yield from _layout_kind(checkpoint)
    yield from _state_dicts(checkpoint, facts, fix)
    yield from _args(checkpoint, facts)
    yield from _silent(checkpoint, facts)


def _yml(checkpoint: Checkpoint, facts: TreeFacts, fix: str) -> Iterator[Case]:
    for duplicate in checkpoint.neox_state.duplicate_keys:
        if not duplicate.refused:
            yield Case(replace(duplicate_finding(duplicate), severity="info"))
            continue
        yield failure(
            "yml-key-twice",
            f"{duplicate.key} stands in {duplicate.first} and {duplicate.second}; GPT-NeoX refuses "
            "that, whatever their values",
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
        yield failure(
            "yml-key-unknown",
            f"the yml has keys that this GPT-NeoX doesn't know, and it refuses them: "
            f"{', '.join(unknown)}" + (f" ({places})" if places else "") + why,
            fix,
            f"TypeError: NeoXArgs.__init__() got an unexpected keyword argument "
            f"'{next(key for key in checkpoint.raw if key in unknown)}'",
        )


def fix_for(checkpoint: Checkpoint, facts: TreeFacts, *, drop_optimizer: bool = False) -> str:
    """The command that fixes a checkpoint for a tree, with what it cannot do without.

    Optimizer states stay with parameters of the same names in the same files only, and a stored
    inv_freq that is not what the settings give is lost where files are rewritten: see ``fixes``.
    """
    state = checkpoint.neox_state
    if state.missing_ranks:
        return "copy the checkpoint again"  # a copy of it would not be whole either
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


def _flat(state: NeoxState, fix: str) -> Iterator[Case]:
    """A step without a run's folder around it (load_checkpoint in megatron/checkpointing.py)."""
    if not state.flat:
        return
    yield failure(
        "flat-folder",
        f"{state.folder} holds the files of one step, and GPT-NeoX looks in the folder that `load` "
        f"names for a file `latest` and a folder such as {state.step}: it finds neither, prints "
        "that, and trains from random weights",
        fix,
        f"Unable to find latest file at {state.folder}/latest, if trying to load latest checkpoint "
        "please ensure this file exists or pass an explicit checkpoint tag when loading a "
        "checkpoint.",
    )


def _rank_files(state: NeoxState) -> Iterator[Case]:
    """The case of mp_rank files that are missing, or left over from another layout."""
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
    held, read_with, wanted, error = "a file a rank", "0", 0, "KeyError: 'module'"
    if state.layout == "layers":
        held, read_with, wanted = "a file a layer", "1 or more", max(1, state.pp)
        error = "TypeError: Expected state_dict to be dict-like, got <class 'NoneType'>."
    yield failure(
        "layout-kind",
        f"the yml says pipe_parallel_size: {stages}, and the checkpoint has {held}, which "
        f"GPT-NeoX reads with {read_with} only",
        f"set pipe_parallel_size: {wanted} in the yml",
        error,
    )


def expected_rows(checkpoint: Checkpoint) -> int | None:
    """The rows that GPT-NeoX computes at start; None where the tokenizer isn't known."""
    if checkpoint.tokenizer_size is None:
        return None
    multiple = _setting(checkpoint, "make_vocab_size_divisible_by")
    tp = _setting(checkpoint, "model_parallel_size")
    return padded_size(checkpoint.tokenizer_size, multiple, tp)


def _setting(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.raw.get(key)
    return max(1, number(key, _DEFAULTS[key] if value is None else value, int))


def stores_inv_freq(checkpoint: Checkpoint, facts: TreeFacts) -> bool | None:
    """Whether the tree, with the checkpoint's yml, wants the buffer; None: either will do."""
    if facts.buffer == "either":
        return None
    if checkpoint.raw.get("pos_emb") != "rotary":
        return False
    if facts.buffer == "flag":
        return bool(checkpoint.raw.get(FLAG, False))
    return facts.buffer == "always"


def _state_dicts(checkpoint: Checkpoint, facts: TreeFacts, fix: str) -> Iterator[Case]:
    """What load_state_dict, which is strict, says of the embeddings and of the blocks."""
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
        )
    missing, unexpected, codes = _key_drift(checkpoint, facts)
    if not (missing or unexpected or sizes):
        return
    # one message names the layers of one file, or of the whole rank
    layers = range(2, 3 if state.layout == "layers" else checkpoint.config.layers + 2)
    prints = _strict(
        state,
        "ParallelTransformerLayerPipe",
        [_key(state, n, key) for n in layers for key in missing],
        [_key(state, n, key) for n in layers for key in unexpected],
        [_mismatch(_key(state, n, key), *sizes[key]) for n in layers for key in sizes],
    )
    for code, message, remedy in codes:
        yield failure(code, message, remedy or fix, prints)
    if sizes:
        yield failure("mlp-width", *_width_words(checkpoint, facts), prints)


def _key_drift(
    checkpoint: Checkpoint, facts: TreeFacts
) -> tuple[list[str], list[str], list[tuple[str, str, str]]]:
    """A block's keys that are missing and unexpected, and (code, message, remedy) of each cause."""
    want, have = _block_keys(checkpoint, facts, wanted=True), _block_keys(checkpoint, facts)
    missing = [key for key in want if key not in have]
    unexpected = [key for key in have if key not in want]
    has_names = checkpoint.neox_state.mlp_names
    same = facts.mlp_names == has_names
    codes = []
    place = f" ({facts.places['inv_freq']})" if "inv_freq" in facts.places else ""
    if INV_FREQ in missing:
        text = f"this GPT-NeoX stores inv_freq{place} and the checkpoint doesn't hold it"
        if facts.buffer == "flag":
            text = f"the yml's {FLAG}: true asks for inv_freq, and the checkpoint doesn't hold it"
        codes.append(("inv-freq-missing", f"{text}: loading is strict", ""))
    if INV_FREQ in unexpected:
        text = f"the checkpoint holds inv_freq, and this GPT-NeoX doesn't store it{place}"
        flag = f" (unless the yml says {FLAG}: true)" if facts.buffer == "flag" else ""
        codes.append(("inv-freq-unexpected", f"{text}{flag}: loading is strict", ""))
    if not same:
        names = {"linear": "linear1 and linear2", "dense": "dense_h_to_4h and dense_4h_to_h"}
        if checkpoint.architecture.gated:
            names["dense"] = "w1, w2 and w3"
        text = (
            f"this GPT-NeoX names the MLP {names[facts.mlp_names]}, the checkpoint "
            f"{names[has_names]} (changed by {since('neox-mlp-names')})"
        )
        codes.append(("mlp-names", text, ""))
    rest = [k for k in (*missing, *unexpected) if k.endswith(".bias")]
    rest = [k for k in rest if same or not k.startswith("mlp.")]
    if rest or (not same and _mlp_bias(checkpoint, facts) is None):
        way = "correct the yml"
        if "mlp" in str(rest):
            way = "name a GPT-NeoX since 2024-10 with `era=`"
        text = "the biases are not those that the yml and this GPT-NeoX give: "
        codes.append(("biases", f"{text}{', '.join(rest) or 'the MLP has none'}", way))
    return missing, unexpected, codes


def _mlp_bias(checkpoint: Checkpoint, facts: TreeFacts) -> bool | None:
    """Whether the tree's MLP has biases; None where it always has and the checkpoint hasn't.

    use_bias_in_mlp came with neox-mlp-type; LLaMAParallelMLP had none before.
    """
    if checkpoint.architecture.gated and facts.gated_biases == "none":
        return False
    if "use_bias_in_mlp" in facts.keys:
        return checkpoint.raw.get("use_bias_in_mlp", True) is not False
    return True if checkpoint.config.mlp_bias else None


def _block_keys(checkpoint: Checkpoint, facts: TreeFacts, wanted: bool = False) -> list[str]:
    """A block's keys in the order of its modules: as the tree wants them, or as they are."""
    config, state = checkpoint.config, checkpoint.neox_state
    dense, inv_freq = state.mlp_names == "dense", state.inv_freq == "store"
    if wanted:
        config = replace(
            config,
            norm_bias=True,
            mlp_bias=_mlp_bias(checkpoint, facts) is not False,
            attention_bias=checkpoint.raw.get("use_bias_in_attn_linear", True) is not False,
        )
        dense = facts.mlp_names == "dense"
        stored = stores_inv_freq(checkpoint, facts)
        inv_freq = inv_freq if stored is None else stored
    names = [
        weight.named(dense)
        for weight in checkpoint.architecture.weights
        if weight.place == "block" and weight.is_in(config)
        if weight.split != "derived" or inv_freq
    ]
    return list(dict.fromkeys(names))


def _sizes(checkpoint: Checkpoint, facts: TreeFacts) -> dict[str, tuple[list[int], list[int]]]:
    """(the checkpoint's shape, the tree's) of an MLP of another width, where its names fit."""
    have, want, state = (
        checkpoint.config.dims["ffn"],
        mlp_width(checkpoint, facts),
        checkpoint.neox_state,
    )
    if (
        have == want
        or checkpoint.architecture is not GPT_NEOX
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
            f"the MLP is {have} wide, and this GPT-NeoX builds plain MLPs four times as wide as "
            f"the model, {want}, whatever the yml says (until {since('neox-mlp-width')})",
            "name a GPT-NeoX since 2024-10 with `era=`: this one can't hold the model",
        )
    return (
        f"the MLP is {have} wide, and the yml makes it {want}",
        f"set intermediate_size: {have} in the yml",
    )


def _args(checkpoint: Checkpoint, facts: TreeFacts) -> Iterator[Case]:
    """check_checkpoint_args: every key of ``args`` against the settings, after the weights."""
    for key, have in checkpoint.neox_state.args.items():
        setting = checkpoint.raw.get(key, _DEFAULTS.get(key, have))
        if key == "padded_vocab_size":
            setting = expected_rows(checkpoint) or have
        if setting != have and key in facts.args_checked:
            yield failure(
                "args-differ",
                f"{key}: the checkpoint's args say {have}, the settings {setting}, and GPT-NeoX "
                "compares them when it loads",
                fix_for(checkpoint, facts),
                f"AssertionError: {key} value from checkpoint ({have}) is not equal to the "
                f"currently set argument value ({setting}).",
            )


def _silent(checkpoint: Checkpoint, facts: TreeFacts) -> Iterator[Case]:
    """What no framework says a word about."""
    raw = checkpoint.raw
    if raw.get("norm") == "rmsnorm" and facts.rms_eps == "outside":
        yield case(
            "rms-epsilon",
            "warning",
            "this GPT-NeoX adds RMSNorm's epsilon to the root, x / (rms + eps); since "
            f"{since('neox-rms-epsilon')} it is inside, sqrt(var + eps): a model of the other "
            "kind differs by some 1e-4 in its logits, and no conversion removes that",
            subject="RMSNorm epsilon",
        )
    if raw.get("num_kv_heads") not in (None, raw.get("num_attention_heads")):
        yield from _gqa(checkpoint.neox_state, facts)
    yield from _mlp_biases(checkpoint, facts)
    if not facts.rope_tables_fp32 and raw.get("pos_emb") == "rotary":
        yield case(
            "rope-tables",
            "info",
            "this GPT-NeoX computes its rotary tables from the rounded inv_freq; since "
            f"{since('neox-rope-fp32')} they are computed in fp32",
        )


def _mlp_biases(checkpoint: Checkpoint, facts: TreeFacts) -> Iterator[Case]:
    """What loads, and then ends in the first forward pass (Era.gated_biases)."""
    config, gated = checkpoint.config, checkpoint.architecture.gated
    if not checkpoint.architecture.has_mlp or "mlp" in checkpoint.neox_state.te:
        return
    activation = str(checkpoint.architecture.write_neox(config, False)["activation"])
    wanted = mlp_biases(
        facts.gated_biases, activation, gated=gated, parallel=config.parallel_residual
    )
    newer = f"name a GPT-NeoX since {since('neox-gated-biases')} with `era=`"
    if wanted == "required" and not config.mlp_bias:
        error = "AttributeError: 'NoneType' object has no attribute 'expand_as'"
        if not gated:
            newer = ""
            error = "TypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType'"
        yield failure(
            "mlp-biases",
            f"the MLP has no biases, and with activation: {activation} this GPT-NeoX adds them "
            "without asking: it loads, and ends in the first forward pass",
            newer,
            error,
        )
    elif wanted == "none" and config.mlp_bias and facts.gated_biases != "none":
        yield failure(
            "mlp-biases",
            f"the MLP has biases, and with activation: {activation} this GPT-NeoX asserts that it "
            "has none: it loads, and ends in the first forward pass",
            newer,
            "AssertionError",
        )


def _gqa(state: NeoxState, facts: TreeFacts) -> Iterator[Case]:
    order = state.gqa_order if state.gqa_order_known else None
    if state.mlp_names == "dense" and facts.gqa_order == "grouped":
        yield failure(
            "gqa-order",
            "the checkpoint is from before 2024-09, when the rows of grouped-query attention lay "
            "by query head, and this GPT-NeoX reads them as all q, all k, all v (since "
            f"{since('neox-gqa-order')}): the shapes are the same, so it loads as another model",
            "load it in a GPT-NeoX of neox@2024-10 or older",
            subject="GQA row order",
        )
    elif order is not None and order != facts.gqa_order:
        yield failure(
            "gqa-order",
            f"the rows of grouped-query attention are {order}, and this GPT-NeoX reads them "
            f"{facts.gqa_order} (changed in {since('neox-gqa-order')}): the shapes are the same, "
            "so it loads as another model",
            "convert it with `to=neox` and this GPT-NeoX as `era=`",
            subject="GQA row order",
        )
    elif order is None:
        yield case(
            "gqa-order-unknown",
            "warning",
            f"grouped-query attention: the order of its rows changed in {since('neox-gqa-order')} "
            "with the shapes the same, so this checkpoint doesn't tell its own; this GPT-NeoX "
            "reads them "
            f"{'by query head' if facts.gqa_order == 'interleaved' else 'as all q, all k, all v'}, "
            "and the wrong order computes another model without a word",
            "compare the logits, or the loss on some text, with those of the run that wrote it",
            subject="GQA row order",
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
