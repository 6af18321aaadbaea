"""A tiny configuration of any architecture, made from the names of its fields, with a small table of exceptions."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import MISSING
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 99
TEXT_TOKENS = (5, 80)  # what texts are drawn from; special tokens lie outside
LONGEST = 64
WINDOW = 8

KEEP = -1
# What a field's whole number becomes: the first line that has a pattern for its whole name says.
SIZES: tuple[tuple[int, str], ...] = (
    (0, "pad_token_id pad_index padding_idx"),
    (1, "bos_token_id bos_index"),
    (2, "eos_token_id eos_index"),
    (90, ".*(_token_id|_token_index|_token) mask_index unk_index"),
    (2, "type_vocab_size task_type_vocab_size segment_types prompt_types n_langs"),
    (VOCABULARY, ".*vocab_size.* ngram_vocab_size_base encoder_hash_byte_group_vocab"),
    (LONGEST, "(max_|num_)?position_embeddings original_max_position_embeddings max_(source|target)_positions n_positions n_ctx"),
    (LONGEST, "max_seq_len context_length seq_length .*max_length"),
    (WINDOW, "index_topk .*_budget"),
    (2, "index_topk_blocks"),
    (4, "index_block_size"),
    (2, ".*num_key_value_heads (num_|n_)kv_heads kv_n_heads num_query_groups linear_num_key_heads"),
    (8, "mamba_(n|num)_heads n_mamba_heads"),
    (4, ".*(num_|n_)heads? .*_heads n_head"),
    (16, "mamba_chunk_size"),
    (8, "qk_rope_head_dim rotary_dim"),
    (24, "qk_head_dim"),
    (16, ".*head_?dim .*_d_head d_kv d_head dim_head kv_channels attention_head_size head_size"),
    (2, "(num_|n_)(hidden_)?layers? .*_layers depth num_blocks"),
    (4, ".*num_experts n_routed_experts num_local_experts zero_expert_num"),
    (2, ".*experts_per_tok.* moe_topk moe_top_k moe_k top_k_experts"),
    (1, "n_group topk_group num_expert_group .*shared_experts first_k_dense_replace num_dense_layers"),
    (96, ".*intermediate_size .*ffn_dim .*ffn_hidden_size .*intermediate_dim d_ff dff dim_ff n_inner d_inner mlp_dim feed_forward_size"),
    (WINDOW, ".*sliding_window(_size)? .*attention_window(_size)? local_attention local_attention_window_len attention_chunk_size"),
    (WINDOW, "keep_window_size"),
    (16, ".*_rank .*lora_dim d_rel hc_lowrank"),
    (8, "(mamba_|ssm_)?(d_state|state_size)"),
    (64, ".*hidden_size d_model model_dim dim n_embd .*embed_dim emb_dim word_embed_proj_dim .*embedding_size .*embedding_dim"),
    (64, "lru_width .*hidden_dim"),
    (16, "image_size img_size crop_size input_size"),
    (4, "patch_size"),
    (KEEP, ".*mel.* feature_size num_channels in_channels kernel_size .*chunk_size.* .*conv.*"),
)

# What names cannot tell: fields of a model type, or of a nameless part ("dbrx.attn_config"), set after the rules.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {**ROPE, "mrope_section": [2, 3, 3]}
HALF_SECTIONS = {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
AXES = {**ROPE, "mrope_section": [3, 3, 2]}
SWIN = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32}
FILTERS = {"num_filters": 2, "depths": [1] * 7}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": AXES, "sliding_attention": AXES}},
    "cosmos3_edge_text": {"rope_parameters": SECTIONS},
    "cpmant": {"prompt_types": 32, "segment_types": 32},
    "dbrx.attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "donut-swin": SWIN,
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 90, "pad_token_id": 0},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "glm4v_moe_text": {"rope_parameters": HALF_SECTIONS},
    "glm4v_text": {"rope_parameters": SECTIONS},
    "glm5_next_text": {"index_kpool": 4},
    "glm_image_text": {"rope_parameters": SECTIONS},
    "glm_ocr_text": {"rope_parameters": SECTIONS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 2, 2, 2]}},
    "informer": {"prediction_length": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96, "channel_shrink_ratio": 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "maskformer-swin": SWIN,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": WINDOW, "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    "swin": SWIN,
    "swin2sr": SWIN,
    "swinv2": SWIN,
    "time_series_transformer": {"prediction_length": 4},
    "vibevoice_acoustic_tokenizer": FILTERS,
    "vibevoice_acoustic_tokenizer_decoder": FILTERS,
    "vibevoice_acoustic_tokenizer_encoder": FILTERS,
    "xlstm": {"qk_dim_factor": 1.0},
    "yolos": {"image_size": [16, 16]},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
# Fields that some classes leave open, and then cannot do without.
OPEN = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 16}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration class of a model type with every size shrunk: a few layers, 64 wide, four heads."""
    config_class: Any = CONFIG_MAPPING[model_type]
    return config_class(**_shrunk(config_class, model_type))


def _shrunk(config_class: Any, path: str) -> dict[str, Any]:
    """What to make a configuration of, its parts included."""
    default = config_class()
    fields = _fields(config_class)
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool):
            changed[name] = _size(name, value)
        elif value is None and name in OPEN:
            changed[name] = OPEN[name]
    if "kv_lora_rank" in fields:  # latent attention: as many heads of keys as of queries
        changed["num_key_value_heads"] = 4
    layers = _layer_lists(default, fields)
    changed.update(layers)
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"):
        if layers and name in changed:
            changed[name] = len(next(iter(layers.values())))
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            changed[name] = {**_shrunk(type(part), f"{path}.{name}"), "model_type": part.model_type}
    return {**changed, **EXCEPTIONS.get(config_class.model_type, EXCEPTIONS.get(path, {}))}


def _fields(config_class: Any) -> dict[str, Any]:
    """Names and defaults of what a configuration class takes."""
    if dataclasses.is_dataclass(config_class):
        common = {field.name for field in dataclasses.fields(PreTrainedConfig)}  # type: ignore[arg-type]
        fields = [field for field in dataclasses.fields(config_class) if field.name not in common]
        made = {field.name: field.default_factory() for field in fields if field.default_factory is not MISSING}
        return {**{field.name: field.default for field in fields if field.default is not MISSING}, **made}
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _size(name: str, value: int) -> int:
    for size, patterns in SIZES:
        if re.fullmatch("|".join(patterns.split()), name):
            return value if size == KEEP or (value <= 1 and size > 1 and "token" not in name) else size
    return min(value, 64)


def _layer_lists(default: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, list]:
    """Lists with an entry a layer, such as `layer_types`: every kind of entry in turn."""
    layers = default.__dict__.get("num_hidden_layers")
    found = {name: list(default.__dict__[name]) for name in fields if isinstance(default.__dict__.get(name), (list, tuple))}
    found = {name: entries for name, entries in found.items() if layers and len(entries) == layers and layers > 4}
    kinds = {name: _distinct(entries) for name, entries in found.items()}
    count = max([2, *(len(k) for k in kinds.values() if len(k) <= 4)])
    count = 4 if count > 2 or any(len(k) == 2 for k in kinds.values()) else count
    lists = {name: [k[i % len(k)] for i in range(count)] if len(k) <= 4 else found[name][:count] for name, k in kinds.items()}
    return {name: [_size(name, x) if type(x) is int else x for x in entries] for name, entries in lists.items()}


def _distinct(entries: list) -> list:
    return [entry for i, entry in enumerate(entries) if entry not in entries[:i]]
