"""A model as one GGUF file, for llama.cpp and what is built on it.

Weights in float16, Q8_0 or Q4_0, norms and biases in float32, and the tokenizer as
metadata. By way of the `gguf` package, which is imported when it is needed. What
llama.cpp would compute or split into tokens in another way is refused.

llama.cpp rotates neighbouring pairs where published Llama and Mistral weights rotate
halves, so the rows of their queries and keys change places; Qwen's stay.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.errors import UserError
from ftjax.models.names import Path as LeafPath
from ftjax.models.names import Weight, model_weights
from ftjax.models.spec import ModelSpec

KINDS = ("f16", "q8_0", "q4_0")
# Family -> (architecture of llama.cpp, whether queries and keys are reordered).
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_LLAMA3 = r"\p{N}{1,3}"
_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = range(1, 7)
Read = Callable[[LeafPath, Weight, int], np.ndarray]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp wants it.

    `kind` is 'gpt2' (byte-level BPE) or 'llama' (SentencePiece); `split` names the rule
    by which text is cut up before the merges. One text, score and type for each id.
    """

    kind: str
    split: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]


def write_gguf(
    path: Path,
    read: Read,
    spec: ModelSpec,
    *,
    kind: str,
    name: str,
    vocabulary: Vocabulary,
    facts: dict[str, Any],
) -> None:
    """Writes the file, one weight in memory at a time.

    Args:
      path: must not exist.
      read: (path, weight, layer) -> the values as published.
      kind: of `KINDS`. A matrix whose rows are no multiple of 32 stays float16.
      name: of the model, for people.
      vocabulary: from `read_vocabulary`.
      facts: `bos`, `eos`, `pad` (ids or None), `add_bos`, `template` (text or None).

    Raises:
      UserError: the `gguf` package is missing, or llama.cpp would not compute this.
    """
    gguf = require(spec)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[spec.family][0])
    _describe(writer, gguf, spec, kind, name)
    _tokenizer(writer, vocabulary, facts)
    weights = list(_weights(spec))
    for published, weight, _, _ in weights:
        shape, qtype = weight.stored_shape, _type(gguf, published, weight, kind)
        if qtype in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
            shape = gguf.quant_shape_to_byte_shape(shape, qtype)
            dtype: np.dtype[Any] = np.dtype(np.uint8)
        else:
            f32 = qtype == gguf.GGMLQuantizationType.F32
            dtype = np.dtype(np.float32 if f32 else np.float16)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(gguf_name(published), shape, dtype, nbytes, qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for published, weight, leaf, layer in weights:
        values = np.asarray(read(leaf, weight, layer)).astype(np.float32)
        values = reordered(values, published, spec)
        qtype = _type(gguf, published, weight, kind)
        writer.write_tensor_data(gguf.quants.quantize(values, qtype))
    writer.close()


def require(spec: ModelSpec) -> Any:
    """The `gguf` package.

    Raises:
      UserError: it is not installed, or this model cannot be written.
    """
    if spec.family not in ARCHITECTURES or spec.rope.kind != "default":
        raise UserError(
            "this model cannot be written as GGUF",
            where="--to=gguf",
            expected=f"{', '.join(ARCHITECTURES)}, without rope scaling",
            got=f"{spec.family}, rope {spec.rope.kind}",
            fix="export with --to=merged, and use llama.cpp's own converter",
        )
    if any(spec.windows) or not all(spec.rope_layers):
        raise UserError(
            "layers that attend to a window, or do not rotate, are not written as GGUF",
            where="--to=gguf",
            fix="export with --to=merged, and use llama.cpp's own converter",
        )
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "GGUF files are written by a package that is not installed",
            where="--to=gguf",
            fix="pip install gguf",
        ) from error
    return gguf


def gguf_name(published: str) -> str:
    """The name of a tensor in llama.cpp.

    >>> gguf_name('model.layers.3.self_attn.q_proj.weight')
    'blk.3.attn_q.weight'
    """
    module, suffix = published.rsplit(".", 1)
    layer = _LAYER.fullmatch(module)
    if layer:
        return f"blk.{layer[1]}.{NAMES[layer[2]]}.{suffix}"
    return f"{NAMES[module]}.{suffix}"


