"""AdamW and its schedules, from optax, with the masks that fine-tuning wants."""

from typing import Any

import jax
import optax

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup` steps, then constant, or down to
    `final * lr` at the last of `steps`."""
    lr, warmup = config.lr, config.warmup
    rest = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "linear": lambda: optax.linear_schedule(lr, config.final * lr, rest),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest, alpha=config.final),
    }[config.schedule]()
    if not warmup:
        return after
    # Step 0 already learns: the ramp is (step + 1) / (warmup + 1).
    ramp = optax.linear_schedule(lr / (warmup + 1), lr, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with decoupled, masked decay after global-norm clipping.

    Decay applies to matrices only: weights and LoRA's `a` and `b`, not to norms, biases
    or scales. Moments are float32, whatever the gradients are.
    """
    tx = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return _with_promotion(tx)


def _with_promotion(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets optax raise a float to an integer power, where JAX is told to be strict."""

    def update(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(*args)

    return optax.GradientTransformation(tx.init, update)


def decayed(trained: Any) -> Any:
    """True for the leaves that weight decay applies to, by name."""
    names = ("w", "embedding", "a", "b")

    def is_matrix(path: Any, leaf: Any) -> bool:
        last = path[-1]
        name = getattr(last, "key", None) or getattr(last, "name", "")
        bias = name == "b" and isinstance(last, jax.tree_util.DictKey)
        return name in names and not bias

    return jax.tree_util.tree_map_with_path(is_matrix, trained)
