"""The card of what is exported: what it is, and from what."""

import json
from typing import Any

import jax

from ftjax.checkpoints.peft_others import KINDS
from ftjax.console import count
from ftjax.loading import public_name
from ftjax.methods.lora import LoraPlan
from ftjax.models.vera import PAIR
from ftjax.policy import Policy


def adapter_facts(kind: str, tree: Any, plan: LoraPlan | None) -> dict[str, str]:
    """What the card says of an adapter."""
    if plan is None:
        own = {name: part for name, part in tree.items() if name != PAIR}
        numbers = sum(leaf.size for leaf in jax.tree.leaves(own))
        return {"adapter": KINDS[kind], "trained parameters": count(numbers)}
    ranks = sorted({r for at in plan.sites.values() for r in at.ranks if r})
    kind = "DoRA" if any(at.dora for at in plan.sites.values()) else "LoRA"
    return {
        "adapter": f"{kind}, rank " + "/".join(map(str, ranks)),
        "targets": ", ".join(path[-1] for path in plan.sites),
        "trained parameters": count(sum(at.count for at in plan.sites.values())),
    }


def model_card(policy: Policy, facts: dict[str, str], library: str) -> str:
    """A short card: what this is, from which base, which step, which weights."""
    name = public_name(policy.base)
    rows = {"base": name, "from": policy.label, **facts}
    if policy.base.weights is not None:
        rows["base weights"] = f"sha256 {policy.base.hash}"
    lines = [
        "---",
        f"base_model: {json.dumps(name)}",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [ftjax]",
        "---",
        "",
        f"# {'An adapter' if library == 'peft' else 'A language model'}",
        "",
        "Written by `ftjax.export`.",
        "",
        *(f"- {key}: {value}" for key, value in rows.items()),
    ]
    return "\n".join(lines) + "\n"
