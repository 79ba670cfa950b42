"""Pipes, links and tokenizers that would hang, leak or bring the process down."""

import json
import os
from pathlib import Path

import pytest

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


def test_numbers_that_do_not_fit(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"input_ids": [1, 2, 10**30, 4]}) + "\n")
    check(tiny, data).refused("outside the model's vocabulary", "token 2")
    rows = [{"instruction": "a", "output": "b", "history": 5}]
    check(tiny, write_rows(data, rows)).refused("`history` has the wrong type")
