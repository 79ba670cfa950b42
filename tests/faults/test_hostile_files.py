"""Pipes, links and tokenizers that would hang, leak or bring the process down."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ftjax.errors import UserError
from ftjax.loading import open_base
from tests.faults.commands import check, copy_model, edit_json, write_rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.jsonl.gz"])
def test_a_pipe_instead_of_data(name: str, tiny: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    check(tiny, tmp_path / name).refused("not a regular file", name)


def test_a_pipe_instead_of_weights(tiny: Path, pairs: Path, tmp_path: Path) -> None:
    model = copy_model(tiny, tmp_path / "model")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    check(model, pairs).refused("not a regular file", "model.safetensors")


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "merges.txt"]
)
def test_a_link_out_of_the_model(
    name: str, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    model, outside = copy_model(tiny, tmp_path / "model"), tmp_path / "outside"
    outside.write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    check(model, pairs).refused("leads out of the model's folder", name)


def test_a_tokenizer_that_brings_its_library_down(
    tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    model = copy_model(tiny, tmp_path / "model")
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    edit_json(model / "tokenizer.json", normalizer=charsmap)
    result = check(model, pairs)
    assert result.code == 2 and "Traceback" not in result.err, result.err


@pytest.mark.parametrize(
    ("file", "key", "value", "part"),
    [
        ("config.json", "rope_theta", 10**400, "config.json: rope_theta"),
        (
            "config.json",
            "rope_scaling",
            {"rope_type": "linear", "factor": 10**400},
            "config.json: rope_scaling.factor",
        ),
        ("config.json", "rms_norm_eps", 10**400, "config.json: rms_norm_eps"),
        ("generation_config.json", "eos_token_id", 10**30, "eos_token_id"),
        ("tokenizer_config.json", "chat_template", 5, "chat template is no text"),
        ("tokenizer_config.json", "chat_template", [["x"]], "tokenizer cannot be read"),
        (
            "tokenizer_config.json",
            "chat_template",
            [{"name": "default", "template": [5]}],
            "chat template is no text",
        ),
        (
            "tokenizer_config.json",
            "chat_template",
            [{"name": 5, "template": "x"}],
            "none is the default",
        ),
        ("tokenizer_config.json", "chat_template", "\ud800", "in UTF-8"),
    ],
    ids=str,
)
def test_values_of_odd_types(
    file: str, key: str, value: Any, part: str, tiny: Path, tmp_path: Path
) -> None:
    model = copy_model(tiny, tmp_path / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(model / file, **{key: value})
    with pytest.raises(UserError) as error:
        open_base(str(model))
    assert part in error.value.screen()


def test_a_weight_file_with_half_a_character_in_its_name(
    tiny: Path, tmp_path: Path
) -> None:
    model = copy_model(tiny, tmp_path / "model")
    (model / "model.safetensors").rename(model / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a\ud800.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="leads out of the model's folder"):
        open_base(str(model))


def test_numbers_that_do_not_fit(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"input_ids": [1, 2, 10**30, 4]}) + "\n")
    check(tiny, data).refused("outside the model's vocabulary", "token 2")
    rows = [{"instruction": "a", "output": "b", "history": 5}]
    check(tiny, write_rows(data, rows)).refused("`history` has the wrong type")
