"""The card of what is exported: what it is, and from what."""

import json
from typing import Any

import jax

from ftjax.checkpoints.peft_others import KINDS
from ftjax.console import count
from ftjax.loading import public_name
from ftjax.methods.heads import SCORE
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


def reward_facts(policy: Policy, library: str) -> dict[str, str]:
    """How others read a reward model's score; empty where there is none."""
    if SCORE not in policy.variables:
        return {}
    base = policy.base
    pad = base.pad_id
    rows = f"pad_token_id={pad} fills up rows"
    if pad is None:
        rows = "one row at a time: the tokenizer has no pad token that ends no answer"
    found = {
        "score": "one number, at the last token of the answer: its end, without what a"
        " chat template writes behind that",
        "rows": rows,
    }
    if library == "peft":
        settings = "" if pad is None else f", pad_token_id={pad}"
        found["loads over"] = (
            "AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1"
            f"{settings})"
        )
    return found


def model_card(policy: Policy, facts: dict[str, str], library: str) -> str:
    """A short card: what this is, from which base, which step, which weights."""
    name = public_name(policy.base)
    rows = {"base": name, "from": policy.label, **facts}
    if policy.base.weights is not None:
        rows["base weights"] = f"sha256 {policy.base.hash}"
    reward = SCORE in policy.variables
    whole = "A reward model" if reward else "A language model"
    lines = [
        "---",
        f"base_model: {json.dumps(name)}",
        f"library_name: {library}",
        f"pipeline_tag: text-{'classification' if reward else 'generation'}",
        "tags: [ftjax]",
        "---",
        "",
        f"# {'An adapter' if library == 'peft' else whole}",
        "",
        "Written by `ftjax.export`.",
        "",
        *(f"- {key}: {value}" for key, value in rows.items()),
    ]
    return "\n".join(lines) + "\n"
