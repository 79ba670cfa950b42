"""Quantized checkpoints: what is written is what was computed, and is read again."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftjax.checkpoints.hf import Weights, load_params, open_weights, read_config
from ftjax.checkpoints.packed import neighbours
from ftjax.checkpoints.quant_save import pairs, save_quantized
from ftjax.checkpoints.sums import SUMS
from ftjax.errors import UserError
from ftjax.methods.quant import Plan, plan_quant
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites
from ftjax.models.registry import spec_from_config
from ftjax.quantize import reader
from tests.quant.test_model import quant_config
from tests.tiny import make_tiny_checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "nf4-double": {"format": "nf4", "group": 128, "double_quant": True},
    "nf4-4096": {"format": "nf4", "group": 4096},
    "fp4-32": {"format": "fp4", "group": 32},
    "int8": {"format": "int8"},
    "int8-affine": {"format": "int8", "scheme": "affine", "group": 32},
    "int4": {"format": "int4", "group": 0},
    "int4-affine": {"format": "int4", "scheme": "affine", "group": 16},
    "mixed": {
        "format": "nf4",
        "pattern": "down_proj=int8,q_proj=none",
        "targets": ".*",
    },
}
BITSANDBYTES = {"nf4", "nf4-double", "nf4-4096", "fp4-32", "int8"}
UP = "model.layers.1.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


def opened(folder: Path, notes: list[str] | None = None) -> Weights:
    config = read_config(folder)
    stored = config.get("quantization_config")
    found: list[str] = [] if notes is None else notes
    note = found.append
    spec = spec_from_config(config, "config.json", note=note)
    return open_weights(folder, spec, quantization=stored, note=note)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "base"
    return make_tiny_checkpoint(folder, "qwen2", hidden_size=32, num_attention_heads=2)


def written(base: Path, folder: Path, **changes: Any) -> Plan:
    """Quantizes to `folder`; returns the plan."""
    weights = opened(base)
    plan = plan_quant(find_sites(Decoder(weights.spec)), quant_config(**changes))
    folder.mkdir()
    save_quantized(
        folder,
        reader(weights, plan),
        weights.spec,
        plan,
        config=read_config(base),
        dtype="float32",
    )
    return plan


@pytest.fixture(scope="module")
def nf4(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "model"
    written(base, folder, format="nf4", double_quant=True)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_codes_survive_the_file(kind: str, base: Path, tmp_path: Path) -> None:
    plan = written(base, tmp_path / "out", **KINDS[kind])
    again = opened(tmp_path / "out")
    assert again.formats == plan
    config = read_config(tmp_path / "out")["quantization_config"]
    assert (config["quant_method"] == "bitsandbytes") == (kind in BITSANDBYTES)
    memory = load_params(opened(base), dtype="float32", formats=plan)
    disk = load_params(again, dtype="float32")

    def same(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, memory, disk)


def test_every_tensor_is_aligned_for_other_readers(nf4: Path) -> None:
    for tensor in opened(nf4).tensors.values():
        width = {"U8": 1, "I8": 1, "F32": 4}[tensor.dtype]
        assert tensor.offset % width == 0
    assert load_file(nf4 / "model.safetensors")[f"{UP}.weight"].shape[1] == 1


def test_an_odd_row_ends_with_half_a_byte() -> None:
    codes = np.arange(35, dtype=np.uint8).reshape(5, 7) % 16
    packed = pairs(codes)
    assert packed.shape == (5, 4) and packed[0].tolist() == [0x01, 0x23, 0x45, 0x60]
    np.testing.assert_array_equal(neighbours(packed)[:, :7], codes)


def state(tensors: dict[str, Any], **changes: Any) -> None:
    facts = json.loads(tensors[STATE].tobytes()) | changes
    tensors[STATE] = np.frombuffer(json.dumps(facts).encode(), np.uint8)


def changed(part: str, edit: Any) -> Any:
    def apply(tensors: dict[str, Any]) -> None:
        values = tensors[f"{UP}.weight{part}"].copy()
        tensors[f"{UP}.weight{part}"] = edit(values)

    return apply


def swapped(values: np.ndarray) -> np.ndarray:
    values[[3, 4]] = values[[4, 3]]
    return values


SPOILED: dict[str, tuple[Any, list[str]]] = {
    "block": (lambda t: state(t, blocksize=48), ["blocksize", "64", "48"]),
    "shape": (lambda t: state(t, shape=[32, 96]), ["shape", "[96, 32]", "[32, 96]"]),
    "type": (lambda t: state(t, quant_type="fp4"), ["quant_type", "nf4", "'fp4'"]),
    "mean": (lambda t: state(t, nested_offset=1e99), ["nested_offset", "1e+99"]),
    "key": (lambda t: state(t, rotation=[1]), ["no other keys", "rotation"]),
    "json": (
        lambda t: t.update({STATE: np.zeros(9, np.uint8)}),
        [UP, "not valid JSON"],
    ),
    "table": (changed(".quant_map", swapped), ["quant_map", "the table of"]),
    "codes": (changed("", lambda v: v[1:]), ["1,536 bytes", "1,535 bytes"]),
    "scales": (changed(".absmax", lambda v: v[1:]), ["absmax", "(48,)", "(47,)"]),
    "lost": (
        lambda t: t.pop(f"{UP}.weight.nested_quant_map"),
        ["missing: nested_quant_map"],
    ),
    "floats": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{UP}.weight.")],
        ["stored in different ways", "layer 0: nf4", "layer 1: floats"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("spoiled", SPOILED)
def test_every_part_is_checked(spoiled: str, nf4: Path, tmp_path: Path) -> None:
    spoil, words = SPOILED[spoiled]
    tensors = dict(load_file(nf4 / "model.safetensors"))
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((nf4 / "config.json").read_bytes())
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    for word in words:
        assert word in caught.value.screen(), caught.value.screen()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_scales_are_numbers(bad: float, base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "out", format="int8")
    file = tmp_path / "out" / "model.safetensors"
    tensors = dict(load_file(file))
    tensors[f"{UP}.SCB"][3] = bad
    save_file(tensors, file)
    (tmp_path / "out" / SUMS).unlink()
    notes: list[str] = []
    weights = opened(tmp_path / "out", notes)
    assert any("outliers (llm_int8_threshold 6.0)" in note for note in notes)
    with pytest.raises(UserError, match="damaged") as caught:
        load_params(weights, dtype="float32", note=notes.append)
    assert f"{UP}.weight (scale)" in caught.value.screen()


def test_config_and_weights_must_agree(nf4: Path, base: Path, tmp_path: Path) -> None:
    config = read_config(nf4)
    quant = config["quantization_config"]
    weights = {True: nf4, False: base}
    for is_quantized, entry, word in (
        (True, quant | {"bnb_4bit_quant_type": "fp4"}, "fp4 weights"),
        (True, {"load_in_8bit": True}, "int8 weights"),
        (False, quant, "floats only"),
        (True, None, "before its quantization"),
    ):
        spec = spec_from_config(config, "config.json")
        with pytest.raises(UserError) as caught:
            open_weights(weights[is_quantized], spec, quantization=entry)
        assert word in caught.value.screen(), caught.value.screen()


def test_a_format_of_our_own_is_checked(base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "out", format="int4", group=16)
    config = read_config(tmp_path / "out")
    spec = spec_from_config(config, "config.json")
    formats = config["quantization_config"]["formats"]
    rest = {"scheme": "symmetric", "double_quant": False}
    for entry, word in (
        ({"name": "int4", "group": 32, **rest}, "(96, 1)"),
        ({"name": "int5", "group": 32, **rest}, "int5"),
        ({"name": "int4", "group": 16, **rest, "scheme": "affine"}, "zero"),
        ({"name": "int4", "group": "16"}, "as ftjax writes it"),
        (None, "as ftjax writes it"),
    ):
        changed = formats | {"layers.mlp.up_proj": entry}
        quant = {"quant_method": "ftjax", "formats": changed}
        with pytest.raises(UserError) as caught:
            open_weights(tmp_path / "out", spec, quantization=quant)
        assert word in caught.value.screen(), caught.value.screen()
