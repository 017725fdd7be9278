"""GPT-NeoX's changes. Each was read in the commit that it names.

An entry without a title only sets facts. It is not shown to users.
"""

from neox_bridge.frameworks.change import Change, Commit
from neox_bridge.frameworks.detectors import (
    HALF,
    MOE_KEYS,
    SEPARATE_QK_NORMS,
    has_usual_head_width,
    is_gated,
    is_grouped,
    is_te,
    is_wide,
    neox,
    on,
    one_stage_ranks,
    stores_bf16,
    sums,
)

_DECODER = ("gpt_neox", "llama", "mistral")


# This commit changed three things.
_NEW_MLP = Commit(
    "0d4bdb965e3bd9eed6df8f5a4f024f9ff310601c", 1212, "2024-09-07", git_date="2024-09-06"
)

# Pull requests that are open, and what their threads say; their branches were not read.
_PROPOSED: tuple[Change, ...] = (
    Change(
        "neox-head-dim",
        Commit("", 1436, "2026-09-20", proposed=True),
        ("llama", "mistral"),
        "the yml key head_dim sets the width of a head, as #1434 asks for. Today it is "
        "hidden_size / num_attention_heads. The q rows of query_key_value and the columns of "
        "attention.dense become num_attention_heads * head_dim",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'head_dim'; without the "
        "key, size mismatch for attention.query_key_value.weight and attention.dense.weight",
        "load it in the tree that wrote it. neox-bridge converts such a checkpoint if head_dim is "
        "hidden_size / num_attention_heads, and refuses it otherwise",
        adds_keys=("head_dim",),
        is_as_before=has_usual_head_width,
    ),
    Change(
        "neox-separate-qk-norms",
        Commit("", 1424, "2026-09-09", proposed=True),
        ("llama", "mistral"),
        "separate norms of q and k, over each head or across the heads of a rank. Today's "
        "use_qk_layernorm is one norm for both, attention.qk_layernorm. #1367, on which it builds, "
        "adds the yml key qk_layernorm_over_heads",
        'unexpected key "attention.q_norm.scale" and "attention.k_norm.scale", or another spelling '
        "of them",
        "load it in the tree that wrote it; neox-bridge refuses such a checkpoint, since the "
        "proposal does not fix the names",
        adds_keys=("qk_layernorm_over_heads",),
        adds_tensors=SEPARATE_QK_NORMS,
        is_as_before=lambda raw: (
            not raw.get("use_qk_layernorm") or raw.get("qk_layernorm_over_heads") is True
        ),
        in_error=(SEPARATE_QK_NORMS,),
    ),
    Change(
        "neox-norm-placement",
        Commit("", 1408, "2026-09-05", proposed=True),
        ("llama",),
        "the yml key norm_placement puts the norms of a block before attention and MLP, as today "
        "(pre_norm), or after them (post_norm_outside_residual, post_norm_inside_residual), as "
        "OLMo 2 does",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'norm_placement'",
        "load it in the tree that wrote it. neox-bridge converts such a checkpoint if "
        "norm_placement is pre_norm, and refuses it otherwise",
        adds_keys=("norm_placement",),
        is_as_before=lambda raw: raw.get("norm_placement") == "pre_norm",
    ),
)

