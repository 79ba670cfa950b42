"""Quantizes a model: a folder of a quarter of the size, and what was lost.

    python -m ftjax.quantize --model=DIR --format=nf4 --double_quant --out=DIR

nf4 and fp4 (with or without --double_quant), and int8 with a scale for each output,
are written as bitsandbytes does, for transformers to load; int4, and int8 in groups or
with --scheme=affine, in a layout that ftjax reads. One weight is in memory as floats at
a time; the perplexity before and after (--data) needs the whole model once more, in
float32: --data=none leaves it out.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ftjax import cli
from ftjax.asked import Asked
from ftjax.checkpoints.folder import refuse_existing, write_folder
from ftjax.checkpoints.hf import Weights, read_matrix, read_plain, tell_policy
from ftjax.checkpoints.quant_save import save_quantized
from ftjax.console import count, say, table
from ftjax.curves import write_errors_png
from ftjax.errors import UserError
from ftjax.evaluate import measure
from ftjax.export import refuse_source, write_rest
from ftjax.loading import Base, open_base
from ftjax.methods.quant import Plan, plan_quant
from ftjax.models.decoder import Decoder
from ftjax.models.names import Path as LeafPath
from ftjax.models.names import Weight, model_weights
from ftjax.models.proj import find_sites
from ftjax.models.spec import ModelSpec
from ftjax.policy import Policy, open_policy
from ftjax.quant.encode import Encoded, host_device
from ftjax.quant.formats import NAMES
from ftjax.quant.qtensor import pack
from ftjax.sharding import make_mesh
from ftjax.workdir import require_space

REPORT, PICTURE = "report.json", "quantization.png"
NO_DATA = "none"


def define(args: flags.FlagValues) -> None:
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("model", "", "a checkpoint folder, a Hub name, or 'base'", flag_values=args)
    text("revision", "main", "of a name on the Hub", flag_values=args)
    text("out", "", "the folder to make", flag_values=args)
    cli.define_format(args, "format", list(NAMES), "of the weights")
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "of what stays floating point; auto: as it is stored",
        flag_values=args,
    )
    text("data", "pydoc:text[eval]", "text for the perplexity; none", flag_values=args)
    text("split", "test", "of a `datasets` name", flag_values=args)
    integer("rows", 64, "at most so many; 0: all", lower_bound=0, flag_values=args)
    integer("max_length", 512, "tokens a row", lower_bound=0, flag_values=args)
    integer("batch_size", 8, "rows at a time", lower_bound=1, flag_values=args)


def main(args: flags.FlagValues) -> dict[str, Any]:
    for name in ("model", "format", "out"):
        if not getattr(args, name):
            raise UserError(f"--{name} is not given", where="command line")
    out = Path(args.out).expanduser()
    refuse_existing(out)
    base = open_base(args.model, args.revision)
    weights = base.weights
    assert weights is not None
    refuse_source(out, base, {})
    if weights.formats:
        raise UserError(
            "the model is quantized already",
            where=base.dir,
            expected="float weights",
            got=", ".join(sorted({str(fmt) for fmt in weights.formats.values()})),
            fix="quantize the original: a second time only adds to the error",
        )
    plan = plan_quant(find_sites(Decoder(base.spec)), args, prefix="--")
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if weights.dtype == "BF16" else "float32"
    tell_policy(weights, dtype, plan, say)
    numbers = quantized_numbers(base.spec, plan, dtype)
    parent = next(p for p in out.absolute().parents if p.exists())
    require_space(parent, numbers["bytes"], "the quantized model")
    found: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        errors = Errors(base.spec, plan)
        save_quantized(
            folder,
            reader(weights, plan, dtype),
            base.spec,
            plan,
            config=base.config,
            dtype=dtype,
            tell=errors.add,
        )
        found.update(_report(args, base, folder, plan, errors, numbers))
        write_errors_png(
            folder / PICTURE, errors.by_kind(), f"{base.name}: {plan_text(plan)}"
        )
        text = json.dumps(found, indent=2) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")

    write_folder(out, fill)
    _show(found, out)
    return {**found, "out": str(out)}


def plan_text(plan: Plan) -> str:
    """The formats of a plan, for people."""
    return "; ".join(sorted({str(fmt) for fmt in plan.values()}))


def quantized_numbers(spec: ModelSpec, plan: Plan, dtype: str) -> dict[str, int]:
    """Parameters, all and quantized, and their bytes: by arithmetic."""
    found = {"parameters": 0, "quantized": 0, "bytes": 0}
    for path, weight in model_weights(spec).items():
        size = int(np.prod(weight.leaf_shape))
        fmt = plan.get(path[:-1]) if path[-1] == "w" else None
        found["parameters"] += size
        if fmt is None:
            found["bytes"] += size * jnp.dtype(dtype).itemsize
        else:
            outputs, inputs = weight.stored_shape
            found["quantized"] += size
            found["bytes"] += int(size * fmt.bits_per_parameter(inputs, outputs) / 8)
    return found


def reader(weights: Weights, plan: Plan, dtype: str = "float32") -> Any:
    """Reads what `save_quantized` asks for out of a checkpoint."""

    def read(path: LeafPath, weight: Weight, i: int) -> np.ndarray:
        if path[-1] == "w" and path[:-1] in plan:
            return read_matrix(weights, weight, i, say)
        return read_plain(weights, weight, i, dtype, say)

    return read


class Errors:
    """The error of every weight, added up as they are quantized.

    `relative` is the root of sum((w - q)^2) / sum(w^2), `max` the largest |w - q|; the
    bits are counted from the buffers of the codes and scales.
    """

    def __init__(self, spec: ModelSpec, plan: Plan):
        self.weights, self.plan = model_weights(spec), plan
        self.rows: list[dict[str, Any]] = []
        self.bytes = 0

    def add(self, path: LeafPath, layer: int, values: np.ndarray, e: Encoded) -> None:
        fmt, weight = self.plan[path[:-1]], self.weights[path]
        q = pack(e, (values.shape[1],), (values.shape[0],), fmt)
        with jax.default_device(host_device()):
            sums = [float(x) for x in _distance(q, values)]
        self.bytes += q.nbytes
        self.rows.append(
            {
                "name": weight.names[layer].removesuffix(".weight"),
                "kind": path[-2],
                "layer": layer if weight.layers else None,
                "format": str(fmt),
                "bits_per_parameter": 8 * q.nbytes / values.size,
                "relative": (sums[0] / sums[1]) ** 0.5 if sums[1] else 0.0,
                "max": sums[2],
            }
        )

    def by_kind(self) -> dict[str, list[tuple[int, float]]]:
        """(layer, relative error) of every projection."""
        found: dict[str, list[tuple[int, float]]] = {}
        for row in self.rows:
            point = (row["layer"] or 0, row["relative"])
            found.setdefault(row["kind"], []).append(point)
        return found


@jax.jit
def _distance(q: Any, values_OI: Any) -> tuple[Any, Any, Any]:
    """Sums of squares of the error and of the weight, and the largest error."""
    error = q.dense().T - values_OI
    return jnp.sum(error**2), jnp.sum(values_OI**2), jnp.max(jnp.abs(error))


def _report(
    args: flags.FlagValues,
    base: Base,
    folder: Path,
    plan: Plan,
    errors: Errors,
    numbers: dict[str, int],
) -> dict[str, Any]:
    """Writes what belongs to the weights, and measures."""
    decoder = Decoder(base.spec)
    label = f"{base.name}, quantized: {plan_text(plan)}"
    source = Policy(base, decoder, {}, None, label, base.spec.max_positions)
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    bits = 8 * errors.bytes / numbers["quantized"]
    facts = {
        "weights": f"{count(numbers['parameters'])} parameters, {plan_text(plan)}",
        "bits a quantized parameter": f"{bits:.3f}",
    }
    write_rest(folder, source, facts, "transformers")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    found: dict[str, Any] = {
        "model": base.name,
        "base_hash": base.hash,
        "format": plan_text(plan),
        "layout": config["quantization_config"]["quant_method"],
        "parameters": numbers["parameters"],
        "quantized_parameters": numbers["quantized"],
        "bits_per_quantized_parameter": bits,
        "bits_per_parameter": 8 * written / numbers["parameters"],
        "file_bytes": written,
        "worst_relative": max(row["relative"] for row in errors.rows),
    }
    if args.data != NO_DATA:
        found |= _perplexity(args, base, folder)
    return {**found, "weights": errors.rows}


def _perplexity(args: flags.FlagValues, base: Base, folder: Path) -> dict[str, Any]:
    """Before, and of the folder as it was written; float32."""
    mesh = make_mesh()
    asked = Asked(
        args.data,
        args.split,
        rows=args.rows,
        max_length=min(args.max_length, base.spec.max_positions),
        batch_size=args.batch_size,
    )
    found: dict[str, Any] = {"data": args.data}
    for name, model in (("before", base.dir), ("after", folder)):
        policy = open_policy(model=str(model), mesh=mesh, note=lambda _: None)
        result, report = measure(asked, policy, mesh, tell=False)
        found[name] = {key: result[key] for key in ("loss", "perplexity", "tokens")}
        found["rows"] = report.kept
    return found


def _show(found: dict[str, Any], out: Path) -> None:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in found["weights"]:
        kinds.setdefault(row["kind"], []).append(row)
    rows = [
        [
            kind,
            own[0]["format"],
            len(own),
            f"{own[0]['bits_per_parameter']:.3f}",
            f"{np.mean([row['relative'] for row in own]):.3%}",
            f"{max(row['relative'] for row in own):.3%}",
            f"{max(row['max'] for row in own):.3g}",
        ]
        for kind, own in kinds.items()
    ]
    headers = ["projection", "format", "weights", "bits", "error", "worst", "largest"]
    say(table(rows, headers))
    say(
        f"\n{found['bits_per_quantized_parameter']:.3f} bits a quantized parameter,"
        f" {found['bits_per_parameter']:.3f} a parameter of the model,"
        f" {found['file_bytes'] / 1e6:,.1f} MB"
    )
    if "before" in found:
        before, after = found["before"], found["after"]
        say(
            f"perplexity {before['perplexity']:.3f} -> {after['perplexity']:.3f}"
            f" (loss {before['loss']:.5f} -> {after['loss']:.5f}) on"
            f" {before['tokens']:,} tokens of {found['data']}"
        )
    say(f"wrote {out} ({found['layout']} layout), {REPORT}, {PICTURE}")


if __name__ == "__main__":
    cli.entry(main, define)
