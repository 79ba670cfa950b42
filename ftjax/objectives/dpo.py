"""DPO and its relatives: pairs against a reference; see `losses.dpo`.

The reference is the base without its update, in the same step, or two numbers a pair
that were computed before the run: there is never a second model in memory.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.losses.dpo import LOSSES, OF_RATIOS, Options, length_desensitized, metrics
from ftjax.losses.f_divergence import SCORES
from ftjax.losses.pairs import Pairs
from ftjax.losses.sums import Sums
from ftjax.losses.token_logps import TokenLogps
from ftjax.models.decoder import Decoder
from ftjax.objectives import rows
from ftjax.step import Objective
from ftjax.weights import Array

PyTree = Any
REFERENCE = ("ref_chosen", "ref_rejected")  # leaves of a batch: the reference's sums
LARGEST_WEIGHT = 1e6  # of a loss in a mixture
SFT = "sft"  # of the losses: the one that is a mean over tokens


def dpo(model: Decoder, config: Any) -> Objective:
    """The weighted sum of some losses of pairs, each a mean over the pairs of a step.

    Args:
      model: of the policy and, where the rows bring no reference, of that too.
      config: `loss` of `configs/dpo.py`.

    Raises:
      UserError: a loss or a divergence that is not known, or that do not go together.
    """
    mixture = mixture_of(config.type, config.type_weights)
    check_divergence(mixture, config.divergence)
    check_smoothing(mixture, config.label_smoothing)
    options = Options(
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        divergence=config.divergence,
        alpha=config.alpha,
        tau=config.tau,
    )

    def loss(policy: PyTree, frozen: PyTree, batch: PyTree, key: Any = None) -> Sums:
        tokens = rows.logps(model, policy, batch, config.chunk, key)
        if REFERENCE[0] in batch:
            reference = batch[REFERENCE[0]], batch[REFERENCE[1]]
        else:
            base = pair_logps(model, frozen, batch, config)
            reference = jax.lax.stop_gradient((base[..., 0], base[..., 1]))
        own = sums_of(tokens, batch, config.ld_alpha)
        pairs = Pairs(*own, *reference, *rows.pair_sums(batch["weights"], batch))
        terms = {"preference": jnp.zeros((), jnp.float32)}
        for name, weight in mixture.items():
            if name == SFT:
                nll = -jnp.sum(tokens.logp_BT * rows.chosen_weights(batch))
                terms[SFT] = weight * nll
            else:
                each = LOSSES[name](pairs, options) * batch["pair"]
                terms["preference"] += weight * jnp.sum(each)
        means = rows.means(metrics(pairs, beta=config.beta), batch["pair"])
        return Sums(terms, means | rows.side_metrics(tokens, batch), {})

    over = {"preference": lambda batch: batch["pair"]}
    if SFT in mixture:
        over[SFT] = rows.chosen_weights
    return Objective(loss, over)


def pair_logps(model: Decoder, variables: PyTree, batch: PyTree, config: Any) -> Array:
    """log p of the chosen and the rejected of each pair: [B, U, 2]."""
    tokens = rows.logps(model, variables, batch, config.chunk)
    return jnp.stack(sums_of(tokens, batch, config.ld_alpha), axis=-1)


def sums_of(tokens: TokenLogps, batch: PyTree, ld_alpha: float) -> tuple[Array, Array]:
    """log p of each side; tokens beyond the shorter one count `ld_alpha` (LD-DPO)."""
    logp_BT = tokens.logp_BT
    if ld_alpha != 1:
        shorter_BU = jnp.minimum(*rows.pair_sums(batch["weights"], batch))
        group, _ = rows.member_of(batch)
        place = answer_places(batch)
        shared = rows.of_group(shorter_BU, group)
        logp_BT = logp_BT * length_desensitized(place, shared, ld_alpha)
    return rows.pair_sums(logp_BT, batch)


def answer_places(batch: PyTree) -> Array:
    """The place of each token in its answer, from 1; 0 outside: float32 [B, T]."""
    counted_BT = jnp.cumsum(batch["weights"], axis=-1)
    segments = batch["segments"]
    starts = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    before = jnp.where(starts, counted_BT - batch["weights"], 0)
    place = counted_BT - jax.lax.cummax(before, axis=1)
    return jnp.where(batch["weights"] > 0, place, 0)


def mixture_of(types: str, weights: str) -> dict[str, float]:
    """{loss: weight} of 'sigmoid,sft' and '1,0.5' (all 1 where no weights are given).

    Raises:
      UserError: a name that is not known, or as many weights as there are names.
    """
    names = [name.strip() for name in types.split(",") if name.strip()]
    if unknown := [name for name in names if name not in LOSSES]:
        raise UserError(
            "there is no such loss of pairs",
            where="config.loss.type",
            expected=", ".join(LOSSES) + "; or several of them, with commas between",
            got=", ".join(unknown),
        )
    try:
        given = weights.split(",") if weights.strip() else []
        numbers = [float(part) for part in given] or [1.0] * len(names)
    except ValueError:
        numbers = []
    good = all(0 <= n <= LARGEST_WEIGHT for n in numbers) and any(numbers)
    if not good or len(numbers) != len(names) or len(set(names)) < len(names):
        raise UserError(
            "every loss of a mixture needs its own weight",
            where="config.loss.type, config.loss.type_weights",
            expected="such as type=sigmoid,sft type_weights=1,0.5; not all 0",
            got=f"type={types} type_weights={weights}",
        )
    return dict(zip(names, numbers, strict=True))


def check_smoothing(mixture: dict[str, float], eps: float) -> None:
    """exo_pair divides by the smoothing, robust by 1 - 2 eps."""
    wrong = ("exo_pair" in mixture and eps == 0) or ("robust" in mixture and eps >= 0.5)
    if wrong:
        raise UserError(
            "this loss is not defined for this label smoothing",
            where="config.loss.type, config.loss.label_smoothing",
            expected="above 0 for exo_pair (such as 1e-3), below 0.5 for robust",
            got=f"type={','.join(mixture)}, label_smoothing={eps}",
        )


def check_divergence(mixture: dict[str, float], divergence: str) -> None:
    """Losses of the log-ratios know no divergence but the usual one."""
    if divergence not in SCORES:
        raise UserError(
            "there is no such divergence",
            where="config.loss.divergence",
            expected=", ".join(SCORES),
            got=divergence,
        )
    strict = [name for name in mixture if name in OF_RATIOS]
    if divergence != "reverse_kl" and strict:
        raise UserError(
            "this loss is defined for the reverse KL divergence alone",
            where="config.loss.type, config.loss.divergence",
            expected="divergence=reverse_kl",
            got=f"type={','.join(strict)}, divergence={divergence}",
        )
