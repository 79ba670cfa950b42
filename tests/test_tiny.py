"""The tiny checkpoint itself: if it were wrong, many tests would prove nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tiny import BOS, IM_END, make_tiny_checkpoint


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    a = make_tiny_checkpoint(tmp_path / "a")
    b = make_tiny_checkpoint(tmp_path / "b")
    c = make_tiny_checkpoint(tmp_path / "c", seed=1)
    read = [(d / "model.safetensors").read_bytes() for d in (a, b, c)]
    assert read[0] == read[1] != read[2]


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    whole = load_file(make_tiny_checkpoint(tmp_path / "a") / "model.safetensors")
    folder = make_tiny_checkpoint(tmp_path / "b", shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = [load_file(p) for p in sorted(folder.glob("*.safetensors"))]
    assert sum(map(len, files)) == len(whole) == len(index["weight_map"])
    for part in files:
        for name, value in part.items():
            np.testing.assert_array_equal(value, whole[name])


def test_tokenizer_marks_what_the_assistant_says(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    messages = [
        {"role": "user", "content": "the thing"},
        {"role": "assistant", "content": "naïve\n\n"},
    ]
    rendered = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = np.asarray(rendered["input_ids"])
    said = ids[np.asarray(rendered["assistant_masks"]) == 1]
    assert tokenizer.decode(said) == "naïve\n\n<|im_end|>"
    assert ids[0] == BOS and said[-1] == IM_END
    assert (ids == BOS).sum() == 1
    assert tokenizer.decode(tokenizer("naïve the").input_ids[1:]) == "naïve the"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_is_one_that_transformers_knows(
    tmp_path: Path, family: str
) -> None:
    from transformers import AutoConfig

    folder = make_tiny_checkpoint(tmp_path, family, dtype="bfloat16")
    config = AutoConfig.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert config.model_type == family
    head = getattr(config, "head_dim", None) or 16
    q_proj = weights["model.layers.1.self_attn.q_proj.weight"]
    assert q_proj.shape == (config.num_attention_heads * head, config.hidden_size)
    assert q_proj.dtype.name == "bfloat16"
    assert ("lm_head.weight" in weights) != config.tie_word_embeddings
