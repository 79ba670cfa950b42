"""How the next token is drawn."""

from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.weights import Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest.

    As in transformers: logits / temperature, then the `top_k` likeliest (0: all), then
    of these the fewest whose probabilities reach `top_p` (1: all).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (all)"),
        ):
            if not good:
                raise UserError(
                    "a sampling setting is out of range",
                    where=f"--{name}",
                    expected=expected,
                    got=str(getattr(self, name)),
                )


@dataclass(frozen=True)
class Kind:
    """Which parts of the drawing a program is compiled with."""

    greedy: bool
    top_k: bool
    top_p: bool


@flax.struct.dataclass
class Settings:
    """The numbers of a `Sampling`, which a program is told; shapes [] but `key`'s."""

    key: Array
    temperature: Array
    top_k: Array
    top_p: Array


def kind_of(sampling: Sampling, vocab: int) -> Kind:
    return Kind(
        greedy=sampling.temperature == 0,
        top_k=0 < sampling.top_k < vocab,
        top_p=sampling.top_p < 1,
    )


def settings_of(sampling: Sampling, vocab: int) -> Settings:
    return Settings(
        key=jax.random.key_data(jax.random.key(sampling.seed)),
        temperature=jnp.float32(sampling.temperature),
        top_k=jnp.int32(min(sampling.top_k or vocab, vocab)),
        top_p=jnp.float32(sampling.top_p),
    )


def draw(
    kind: Kind, settings: Settings, logits_BV: Array, row_B: Array, count_B: Array
) -> Array:
    """One token per row, int32 [B].

    Its random number follows from the seed, the row's number and how many tokens the
    row has, and so not from what else is in the batch.
    """
    if kind.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits = logits_BV / settings.temperature
    if kind.top_k or kind.top_p:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        if kind.top_k:
            kth = jnp.take(ranked, settings.top_k - 1, axis=-1)[:, None]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
            ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
        if kind.top_p:
            logits = _nucleus(logits, ranked, settings.top_p)
    steps = jax.vmap(
        partial(jax.random.fold_in, jax.random.wrap_key_data(settings.key))
    )
    keys = jax.vmap(jax.random.fold_in)(steps(count_B), row_B)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits_BV: Array, ranked_BV: Array, top_p: Array) -> Array:
    """Keeps a token if those likelier than it have less than `top_p` together."""
    probs = jax.nn.softmax(ranked_BV, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    last = jnp.sum(before < top_p, axis=-1) - 1
    least = jnp.take_along_axis(ranked_BV, last[:, None], axis=-1)
    return jnp.where(logits_BV < least, -jnp.inf, logits_BV)
