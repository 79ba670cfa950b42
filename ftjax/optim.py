"""Optimizers and their schedules, from optax, with the masks that fine-tuning wants.

Every optimizer is a direction, then decay, then the rate; what differs is the
direction. `ftjax/optimizers` has what optax does not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ftjax.optimizers.adam8 import scale_by_adam8
from ftjax.optimizers.muon import Matrices, scale_by_muon_or_adam
from ftjax.optimizers.schedule_free import schedule_free
from ftjax.optimizers.settings import resolve

USUAL_WARMUP = 10


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup` steps, then constant, or down to
    `final * lr` at the last of `steps`: all the way (linear, cosine), or over the last
    `decay` share of the steps (wsd, arXiv 2404.06395; linear as in 2405.18392)."""
    lr, warmup = config.lr, warmup_steps(config, steps)
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "linear": lambda: optax.linear_schedule(lr, config.final * lr, rest),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest, alpha=config.final),
        "wsd": lambda: _stay_then_fall(config, steps, rest),
    }[config.schedule]()
    if not warmup:
        return after
    # Step 0 already learns: the ramp is (step + 1) / (warmup + 1).
    ramp = optax.linear_schedule(lr / (warmup + 1), lr, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def warmup_steps(config: Any, steps: int) -> int:
    """Of the warm-up; as usual (-1) it is 10, or half of a run that is short."""
    return min(USUAL_WARMUP, steps // 2) if config.warmup < 0 else config.warmup


def _stay_then_fall(config: Any, steps: int, rest: int) -> optax.Schedule:
    lr, fall = config.lr, min(rest, max(1, round(config.decay * steps)))
    return optax.linear_schedule(lr, config.final * lr, fall, rest - fall)


def make_optimizer(
    config: Any, steps: int, matrices: Matrices | None = None
) -> optax.GradientTransformation:
    """The optimizer `config.name`, after clipping by the global norm.

    Decay is decoupled (arXiv 1711.05101) and applies to matrices only: weights and
    LoRA's `a` and `b`, not to norms, biases or scales. Rate and decay of `b` are
    `b_lr_ratio` times those of `a` (LoRA+, 2402.12354). Moments are float32 or 8-bit
    codes, whatever the weights and gradients are.

    Args:
      config: the section `optim`.
      steps: of the whole run, for the schedule.
      matrices: which axes of the projections are inputs; for muon alone.
    """
    rate = make_schedule(config, steps)
    parts = [
        _direction(config, matrices),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(rate),
    ]
    if config.b_lr_ratio != 1:
        parts.append(_scale_b(config.b_lr_ratio))
    tx = optax.chain(*parts)
    if config.name == "schedule_free":
        tx = schedule_free(tx, rate, resolve(config)["b1"])
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return _in_float32(tx)


def _direction(config: Any, matrices: Matrices | None) -> optax.GradientTransformation:
    """Where a step goes, before decay and rate."""
    s = resolve(config)
    if config.name == "adamw":
        return optax.scale_by_adam(**s)
    if config.name == "adamw8bit":
        return scale_by_adam8(**s)
    if config.name == "lion":
        return optax.scale_by_lion(**s)
    if config.name == "adafactor":
        # Steps of the given rate, as for the others: not relative to the weights,
        # where LoRA's `b` starts at zero.
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if config.name == "schedule_free":
        # Adam without momentum: the average takes its place.
        return optax.scale_by_rms(
            s["b2"], s["eps"], eps_in_sqrt=False, bias_correction=True
        )
    if config.name == "muon" and matrices is not None:
        return scale_by_muon_or_adam(matrices, **s)
    raise ValueError(f"{config.name} without `matrices`, or not known")


def _scale_b(ratio: float) -> optax.GradientTransformation:
    def scaled(path: Any, leaf: Any) -> Any:
        return ratio * leaf if _is_b(path) else leaf

    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates)
    )


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows optax float32 alone, and lets it raise a float to an integer power, where
    JAX is told to be strict."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return tx.init(cast(params))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(cast(grads), state, cast(params))

    return optax.GradientTransformation(init, update)


def decayed(trained: Any) -> Any:
    """True for the leaves that weight decay applies to, by name."""
    names = ("w", "embedding", "a")

    def is_matrix(path: Any, leaf: Any) -> bool:
        return _name(path) in names or _is_b(path)

    return jax.tree_util.tree_map_with_path(is_matrix, trained)


def _is_b(path: Any) -> bool:
    """Whether a leaf is LoRA's `b`: a bias is called the same, but in a dict."""
    return _name(path) == "b" and not isinstance(path[-1], jax.tree_util.DictKey)


def _name(path: Any) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
