"""GGUF: names, order and vocabulary; `tests/goldens/check_gguf.py` reads files back."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftjax.checkpoints.gguf import gguf_name, read_vocabulary, reordered, require
from ftjax.errors import UserError
from ftjax.models.names import model_weights
from ftjax.models.spec import ModelSpec, Rope
from tests.tiny import make_tiny_tokenizer

SPEC = ModelSpec("llama", 96, 32, 2, 4, 2, 8, 48, qkv_bias=True, qk_norm=True)
QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_every_weight_has_a_name() -> None:
    names = [name for w in model_weights(SPEC).values() for name in w.names]
    found = {gguf_name(name) for name in names}
    assert len(found) == len(names)
    assert {"token_embd.weight", "output.weight", "blk.1.attn_k.bias"} <= found


def rotate(pairs: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Turns (first, second) [2, H/2] by an angle for each pair."""
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = pairs
    return np.stack([first * cos - second * sin, second * cos + first * sin])


def test_neighbours_rotate_as_halves_did() -> None:
    """The scores of queries and keys are the same under llama.cpp's rotation."""
    rng = np.random.default_rng(0)
    size, half = SPEC.head_dim, SPEC.head_dim // 2
    query, key = rng.normal(size=(2, size, 32))
    x, y = rng.normal(size=(2, 32))
    angles = 10000.0 ** (-np.arange(half) / half)

    def halves(w: np.ndarray, x: np.ndarray, position: int) -> np.ndarray:
        return rotate((w @ x).reshape(2, half), position * angles)

    def neighbours(w: np.ndarray, x: np.ndarray, position: int) -> np.ndarray:
        moved = reordered(w, QUERY, SPEC) @ x
        return rotate(moved.reshape(half, 2).T, position * angles)

    wanted = np.sum(halves(query, x, 7) * halves(key, y, 3))
    found = np.sum(neighbours(query, x, 7) * neighbours(key, y, 3))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert not np.array_equal(reordered(query, QUERY, SPEC), query)
    value = QUERY.replace("q_proj", "v_proj")
    np.testing.assert_array_equal(reordered(query, value, SPEC), query)
    qwen = replace(SPEC, family="qwen2")
    np.testing.assert_array_equal(reordered(query, QUERY, qwen), query)


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    words = read_vocabulary(tmp_path / "tokenizer.json", 280)
    assert (words.kind, words.split) == ("gpt2", "gpt-2")
    assert words.merges[:2] == ["t h", "Ġ t"] and len(words.tokens) == 280
    assert words.tokens[0] == "<|pad|>" and words.types[:5] == [3, 3, 3, 3, 1]
    assert words.tokens[-1] == "[PAD279]" and words.types[-1] == 5


def test_a_vocabulary_of_sentencepiece(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁ab": 6}
    merges = [["▁", "a"], ["▁a", "b"]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"}
    added = [{"id": 0, "content": "<unk>", "special": True}]
    tokenizer = {"model": model | {"byte_fallback": True}, "added_tokens": added}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(tokenizer))
    words = read_vocabulary(file, 7)
    assert words.kind == "llama" and words.types == [2, 6, 1, 1, 1, 1, 1]
    # The earlier merge wins, as the greater score does.
    assert words.scores[5] > words.scores[6]


def split(regex: str) -> dict[str, Any]:
    kinds = [
        {"type": "Split", "pattern": {"Regex": regex}},
        {"type": "ByteLevel", "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": kinds}


START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (split(START + r"\p{N}{1,3}| "), "llama-bpe"),
        (split(START + r"\p{N}| "), "qwen2"),
        ({"pretokenizers": [DIGITS, {"type": "ByteLevel"}]}, "smollm"),
        (split(r"\d+"), None),
        ({"type": "Whitespace"}, None),
        ({"type": "ByteLevel", "add_prefix_space": True}, None),
    ],
)
def test_how_text_is_cut_up(rule: Any, name: str | None, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    model: dict[str, Any] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    file.write_text(json.dumps({"model": model, "pre_tokenizer": rule}))
    if name is None:
        with pytest.raises(UserError, match="other tokens"):
            read_vocabulary(file, 1)
    else:
        assert read_vocabulary(file, 1).split == name


def test_what_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, word in (
        (replace(SPEC, family="smollm3"), "smollm3"),
        (replace(SPEC, rope=Rope(kind="yarn", factor=4.0)), "yarn"),
        (replace(SPEC, windows=(8, 0)), "window"),
    ):
        with pytest.raises(UserError) as caught:
            require(spec)
        assert word in caught.value.screen()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError) as caught:
        require(SPEC)
    assert "pip install gguf" in caught.value.screen()
