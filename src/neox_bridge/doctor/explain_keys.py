"""What keys that are missing, unexpected or of another shape mean."""

import re
from collections.abc import Callable, Iterator

from neox_bridge.doctor.messages import CONVERT, Diagnosis, Message, Older, Sizes, short
from neox_bridge.frameworks.changes import change_named, since

_VOCABULARY = re.compile(
    r"(word_embeddings|final_linear|embed_in|embed_out|lm_head|embed_tokens)\."
)

# grouped-query rows changed their order (neox-gqa-order)
_BEFORE_NOVEMBER = (
    "for a GPT-NeoX from before 2024-11-13 and with num_kv_heads: the same with --for neox@2024-10",
)


def _inv_freq(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = (short(keys, r"rotary_emb\.inv_freq") for keys in m.keys)
    if m.by_transformers and (missing or unexpected):
        llama = any("self_attn" in key for key in (*missing, *unexpected))
        yield Diagnosis(
            "hf-llama-inv-freq" if llama else "hf-neox-inv-freq",
            "inv_freq is stored by older versions of transformers only; it is recomputed",
            "nothing needs doing where it is only a warning: the values follow from the base. To "
            "be rid of the keys: neox-bridge convert CHECKPOINT NEW --to hf",
            missing + unexpected,
            older="framework" if missing else "checkpoint",
        )
    elif missing:
        yield Diagnosis(
            "neox-inv-freq",
            "this GPT-NeoX stores the rotary buffer in every layer, as all trees did before "
            "2024-03-04. transformers 4.35 and newer do not store it, so converted checkpoints do "
            "not hold it. It is not learned: inv_freq = 1 / rotary_emb_base ** (arange(0, dim, 2) "
            "/ dim)",
            f"{CONVERT} --for neox@2024-03",
            missing,
            by_convert=True,
            others=(
                "remove rotary_save_freqs_buffer: true from the yml, if it is there",
                "neox-bridge patch TREE   # lets the tree load both kinds",
            ),
            more=change_named("neox-inv-freq").link,
            older="framework",
        )
    elif unexpected:
        yield Diagnosis(
            "neox-inv-freq",
            "the checkpoint holds the rotary buffer, and this GPT-NeoX does not store it (since "
            f"{since('neox-inv-freq')})",
            f"{CONVERT} --inv-freq omit",
            unexpected,
            by_convert=True,
            others=(
                "in the yml: rotary_save_freqs_buffer: true",
                "neox-bridge patch TREE   # lets the tree load both kinds",
            ),
            more=change_named("neox-inv-freq").link,
            older="checkpoint",
        )


def _mlp(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = m.keys
    linear = r"mlp\.linear[12]\.\w+"
    if m.by_transformers:
        if keys := short(unexpected, linear):
            yield Diagnosis(
                "neox-names-in-hf",
                "the folder holds GPT-NeoX's names (mlp.linear1), which transformers doesn't "
                "know: whatever exported it didn't rename them, and the model's MLPs are random "
                "now",
                "export it again: neox-bridge convert CHECKPOINT NEW --to hf",
                keys,
            )
        return
    when, more = since("neox-mlp-names"), change_named("neox-mlp-names").link
    renamed = (
        ("neox-gated-mlp", r"mlp\.w[123]\.weight", "gated MLPs are w1, w2, w3"),
        ("neox-mlp-names", r"mlp\.dense_\w+\.\w+", "MLPs are dense_h_to_4h and dense_4h_to_h"),
    )
    for code, names, old in renamed:
        if keys := short(unexpected, names):
            yield Diagnosis(
                code,
                f"the checkpoint's {old}, as before {when}; the tree has linear1 and linear2",
                f"{CONVERT} --for today",
                keys,
                by_convert=True,
                others=_BEFORE_NOVEMBER,
                more=more,
                older="checkpoint",
            )
            return
        if keys := short(missing, names):
            yield Diagnosis(
                code,
                f"the tree's {old}, as before {when}; the checkpoint has linear1 and linear2",
                f"{CONVERT} --for neox@2024-09",
                keys,
                by_convert=True,
                more=more,
                older="framework",
            )
            return
    if keys := short(missing, r"mlp\.linear[12]\.weight"):
        yield Diagnosis(
            "neox-mlp-names",
            f"the tree has linear1 and linear2, as since {when}, and the checkpoint does not",
            f"{CONVERT} --for today",
            keys,
            needs=(("for", "today"),),
            by_convert=True,
            more=more,
            older="checkpoint",
        )


def _norms(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = m.keys
    norm = r"(?:input_layernorm|post_attention_layernorm|norm)\."
    for keys, other, held, wanted in (
        (short(missing, norm + "scale"), unexpected, "layernorm", "rmsnorm"),
        (short(unexpected, norm + "scale"), missing, "rmsnorm", "layernorm"),
    ):
        if keys:
            yield Diagnosis(
                "norm-kind",
                f"the yml asks for norm: {wanted}, and the checkpoint holds {held}: GPT-NeoX "
                "names the weights of rmsnorm scale, those of layernorm weight and bias",
                f"in the yml: norm: {held}",
                keys + short(other, norm + r"\w+"),
            )


def _biases(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = m.keys
    attention = r"attention\.(?:query_key_value|dense)\.bias"
    if m.by_transformers:
        if keys := short(missing, attention):
            yield Diagnosis(
                "hf-attention-bias",
                "the files have no biases in attention, and the model has: they are random now; "
                "transformers is older than 4.37, or config.json doesn't say attention_bias: false",
                "in config.json: attention_bias: false, with transformers 4.37 or newer",
                keys,
                older="framework",
            )
        return
    for pattern, key in (
        (attention, "use_bias_in_attn_linear"),
        (r"mlp\.linear[12]\.bias", "use_bias_in_mlp"),
    ):
        lacks, has = short(missing, pattern), short(unexpected, pattern)
        weights = short([*missing, *unexpected], pattern.replace("bias", "weight"))
        if (lacks or has) and not weights:
            value, says = ("true", "holds") if has else ("false", "doesn't hold")
            yield Diagnosis(
                "bias-keys",
                f"the checkpoint {says} these biases, and the yml says otherwise",
                f"in the yml: {key}: {value}",
                lacks + has,
            )


def _transformer_engine(m: Message) -> Iterator[Diagnosis]:
    te = r"(?:attention\.(?:qkv|proj)\..*|mlp\.(?:fc[12]_|layer_norm_)\w+|.*_extra_state)"
    missing, unexpected = (short(keys, te) for keys in m.keys)
    if (missing or unexpected) and not m.by_transformers:
        has = "the tree builds" if missing else "the checkpoint was saved with"
        yield Diagnosis(
            "neox-transformer-engine",
            f"{has} Transformer Engine's modules, which have other names, and the other side "
            "doesn't",
            "in the yml: te_columnparallel, te_rowparallel, te_layernorm_mlp and te_mha as they "
            "were when the checkpoint was saved",
            missing + unexpected,
        )


def _head(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = (short(keys, r"(?:lm_head|embed_out)\.weight") for keys in m.keys)
    if missing and unexpected:
        older: Older = "framework" if "embed_out" in missing[0] else "checkpoint"
        yield Diagnosis(
            "hf-lm-head",
            f"the output layer is {unexpected[0]} in the files and {missing[0]} in the model "
            "(transformers 5.14 renamed it in memory): it is random now",
            "neox-bridge convert CHECKPOINT NEW --to hf writes embed_out.weight, which every "
            "version reads",
            missing + unexpected,
            older=older,
        )
    elif missing:
        yield Diagnosis(
            "no-output-layer",
            "the files have no output layer, and config.json doesn't say that it is the "
            "embeddings: it is random now",
            "in config.json: tie_word_embeddings: true, if the model is tied; else download or "
            "export the weights again",
            missing,
        )
    elif unexpected:
        yield Diagnosis(
            "output-layer-unused",
            "the files hold an output layer that this model doesn't have: it is tied, or it was "
            "loaded without its head",
            "in config.json: tie_word_embeddings: false, if the layer is one of its own; load it "
            "with AutoModelForCausalLM",
            unexpected,
        )


def _masks(m: Message) -> Iterator[Diagnosis]:
    missing, unexpected = (short(keys, r"attention\.(?:masked_)?bias") for keys in m.keys)
    if missing or unexpected:
        yield Diagnosis(
            "hf-masks",
            "attention.bias and attention.masked_bias are causal masks, not weights; transformers "
            "before 4.31 stored them",
            "neox-bridge convert CHECKPOINT NEW --to hf drops them",
            missing + unexpected,
            older="framework" if missing else "checkpoint",
        )


def _sizes(m: Message) -> Iterator[Diagnosis]:
    rows = [size for size in m.sizes if _VOCABULARY.search(size.key) and size.stored]
    qkv = tuple(size.key for size in m.sizes if "query_key_value" in size.key)
    mlp = [size for size in m.sizes if "mlp." in size.key and size.stored and size.wanted]
    if rows and rows[0].wanted:
        yield _vocabulary(rows, m.by_transformers)
    if qkv and not m.by_transformers:
        yield Diagnosis(
            "query-key-value-rows",
            "query_key_value has another number of rows than the yml asks for",
            "in the yml: num_kv_heads, num_attention_heads and model_parallel_size as they were "
            f"when the checkpoint was saved; for another TP: {CONVERT} --tp N",
            qkv,
        )
    if mlp:
        yield _width(mlp, m.by_transformers)
    if m.sizes and not (rows or qkv or mlp):
        yield Diagnosis(
            "sizes",
            "the checkpoint is of a model of another size, or of another number of ranks",
            f"neox-bridge inspect CHECKPOINT shows its sizes; for another TP: {CONVERT} --tp N",
            tuple(size.key for size in m.sizes),
        )


def _width(mlp: list[Sizes], hf: bool) -> Diagnosis:
    stored, wanted = mlp[0].stored[0], mlp[0].wanted[0]
    keys = tuple(size.key for size in mlp)
    where = "config.json" if hf else "the yml"
    cause = f"{mlp[0].key} has {stored} rows in the checkpoint, and {wanted} by {where}"
    if hf:
        wide = next((size for size in mlp if "h_to_4h" in size.key or "up_proj" in size.key), None)
        width = wide.stored[0] if wide else stored
        return Diagnosis("mlp-width", cause, f"in config.json: intermediate_size: {width}", keys)
    return Diagnosis(
        "mlp-width",
        cause,
        "in the yml: activation, intermediate_size and model_parallel_size as they were when the "
        "checkpoint was saved. Trees before 2024-09-07 have plain MLPs of four times the model's "
        f"width only; for another TP: {CONVERT} --tp N",
        keys,
    )


def _vocabulary(rows: list[Sizes], hf: bool) -> Diagnosis:
    stored, wanted = rows[0].stored[0], rows[0].wanted[0]
    cause = f"the vocabulary has {stored} rows in the checkpoint and {wanted} in the model"
    keys = tuple(size.key for size in rows)
    if hf:
        remedy = f"in config.json: vocab_size: {stored}"
        return Diagnosis("vocabulary-rows", cause, remedy, keys)
    cause += (
        " (on one rank): GPT-NeoX pads the tokenizer's size to a multiple of "
        "make_vocab_size_divisible_by x model_parallel_size"
    )
    needs = [("vocab-multiple", str(wanted))]
    if wanted < stored:
        needs.append(("vocab-rows", "tokenizer"))
    others = (
        "in the yml: the tokenizer, make_vocab_size_divisible_by and model_parallel_size as they "
        "were when the checkpoint was saved",
    )
    return Diagnosis("vocabulary-rows", cause, "", keys, tuple(needs), others=others)


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
