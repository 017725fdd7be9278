"""Explains missing keys, unexpected keys and wrong shapes."""

import re
from collections.abc import Callable, Iterator

from neox_bridge.doctor.causes import BUFFER_LINKS, NAMES_LINKS, buffer_cause, names_cause
from neox_bridge.doctor.messages import (
    CONVERT,
    EXPORT,
    FIX,
    OTHER_TP,
    PATCH,
    Diagnosis,
    Message,
    Older,
    Sizes,
    short,
)
from neox_bridge.findings import Command
from neox_bridge.frameworks.changes import change_named
from neox_bridge.frameworks.eras import FLAG

_VOCABULARY = re.compile(
    r"(word_embeddings|final_linear|embed_in|embed_out|lm_head|embed_tokens)\."
)
VOCABULARY_SETTINGS = ("tokenizer_type", "make_vocab_size_divisible_by", "model_parallel_size")
_FOR_TODAY = Command(f"{CONVERT} --for today")
# The rows of grouped-query attention changed their order (neox-gqa-order).
_BEFORE_NOVEMBER = (
    Command(f"{CONVERT} --for neox@2024-10   # with num_kv_heads, for a tree before 2024-11-13"),
)
_RANDOM = "transformers initialized it at random"


def _inv_freq(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = (short(keys, r"rotary_emb\.inv_freq") for keys in m.keys)
    if m.by_transformers and (missing or unexpected):
        llama = any("self_attn" in key for key in (*missing, *unexpected))
        code = "hf-llama-inv-freq" if llama else "hf-neox-inv-freq"
        change = change_named(code)
        yield Diagnosis(
            code,
            f"transformers before {change.cited} stored the rotary buffer inv_freq. It is not "
            "learned: newer versions compute it from the base. As a warning it is harmless.",
            FIX,
            missing + unexpected,
            older="framework" if missing else "checkpoint",
            more=(change.link,),
        )
    elif missing:
        yield Diagnosis(
            "neox-inv-freq",
            buffer_cause("store"),
            Command(f"{CONVERT} --for neox@2024-03"),
            missing,
            by_convert=True,
            others=(PATCH, f"if the yml says {FLAG}: true, remove that"),
            more=BUFFER_LINKS,
            older="framework",
        )
    elif unexpected:
        yield Diagnosis(
            "neox-inv-freq",
            buffer_cause("omit"),
            Command(f"{CONVERT} --inv-freq omit"),
            unexpected,
            by_convert=True,
            others=(f"in the yml: {FLAG}: true", PATCH),
            more=BUFFER_LINKS[:1],
            older="checkpoint",
        )


def _mlp(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = m.keys
    linear = r"mlp\.linear[12]\.\w+"
    if m.by_transformers:
        if keys := short(unexpected, linear):
            yield Diagnosis(
                "neox-names-in-hf",
                "The files have GPT-NeoX's names, such as mlp.linear1, which transformers does not "
                "know: the tool that exported them did not rename them. The MLPs of the model are "
                "random now. CHECKPOINT is the GPT-NeoX checkpoint.",
                EXPORT,
                keys,
            )
        return
    renamed = (
        ("neox-gated-mlp", r"mlp\.w[123]\.weight"),
        ("neox-mlp-names", r"mlp\.dense_\w+\.\w+"),
    )
    for code, names in renamed:
        gated = code == "neox-gated-mlp"
        if keys := short(unexpected, names):
            yield Diagnosis(
                code,
                names_cause("linear", gated),
                _FOR_TODAY,
                keys,
                by_convert=True,
                others=_BEFORE_NOVEMBER,
                more=NAMES_LINKS,
                older="checkpoint",
            )
            return
        if keys := short(missing, names):
            yield Diagnosis(
                code,
                names_cause("dense", gated),
                Command(f"{CONVERT} --for neox@2024-09"),
                keys,
                by_convert=True,
                more=NAMES_LINKS,
                older="framework",
            )
            return
    if keys := short(missing, r"mlp\.linear[12]\.weight"):
        yield Diagnosis(
            "neox-mlp-names",
            names_cause("linear", False),
            _FOR_TODAY,
            keys,
            needs=(("for", "today"),),
            by_convert=True,
            more=NAMES_LINKS,
            older="checkpoint",
        )
    elif not missing and (keys := short(unexpected, r"mlp\.linear[12]\.weight")):  # a cut message
        yield Diagnosis(
            "neox-mlp-names",
            names_cause("dense", False),
            Command(f"{CONVERT} --for neox@2024-09"),
            keys,
            needs=(("for", "neox@2024-09"),),
            by_convert=True,
            more=NAMES_LINKS,
            older="framework",
        )


def _norms(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = m.keys
    norm = r"(?:input_layernorm|post_attention_layernorm|norm)\."
    for keys, other, stored, wanted in (
        (short(missing, norm + "scale"), unexpected, "layernorm", "rmsnorm"),
        (short(unexpected, norm + "scale"), missing, "rmsnorm", "layernorm"),
    ):
        if keys:
            yield Diagnosis(
                "norm-kind",
                f"The yml says norm: {wanted}, and the checkpoint has {stored}. GPT-NeoX names the "
                "weights of rmsnorm scale, and those of layernorm weight and bias.",
                f"in the yml: norm: {stored}",
                keys + short(other, norm + r"\w+"),
            )


def _biases(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = m.keys
    attention = r"attention\.(?:query_key_value|dense)\.bias"
    if m.by_transformers:
        if keys := short(missing, attention):
            change = change_named("hf-attention-bias")
            yield Diagnosis(
                "hf-attention-bias",
                "The files have no biases in attention, and the model has: they are random now. "
                f"transformers is older than {change.cited}, or config.json does not say "
                "attention_bias: false.",
                "in config.json: attention_bias: false, with transformers 4.37 or newer",
                keys,
                older="framework",
                more=(change.link,),
            )
        return
    for pattern, key in (
        (attention, "use_bias_in_attn_linear"),
        (r"mlp\.linear[12]\.bias", "use_bias_in_mlp"),
    ):
        absent, present = short(missing, pattern), short(unexpected, pattern)
        weights = short([*missing, *unexpected], pattern.replace("bias", "weight"))
        if (absent or present) and not weights:
            value, has = ("true", "has") if present else ("false", "does not have")
            yield Diagnosis(
                "bias-keys",
                f"The checkpoint {has} these biases, and the yml says otherwise.",
                f"in the yml: {key}: {value}",
                absent + present,
            )


def _transformer_engine(m: Message) -> Iterator[Diagnosis]:
    te = r"(?:attention\.(?:qkv|proj)\..*|mlp\.(?:fc[12]_|layer_norm_)\w+|.*_extra_state)"
    missing, unexpected = (short(keys, te) for keys in m.keys)
    if (missing or unexpected) and not m.by_transformers:
        side = "The tree uses" if missing else "The checkpoint was saved with"
        yield Diagnosis(
            "neox-transformer-engine",
            f"{side} Transformer Engine's modules, which have other names, and the other side does "
            "not.",
            "",
            missing + unexpected,
            settings=("te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha"),
            more=(change_named("neox-transformer-engine").link,),
        )


def _head(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = (short(keys, r"(?:lm_head|embed_out)\.weight") for keys in m.keys)
    if missing and unexpected:
        change = change_named("hf-lm-head")
        older: Older = "framework" if "embed_out" in missing[0] else "checkpoint"
        yield Diagnosis(
            "hf-lm-head",
            f"The output layer is {unexpected[0]} in the files and {missing[0]} in the model, and "
            f"{_RANDOM}. transformers renamed it in memory in {change.cited}. Files keep the name "
            "embed_out.weight, which every version reads.",
            FIX,
            missing + unexpected,
            older=older,
            others=("rename it to embed_out.weight, where the files are written",),
            more=(change.link,),
        )
    elif missing:
        yield Diagnosis(
            "no-output-layer",
            "The files have no output layer, and config.json does not say that it is the "
            f"embeddings, so {_RANDOM}.",
            "in config.json: tie_word_embeddings: true, if the model is tied",
            missing,
            others=("if the model is not tied, download or export the weights again",),
        )
    elif unexpected:
        yield Diagnosis(
            "output-layer-unused",
            "The files have an output layer that this model does not have: the model is tied, or "
            "it was loaded without its head.",
            "in config.json: tie_word_embeddings: false, if the layer differs from the embeddings",
            unexpected,
            others=("load the model with AutoModelForCausalLM",),
        )


def _masks(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = (short(keys, r"attention\.(?:masked_)?bias") for keys in m.keys)
    if missing or unexpected:
        change = change_named("hf-masks")
        yield Diagnosis(
            "hf-masks",
            "attention.bias and attention.masked_bias are causal masks, not weights. transformers "
            f"before {change.cited} stored them, and newer versions compute them.",
            FIX,
            missing + unexpected,
            older="framework" if missing else "checkpoint",
            more=(change.link,),
        )


def _sizes(m: Message) -> Iterator[Diagnosis]:
    rows = [size for size in m.sizes if _VOCABULARY.search(size.key) and size.stored]
    qkv = [size for size in m.sizes if "query_key_value" in size.key]
    mlp = [size for size in m.sizes if "mlp." in size.key and size.stored and size.wanted]
    if (change := _tp_change(m, [*qkv, *mlp])) is not None:
        yield Diagnosis(
            "tensor-parallel",
            f"A rank has {change[0]} rows of a tensor in the checkpoint and {change[1]} in the "
            "model, and the other tensors differ in the same way: the number of tensor-parallel "
            "ranks differs.",
            OTHER_TP,
            tuple(size.key for size in m.sizes),
            settings=("model_parallel_size",),
            tp_change=change,
        )
        return
    if rows and rows[0].wanted:
        yield _vocabulary(rows, m.by_transformers)
    if qkv and not m.by_transformers:
        yield Diagnosis(
            "query-key-value-rows",
            "query_key_value has another number of rows than the yml asks for: the number of "
            "heads, of key-value heads or of tensor-parallel ranks differs.",
            "",
            tuple(size.key for size in qkv),
            settings=("num_attention_heads", "num_kv_heads", "model_parallel_size"),
            others=(OTHER_TP,),
        )
    if mlp:
        yield _width(mlp, m.by_transformers)
    if m.sizes and not (rows or qkv or mlp):
        yield Diagnosis(
            "sizes",
            "The checkpoint is of a model of another size, or of another number of "
            "tensor-parallel ranks.",
            Command("neox-bridge inspect CHECKPOINT   # shows its sizes"),
            tuple(size.key for size in m.sizes),
            others=(OTHER_TP,),
        )


def _tp_change(m: Message, sizes: list[Sizes]) -> tuple[int, int] | None:
    """Rows of one rank in the checkpoint and in the model, if only TP differs.

    Only TP differs if attention and MLP both differ by the same factor in one dimension.
    """
    kinds = {"mlp" if "mlp." in size.key else "attention" for size in sizes}
    if m.by_transformers or len(kinds) < 2:
        return None
    changes = set()
    for size in sizes:
        if len(size.stored) != len(size.wanted):
            return None
        pairs = zip(size.stored, size.wanted, strict=True)
        differing = [(stored, wanted) for stored, wanted in pairs if stored != wanted]
        if len(differing) != 1 or 0 in differing[0]:
            return None
        (stored, wanted), *_ = differing
        if max(stored, wanted) % min(stored, wanted):
            return None
        changes.add(stored / wanted)
    first = sizes[0]
    return (first.stored[0], first.wanted[0]) if len(changes) == 1 else None


def _width(mlp: list[Sizes], hf: bool) -> Diagnosis:
    stored, wanted = mlp[0].stored[0], mlp[0].wanted[0]
    keys = tuple(size.key for size in mlp)
    where = "config.json" if hf else "the yml"
    cause = f"{mlp[0].key} has {stored} rows in the checkpoint, and {wanted} by {where}."
    if hf:
        wide = next((size for size in mlp if "h_to_4h" in size.key or "up_proj" in size.key), None)
        others = (f"in config.json: intermediate_size: {wide.stored[0] if wide else stored}",)
        return Diagnosis("mlp-width", cause, FIX, keys, others=others)
    return Diagnosis(
        "mlp-width",
        f"{cause} Trees before {change_named('neox-mlp-width').cited} always build plain MLPs four "
        "times as wide as the model.",
        "",
        keys,
        settings=("activation", "intermediate_size", "model_parallel_size"),
        others=(OTHER_TP,),
    )


def _vocabulary(rows: list[Sizes], hf: bool) -> Diagnosis:
    stored, wanted = rows[0].stored[0], rows[0].wanted[0]
    cause = f"The vocabulary has {stored} rows in the checkpoint and {wanted} in the model"
    keys = tuple(size.key for size in rows)
    if hf:
        others = (f"in config.json: vocab_size: {stored}",)
        return Diagnosis("vocabulary-rows", f"{cause}.", FIX, keys, others=others)
    needs = [("vocab-multiple", str(wanted))]
    if wanted < stored:
        needs.append(("vocab-rows", "tokenizer"))
    return Diagnosis(
        "vocabulary-rows",
        f"{cause}, on one rank. GPT-NeoX pads the tokenizer's size to a multiple of "
        "make_vocab_size_divisible_by x model_parallel_size.",
        "",
        keys,
        tuple(needs),
        settings=VOCABULARY_SETTINGS,
    )


KEY_RULES: tuple[Callable[[Message], Iterator[Diagnosis]], ...] = (
    _inv_freq,
    _mlp,
    _norms,
    _biases,
    _transformer_engine,
    _head,
    _masks,
    _sizes,
)
