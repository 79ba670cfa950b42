"""Exports what a run has learned: a PEFT adapter, or a merged model.

    python -m ftjax.export --workdir=RUN --to=peft --out=DIR
    python -m ftjax.export --workdir=RUN --to=merged --out=DIR [--dtype=float32]
    python -m ftjax.export --workdir=RUN --to=merged --out=DIR --requantize=nf4

A quantized base is dequantized before the update is added, and the sum is written in 16
bits: rounding it again to a few may lose what was learned. `--requantize` does so, and
measures what changes.

Both with tokenizer, chat template and generation config. The folder appears whole or
not at all, and nothing is ever overwritten.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ftjax import cli
from ftjax.checkpoints.folder import refuse_existing, write_folder
from ftjax.checkpoints.hf import save_params
from ftjax.checkpoints.hf_save import Host
from ftjax.checkpoints.peft import is_zero, save_adapter
from ftjax.checkpoints.quant_save import save_quantized
from ftjax.console import count, say
from ftjax.data.tokenizer import FILES
from ftjax.errors import UserError
from ftjax.evals.change import change
from ftjax.evaluate import read_batches
from ftjax.loading import (
    Base,
    Policy,
    base_hash,
    load_base,
    open_base,
    open_policy,
    public_name,
    read_run_config,
)
from ftjax.methods.lora import merge
from ftjax.methods.quant import Plan, dequantize, plan_quant
from ftjax.models.decoder import Decoder
from ftjax.models.names import Weight
from ftjax.models.proj import find_sites
from ftjax.quant.formats import NAMES
from ftjax.quant.qtensor import QTensor
from ftjax.sharding import batch_sharding, make_mesh
from ftjax.workdir import require_space

GENERATION = "generation_config.json"


def define(args: flags.FlagValues) -> None:
    cli.define_source(args)
    flags.DEFINE_enum(
        "to", None, ["peft", "merged"], "an adapter or a whole model", flag_values=args
    )
    flags.DEFINE_string("out", "", "the folder to make", flag_values=args)
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "of a merged model's weights; auto: as the base's are stored",
        flag_values=args,
    )
    what = "of the merged model's weights, quantized again"
    cli.define_format(args, "requantize", list(NAMES), what)
    text, integer = flags.DEFINE_string, flags.DEFINE_integer
    text("data", "pydoc:text[eval]", "where the change is measured", flag_values=args)
    text("split", "test", "of a `datasets` name", flag_values=args)
    integer("rows", 16, "at most so many; 0: all", lower_bound=0, flag_values=args)
    integer("max_length", 256, "tokens a row", lower_bound=0, flag_values=args)


def main(args: flags.FlagValues) -> dict[str, Any]:
    out = _check(args)
    policy = open_policy(
        model=args.model,
        workdir=args.workdir,
        adapter=args.adapter,
        dtype=jnp.float32,
        weights=args.weights,
    )
    refuse_source(out, policy.base, args.adapter)
    found: dict[str, Any] = {}
    if args.to == "peft":
        write_adapter(out, policy)
        dtype = "float32"
    else:
        dtype = args.dtype if args.dtype != "auto" else stored_dtype(policy)
        found = write_merged(out, policy, dtype, args if args.requantize else None)
    say(f"wrote {out}: {policy.label}, {dtype}")
    size = sum(file.stat().st_size for file in out.iterdir())
    return {
        "out": str(out),
        "to": args.to,
        "from": policy.label,
        "step": policy.step,
        "dtype": dtype,
        "bytes": size,
        **found,
    }


def _check(args: flags.FlagValues) -> Path:
    """What can be refused before anything is read."""
    for name, fix in (("to", "--to=peft or --to=merged"), ("out", "--out=DIR")):
        if not getattr(args, name):
            raise UserError(f"--{name} is not given", where="command line", fix=fix)
    if args.requantize and args.to != "merged":
        raise UserError(
            "an adapter is not quantized",
            where="--requantize",
            expected="--to=merged",
            got=f"--to={args.to}",
        )
    out = Path(args.out).expanduser()
    refuse_existing(out)
    if args.to == "peft" and not args.adapter:
        method = read_run_config(args.workdir)["method"]["name"] if args.workdir else ""
        if method != "lora":
            raise UserError(
                "there is no adapter to export",
                where="--to=peft",
                got=f"{args.workdir} is a full fine-tune"
                if method
                else "a model alone",
                fix="--to=merged writes the whole model",
            )
    return out


def refuse_source(out: Path, base: Base, adapter: str) -> None:
    """Nothing is written into the folders that are read from."""
    for source in (base.dir, *([Path(adapter)] if adapter else [])):
        if out.resolve().is_relative_to(source.expanduser().resolve()):
            raise UserError(
                "the export would go into a folder that it is made from",
                where=out,
                got=f"inside {source}",
                fix="choose an --out elsewhere",
            )


def write_adapter(out: Path, policy: Policy) -> None:
    """Writes a folder that PEFT loads. Raises UserError if nothing was learned."""
    plan, base = policy.plan, policy.base
    if plan is None:
        raise ValueError("the policy has no adapter")
    lora = policy.variables["lora"]
    if is_zero(lora):
        raise UserError(
            "the adapter changes nothing: its B is zero everywhere",
            where=policy.label,
            fix="train it first",
        )

    def fill(folder: Path) -> None:
        save_adapter(folder, lora, plan, public_name(base), _hash(base))
        ranks = sorted({r for at in plan.sites.values() for r in at.ranks if r})
        facts = {
            "adapter": "LoRA, rank " + "/".join(map(str, ranks)),
            "targets": ", ".join(path[-1] for path in plan.sites),
            "trained parameters": count(sum(at.count for at in plan.sites.values())),
        }
        write_rest(folder, policy, facts, "peft")

    write_folder(out, fill)


def write_merged(
    out: Path, policy: Policy, dtype: str, requantize: Any = None
) -> dict[str, Any]:
    """Writes a folder that transformers loads: W + scale * a.b, cast last.

    Of a quantized base W is what its codes stand for.

    Args:
      requantize: settings as `ftjax.quantize` has them, and `requantize`, the format.

    Returns:
      what was measured, for `--json`.
    """
    base, params = policy.base, policy.variables["params"]
    plan: Plan = {}
    if requantize:
        settings = {"format": requantize.requantize, **requantize.flag_values_dict()}
        sites = find_sites(policy.model)
        plan = plan_quant(sites, SimpleNamespace(**settings), prefix="--")
    found: dict[str, Any] = {}
    if "quant" in policy.variables:
        found["base"] = f"dequantized ({_kinds(policy.variables['quant'])})"
        params = jax.jit(dequantize)(params, policy.variables["quant"])
    if "lora" in policy.variables:
        params = jax.jit(merge)(params, policy.variables["lora"])
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    parent = next(p for p in out.absolute().parents if p.exists())
    require_space(parent, numbers * jnp.dtype(dtype).itemsize, "the merged model")

    def fill(folder: Path) -> None:
        facts = {"weights": f"{count(numbers)} parameters, {dtype}"}
        if plan:
            read = tree_reader(params)
            save_quantized(
                folder, read, base.spec, plan, config=base.config, dtype=dtype
            )
            facts["quantized"] = ", ".join(sorted({str(f) for f in plan.values()}))
        else:
            save_params(folder, params, base.spec, config=base.config, dtype=dtype)
        if "base" in found:
            facts["base, before the merge"] = found["base"]
        write_rest(folder, policy, facts, "transformers")
        if plan:
            found["change"] = _change(folder, policy, params, requantize)

    write_folder(out, fill)
    _tell(found)
    return found


def _kinds(quant: Any) -> str:
    leaves = jax.tree.leaves(quant, is_leaf=lambda x: isinstance(x, QTensor))
    return "; ".join(sorted({str(leaf.format) for leaf in leaves}))


def tree_reader(params: Any) -> Any:
    """Reads what `save_quantized` asks for out of a tree of arrays."""
    hosts: dict[tuple[str, ...], Host] = {}

    def read(path: tuple[str, ...], weight: Weight, i: int) -> np.ndarray:
        if path not in hosts:
            leaf = params
            for key in path:
                leaf = leaf[key]
            hosts[path] = Host(leaf, weight)
        return np.ascontiguousarray(hosts[path].stored(i))

    return read


def _change(folder: Path, policy: Policy, params: Any, args: Any) -> dict[str, float]:
    """Of the folder as it was written, against the merge before it was quantized."""
    mesh = make_mesh()
    asked = SimpleNamespace(
        data=args.data,
        split=args.split,
        rows=args.rows,
        max_length=min(args.max_length, policy.base.spec.max_positions),
        batch_size=1,
        completion_only=True,
        overlong="truncate",
    )
    batches, _ = read_batches(asked, policy.base, mesh)
    written = open_base(str(folder), note=lambda _: None)
    after = load_base(written, jnp.float32, mesh, note=lambda _: None)
    return change(
        Decoder(policy.base.spec),
        {"params": params},
        after,
        batches,
        batch_sharding(mesh),
    )


def _tell(found: dict[str, Any]) -> None:
    if "base" in found:
        say(f"the base was {found['base']}, then the update was added")
    if "change" in found:
        c = found["change"]
        say(
            f"quantized again, against the merge in float32: loss"
            f" {c['loss_before']:.5f} -> {c['loss_after']:.5f}, KL {c['kl']:.5f}"
            f" nats a token, |logits| moved by {c['logits_mean']:.4f} (at most"
            f" {c['logits_max']:.3f}), {c['agree']:.2%} of {c['tokens']:,} likeliest"
            f" tokens the same"
        )


def stored_dtype(policy: Policy) -> str:
    """The dtype that the base's weights are stored in; float32 where it is wider.

    16 bits where the base was quantized: its weights have no more than that to say.
    """
    base = policy.base
    if "quant" in policy.variables:
        return "bfloat16"
    if base.weights is not None:
        return "bfloat16" if base.weights.dtype == "BF16" else "float32"
    named = base.config.get("torch_dtype") or base.config.get("dtype")
    return "bfloat16" if named == "bfloat16" else "float32"


def _hash(base: Base) -> str | None:
    return base_hash(base) if base.weights is not None else None


def write_rest(
    folder: Path, policy: Policy, facts: dict[str, str], library: str
) -> None:
    """The tokenizer, its template, the generation config and the model card."""
    base = policy.base
    for name in FILES:
        if (base.dir / name).is_file():
            shutil.copyfile(base.dir / name, folder / name)
    template = base.tokenizer.template
    if template is not None:
        (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    _write_json(folder / GENERATION, generation_config(base))
    (folder / "README.md").write_text(
        model_card(policy, facts, library), encoding="utf-8"
    )


def generation_config(base: Base) -> dict[str, Any]:
    """The base's own, with every token that ends an answer."""
    source = base.dir / GENERATION
    config = json.loads(source.read_text("utf-8")) if source.is_file() else {}
    for key in ("bos_token_id", "pad_token_id"):
        if base.config.get(key) is not None:
            config.setdefault(key, base.config[key])
    ids = list(base.eos_ids)
    if ids:
        config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    return config


def model_card(policy: Policy, facts: dict[str, str], library: str) -> str:
    """A short card: what this is, from which base, which step, which weights."""
    name = public_name(policy.base)
    rows = {"base": name, "from": policy.label, **facts}
    if policy.base.weights is not None:
        rows["base weights"] = f"sha256 {_hash(policy.base)}"
    lines = [
        "---",
        f"base_model: {json.dumps(name)}",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [ftjax]",
        "---",
        "",
        f"# {'A LoRA adapter' if library == 'peft' else 'A language model'}",
        "",
        "Written by `ftjax.export`.",
        "",
        *(f"- {key}: {value}" for key, value in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    cli.entry(main, define)
