"""Exports what a run has learned: a PEFT adapter, or a merged model.

    python -m ftjax.export --workdir=RUN --to=peft --out=DIR
    python -m ftjax.export --workdir=RUN --to=merged --out=DIR [--dtype=float32]

Both with tokenizer, chat template and generation config. The folder appears whole or
not at all, and nothing is ever overwritten.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from ftjax import cli
from ftjax.checkpoints.folder import refuse_existing, write_folder
from ftjax.checkpoints.hf import save_params
from ftjax.checkpoints.peft import is_zero, save_adapter
from ftjax.console import count, say
from ftjax.data.tokenizer import FILES
from ftjax.errors import UserError
from ftjax.loading import (
    Base,
    Policy,
    base_hash,
    open_policy,
    public_name,
    read_run_config,
)
from ftjax.methods.lora import merge
from ftjax.methods.quant import dequantize
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


def main(args: flags.FlagValues) -> dict[str, Any]:
    out = _check(args)
    policy = open_policy(
        model=args.model,
        workdir=args.workdir,
        adapter=args.adapter,
        adapter_weights=args.adapter_weights,
        adapter_rank=args.adapter_rank,
        dtype=jnp.float32,
        weights=args.weights,
    )
    _refuse_source(out, policy)
    if args.to == "peft":
        write_adapter(out, policy)
        dtype = "float32"
    else:
        dtype = args.dtype if args.dtype != "auto" else stored_dtype(policy)
        write_merged(out, policy, dtype)
    say(f"wrote {out}: {policy.label}, {dtype}")
    size = sum(file.stat().st_size for file in out.iterdir())
    return {
        "out": str(out),
        "to": args.to,
        "from": policy.label,
        "step": policy.step,
        "dtype": dtype,
        "bytes": size,
    }


def _check(args: flags.FlagValues) -> Path:
    """What can be refused before anything is read."""
    for name, fix in (("to", "--to=peft or --to=merged"), ("out", "--out=DIR")):
        if not getattr(args, name):
            raise UserError(f"--{name} is not given", where="command line", fix=fix)
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


def _refuse_source(out: Path, policy: Policy) -> None:
    """Nothing is written into the folders that are read from."""
    adapters = [Path(name) for name, found in policy.adapters.items() if found]
    for source in (policy.base.dir, *adapters):
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
    lora = policy.variables.get("lora")
    if plan is None or is_zero(lora):
        raise UserError(
            "the adapter changes nothing: its B is zero everywhere"
            if plan
            else "there is no adapter to export",
            where=policy.label,
            fix="train it first" if plan else "--to=merged writes the whole model",
        )

    def fill(folder: Path) -> None:
        save_adapter(folder, lora, plan, public_name(base), _hash(base))
        ranks = sorted({r for at in plan.sites.values() for r in at.ranks if r})
        facts = {
            "adapter": "LoRA, rank " + "/".join(map(str, ranks)),
            "targets": ", ".join(path[-1] for path in plan.sites),
            "trained parameters": count(sum(at.count for at in plan.sites.values())),
        }
        _write_rest(folder, policy, facts, "peft")

    write_folder(out, fill)


def write_merged(out: Path, policy: Policy, dtype: str) -> None:
    """Writes a folder that transformers loads: W + scale * a.b, cast last.

    Of a quantized base W is what its codes stand for.
    """
    base, params = policy.base, policy.variables["params"]
    if "quant" in policy.variables:
        params = jax.jit(dequantize)(params, policy.variables["quant"])
    if "lora" in policy.variables:
        params = jax.jit(merge)(params, policy.variables["lora"])
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    parent = next(p for p in out.absolute().parents if p.exists())
    require_space(parent, numbers * jnp.dtype(dtype).itemsize, "the merged model")

    def fill(folder: Path) -> None:
        save_params(folder, params, base.spec, config=base.config, dtype=dtype)
        facts = {"weights": f"{count(numbers)} parameters, {dtype}"}
        _write_rest(folder, policy, facts, "transformers")

    write_folder(out, fill)


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


def _write_rest(
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