def reordered(values: np.ndarray, published: str, spec: ModelSpec) -> np.ndarray:
    """Rows of queries and keys [N*H, ...] from halves of a head to neighbours in it.

    Row i and row i + H/2 of a head, which are rotated together, become 2i and 2i + 1.
    """
    if not ARCHITECTURES[spec.family][1]:
        return values
    if not re.search(r"self_attn\.[qk]_proj\.", published):
        return values
    halves = values.reshape(-1, 2, spec.head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _weights(spec: ModelSpec) -> Iterator[tuple[str, Weight, LeafPath, int]]:
    for path, weight in model_weights(spec).items():
        for i, name in enumerate(weight.names):
            yield name, weight, path, i


def _type(gguf: Any, published: str, weight: Weight, kind: str) -> Any:
    types = gguf.GGMLQuantizationType
    shape = weight.stored_shape
    if len(shape) == 1:
        return types.F32
    if shape[-1] % 32 or kind == "f16":
        return types.F16
    # As llama.cpp does: what meets every token keeps more bits.
    both = published.startswith(("model.embed_tokens", "lm_head"))
    return types.Q8_0 if both or kind == "q8_0" else types.Q4_0


def _describe(writer: Any, gguf: Any, spec: ModelSpec, kind: str, name: str) -> None:
    files = gguf.LlamaFileType
    types = {
        "f16": files.MOSTLY_F16,
        "q8_0": files.MOSTLY_Q8_0,
        "q4_0": files.MOSTLY_Q4_0,
    }
    writer.add_name(name)
    writer.add_file_type(types[kind])
    if kind != "f16":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.d_model)
    writer.add_block_count(spec.n_layers)
    writer.add_feed_forward_length(spec.d_ff)
    writer.add_head_count(spec.n_heads)
    writer.add_head_count_kv(spec.n_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)


def _tokenizer(writer: Any, words: Vocabulary, facts: dict[str, Any]) -> None:
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.split)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.kind == "llama":
        writer.add_token_scores(words.scores)
    else:
        writer.add_token_merges(words.merges)
    for key in ("bos", "eos", "pad"):
        if facts.get(key) is not None:
            getattr(writer, f"add_{key}_token_id")(facts[key])
    writer.add_add_bos_token(bool(facts.get("add_bos")))
    if facts.get("template"):
        writer.add_chat_template(facts["template"])


def read_vocabulary(file: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a `tokenizer.json`, padded with unused ids to `vocab_size`.

    Raises:
      UserError: llama.cpp has no rule that cuts text as this tokenizer does.
    """
    found = json.loads(file.read_text("utf-8"))
    model = found.get("model", {})
    if model.get("type") != "BPE":
        raise _unknown(file, f"a model of type {model.get('type')}")
    pairs = [p.split(" ") if isinstance(p, str) else p for p in model["merges"]]
    is_bytes = bool(model.get("byte_fallback"))
    split = "default" if is_bytes else _split(file, found.get("pre_tokenizer") or {})
    texts = {i: text for text, i in model["vocab"].items()}
    rank = {"".join(pair): -float(i) for i, pair in reversed(list(enumerate(pairs)))}
    types = dict.fromkeys(texts, _NORMAL)
    if is_bytes:
        marks = {i for i, t in texts.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", t)}
        types |= dict.fromkeys(marks, _BYTE)
    for token in found.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token["special"] else _OWN
    unknown = model["vocab"].get(model.get("unk_token") or "")
    if is_bytes and unknown is not None:
        types[unknown] = _UNKNOWN
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return Vocabulary(
        "llama" if is_bytes else "gpt2",
        split,
        tokens,
        [rank.get(text, 0.0) for text in tokens],
        [types.get(i, _UNUSED) for i in range(vocab_size)],
        [" ".join(pair) for pair in pairs],
    )


def _split(file: Path, rule: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut up before byte-level merges."""
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise _unknown(file, "a space before the text")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        if pattern.startswith("(?i:'s|'t|'re|'ve|'m|'ll|'d)|"):
            return "llama-bpe" if _LLAMA3 in pattern else "qwen2"
    raise _unknown(file, " then ".join(str(kind) for kind in kinds))


def _unknown(file: Path, got: str) -> UserError:
    return UserError(
        "llama.cpp would cut text into other tokens than this tokenizer",
        where=file,
        expected="byte-level BPE as of GPT-2, SmolLM, Llama 3 or Qwen, or a BPE of"
        " SentencePiece with byte fallback",
        got=got,
        fix="export with --to=merged, and use llama.cpp's own converter",
    )
