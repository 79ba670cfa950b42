"""Formats that do not fit, quantized bases of every kind, and merges onto them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax.checkpoints.sums import SUMS
from tests.cli import run_cli
from tests.faults.commands import (
    assert_no_run,
    check,
    contents,
    copy_model,
    edit_json,
    edit_weights,
    finished_run,
    options,
    weights,
)
from tests.tiny import make_tiny_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def nf4(tiny: Path, shelf: Path) -> Path:
    """The tiny model in bitsandbytes' layout; tests only read it."""
    out = shelf / "nf4"
    flags = ("--format=nf4", "--double_quant", "--data=none")
    found = run_cli("quantize", f"--model={tiny}", f"--out={out}", *flags, "--json")
    report = found.ok().json
    assert report is not None and report["layout"] == "bitsandbytes"
    assert json.loads((out / "report.json").read_text())["weights"]
    assert 4.1 < report["bits_per_quantized_parameter"] < 4.2
    return out


@pytest.fixture(scope="module")
def qlora(nf4: Path, pairs: Path, shelf: Path) -> Path:
    """A LoRA run on the quantized folder that has ended; tests only read it."""
    return finished_run(nf4, pairs, shelf / "qlora")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--format=nf5",), ("--format", "nf4", "fp4", "int8", "int4")),
        (("--format=nf4", "--group=48"), ("--group", "64", "48")),
        (
            ("--format=int4", "--group=64"),
            ("--group for layers.mlp.down_proj", "a divisor of 96", "group=32"),
        ),
        (("--format=int8", "--double_quant"), ("--double_quant", "no blocks")),
    ],
    ids=["unknown", "block", "divides", "double"],
)
def test_formats_that_do_not_fit(
    flags: tuple[str, ...], parts: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_cli("quantize", f"--model={tiny}", f"--out={out}", *flags).refused(*parts)
    assert not list(tmp_path.iterdir())


def test_dtypes_and_what_becomes_of_them(tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", dtype="float16")
    out, flags = tmp_path / "out", ("--format=nf4", "--data=none", "--dtype=bfloat16")
    told = run_cli("quantize", f"--model={model}", f"--out={out}", *flags).ok()
    # The embedding, the head, and five norms; the projections become codes.
    assert "7 F16 tensors are rounded to bfloat16" in told.out
    edit_weights(model, model__layers__1__mlp__up_proj__weight=np.ones((96, 64), "i1"))
    again = (f"--out={tmp_path / 'again'}", *flags)
    run_cli("quantize", f"--model={model}", *again).refused(UP, "BF16, F16", "got:")


@pytest.mark.parametrize("method", ["gptq", "mxfp4"])
def test_other_quantizers_are_named(
    method: str, tiny: Path, pairs: Path, tmp_path: Path
) -> None:
    model = copy_model(tiny, tmp_path / "model")
    edit_json(model / "config.json", quantization_config={"quant_method": method})
    check(model, pairs).refused(method, "bitsandbytes (nf4, fp4, int8)", "ftjax")


@pytest.mark.parametrize(
    ("flags", "method", "parts"),
    [
        ((), "full", ("its codes have no gradient", "nf4, double quantization")),
        (("--config.quant.format=int8",), "lora", ("already", "int8", "none")),
    ],
    ids=["full", "format"],
)
def test_a_quantized_base_stays_what_it_is(
    flags: tuple[str, ...],
    method: str,
    parts: tuple[str, ...],
    nf4: Path,
    pairs: Path,
) -> None:
    check(nf4, pairs, *flags, method=method).refused(*parts)


def test_nothing_is_quantized_twice(nf4: Path, tmp_path: Path) -> None:
    again = (f"--model={nf4}", f"--out={tmp_path / 'out'}", "--format=nf4")
    run_cli("quantize", *again).refused("quantized already", str(nf4))
    assert not list(tmp_path.iterdir())


def test_one_flipped_bit(nf4: Path, tmp_path: Path) -> None:
    model = copy_model(nf4, tmp_path / "model")
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)
    flags = (f"--model={model}", "--prompt=a", "--max_new_tokens=1")
    run_cli("generate", *flags).refused("has changed", str(file), "sha256", SUMS)


def test_a_base_that_is_replaced_during_a_run(
    nf4: Path, qlora: Path, pairs: Path, tmp_path: Path
) -> None:
    """One scale of one weight: the same shapes, and as good a model by its looks."""
    model = copy_model(nf4, tmp_path / "model")
    workdir = copy_model(qlora, tmp_path / "run")
    file = model / "model.safetensors"
    tensors = dict(load_file(file))
    tensors[f"{UP}.nested_absmax"][0] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    (model / SUMS).unlink()
    config = json.loads((workdir / "config.json").read_text())
    edit_json(workdir / "config.json", model=config["model"] | {"path": str(model)})
    before = contents(workdir)
    flags = options(model, pairs, "--config.optim.lr=0.01", f"--workdir={workdir}")
    run_cli("train", *flags).refused("belong to another run", "base_hash")
    assert {k: v for k, v in contents(workdir).items() if k != "error.txt"} == before


def test_a_quantized_base_is_dequantized_and_merged(
    nf4: Path, qlora: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "merged", tmp_path / "again"
    flags = (f"--workdir={qlora}", "--to=merged", "--json")
    merged = run_cli("export", *flags, f"--out={out}").ok().json
    assert merged is not None and merged["dtype"] == "bfloat16"
    assert merged["base"] == "dequantized (nf4, double quantization)"
    assert "dequantized" in (out / "README.md").read_text()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert UP in weights(out) and f"{UP}.absmax" not in weights(out)
    asked = ("--requantize=int4", "--scheme=affine", "--group=32", "--rows=2")
    found = run_cli("export", *flags, f"--out={again}", *asked).ok().json
    assert found is not None
    moved = found["change"]
    assert 0 < moved["kl"] < 0.5 and 0 < moved["logits_mean"] < moved["logits_max"]
    assert moved["loss_before"] != moved["loss_after"]
    assert f"{UP}.zero" in weights(again)
    flags = (f"--workdir={qlora}", "--to=peft", "--requantize=nf4")
    wrong = run_cli("export", *flags, f"--out={tmp_path / 'adapter'}")
    wrong.refused("an adapter is not quantized", "--to=merged")
    assert_no_run(tmp_path / "adapter")
