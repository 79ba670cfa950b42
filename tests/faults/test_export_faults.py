"""Adapters on the wrong base, heads that must not be lost, exports that are killed."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.cli import run_cli
from tests.faults.commands import (
    check,
    contents,
    copy_model,
    edit_json,
    options,
    weights,
)
from tests.tiny import make_tiny_checkpoint

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(finished: Path, shelf: Path) -> Path:
    """The PEFT adapter of the finished run."""
    out = shelf / "adapter"
    flags = (f"--workdir={finished}", "--to=peft", f"--out={out}")
    run_cli("export", *flags).ok()
    return out


def test_a_tied_head_is_no_target(pairs: Path, tmp_path: Path) -> None:
    tied = make_tiny_checkpoint(tmp_path / "tied", "qwen3")
    check(tied, pairs, "--config.method.targets=q_proj,lm_head").refused(
        "config.method.targets", "lm_head"
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),  # which is not there
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules"),
    ],
    ids=["saved", "targeted"],
)
def test_an_adapter_with_a_head_or_an_embedding(
    changes: dict[str, Any], part: str, adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    odd = copy_model(adapter, tmp_path / "odd")
    edit_json(odd / "adapter_config.json", **changes)
    out = tmp_path / "out"
    flags = (f"--model={tiny}", f"--adapter={odd}", "--to=merged", f"--out={out}")
    run_cli("export", *flags).refused(str(odd), part)
    assert not out.exists()


def test_a_tensor_of_an_embedding_is_not_dropped(
    adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    odd = copy_model(adapter, tmp_path / "odd")
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    tensors = load_file(odd / ADAPTER) | {key: np.zeros((4, 271), np.float32)}
    save_file(tensors, odd / ADAPTER, metadata={"format": "pt"})
    flags = (f"--model={tiny}", f"--adapter={odd}", "--prompt=a")
    run_cli("generate", *flags).refused(key, "an update of the embedding or the head")


def test_a_tied_model_with_its_own_head_is_merged_untied(
    adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    model, out = copy_model(tiny, tmp_path / "model"), tmp_path / "out"
    edit_json(model / "config.json", tie_word_embeddings=True)
    flags = (f"--model={model}", f"--adapter={adapter}", "--to=merged", f"--out={out}")
    run_cli("export", *flags).ok()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(
        weights(out)["lm_head.weight"], weights(tiny)["lm_head.weight"]
    )


def test_an_adapter_on_another_base_of_the_same_shapes(
    adapter: Path, tiny: Path, tmp_path: Path
) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    with safe_open(adapter / ADAPTER, "np") as file:
        wanted = file.metadata()["ftjax_base_hash"]
    flags = (f"--adapter={adapter}", "--prompt=a", "--max_new_tokens=1")
    result = run_cli("generate", f"--model={other}", *flags)
    result.refused("trained on another base", str(adapter), wanted[:16], f"in {other}")
    [got] = (line for line in result.err.splitlines() if "got:" in line)
    assert wanted[:16] not in got
    run_cli("generate", f"--model={tiny}", *flags).ok()


def test_a_run_whose_base_was_replaced(
    tiny: Path, pairs: Path, finished: Path, tmp_path: Path
) -> None:
    workdir = copy_model(finished, tmp_path / "run")
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    edit_json(
        workdir / "config.json",
        model=json.loads((workdir / "config.json").read_text())["model"]
        | {"path": str(other)},
    )
    before = contents(workdir)
    flags = options(other, pairs, "--config.optim.lr=0.01", f"--workdir={workdir}")
    run_cli("train", *flags).refused("belong to another run", "base_hash")
    run_cli("generate", f"--workdir={workdir}", "--prompt=a").refused(
        "trained on another base"
    )
    assert {k: v for k, v in contents(workdir).items() if k != "error.txt"} == before


def test_an_exported_adapter_is_what_peft_reads(adapter: Path, tiny: Path) -> None:
    """By its names and rules alone; `tests/goldens` asks the real PEFT."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["bias"]) == (16, 32, "none")
    assert config["modules_to_save"] is None
    targets = {n.rsplit(".", 2)[-2] for n in weights(tiny) if "_proj" in n}
    assert set(config["target_modules"]) == targets
    shapes = {}
    for name, weight in weights(tiny).items():
        if "_proj" in name:
            key = "base_model.model." + name.removesuffix("weight") + "lora_"
            shapes[key + "A.weight"] = (16, weight.shape[1])
            shapes[key + "B.weight"] = (weight.shape[0], 16)
    tensors = load_file(adapter / ADAPTER)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    assert all(tensors[name].any() for name in shapes)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (adapter / name).is_file()


def test_a_killed_export_leaves_nothing_half_named(
    finished: Path, tiny: Path, tmp_path: Path
) -> None:
    sources = contents(finished), contents(tiny)
    out = tmp_path / "out"
    flags = (f"--workdir={finished}", "--to=merged", f"--out={out}")
    # The third look at the target comes when all files are written.
    killed = run_cli("tests.faults.killed", "export:3", "export", *flags)
    assert killed.code == -signal.SIGKILL, killed.err
    assert not out.exists()
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".out.tmp-") and (left / "model.safetensors").is_file()
    run_cli("export", *flags).ok()
    whole = contents(out)
    assert (contents(finished), contents(tiny)) == sources
    run_cli("export", *flags).refused("not overwritten", str(out), "another --out")
    assert contents(out) == whole


@pytest.mark.parametrize("inside", ["", "merged"], ids=["source", "inside"])
def test_an_export_into_its_own_source(
    inside: str, finished: Path, tiny: Path, tmp_path: Path
) -> None:
    before = contents(tiny)
    flags = (f"--workdir={finished}", "--to=merged", f"--out={tiny / inside}")
    run_cli("export", *flags).refused(str(tiny / inside))
    assert contents(tiny) == before
