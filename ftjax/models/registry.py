"""From a `config.json` to a `ModelSpec`, or to an error that names the key.

Three kinds of keys. Those that a family reads are honoured. Those below in
`CHANGES_THE_MATHS` are refused by name unless they say what this decoder does anyway.
The rest is listed for the user, once, unless it is known to be harmless.
"""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from ftjax.errors import UserError
from ftjax.models.config_reader import ConfigReader, say
from ftjax.models.families import llama, mistral, qwen2, qwen3, smollm3
from ftjax.models.spec import ModelSpec

FAMILIES: dict[str, ModuleType] = {
    family.MODEL_TYPE: family for family in (llama, mistral, qwen2, qwen3, smollm3)
}

# Key -> the values that mean 'off' or 'as here'. A null is always allowed.
CHANGES_THE_MATHS: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_out_bias": (False,),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False, 0),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "moe_intermediate_size": (),
    "mup_enabled": (False,),
    "no_rope_layers": (),
    "norm_type": ("rms_norm", "rmsnorm"),
    "num_experts": (0,),
    "num_experts_per_tok": (0,),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "parallel_residual": (False,),
    "partial_rotary_factor": (1,),
    "per_layer_config": ({},),
    "position_embedding_type": ("rope", "rotary"),
    "qk_layernorm": (False,),
    "quantization_config": ({},),
    "compression_config": ({},),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "text_config": (),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
    "vision_config": (),
}

SCORER = "ForSequenceClassification"  # transformers' name of a reward model

# What a `quantization_config` may name: `checkpoints/quantized.py` reads it.
QUANT_METHODS = {
    "bitsandbytes": "nf4, fp4, int8",
    "ftjax": "nf4, fp4, int8, int4",
}

HARMLESS = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path",
    "add_cross_attention", "architectures", "attn_implementation", "auto_map",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "is_llama_config", "label2id", "length_penalty",
    "max_length", "max_window_layers", "min_length", "model_type", "name_or_path",
    "no_repeat_ngram_size", "no_rope_layer_interval", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "resid_pdrop",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip


def spec_from_config(
    config: dict[str, Any],
    where: str,
    *,
    reward: bool = False,
    note: Callable[[str], None] = say,
) -> ModelSpec:
    """The `ModelSpec` of a published configuration.

    Args:
      config: the contents of a `config.json`.
      where: the file, named in errors.
      reward: whether a reward model will do; see `is_reward`.
      note: told once of keys that ftjax does not know, and of code that is not run.

    Raises:
      UserError: for an architecture, a key or a value that ftjax does not compute.
    """
    family = _family(config, where, reward)
    reader = ConfigReader(config, where)
    spec = family.spec(reader)
    unknown = []
    for key, value in reader.unread().items():
        if key in CHANGES_THE_MATHS:
            _refuse_unless_off(reader, key, value)
        elif key not in HARMLESS and key != "attention_dropout" and value is not None:
            unknown.append(key)
    if unknown:
        shown = ", ".join(sorted(unknown)[:20])
        note(f"{where}: ignored, unknown to ftjax: {shown}")
    if config.get("attention_dropout"):
        note(f"{where}: attention_dropout is not applied in fine-tuning")
    if config.get("auto_map"):
        note(f"{where}: auto_map: the model's own code is never run; ftjax's is used")
    return spec


def quant_method(config: Any) -> str | None:
    """The method that a `quantization_config` names; None if it names none."""
    if not isinstance(config, dict):
        return None
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        return "bitsandbytes"  # as its first releases wrote it
    return method if isinstance(method, str) else None


def scorer_of(family: str) -> str:
    """The architecture of a reward model over a family."""
    return FAMILIES[family].ARCHITECTURE.replace("ForCausalLM", SCORER)


def is_reward(config: dict[str, Any]) -> bool:
    """Whether a configuration is that of a classifier, such as a reward model."""
    names = config.get("architectures")
    names = names if isinstance(names, list) else []
    return any(str(name).endswith(SCORER) for name in names)


def token_ids(config: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    """Token ids from a key that may hold one id, several, or none.

    `key` is such as 'eos_token_id', in a `config.json` or `generation_config.json`.
    """
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int):
            reader = ConfigReader(config, where)
            reader.refuse(key, "a token id, a list of token ids, or null")
    # Some publishers write -1 for 'none'.
    return tuple(dict.fromkeys(item for item in ids if item >= 0))


def _family(config: dict[str, Any], where: str, reward: bool) -> ModuleType:
    """The family by `model_type`, or by `architectures` where that is absent."""
    names = config.get("architectures")
    names = [str(n) for n in names] if isinstance(names, list) else []
    model_type = config.get("model_type")
    if model_type is None:
        wanted = {f.ARCHITECTURE: t for t, f in FAMILIES.items()}
        wanted |= {scorer_of(t): t for t in FAMILIES} if reward else {}
        model_type = next((wanted[n] for n in names if n in wanted), None)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _unknown_architecture(config, where, names)
    family = FAMILIES[model_type]
    known = {family.ARCHITECTURE} | ({scorer_of(model_type)} if reward else set())
    if names and not known & set(names):
        scorer = is_reward(config)
        raise UserError(
            f"{', '.join(names)} is not a causal language model that ftjax reads",
            where=f"{where}: architectures",
            expected=f"{family.ARCHITECTURE} for model_type {model_type}",
            got=", ".join(names),
            fix="begin with a language model; this one is for ftjax.evaluate"
            " --to=scores"
            if scorer
            else "use the checkpoint with its language-model head",
        )
    return family


def _unknown_architecture(
    config: dict[str, Any], where: str, names: Iterable[str]
) -> UserError:
    supported = (f"{t} ({f.ARCHITECTURE})" for t, f in FAMILIES.items())
    code = " (auto_map asks for code of its own, which is never run)"
    return UserError(
        "the architecture of this model is not supported",
        where=f"{where}: model_type",
        expected="one of " + ", ".join(supported),
        got=f"model_type = {config.get('model_type')!r}, architectures ="
        f" {', '.join(names) or 'none'}{code if config.get('auto_map') else ''}",
        fix="use a model of a supported family",
    )


def _refuse_unless_off(reader: ConfigReader, key: str, value: Any) -> None:
    if value is None or value in CHANGES_THE_MATHS[key]:
        return
    if key == "sliding_window" and reader.config.get("use_sliding_window") is False:
        return
    if key in ("quantization_config", "compression_config"):
        method = quant_method(value)
        if key == "quantization_config" and method in QUANT_METHODS:
            return
        reader.refuse(
            key,
            "float weights (bfloat16, float16, float32), or quant_method "
            + " or ".join(f"{name} ({what})" for name, what in QUANT_METHODS.items()),
            f"use the checkpoint before its quantization ({method or 'unknown'}),"
            " or dequantize it first",
        )
    allowed = [repr(v) for v in CHANGES_THE_MATHS[key]]
    reader.refuse(key, " or ".join(["absent", "null", *allowed]))
