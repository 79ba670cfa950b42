"""Damaged, foreign and contradictory model folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli import run_cli
from tests.faults.commands import (
    assert_no_run,
    check,
    copy_model,
    edit_json,
    edit_weights,
    evaluate,
    options,
    weights,
)
from tests.tiny import make_tiny_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return copy_model(tiny, tmp_path / "model")


def test_a_missing_tensor(model: Path, pairs: Path, tmp_path: Path) -> None:
    edit_weights(model, model__layers__1__mlp__up_proj__weight=None)
    workdir = tmp_path / "run"
    run_cli("train", *options(model, pairs, f"--workdir={workdir}")).refused(
        "1 of 21 tensors are missing", f"missing: {UP}"
    )
    assert_no_run(workdir)


def test_many_missing_tensors_are_listed_in_part(model: Path, pairs: Path) -> None:
    gone = [name for name in weights(model) if "layers" in name]
    edit_weights(model, **{name.replace(".", "__"): None for name in gone})
    check(model, pairs).refused("18 of 21 tensors are missing", "... and 8 more")


def test_an_extra_tensor(model: Path, pairs: Path) -> None:
    spare = np.zeros((4, 4), np.float32)
    edit_weights(model, model__layers__0__self_attn__rotary_emb__inv_freq=spare[0])
    check(model, pairs).ok()
    edit_weights(model, model__layers__0__mlp__gate_extra__weight=spare)
    check(model, pairs).refused(
        "1 tensors that this model has no place for",
        "left over: model.layers.0.mlp.gate_extra.weight",
    )


def test_a_wrong_shape(model: Path, pairs: Path) -> None:
    edit_weights(model, model__layers__1__mlp__up_proj__weight=weights(model)[UP].T)
    check(model, pairs).refused("another shape", UP, "(96, 64)", "(64, 96)")


def test_a_run_or_an_adapter_in_place_of_a_model(pairs: Path, tmp_path: Path) -> None:
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    run.mkdir()
    (run / "config.json").write_text('{"model": {}, "method": {}, "data": {}}')
    told = f"export --workdir={run} --to=merged"
    check(run, pairs).refused("the folder of a run", "--workdir=", told)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    check(adapter, pairs).refused("this is an adapter", f"--adapter={adapter}")


@pytest.mark.parametrize("kind", ["cut", "short", "empty", "long"])
def test_a_weight_file_of_the_wrong_length(kind: str, model: Path, pairs: Path) -> None:
    file = model / FILE
    data = file.read_bytes()
    size = len(data)
    found = {
        "cut": data[: size // 2],
        "short": data[:-1],
        "empty": b"",
        "long": data + b"\0" * 9,
    }[kind]
    file.write_bytes(found)
    parts = [str(file), f"{len(found):,} bytes", "download the file again"]
    if kind != "empty":
        parts.append(f"expected: {size:,} bytes")
    check(model, pairs).refused(*parts)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a git-LFS pointer",
        ),
    ],
    ids=["html", "lfs"],
)
def test_something_else_instead_of_weights(
    text: str, cause: str, model: Path, pairs: Path
) -> None:
    (model / FILE).write_text(text)
    check(model, pairs).refused("not a safetensors file", FILE, cause)


def shard_of(model: Path, name: str) -> str:
    return json.loads((model / INDEX).read_text())["weight_map"][name]


def edit_index(model: Path, **changes: Any) -> None:
    shards = json.loads((model / INDEX).read_text())["weight_map"]
    edit_json(model / INDEX, weight_map=shards | changes)


def test_a_missing_shard(tmp_path: Path, pairs: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", shards=3)
    lost = shard_of(model, UP)
    (model / lost).unlink()
    check(model, pairs).refused(
        "1 of 3 weight files are missing", f"missing: {lost}", "download"
    )


def test_an_index_that_names_a_tensor_that_is_not_there(
    tmp_path: Path, pairs: Path
) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", shards=2)
    edit_index(model, ghost=shard_of(model, UP))
    check(model, pairs).refused("names 1 tensors that are not in the files", "ghost in")


def test_a_tensor_in_two_shards(tmp_path: Path, pairs: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", shards=2)
    home = shard_of(model, UP)
    other = next(p.name for p in model.glob("model-*") if p.name != home)
    edit_index(model, **{UP: other})
    check(model, pairs).refused("a tensor is in two weight files", UP, home, other)


def test_a_missing_index(tmp_path: Path, pairs: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", shards=2)
    (model / INDEX).unlink()
    check(model, pairs).refused("have no index", INDEX, "model-00001-of-00002")


def test_an_architecture_that_is_not_known(model: Path, pairs: Path) -> None:
    edit_json(
        model / "config.json", model_type="falcon", architectures=["FalconForCausalLM"]
    )
    check(model, pairs).refused(
        "the architecture of this model is not supported", "'falcon'", "llama", "qwen3"
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            ("rope_scaling", "longrope", "llama3"),
        ),
        ({"sliding_window": 16}, ("sliding_window", "16")),
        ({"attention_bias": "yes"}, ("attention_bias", "true or false", "'yes'")),
        ({"hidden_act": "gelu"}, ("hidden_act", "silu", "'gelu'")),
        ({"head_dim": 32}, ("another shape", "self_attn", "(64, 64)", "(32, 64)")),
        ({"hidden_size": ...}, ("lacks hidden_size",)),
        ({"num_local_experts": 8}, ("num_local_experts", "8")),
    ],
    ids=["rope", "window", "bias", "activation", "head", "absent", "experts"],
)
def test_keys_that_change_the_maths(
    changes: dict[str, Any], parts: tuple[str, ...], model: Path, pairs: Path
) -> None:
    edit_json(model / "config.json", **changes)
    check(model, pairs).refused(str(model), *parts)


def test_weights_that_are_not_numbers(model: Path, pairs: Path, tmp_path: Path) -> None:
    values = weights(model)[UP]
    values[3, 5:8] = np.nan
    values[9, 9] = np.inf
    edit_weights(model, model__layers__1__mlp__up_proj__weight=values)
    workdir = tmp_path / "run"
    run_cli("train", *options(model, pairs, f"--workdir={workdir}")).refused(
        "4 values that are NaN or infinite", UP, "4 of 6,144"
    )
    assert_no_run(workdir)


def test_a_weight_of_zeros_is_told(model: Path, pairs: Path) -> None:
    edit_weights(model, model__layers__1__mlp__up_proj__weight=np.zeros((96, 64), "f4"))
    result = evaluate(model, pairs).ok()
    assert f"{UP} is all zero" in result.err


def test_a_vocabulary_that_is_not_the_tokenizers(pairs: Path, tmp_path: Path) -> None:
    padded = make_tiny_checkpoint(tmp_path / "padded", vocab_size=384)
    check(padded, pairs).ok()
    smaller = make_tiny_checkpoint(tmp_path / "smaller", vocab_size=256)
    check(smaller, pairs).refused(
        "the tokenizer has more tokens than the model", "at most 256", "271 tokens"
    )


def test_a_tied_model_with_a_head_of_its_own(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    untied = evaluate(model, pairs).ok()
    edit_json(model / "config.json", tie_word_embeddings=True)
    result = evaluate(model, pairs).ok()
    assert "lm_head.weight is stored and differs" in result.err
    assert "the stored head is used" in result.err
    assert result.json is not None and untied.json is not None
    assert result.json["loss"] == untied.json["loss"]


def test_an_untied_model_without_a_head(model: Path, pairs: Path) -> None:
    edit_weights(model, lm_head__weight=None)
    check(model, pairs).refused(
        "the output head is missing", "lm_head.weight", "tie_word_embeddings"
    )


def test_a_name_on_the_hub_without_a_network(pairs: Path, tmp_path: Path) -> None:
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    flags = options("meta-llama/Llama-3.2-1B", pairs)
    result = run_cli("check", *flags, env=cache)
    result.refused("meta-llama/Llama-3.2-1B", "HF_HUB_OFFLINE", "--local-dir DIR")
    assert result.seconds < 60  # 2 on an idle machine; retries would take minutes