NEOX: tuple[Change, ...] = (
    *_PROPOSED,
    Change(
        "neox-rms-epsilon",
        Commit("4c9f10816d15a8173fc8779a4c261c3f7dff5155", 1345, "2025-05-09"),
        ("llama", "mistral"),
        "RMSNorm adds its epsilon inside the root (x / sqrt(mean(x²) + eps)), as transformers "
        "does; before, it added the epsilon outside (x / (rms + eps))",
        "the logits differ by about 1e-4 between trees, or from transformers",
        "nothing in the checkpoint can fix it: evaluate a model in the form that it was trained "
        "with, or accept 1e-4",
        loud=False,
        in_checkpoint=neox(lambda c: c.raw.get("norm") == "rmsnorm"),
        sets={"rms_eps": "inside"},
    ),
    Change(
        "neox-te-gated-width",
        Commit("21fa24f9c75cef21cf14cdf681f3b257210ee8bf", 1352, "2025-05-09"),
        ("llama",),
        "Transformer Engine's gated MLP uses intermediate_size as it is; before, two thirds of it",
        "size mismatch for mlp.fc1_weight, with the same yml",
        "set intermediate_size in the yml to the width that the checkpoint has",
        in_checkpoint=neox(lambda c: bool(c.raw.get("te_layernorm_mlp")) and is_gated(c)),
        in_error=(r"size mismatch for \S*mlp\.fc[12]_weight",),
    ),
    Change(
        "neox-moe-keys",
        Commit("d11df9614071ba1edf7665f73279447105853812", 1210, "2025-05-09"),
        ("mixtures of experts",),
        "other experts (dMoE) with other yml keys: moe_expert_interval replaces expert_interval, "
        "and moe_type, moe_glu, moe_loss_coeff and others were removed",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'moe_type'",
        "remove the old keys from the yml; neox-bridge does not convert the weights of experts",
        adds_keys=("moe_expert_interval",),
        removes_keys=MOE_KEYS,
    ),
    Change(
        "neox-nvlink-key",
        Commit("9107b255cc21fed773c6d6af3ff4a11f1cb237cd", 1339, "2025-02-18"),
        _DECODER,
        "the yml key detect_nvlink_pairs was removed",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'detect_nvlink_pairs'",
        "remove detect_nvlink_pairs from the yml",
        removes_keys=("detect_nvlink_pairs",),
    ),
    Change(
        "neox-non-parametric-layernorm",
        Commit("9eaec64d8cdd09a88459dcd40c4341aa6b0d826c", 1338, "2025-02-18"),
        ("gpt_neox",),
        "the new norm non_parametric_layernorm is a LayerNorm without weights",
        "older trees: ValueError: norm non_parametric_layernorm not recognized",
        "load it with a GPT-NeoX of 2025-02-18 or later",
        in_checkpoint=neox(lambda c: c.raw.get("norm") == "non_parametric_layernorm"),
        in_error=(r"norm non_parametric_layernorm not recognized",),
    ),
    Change(
        "neox-transformer-engine",
        Commit("8900d05c8df1f2f5728a5305b5a1447697b548ac", 1282, "2024-12-19"),
        _DECODER,
        "Transformer Engine's modules, if the yml asks for them, have other names: "
        "attention.qkv, attention.proj, mlp.fc1_weight, mlp.fc2_weight, mlp.layer_norm_weight, "
        "*._extra_state",
        "missing or unexpected keys attention.qkv.weight, mlp.fc1_weight, _extra_state",
        "set te_columnparallel, te_rowparallel, te_layernorm_mlp and te_mha in the yml as they "
        "were when the checkpoint was saved",
        in_checkpoint=neox(is_te),
        sets={"transformer_engine": True},
        in_error=(r"\"[\w.]*(attention\.qkv\.|attention\.proj\.|mlp\.fc[12]_weight|_extra_state)",),
    ),
    Change(
        "neox-gated-biases",
        Commit("f5325805678c2b9e35aae4528283e0132c5f5bbc", 1325, "2024-11-27"),
        ("llama",),
        "a gated MLP may have biases or none, with any activation; from 0d4bdb96 (2024-09) until "
        "this commit, swiglu must have none (use_bias_in_mlp: false), and geglu and the others "
        "must have them, unless gpt_j_residual is true",
        "the checkpoint loads, and the first forward pass fails with AttributeError: 'NoneType' "
        "object has no attribute 'expand_as', or with AssertionError",
        "use a GPT-NeoX since that day; neox-bridge refuses to write such a model for the trees "
        "between",
        in_checkpoint=neox(
            lambda c: c.config.mlp_bias == (c.raw.get("activation") == "swiglu") and is_gated(c)
        ),
        sets={"gated_biases": "optional"},
        in_error=(r"'NoneType' object has no attribute 'expand_as'",),
    ),
    Change(
        "neox-gqa-order",
        Commit("96c242ebfc61935ea17868b3dec3847da7dfe071", 1315, "2024-11-13"),
        ("llama", "mistral"),
        "the rows of query_key_value with grouped-query attention are all q, all k, all v on each "
        "rank; before, they were by query head: [q, a slice of k, a slice of v]. The shapes are "
        "the same",
        "the checkpoint loads, and the model generates nonsense: its logits are off by several "
        "units",
        "name the GPT-NeoX that wrote the checkpoint; the files do not tell, so you need its date "
        "or a test of the logits",
        loud=False,
        in_checkpoint=neox(is_grouped),
        sets={"gqa_order": "grouped"},
        ends_era="2024-10",
    ),
    Change(
        "neox-mlp-type",
        Commit("adbf5d6f65f185718f5f5909f1191f54b25ec29d", 1276, "2024-09-10"),
        _DECODER,
        "the yml key mlp_type was removed: activation: swiglu replaces mlp_type: llama with silu. "
        "use_bias_in_mlp and mlp_multiple_of are new",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'mlp_type'",
        'remove mlp_type from the yml; if it was "llama" with activation: silu, set '
        "activation: swiglu and use_bias_in_mlp: false",
        adds_keys=("use_bias_in_mlp", "mlp_multiple_of"),
        removes_keys=("mlp_type",),
    ),
    Change(
        "neox-gpt-j-no-mlp-bias",
        Commit("e37ad2f0d4414ea6f42fc9ca53b75cff3be13b62", 1278, "2024-09-10"),
        ("gpt_neox",),
        "gpt_j_residual: true with use_bias_in_mlp: false runs, but the output of a block is that "
        "of the MLP alone: attention and residual are dropped",
        "it trains and loads, and the model ignores attention; no model in transformers computes "
        "this",
        "train with use_bias_in_mlp: true; neox-bridge refuses such a model for Hugging Face",
        loud=False,
        in_checkpoint=neox(
            lambda c: bool(c.raw.get("gpt_j_residual")) and c.raw.get("use_bias_in_mlp") is False
        ),
    ),
    Change(
        "neox-mlp-names",
        _NEW_MLP,
        ("gpt_neox",),
        "the plain MLP is named mlp.linear1 and mlp.linear2; before, mlp.dense_h_to_4h and "
        "mlp.dense_4h_to_h",
        'Missing key(s) in state_dict: "mlp.linear1.weight" … Unexpected key(s): '
        '"mlp.dense_h_to_4h.weight", or the reverse',
        "neox-bridge convert CHECKPOINT NEW --to neox --for today (a tree of 2024-09-07 or later), "
        "--for neox@2024-09 (an earlier one), --for neox@2024-03 (one before 2024-03-04)",
        in_checkpoint=neox(lambda c: not is_gated(c)),
        sets={"mlp_names": "linear", "gated_biases": "by activation"},
        ends_era="2024-09",
        renames={"mlp.dense_h_to_4h": "mlp.linear1", "mlp.dense_4h_to_h": "mlp.linear2"},
    ),
    Change(
        "neox-gated-mlp",
        _NEW_MLP,
        ("llama", "mistral"),
        "in gated MLPs, w1 (gate) and w3 (up) became one mlp.linear1, [up | gate] on each rank, "
        "and w2 became mlp.linear2; intermediate_size in the yml became three times the real width",
        'Missing key(s) in state_dict: "mlp.linear1.weight" … Unexpected key(s): '
        '"mlp.w1.weight", "mlp.w3.weight"; or size mismatch for mlp.linear1.weight',
        "neox-bridge convert CHECKPOINT NEW --to neox --for today, or --for neox@2024-09 for an "
        "older tree; in a yml for a newer tree, intermediate_size is 3 x the width of w1",
        in_checkpoint=neox(is_gated),
        renames={"mlp.w1": "mlp.linear1", "mlp.w3": "mlp.linear1", "mlp.w2": "mlp.linear2"},
    ),
    Change(
        "neox-mlp-width",
        _NEW_MLP,
        ("gpt_neox",),
        "plain MLPs use intermediate_size; before, they were always four times as wide as the "
        "model",
        "older trees: size mismatch for mlp.dense_h_to_4h.weight",
        "load it with a GPT-NeoX of 2024-09 or later (neox-bridge convert … --for neox@2024-10)",
        in_checkpoint=is_wide,
        sets={"plain_mlp_4h": False},
        in_error=(r"size mismatch for (?!gpt_neox)\S*mlp\.(dense_h_to_4h|dense_4h_to_h)\.",),
    ),
    Change(
        "neox-hf-import-bias-split",
        Commit("90a6cdb35f11d3a1892da4cb242c6a2576bcfb6a", 1220, "2024-06-07"),
        ("gpt_neox",),
        "GPT-NeoX's own importer (convert_hf_to_sequential.py) divides row-parallel biases by the "
        "number of ranks; before, each rank held all of them, and with gpt_j_residual: true they "
        "were summed",
        "a model that was imported with TP above 1 starts with a loss that is far too high",
        "import it again: neox-bridge convert CHECKPOINT NEW --tp N",
        loud=False,
        in_checkpoint=neox(lambda c: sums(c) and c.config.parallel_residual),
    ),
    Change(
        "neox-pipe-1-again",
        Commit("2382bd4a6bfd0ec7199e1b7876cd8c457029e8e1", 1219, "2024-06-07"),
        _DECODER,
        "pipe_parallel_size: 1 writes and reads one file per layer again; since 86758c35 "
        "(2024-03-07), it meant one file per rank, as 0 does",
        "TypeError: Expected state_dict to be dict-like, got <class 'NoneType'>, or KeyError: "
        "'module'",
        "neox-bridge convert CHECKPOINT NEW --to neox --layout layers, or set pipe_parallel_size: "
        "0",
        in_checkpoint=one_stage_ranks,
        in_error=(
            r"Expected state_dict to be dict-like, got <class 'NoneType'>",
            r"KeyError: 'module'",
        ),
    ),
    Change(
        "neox-pipe-1-ranks",
        Commit("86758c350bff4a06beefe859b4a27a5bc930facf", 1129, "2024-03-07"),
        _DECODER,
        "pipe_parallel_size: 1 is no longer a pipeline: checkpoints have one file per rank "
        "(names with sequential.N.), and layer files do not load; reverted by 2382bd4a "
        "(2024-06-07)",
        "TypeError: Expected state_dict to be dict-like, got <class 'NoneType'>",
        "neox-bridge convert CHECKPOINT NEW --to neox --layout ranks for a tree of that time",
        in_checkpoint=one_stage_ranks,
        in_error=(r"Expected state_dict to be dict-like, got <class 'NoneType'>",),
    ),
    Change(
        "neox-inv-freq",
        Commit("e109bf5e068bd64bfd08e5ade4191a7ba3e796e3", 1168, "2024-03-04"),
        _DECODER,
        "attention.rotary_emb.inv_freq is no longer stored, unless the yml says "
        "rotary_save_freqs_buffer: true",
        'Unexpected key(s) in state_dict: "attention.rotary_emb.inv_freq" with a checkpoint from '
        "an older tree; Missing key(s) in an older tree with a newer checkpoint",
        "neox-bridge convert CHECKPOINT NEW --to neox --for neox@2024-03 (a tree before this "
        "change), --for neox@2024-09 (one from before 2024-09-07) or --for today; in the yml of a "
        "tree with this change, rotary_save_freqs_buffer: true keeps the buffer",
        in_checkpoint=neox(lambda c: c.raw.get("pos_emb") == "rotary"),
        sets={"buffer": "flag"},
        adds_keys=("rotary_save_freqs_buffer",),
        ends_era="2024-03",
        in_error=(r"(?:Missing|Unexpected) key\(s\) in state_dict: [^\n]*rotary_emb\.inv_freq",),
    ),
    Change(
        "neox-num-kv-heads",
        Commit("f36aed7ffd93fcb5d674236e476a5c80c0e31163", 1131, "2024-02-23"),
        ("llama", "mistral"),
        "grouped-query attention and its yml key num_kv_heads",
        "older trees: TypeError: NeoXArgs.__init__() got an unexpected keyword argument "
        "'num_kv_heads'",
        "load it with a GPT-NeoX of 2024-02-23 or later",
        adds_keys=("num_kv_heads",),
    ),
    Change(
        "neox-qk-layernorm",
        Commit("f161245b7c3848811f7e8e092977fbaeea12d283", 1100, "2023-12-22"),
        ("gpt_neox",),
        "the new yml key use_qk_layernorm adds a norm of queries and keys, attention.qk_layernorm",
        'missing or unexpected key "attention.qk_layernorm.weight"',
        "set use_qk_layernorm in the yml as it was when the checkpoint was saved; gpt_neox of "
        "transformers has no such norm",
        in_checkpoint=on("use_qk_layernorm"),
        adds_keys=("use_qk_layernorm",),
        in_error=(r"attention\.qk_layernorm\.",),
    ),
    Change(
        "neox-rope-fp32",
        Commit("3bfedf47cc86679c305e6430b71f82ae99a2a265", 1041, "2023-09-25"),
        _DECODER,
        "the rotary tables are computed in fp32; before, in the model's precision",
        "a model that was trained in half precision before was trained with rounded angles: small "
        "differences at long positions",
        "nothing in the checkpoint can fix it; compare the loss at long contexts",
        loud=False,
        in_checkpoint=neox(lambda c: c.config.dtype in HALF and c.raw.get("pos_emb") == "rotary"),
        sets={"rope_tables_fp32": True},
    ),
    Change(
        "neox-bf16-key",
        Commit("056e9caf23e04a2ee13b5066cb6b7bef5404aa33", 787, "2023-05-16"),
        _DECODER,
        "bfloat16 is set with precision: bfloat16 or bf16: {enabled: true}; before, with "
        "fp16: {type: bfloat16}. Optimizer files are named bf16_zero_pp_rank_…",
        "AssertionError: DeepSpeed fp16 field was set but precision conflicts, or a run that "
        "starts in another precision",
        "set precision: bfloat16 and remove fp16 from the yml",
        in_checkpoint=stores_bf16,
        in_error=(r"DeepSpeed fp16 field was set but precision conflicts",),
    ),
    Change(
        "neox-pipe-1-layers",
        Commit("1faff79dadc0383b9d0bb78c9bee87959fee310b", 866, "2023-04-21"),
        _DECODER,
        "pipe_parallel_size: 1 is a pipeline of one stage, with one file per layer; before, it "
        "meant one file per rank, as 0 does",
        "KeyError: 'module' with a checkpoint from an older tree",
        "neox-bridge convert CHECKPOINT NEW --to neox --layout layers, or set pipe_parallel_size: "
        "0",
        in_checkpoint=one_stage_ranks,
        in_error=(r"KeyError: 'module'",),
    ),
    Change(
        "neox-gpt-j-tied-fixed",
        Commit("f607953d2e8f17720b9bf1264976a3e88623c938", 0, "2022-12-27"),
        ("gpt_neox",),
        "gpt_j_tied works as documented; from 0accac61 (2022-12-06) until this commit, its test "
        "was inverted, so models with gpt_j_residual used one norm for both branches",
        "a model that was trained in those three weeks has a loss that is too high in other trees",
        "set gpt_j_tied to the opposite for a model that was trained in those weeks",
        loud=False,
        in_checkpoint=neox(lambda c: c.config.parallel_residual and "gpt_j_tied" in c.raw),
    ),
    Change(
        "neox-gas-key",
        Commit("91c44bc301996b926ecc295207b4e05bfa0a9a9d", 1144, "2024-02-05"),
        (*_DECODER, "mamba"),
        "the yml key gas was removed. GPT-NeoX computed it from gradient_accumulation_steps, so "
        "its value in a yml had no effect",
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument 'gas'",
        "remove gas from the yml: only gradient_accumulation_steps has an effect (default: 1)",
        removes_keys=("gas",),
    ),
    Change(
        "neox-deepspeed-08",
        Commit("9610391ab319403cef079b438edd016a2443af54", 818, "2023-03-09"),
        ("gpt_neox",),
        "GPT-NeoX v2.0 requires DeepSpeed (0.8.3 then) instead of DeeperSpeed 0.3.15: optimizer "
        "states have another form and a ds_version, without which DeepSpeed rejects them",
        "AssertionError: Empty ds_version in checkpoint, not clear how to proceed; in v1.0 with a "
        "newer checkpoint: KeyError: 'csr_tensor_module_names'",
        "neox-bridge reshard CHECKPOINT NEW --for today rewrites the states, and --for neox@v1.0 "
        "rewrites those of a newer run for v1.0; finetune: true in the yml loads only the weights",
        in_checkpoint=neox(lambda c: c.neox is not None and not c.neox.ds_version),
        sets={"states": "partitions", "deepspeed": "0.8.3"},
        ends_era="v1.0",
        in_error=(r"Empty ds_version in checkpoint", r"KeyError: 'csr_tensor_module_names'"),
    ),
    Change(
        "neox-gpt-j-tied",
        Commit("0accac618d70bd62de3965c037a7b2a36d07deb1", 481, "2022-12-06"),
        ("gpt_neox",),
        "the new yml key gpt_j_tied uses one norm for both branches of a gpt_j_residual block; "
        "post_attention_layernorm is stored but unused",
        "older trees: unexpected keyword argument 'gpt_j_tied'; converters that use both norms "
        "write another model without a message",
        "neox-bridge convert writes input_layernorm twice, which is exact",
        loud=False,
        in_checkpoint=on("gpt_j_tied"),
        adds_keys=("gpt_j_tied",),
    ),
    Change(
        "neox-gpt-j-reduce",
        Commit("eb02115bace75d789c443c6641877fed963452ce", 0, "2021-09-29"),
        ("gpt_neox",),
        "with gpt_j_residual: true, attention and MLP are summed over the ranks together, with "
        "their biases: the model's bias is the sum over the ranks",
        "logits are off by 0.5 and more if a converter takes one rank's bias, or sums those of a "
        "model without gpt_j_residual",
        "neox-bridge convert sums them for gpt_j_residual: true, and takes one otherwise",
        loud=False,
        in_checkpoint=sums,
    ),
    # The versions of DeeperSpeed that requirements/requirements.txt names. neox-deepspeed-08 takes
    # any DeepSpeed; the newest was 0.8.3.
    Change(
        "neox-deeperspeed-0-16-5",
        Commit("62aded2ee8ada544b87b7bf46ff55759cc9c7cb9", 0, "2025-03-06"),
        sets={"deepspeed": "0.16.5"},
    ),
    Change(
        "neox-deeperspeed-0-12-4",
        Commit("df8cf244be4b73d3c6d50cd610f4b1a57af0c678", 0, "2024-03-04"),
        sets={"deepspeed": "0.12.4"},
    ),
    Change(
        "neox-deeperspeed-0-9-3",
        Commit("9283effb37e1b72acef265d17cbe37881441e88c", 0, "2023-12-20"),
        sets={"deepspeed": "0.9.3"},
    ),
    # Defaults of settings that a yml does not set. Those of v1.0 are from a run of its NeoXArgs.
    Change(
        "neox-dropout-defaults",
        Commit("e5a7ea71e96eeada636c9612036dc85e886d973d", 1107, "2023-12-26"),
        defaults={
            "hidden_dropout": (0.1, 0.0),
            "attention_dropout": (0.1, 0.0),
            "weight_decay": (0.01, 0.1),
            "weighted_sampler_alpha": (0.3, 1.0),
        },
    ),
    Change(
        "neox-clipping-default",
        Commit("5c5fb945c6b7548177a4e7e731870154320751db", 819, "2023-03-26"),
        defaults={"gradient_clipping": (0.0, 1.0)},
    ),
    # The newest commit whose tree was read: the end of today's era.
    Change("neox-newest", Commit("ea7aefd8f8e183256992d9fede4d7c71a46d67a5", 0, "2026-05-19")),
)
