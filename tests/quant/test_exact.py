"""Codes, scales and values are bitsandbytes', to the bit."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from ftjax.quant.codebooks import table
from ftjax.quant.encode import encode
from ftjax.quant.formats import Format
from ftjax.quant.qtensor import pack, quantize, unpack
from tests.conftest import ROOT
from tests.goldens.weights import exact, quant_cases, random_tensor

GOLDEN = json.loads((ROOT / "tests" / "goldens" / "quant.json").read_text())["cases"]
CASES = quant_cases()
TABLES = [
    Format(name, block, double=double)
    for name in ("nf4", "fp4")
    for block in (64, 128)
    for double in (False, True)
]


def label(fmt: Format) -> str:
    return f"{fmt.name}-{fmt.group}{'-double' if fmt.double else ''}"


def neighbours(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte as bitsandbytes has them: the first of a pair is high."""
    flat = codes.reshape(-1)
    flat = np.append(flat, np.uint8(7)) if flat.size % 2 else flat
    return (flat[::2] << 4) | flat[1::2]


@pytest.mark.parametrize("fmt", TABLES, ids=label)
@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_bitsandbytes(case: str, fmt: Format) -> None:
    golden, weight = GOLDEN[case][label(fmt)], CASES[case]
    e = encode(weight, fmt)
    packed = neighbours(e.codes)
    if e.codes.size % 2 and fmt.name == "fp4":
        packed[-1] &= 0xF0  # the code of the zero that fills up the byte
    assert exact(packed[:, None]) == golden["packed"]
    assert exact(e.scale) == golden["scale"]
    if fmt.double:
        assert e.offset is not None and e.nested is not None
        nested = np.frombuffer(bytes.fromhex(golden["nested"]), np.float32)
        # The mean of the scales: torch's depends on the order of its sum.
        offset = np.asarray(golden["offset"], np.float32)
        near = float(np.spacing(offset))
        np.testing.assert_allclose(e.offset, offset, rtol=0, atol=near)
        np.testing.assert_allclose(e.nested, nested, rtol=0, atol=near)
        e = e._replace(nested=nested, offset=offset)
    inputs, outputs = (weight.shape[1],), (weight.shape[0],)
    dense = np.asarray(pack(e, inputs, outputs, fmt).dense())
    assert exact(dense.T) == golden["dense"]


@pytest.mark.parametrize("case", CASES)
def test_int8_is_that_of_bitsandbytes(case: str) -> None:
    e = encode(CASES[case], Format("int8", 0))
    assert exact(e.codes) == GOLDEN[case]["int8"]["codes"]
    assert exact(e.scale[:, 0]) == GOLDEN[case]["int8"]["scale"]


FORMATS = [
    *TABLES,
    *(
        Format(name, group, affine)
        for name in ("int8", "int4")
        for group in (0, 32)
        for affine in (False, True)
    ),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("case", ["plain", "odd"])
def test_packing_loses_nothing(case: str, fmt: Format) -> None:
    weight = CASES[case]
    if not fmt.is_table and fmt.group and weight.shape[1] % fmt.group:
        fmt = replace(fmt, group=0)
    e = encode(weight, fmt)
    back = unpack(pack(e, (weight.shape[1],), (weight.shape[0],), fmt))
    for before, after in zip(e, back, strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_bits_are_counted_from_the_buffers(fmt: Format) -> None:
    weight = CASES["many"]
    q = quantize(weight, (512,), (40,), fmt)
    assert 8 * q.nbytes / weight.size == fmt.bits_per_parameter(512, 40)


def test_four_bits_are_half_a_byte() -> None:
    sizes = {}
    for double in (False, True):
        weight = random_tensor("quant.bits.weight", (512, 1024))
        q = quantize(weight, (1024,), (512,), Format("nf4", 64, double=double))
        assert q.codes.nbytes == weight.size // 2
        sizes[double] = 8 * q.nbytes / weight.size
    assert sizes[False] == 4.5
    assert sizes[True] == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_error_is_at_most_half_a_step(fmt: Format) -> None:
    """Of the largest step of the table or of the integers, in units of the scale."""
    weight = CASES["plain"]
    dense = np.asarray(quantize(weight, (128,), (16,), fmt).dense()).T
    grouped = weight.reshape(16, -1, fmt.group or 128)
    if fmt.is_table:
        edges = np.sort(table(fmt.name))
        step = np.diff(edges).max() * np.abs(grouped).max(2, keepdims=True)
        step = step * (1.05 if fmt.double else 1.0)
    elif fmt.affine:
        step = np.ptp(grouped, axis=2, keepdims=True) / (2**fmt.bits - 1)
    else:
        step = np.abs(grouped).max(2, keepdims=True) / (2 ** (fmt.bits - 1) - 1)
    error = np.abs(dense.reshape(grouped.shape) - grouped)
    slack = 1.01 + (0.5 if fmt.affine else 0)  # the zero point is rounded too
    # Beside it, the error of 8-bit scales, and of the float16 that int8 starts from.
    slack_abs = 1e-3 if fmt.double else 0
    if fmt == Format("int8", 0):
        slack_abs = np.abs(weight).max() * 2.0**-11
    assert (error <= slack * step / 2 + slack_abs).all()


def test_a_stack_of_layers_is_its_layers() -> None:
    layers = [
        quantize(CASES["plain"] * k, (128,), (4, 4), Format("nf4", 64)) for k in (1, 2)
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    assert stacked.shape == (2, 128, 4, 4) and stacked.stack == (2,)
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(stacked.dense()[i], layer.dense())
