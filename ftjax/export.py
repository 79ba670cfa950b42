"""Exports what a run has learned: a PEFT adapter, or a merged model.

    python -m ftjax.export --workdir=RUN --to=peft --out=DIR
    python -m ftjax.export --workdir=RUN --to=merged --out=DIR [--dtype=float32]
    python -m ftjax.export --workdir=RUN --to=merged --out=DIR --requantize=nf4
    python -m ftjax.export --workdir=RUN --to=gguf --out=DIR [--dtype=q8_0]
    python -m ftjax.export --workdir=RUN --to=pair --out=DIR     # see `pair`

A quantized base is dequantized before the update is added, and the sum is written in 16
bits: rounding it again to a few may lose what was learned. `--requantize` does so, and
measures what changes.

A reward model's adapter is PEFT's SEQ_CLS, and merged it is transformers'
...ForSequenceClassification.

Both with tokenizer, chat template and generation config. The folder appears whole or
not at all, and nothing is ever overwritten.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from ftjax import cli
from ftjax.card import adapter_facts, model_card, reward_facts
from ftjax.checkpoints import gguf
from ftjax.checkpoints.folder import refuse_existing, write_folder
from ftjax.checkpoints.heads import reward_config
from ftjax.checkpoints.hf import save_params
from ftjax.checkpoints.peft_others import (
    KINDS,
    adapter_kind,
    idle,
    save_any,
    why_unsaved,
)
from ftjax.checkpoints.quant_save import save_quantized
from ftjax.console import count, say
from ftjax.data.tokenizer import FILES
from ftjax.errors import UserError
from ftjax.loading import Base, public_name
from ftjax.merged import kinds, measure_change, merged_params, tell_change, tree_reader
from ftjax.methods.heads import SCORE
from ftjax.methods.quant import Plan, plan_quant
from ftjax.methods.residual import beyond
from ftjax.models.proj import find_sites
from ftjax.pair import write_pair
from ftjax.policy import Policy, open_policy
from ftjax.quant.formats import NAMES
from ftjax.run_folder import read_run_config
from ftjax.workdir import require_space

GENERATION = "generation_config.json"
# Methods that train what is no weight of the model, and what that is.
NEW = {
    "bottleneck": "new layers between those of the base",
    "prompt": "virtual tokens before every row",
    "prefix": "keys and values before every row",
}


def define(args: flags.FlagValues) -> None:
    cli.define_source(args)
    flags.DEFINE_enum(
        "to",
        None,
        ["peft", "merged", "gguf", "pair"],
        "adapter, whole model, that as a file for llama.cpp, quantized base + adapter",
        flag_values=args,
    )
    flags.DEFINE_string("out", "", "the folder to make", flag_values=args)
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16", *gguf.KINDS],
        "of a merged model's weights; auto: as the base's are stored, f16 for gguf",
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
        adapter_weights=args.adapter_weights,
        adapter_rank=args.adapter_rank,
        dtype=jnp.float32,
        weights=args.weights,
    )
    refuse_source(out, policy.base, policy.adapters)
    found: dict[str, Any] = {}
    if args.to == "peft":
        write_adapter(out, policy)
        dtype = "float32"
    elif args.to == "gguf":
        dtype = "f16" if args.dtype == "auto" else args.dtype
        found = write_gguf(out, policy, dtype)
    elif args.to == "pair":
        dtype = write_pair(out, policy, write_rest)
    else:
        dtype = args.dtype if args.dtype != "auto" else stored_dtype(policy)
        found = write_merged(out, policy, dtype, args if args.requantize else None)
    say(f"wrote {out}: {policy.label}, {dtype}")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
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
    if args.dtype != "auto" and (args.dtype in gguf.KINDS) != (args.to == "gguf"):
        raise UserError(
            "a dtype that does not go with what is exported",
            where="--dtype, --to",
            expected=f"{' or '.join(gguf.KINDS)} with --to=gguf, and only there",
            got=f"--to={args.to} --dtype={args.dtype}",
        )
    own = args.group != -1 or args.scheme != "symmetric" or args.double_quant
    if not args.requantize and (own or args.pattern or args.targets != "all-linear"):
        raise UserError(
            "settings of a quantization that was not asked for",
            where="--group, --scheme, --double_quant, --targets, --pattern",
            fix="--requantize=nf4 (or another format), or leave them out",
        )
    if args.requantize and args.to != "merged":
        raise UserError(
            "an adapter is not quantized",
            where="--requantize",
            expected="--to=merged",
            got=f"--to={args.to}",
        )
    out = Path(args.out).expanduser()
    refuse_existing(out)
    if not args.adapter:
        _check_method(args)
    return out


def _check_method(args: flags.FlagValues) -> None:
    """Whether what was trained goes into the folder that is asked for."""
    method = read_run_config(args.workdir)["method"] if args.workdir else {}
    name = method.get("name", "")
    if args.to != "peft" and name in NEW:
        raise UserError(
            "what this run has trained is no weight of the model",
            where=f"--to={args.to}",
            got=f"method={name}: {NEW[name]}",
            fix="use the run itself: generate and evaluate take --workdir"
            + ("; --to=peft writes the adapter" if name in KINDS else ""),
        )
    if args.to == "peft" and name not in KINDS:
        trained = {"": "a model alone", "full": f"{args.workdir} is a full fine-tune"}
        got = trained.get(name, f"{args.workdir} was trained with method={name}")
        whole = name not in NEW
        raise UserError(
            "there is no adapter to export",
            where="--to=peft",
            got=got,
            fix="--to=merged writes the whole model" if whole else None,
        )


def refuse_source(out: Path, base: Base, adapters: Mapping[str, Any]) -> None:
    """Nothing is written into the folders that are read from."""
    folders = [Path(name) for name, found in adapters.items() if found]
    for source in (base.dir, *folders):
        if out.resolve().is_relative_to(source.expanduser().resolve()):
            raise UserError(
                "the export would go into a folder that it is made from",
                where=out,
                got=f"inside {source}",
                fix="choose an --out elsewhere",
            )


def write_adapter(out: Path, policy: Policy) -> None:
    """Writes a folder that PEFT loads. Raises UserError if nothing was learned."""
    plan, base, variables = policy.plan, policy.base, policy.variables
    kind = adapter_kind(variables)
    if kind is None or (kind == "lora" and plan is None):
        raise UserError(
            "there is no adapter to export",
            where=policy.label,
            fix="--to=merged writes the whole model",
        )
    tree, saved, sites = variables[kind], policy.saved, find_sites(policy.model)
    whole = saved or SCORE in variables
    if (why := idle(kind, tree, policy.origin)) and not whole:
        raise UserError(
            f"the adapter changes nothing: {why}",
            where=policy.label,
            fix="train it first",
        )
    if reason := why_unsaved(variables, saved, sites):
        raise UserError(
            "PEFT's files have no place for what was trained",
            where="--to=peft",
            got=reason,
            fix="--to=merged writes the whole model" if kind not in NEW else None,
        )
    facts = adapter_facts(kind, tree, plan) | reward_facts(policy, "peft")
    if "quant" in variables:
        # LoftQ's update holds the error of the codes: over floats it is no use.
        facts["trained over"] = f"the base as {kinds(variables['quant'])}"
    if policy.origin is not None and plan is not None:
        tree, plan = beyond(tree, plan, policy.origin)
        variables = {**variables, kind: tree}
        facts["written as"] = "a plain update of the published base, of twice the rank"
        if "quant" in variables:
            facts["not in it"] = "what rounding took (--to=pair keeps all)"

    def fill(folder: Path) -> None:
        name, known = public_name(base), base.hash or None
        save_any(
            folder, variables, plan, sites, name, known, saved=saved, spec=base.spec
        )
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
    base = policy.base
    plan: Plan = {}
    if requantize:
        settings = {"format": requantize.requantize, **requantize.flag_values_dict()}
        sites = find_sites(policy.model)
        plan = plan_quant(sites, SimpleNamespace(**settings), prefix="--")
    found: dict[str, Any] = {}
    if "quant" in policy.variables:
        found["base"] = f"dequantized ({kinds(policy.variables['quant'])})"
    params = merged_params(policy, head=not plan)
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
            _save_floats(folder, policy, params, dtype)
            facts |= reward_facts(policy, "transformers")
        if "base" in found:
            facts["base, before the merge"] = found["base"]
        write_rest(folder, policy, facts, "transformers")
        if plan:
            found["change"] = measure_change(folder, policy, params, requantize)

    write_folder(out, fill)
    tell_change(found)
    return found


def _save_floats(folder: Path, policy: Policy, params: Any, dtype: str) -> None:
    """The weights, and a reward model's head, in one model."""
    base, head = policy.base, policy.variables.get(SCORE)
    config = base.config
    if head is not None:
        config = reward_config(config, base.spec, base.pad_id)
    save_params(folder, params, base.spec, config=config, dtype=dtype, head=head)


def write_gguf(out: Path, policy: Policy, kind: str) -> dict[str, Any]:
    """Writes a folder with one file that llama.cpp loads; returns what `--json` has."""
    base, tokenizer = policy.base, policy.base.tokenizer
    gguf.require(base.spec)
    vocabulary = gguf.read_vocabulary(base.dir / "tokenizer.json", base.spec.vocab_size)
    template = tokenizer.template
    first = tokenizer.encode(["a"], add_special=True)[0][:1]
    facts = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad,
        "add_bos": first == [tokenizer.bos_id],
        "template": template.source if template is not None else None,
    }
    read = tree_reader(merged_params(policy))

    def fill(folder: Path) -> None:
        gguf.write_gguf(
            folder / "model.gguf",
            read,
            base.spec,
            kind=kind,
            name=base.dir.name,
            vocabulary=vocabulary,
            facts=facts,
        )

    write_folder(out, fill)
    found: dict[str, Any] = {}
    if "quant" in policy.variables:
        found["base"] = f"dequantized ({kinds(policy.variables['quant'])})"
    tell_change(found)
    return found


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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    cli.entry(main, define)
