"""GPT-NeoX's changes. Each was read in the commit that it names (EleutherAI/gpt-neox)."""

from neox_bridge.frameworks.change import Change
from neox_bridge.frameworks.detectors import (
    HALF,
    MOE_KEYS,
    is_gated,
    is_grouped,
    is_te,
    is_wide,
    key,
    knows,
    neox,
    on,
    one_stage_ranks,
    refuses,
    stores_bf16,
    sums,
    unknown,
)

_DECODER = ("gpt_neox", "llama", "mistral")


def _commit(hash_: str) -> str:
    return f"https://github.com/EleutherAI/gpt-neox/commit/{hash_}"


def _pull(number: int) -> str:
    return f"https://github.com/EleutherAI/gpt-neox/pull/{number}"


NEOX: tuple[Change, ...] = (
    Change(
        "neox-rms-epsilon",
        *("gpt-neox", "4c9f1081", "#1345", "2025-05-09", ""),
        ("llama", "mistral"),
        "RMSNorm adds its epsilon inside the root (x / sqrt(mean(x²) + eps)), as transformers "
        "does; before, outside (x / (rms + eps))",
        "logits that differ by some 1e-4 between trees, or from transformers",
        False,
        "nothing in the checkpoint can mend it: evaluate a model in the form that it was trained "
        "with, or accept 1e-4",
        _pull(1345),
        in_checkpoint=neox(lambda c: c.raw.get("norm") == "rmsnorm"),
        in_tree=lambda t: t.rms_eps == "inside",
    ),
    Change(
        "neox-te-gated-width",
        *("gpt-neox", "21fa24f9", "#1352", "2025-05-09", ""),
        ("llama",),
        "Transformer Engine's gated MLP takes intermediate_size as it is; before, two thirds of it",
        "size mismatch for mlp.fc1_weight, with the same yml",
        True,
        "set intermediate_size in the yml to the width that the checkpoint has",
        _pull(1352),
        in_checkpoint=neox(lambda c: bool(c.raw.get("te_layernorm_mlp")) and is_gated(c)),
        in_error=(r"size mismatch for \S*mlp\.fc[12]_weight",),
    ),
    Change(
        "neox-moe-keys",
        *("gpt-neox", "d11df961", "#1210", "2025-05-09", ""),
        ("mixtures of experts",),
        "other experts (dMoE), and other yml keys for them: moe_expert_interval in place of "
        "expert_interval; moe_type, moe_glu, moe_loss_coeff and others are gone",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'moe_type'",
        True,
        "take the old keys out of the yml; weights of experts aren't carried over by neox-bridge",
        _pull(1210),
        in_checkpoint=neox(lambda c: not MOE_KEYS.isdisjoint(c.raw)),
        in_tree=knows("moe_expert_interval"),
        in_error=tuple(unknown(key) for key in sorted(MOE_KEYS)),
    ),
    Change(
        "neox-nvlink-key",
        *("gpt-neox", "9107b255", "#1339", "2025-02-18", ""),
        _DECODER,
        "the yml key detect_nvlink_pairs is gone",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'detect_nvlink_pairs'",
        True,
        "remove detect_nvlink_pairs from the yml",
        _pull(1339),
        in_checkpoint=key("detect_nvlink_pairs"),
        in_tree=refuses("detect_nvlink_pairs"),
        in_error=(unknown("detect_nvlink_pairs"),),
    ),
    Change(
        "neox-non-parametric-layernorm",
        *("gpt-neox", "9eaec64d", "#1338", "2025-02-18", ""),
        ("gpt_neox",),
        "norm: non_parametric_layernorm, a LayerNorm without weights",
        "older trees: ValueError: norm non_parametric_layernorm not recognized",
        True,
        "load it with a GPT-NeoX of 2025-02-18 or later",
        _pull(1338),
        in_checkpoint=neox(lambda c: c.raw.get("norm") == "non_parametric_layernorm"),
        in_error=(r"norm non_parametric_layernorm not recognized",),
    ),
    Change(
        "neox-transformer-engine",
        *("gpt-neox", "8900d05c", "#1282", "2024-12-19", ""),
        _DECODER,
        "Transformer Engine's modules, where the yml asks for them, with names of their own: "
        "attention.qkv, attention.proj, mlp.fc1_weight, mlp.fc2_weight, mlp.layer_norm_weight, "
        "*._extra_state",
        "Missing or unexpected keys attention.qkv.weight, mlp.fc1_weight, _extra_state",
        True,
        "set te_columnparallel, te_rowparallel, te_layernorm_mlp and te_mha in the yml as they "
        "were when the checkpoint was saved",
        _pull(1282),
        in_checkpoint=neox(is_te),
        in_tree=lambda t: t.transformer_engine,
        in_error=(r"\"[\w.]*(attention\.qkv\.|attention\.proj\.|mlp\.fc[12]_weight|_extra_state)",),
    ),
    Change(
        "neox-gated-biases",
        *("gpt-neox", "f5325805", "#1325", "2024-11-27", ""),
        ("llama",),
        "a gated MLP may have biases or none, whatever its activation; from 0d4bdb96 (2024-09) to "
        "here swiglu must have none (use_bias_in_mlp: false), and geglu and the others must have "
        "them, unless gpt_j_residual is true",
        "it loads, and the first forward pass ends in AttributeError: 'NoneType' object has no "
        "attribute 'expand_as', or in AssertionError",
        True,
        "use a GPT-NeoX since that day; neox-bridge refuses to write such a model for the trees "
        "between",
        _pull(1325),
        in_checkpoint=neox(
            lambda c: c.config.mlp_bias == (c.raw.get("activation") == "swiglu") and is_gated(c)
        ),
        in_tree=lambda t: t.gated_biases == "optional",
        in_error=(r"'NoneType' object has no attribute 'expand_as'",),
    ),
    Change(
        "neox-gqa-order",
        *("gpt-neox", "96c242eb", "#1315", "2024-11-13", ""),
        ("llama", "mistral"),
        "rows of a grouped-query query_key_value: on each rank all q, all k, all v; before, by "
        "query head, [q, a slice of k, a slice of v]. The shapes are the same",
        "loads, and the model talks nonsense: logits off by several units",
        False,
        "say which GPT-NeoX wrote the checkpoint; only its date, or a test of the logits, tells",
        _pull(1315),
        in_checkpoint=neox(is_grouped),
        in_tree=lambda t: t.gqa_order == "grouped",
    ),
    Change(
        "neox-mlp-type",
        *("gpt-neox", "adbf5d6f", "#1276", "2024-09-10", ""),
        _DECODER,
        "the yml key mlp_type is gone (the activation tells: swiglu in place of mlp_type: llama "
        "with silu); use_bias_in_mlp and mlp_multiple_of are new",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'mlp_type'",
        True,
        'remove mlp_type from the yml; where it was "llama" with activation: silu, set '
        "activation: swiglu and use_bias_in_mlp: false",
        _pull(1276),
        in_checkpoint=key("mlp_type"),
        in_tree=refuses("mlp_type"),
        in_error=(unknown("mlp_type"), unknown("use_bias_in_mlp"), unknown("mlp_multiple_of")),
    ),
    Change(
        "neox-gpt-j-no-mlp-bias",
        *("gpt-neox", "e37ad2f0", "#1278", "2024-09-10", ""),
        ("gpt_neox",),
        "gpt_j_residual: true with use_bias_in_mlp: false runs, but the block's output is the "
        "MLP's alone: attention and residual are dropped",
        "trains and loads, and the model ignores attention; nothing in transformers computes this",
        False,
        "train with use_bias_in_mlp: true; neox-bridge refuses such a model for Hugging Face",
        _pull(1278),
        in_checkpoint=neox(
            lambda c: bool(c.raw.get("gpt_j_residual")) and c.raw.get("use_bias_in_mlp") is False
        ),
    ),
    Change(
        "neox-mlp-names",
        *("gpt-neox", "0d4bdb96", "#1212", "2024-09-07", ""),
        ("gpt_neox",),
        "the plain MLP's names: mlp.linear1 and mlp.linear2; before, mlp.dense_h_to_4h and "
        "mlp.dense_4h_to_h",
        'Missing key(s) in state_dict: "mlp.linear1.weight" … Unexpected key(s): '
        '"mlp.dense_h_to_4h.weight", or the other way round',
        True,
        "neox-bridge convert CHECKPOINT NEW --to neox --for today (a tree of 2024-09-07 or later), "
        "--for neox@2024-09 (an earlier one), --for neox@2024-03 (one before 2024-03-04)",
        _pull(1212),
        in_checkpoint=neox(lambda c: not is_gated(c)),
        in_tree=lambda t: t.mlp_names == "linear",
        in_error=(r"\"[\w.]*mlp\.(dense_h_to_4h|dense_4h_to_h)\.\w+\"",),
    ),
    Change(
        "neox-gated-mlp",
        *("gpt-neox", "0d4bdb96", "#1212", "2024-09-07", ""),
        ("llama", "mistral"),
        "gated MLPs: w1 (gate) and w3 (up) became one mlp.linear1, [up | gate] on each rank, w2 "
        "became mlp.linear2; intermediate_size in the yml became three times the real width",
        'Missing key(s) in state_dict: "mlp.linear1.weight" … Unexpected key(s): '
        '"mlp.w1.weight", "mlp.w3.weight"; or size mismatch for mlp.linear1.weight',
        True,
        "neox-bridge convert CHECKPOINT NEW --to neox --for today, or --for neox@2024-09 for an "
        "older tree; in a yml for a newer one intermediate_size is 3 x the width of w1",
        _pull(1212),
        in_checkpoint=neox(is_gated),
        in_error=(r"\"[\w.]*mlp\.w[123]\.weight\"",),
    ),
    Change(
        "neox-mlp-width",
        *("gpt-neox", "0d4bdb96", "#1212", "2024-09-07", ""),
        ("gpt_neox",),
        "plain MLPs take intermediate_size; before, they were always four times as wide as the "
        "model, whatever the yml said",
        "size mismatch for mlp.dense_h_to_4h.weight in an older tree",
        True,
        "load it with a GPT-NeoX of 2024-09 or later (neox-bridge convert … --for neox@2024-10)",
        _pull(1212),
        in_checkpoint=is_wide,
        in_tree=lambda t: not t.plain_mlp_4h,
        in_error=(r"size mismatch for (?!gpt_neox)\S*mlp\.(dense_h_to_4h|dense_4h_to_h)\.",),
    ),
    Change(
        "neox-hf-import-bias-split",
        *("gpt-neox", "90a6cdb3", "#1220", "2024-06-07", ""),
        ("gpt_neox",),
        "GPT-NeoX's own importer (convert_hf_to_sequential.py) divides row-parallel biases by the "
        "number of ranks; before, each rank held all of them, and with gpt_j_residual: true they "
        "were added up",
        "a model imported with TP above 1 starts with a loss that is far too high",
        False,
        "import it again: neox-bridge convert CHECKPOINT NEW --tp N",
        _pull(1220),
        in_checkpoint=neox(lambda c: sums(c) and c.config.parallel_residual),
    ),
    Change(
        "neox-pipe-1-again",
        *("gpt-neox", "2382bd4a", "#1219", "2024-06-07", ""),
        _DECODER,
        "pipe_parallel_size: 1 writes and reads layer files again; from 86758c35 (2024-03-07) on "
        "it meant one file a rank, as 0 does",
        "TypeError: Expected state_dict to be dict-like, got <class 'NoneType'>, or KeyError: "
        "'module'",
        True,
        "neox-bridge convert CHECKPOINT NEW --to neox --layout layers, or set pipe_parallel_size: "
        "0",
        _pull(1219),
        in_checkpoint=one_stage_ranks,
        in_error=(
            r"Expected state_dict to be dict-like, got <class 'NoneType'>",
            r"KeyError: 'module'",
        ),
    ),
    Change(
        "neox-pipe-1-ranks",
        *("gpt-neox", "86758c35", "#1129", "2024-03-07", ""),
        _DECODER,
        "pipe_parallel_size: 1 no longer makes a pipeline: checkpoints hold one file a rank "
        "(sequential.N. names), and layer files don't load; undone by 2382bd4a (2024-06-07)",
        "TypeError: Expected state_dict to be dict-like, got <class 'NoneType'>",
        True,
        "neox-bridge convert CHECKPOINT NEW --to neox --layout ranks for a tree of that time",
        _pull(1129),
        in_checkpoint=one_stage_ranks,
        in_error=(r"Expected state_dict to be dict-like, got <class 'NoneType'>",),
    ),
    Change(
        "neox-inv-freq",
        *("gpt-neox", "e109bf5e", "#1168", "2024-03-04", ""),
        _DECODER,
        "attention.rotary_emb.inv_freq is no longer stored, unless the yml sets "
        "rotary_save_freqs_buffer: true",
        'Unexpected key(s) in state_dict: "attention.rotary_emb.inv_freq" with a checkpoint of an '
        "older tree; Missing key(s) in an older tree with a new checkpoint",
        True,
        "neox-bridge convert CHECKPOINT NEW --to neox --for neox@2024-03 (a tree before this "
        "change), --for neox@2024-09 (one from before 2024-09-07) or --for today; in the yml of a "
        "tree with this change rotary_save_freqs_buffer: true keeps the buffer",
        _pull(1168),
        in_checkpoint=neox(lambda c: c.raw.get("pos_emb") == "rotary"),
        in_tree=lambda t: t.inv_freq in ("flag", "never", "either"),
        in_error=(
            r"(?:Missing|Unexpected) key\(s\) in state_dict: [^\n]*rotary_emb\.inv_freq",
            unknown("rotary_save_freqs_buffer"),
        ),
    ),
    Change(
        "neox-num-kv-heads",
        *("gpt-neox", "f36aed7f", "#1131", "2024-02-23", ""),
        ("llama", "mistral"),
        "grouped-query attention and its yml key num_kv_heads",
        "older trees: TypeError: NeoXArgs.__init__() got an unexpected keyword argument "
        "'num_kv_heads'",
        True,
        "load it with a GPT-NeoX of 2024-02-23 or later",
        _pull(1131),
        in_checkpoint=key("num_kv_heads"),
        in_tree=knows("num_kv_heads"),
        in_error=(unknown("num_kv_heads"),),
    ),
    Change(
        "neox-qk-layernorm",
        *("gpt-neox", "f161245b", "#1100", "2023-12-22", ""),
        ("gpt_neox",),
        "use_qk_layernorm: a norm of queries and keys, attention.qk_layernorm",
        'Missing or unexpected key "attention.qk_layernorm.weight"',
        True,
        "set use_qk_layernorm in the yml as it was; transformers' gpt_neox has no such norm",
        _pull(1100),
        in_checkpoint=on("use_qk_layernorm"),
        in_tree=knows("use_qk_layernorm"),
        in_error=(r"attention\.qk_layernorm\.", unknown("use_qk_layernorm")),
    ),
    Change(
        "neox-rope-fp32",
        *("gpt-neox", "3bfedf47", "#1041", "2023-09-25", ""),
        _DECODER,
        "the tables of RoPE are computed in fp32; before, in the model's own precision",
        "a model trained in half precision before has seen rounded angles: small differences at "
        "long positions",
        False,
        "nothing in the checkpoint can mend it; compare the loss at long contexts",
        _pull(1041),
        in_checkpoint=neox(lambda c: c.config.dtype in HALF and c.raw.get("pos_emb") == "rotary"),
        in_tree=lambda t: t.rope_tables_fp32,
    ),
    Change(
        "neox-bf16-key",
        *("gpt-neox", "056e9caf", "#787", "2023-05-16", ""),
        _DECODER,
        "bfloat16 is asked for by precision: bfloat16 or bf16: {enabled: true}; before, by "
        "fp16: {type: bfloat16}. Optimizer files are named bf16_zero_pp_rank_…",
        "AssertionError: DeepSpeed fp16 field was set but precision conflicts, or a run that "
        "starts in another precision",
        True,
        "set precision: bfloat16 and remove fp16 from the yml",
        _pull(787),
        in_checkpoint=stores_bf16,
        in_error=(r"DeepSpeed fp16 field was set but precision conflicts",),
    ),
    Change(
        "neox-pipe-1-layers",
        *("gpt-neox", "1faff79d", "#866", "2023-04-21", ""),
        _DECODER,
        "pipe_parallel_size: 1 is a pipeline of one stage, with layer files; before, it meant one "
        "file a rank, as 0 does",
        "KeyError: 'module' with a checkpoint of an older tree",
        True,
        "neox-bridge convert CHECKPOINT NEW --to neox --layout layers, or set pipe_parallel_size: "
        "0",
        _pull(866),
        in_checkpoint=one_stage_ranks,
        in_error=(r"KeyError: 'module'",),
    ),
    Change(
        "neox-gpt-j-tied-fixed",
        *("gpt-neox", "f607953d", "", "2022-12-27", ""),
        ("gpt_neox",),
        "gpt_j_tied means what it says; between 0accac61 (2022-12-06) and this its test was the "
        "wrong way round, so that models with gpt_j_residual used one norm for both branches",
        "a model trained in those three weeks has a loss that is too high in any other tree",
        False,
        "set gpt_j_tied to the opposite for a model that was trained in those weeks",
        _commit("f607953d"),
        in_checkpoint=neox(lambda c: c.config.parallel_residual and "gpt_j_tied" in c.raw),
    ),
    Change(
        "neox-gas-key",
        *("gpt-neox", "91c44bc3", "#1144", "2024-02-05", ""),
        (*_DECODER, "mamba"),
        "the yml key gas is gone. GPT-NeoX had computed it from gradient_accumulation_steps, so "
        "that its value in a yml had no effect",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'gas'",
        True,
        "remove gas from the yml: gradient_accumulation_steps is what counted, and is 1 by default",
        _pull(1144),
        in_checkpoint=key("gas"),
        in_tree=refuses("gas"),
        in_error=(unknown("gas"),),
    ),
    Change(
        "neox-deepspeed-08",
        *("gpt-neox", "9610391a", "#818", "2023-03-09", ""),
        ("gpt_neox",),
        "GPT-NeoX v2.0 requires DeepSpeed (0.8.3 then) in place of DeeperSpeed 0.3.15: optimizer "
        "states have another form and a ds_version, without which they are refused",
        "AssertionError: Empty ds_version in checkpoint, not clear how to proceed; in v1.0 with a "
        "newer checkpoint: KeyError: 'csr_tensor_module_names'",
        True,
        "neox-bridge reshard CHECKPOINT NEW --for today writes the states anew, --for neox@v1.0 "
        "those of a newer run for v1.0; finetune: true in the yml loads the weights alone",
        _pull(818),
        in_checkpoint=neox(lambda c: c.neox is not None and not c.neox.ds_version),
        in_tree=lambda t: t.states == "partitions",
        in_error=(r"Empty ds_version in checkpoint", r"KeyError: 'csr_tensor_module_names'"),
    ),
    Change(
        "neox-gpt-j-tied",
        *("gpt-neox", "0accac61", "#481", "2022-12-06", ""),
        ("gpt_neox",),
        "the yml key gpt_j_tied: one norm for both branches of a gpt_j_residual block; "
        "post_attention_layernorm is stored but unused",
        "older trees: unexpected keyword argument 'gpt_j_tied'; converters that use both norms "
        "give a silently wrong model",
        False,
        "neox-bridge convert writes input_layernorm twice, which is exact",
        _pull(481),
        in_checkpoint=on("gpt_j_tied"),
        in_tree=knows("gpt_j_tied"),
        in_error=(unknown("gpt_j_tied"),),
    ),
    Change(
        "neox-gpt-j-reduce",
        *("gpt-neox", "eb02115b", "", "2021-09-29", ""),
        ("gpt_neox",),
        "with gpt_j_residual: true attention and MLP are added up over the ranks together, biases "
        "included: the model's bias is the sum over the ranks",
        "logits off by 0.5 and more where a converter takes one rank's bias, or sums those of a "
        "model without gpt_j_residual",
        False,
        "neox-bridge convert sums them for gpt_j_residual: true, and takes one otherwise",
        _commit("eb02115b"),
        in_checkpoint=sums,
    ),
)
