"""What a format costs and gives: bits, error, perplexity, speed, in this process."""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.integrals import expected_error
from ftjax.data.dataset import build_dataset
from ftjax.data.loader import Loader, row_length
from ftjax.data.sources import read_rows
from ftjax.evals.measure import evaluate, make_sum_batch
from ftjax.loading import load_base, open_base
from ftjax.methods.quant import plan_quant
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites
from ftjax.objectives.causal import causal
from ftjax.quant.formats import Format, make_format
from ftjax.quant.qtensor import QTensor, quantize
from ftjax.sharding import batch_sharding, make_mesh

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "nf4 double": {"format": "nf4", "double_quant": True},
    "fp4": {"format": "fp4"},
    "int8": {"format": "int8"},
    "int8 affine": {"format": "int8", "scheme": "affine"},
    "int4 g64": {"format": "int4", "group": 64},
    "int4 affine g64": {"format": "int4", "group": 64, "scheme": "affine"},
}


def quant_section(name: str) -> SimpleNamespace:
    """The `quant` section of a config that asks for one of FORMATS; 'none' for none."""
    usual = {
        "format": "none",
        "double_quant": False,
        "group": -1,
        "scheme": "symmetric",
        "targets": "all-linear",
        "pattern": "",
    }
    return SimpleNamespace(**usual | FORMATS.get(name, {}))


def format_of(name: str) -> Format:
    c = quant_section(name)
    return make_format(c.format, group=c.group, scheme=c.scheme, double=c.double_quant)


def gaussian(outputs: int, inputs: int) -> np.ndarray:
    """A float32 weight from N(0, 1), the same every time."""
    return np.random.default_rng(0).standard_normal((outputs, inputs), np.float32)


def error(weight_OI: np.ndarray, name: str) -> dict[str, float]:
    """Bits per parameter and the error of a weight from N(0, 1), beside the integrals.

    Returns:
      bits: of all buffers. mae, mse: per weight. sqnr_db: 10 log10(signal / noise).
      mae_expected, mse_expected: the integrals of `benchmarks.integrals`.
    """
    fmt = format_of(name)
    q = _quantized(weight_OI, fmt)
    off = np.asarray(q.dense(), np.float64).T - weight_OI
    mse = float((off**2).mean())
    signal = float((weight_OI.astype(np.float64) ** 2).mean())
    expected = expected_error(fmt, weight_OI.shape[1])
    return {
        "bits": 8 * q.nbytes / weight_OI.size,
        "mae": float(np.abs(off).mean()),
        "mse": mse,
        "sqnr_db": 10 * float(np.log10(signal / mse)),
        "mae_expected": expected.mae,
        "mse_expected": expected.mse,
    }


def speed(weight_OI: np.ndarray, name: str, repeats: int) -> dict[str, float]:
    """GB/s of the float32 weight, by the median; 'none' copies it: the machine's limit.

    Quantizing starts and ends in the host's memory, packing included; dequantizing is
    jitted, and its codes are on the device.
    """
    gigabytes = weight_OI.nbytes / 1e9
    if name == "none":
        copy, weight = jax.jit(jnp.copy), jnp.asarray(weight_OI)
        return {"dequantize_gb_s": gigabytes / _median(lambda: copy(weight), repeats)}
    fmt = format_of(name)
    q = jax.device_put(_quantized(weight_OI, fmt))
    dense = jax.jit(QTensor.dense)
    return {
        "quantize_gb_s": gigabytes
        / _median(lambda: _quantized(weight_OI, fmt), repeats),
        "dequantize_gb_s": gigabytes / _median(lambda: dense(q), repeats),
    }


def _quantized(weight_OI: np.ndarray, fmt: Format) -> QTensor:
    outputs, inputs = weight_OI.shape
    return quantize(weight_OI, (inputs,), (outputs,), fmt)


def _median(work: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(work())  # what is compiled is compiled here
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


class Corpus:
    """A model and a text: perplexity by format, in float32.

    Args:
      model: as `config.model.path` names it.
      data: as `config.data.eval` names it.
      rows: at most so many, spread evenly; 0: all. `size` says how many there are.
    """

    def __init__(self, model: str, data: str, rows: int):
        self.base = open_base(model, note=_quiet)
        spec = self.base.spec
        rules = SimpleNamespace(
            max_length=min(spec.max_positions, 512),
            overlong="truncate",
            separator="",
            join=False,
            completion_only=True,
            empty_completion="drop",
            on_bad_row="error",
            split="test",
            eval_rows=rows,
        )
        dataset = build_dataset(
            data, self.base.tokenizer, rules, vocab_size=spec.vocab_size, split="eval"
        )
        everything = sum(1 for _ in read_rows(data, split="eval"))
        self.size = {"texts": dataset.report.kept, "of": everything}
        length = row_length(dataset, max_length=rules.max_length, packing=True)
        self.loader = Loader(
            dataset, length=length, packing=True, seed=0, shuffle=False
        )
        self.model, self.mesh = Decoder(spec, dtype=np.float32), make_mesh()
        self.sites = find_sites(self.model)
        self.sum_batch = make_sum_batch(causal(self.model, 64))

    def perplexity(self, name: str) -> dict[str, float]:
        """Of one of FORMATS, or of the base as it is: 'none'.

        Raises:
          UserError: if the format does not fit the model.
        """
        formats = plan_quant(self.sites, quant_section(name))
        variables = load_base(
            self.base, np.float32, self.mesh, formats=formats, note=_quiet
        )
        rows = 4 * self.mesh.size
        batches = self.loader.epoch(rows)
        return evaluate(
            self.sum_batch, variables, {}, batches, batch_sharding(self.mesh)
        )


def _quiet(note: str) -> None:
    """What a base has to say about its files is not asked for here."""
