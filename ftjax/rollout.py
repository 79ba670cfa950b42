"""Generation: a jitted prefill and a decode loop that stays on the device.

Prompts of unequal length are padded on the left, so that all rows write to the same
slot of the cache. Shapes are rounded up, so that another prompt of about the same
length does not compile again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ftjax.errors import UserError
from ftjax.models.cached import (
    Cache,
    Weights,
    cached_logits,
    init_cache,
    split_layers,
    virtual_tokens,
    with_lora,
)
from ftjax.models.spec import ModelSpec
from ftjax.weights import Array, choose

PROMPT_STEP = 32  # prompts are padded to a multiple of this
NEW_STEP = 64  # room for new tokens is a multiple of this
NOTHING = -1  # in the output: no token


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
class Completion:
    """The new tokens of one prompt; the last is an eos token where it `stopped`."""

    tokens: list[int]
    stopped: bool


@dataclass(frozen=True)
class _Static:
    """What a compiled loop is specialised on, beside shapes."""

    spec: ModelSpec
    greedy: bool
    top_k: bool
    top_p: bool


@flax.struct.dataclass
class _Rules:
    """What a loop is told, and does not change."""

    start_B: Array  # the slot of each row's first token
    limit_B: Array  # how many new tokens at most
    eos_E: Array
    key: Array
    temperature: Array
    top_k: Array
    top_p: Array


@flax.struct.dataclass
class _State:
    """What a loop changes."""

    slot: Array  # [], where the last tokens go
    count: Array  # [], new tokens so far
    token_B: Array  # the last tokens, not yet in the cache
    done_B: Array
    out_BM: Array
    cache: Cache


class Generator:
    """Generates from a model; holds its weights once, in the dtype of the computation.

    Args:
      spec: of the model.
      variables: {'params': ..., maybe 'quant': ..., maybe 'lora': ...}; see
        `split_layers`.
      dtype: of the computation.
      eos_ids: the tokens that end a text; any of them.
      release: `variables` are not used again: each array is given up once it is taken.
      apart: updates are not added to the weights, so that `adapt` may change them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        variables: Any,
        *,
        dtype: Any = jnp.float32,
        eos_ids: Sequence[int] = (),
        release: bool = False,
        apart: bool = False,
    ):
        self.spec, self.dtype, self.eos_ids = spec, dtype, tuple(eos_ids)
        self._weights = split_layers(variables, dtype, release=release, apart=apart)

    def adapt(self, lora: Any) -> None:
        """Puts another update beside the weights, or none: needs `apart`."""
        self._weights = with_lora(self._weights, lora)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        ignore_eos: bool = False,
        use: Sequence[int] = (),
    ) -> list[Completion]:
        """Continues every prompt until an eos token, `max_new_tokens` or the context.

        Args:
          use: each prompt's choice, where updates are stacked (`weights.Stack`).

        Raises:
          UserError: an empty prompt, or one that leaves no room in the context.
        """
        sampling = sampling or Sampling()
        run = self._start(prompts, max_new_tokens, sampling, ignore_eos, use)
        state = _decode(*run.fixed, run.rules, run.state, max_new_tokens)
        rows = np.asarray(state.out_BM)
        return [self._completion(row, ignore_eos) for row in rows]

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        block: int = 4,
    ) -> Iterator[list[int]]:
        """Continues one prompt, giving the new tokens a few at a time."""
        run = self._start([prompt], max_new_tokens, sampling or Sampling(), False)
        state, given = run.state, 0
        while True:
            row = np.asarray(state.out_BM[0])
            tokens = row[row != NOTHING].tolist()
            yield tokens[given:]
            given = len(tokens)
            if bool(state.done_B[0]):
                return
            state = _decode(*run.fixed, run.rules, state, given + block)

    def _start(
        self,
        prompts: Sequence[Sequence[int]],
        new: int,
        sampling: Sampling,
        ignore_eos: bool,
        use: Sequence[int] = (),
    ) -> "_Run":
        room = [self._room(prompt) for prompt in prompts]
        limit = [min(new, most) for most in room]
        longest = max(len(prompt) for prompt in prompts)
        width = -(-longest // PROMPT_STEP) * PROMPT_STEP
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        eos = () if ignore_eos else self.eos_ids
        vocab = self.spec.vocab_size
        rules = _Rules(
            start_B=jnp.asarray([width - len(prompt) for prompt in prompts], jnp.int32),
            limit_B=jnp.asarray(limit, jnp.int32),
            eos_E=jnp.asarray(eos or (NOTHING,), jnp.int32),
            key=jax.random.key_data(jax.random.key(sampling.seed)),
            temperature=jnp.float32(sampling.temperature),
            top_k=jnp.int32(min(sampling.top_k or vocab, vocab)),
            top_p=jnp.float32(sampling.top_p),
        )
        static = _Static(
            self.spec,
            sampling.temperature == 0,
            0 < sampling.top_k < vocab,
            sampling.top_p < 1,
        )
        most = -(-max(limit) // NEW_STEP) * NEW_STEP
        fixed = (static, choose(self._weights, use) if use else self._weights)
        state = _prefill(*fixed, rules, tokens, most, jnp.dtype(self.dtype).name)
        return _Run(fixed, rules, state)

    def _room(self, prompt: Sequence[int]) -> int:
        if not len(prompt):
            raise UserError(
                "the prompt has no tokens",
                expected="at least one; this tokenizer puts no token before a text",
                fix="write a prompt",
            )
        virtual = virtual_tokens(self._weights)
        room = self.spec.max_positions - virtual - len(prompt)
        if room <= 0:
            raise UserError(
                "the prompt is longer than the model's context",
                expected=f"fewer than {self.spec.max_positions - virtual} tokens",
                got=f"{len(prompt)} tokens",
                fix="shorten the prompt",
            )
        return room

    def _completion(self, row: np.ndarray, ignore_eos: bool) -> Completion:
        tokens = row[row != NOTHING].tolist()
        ended = bool(tokens) and tokens[-1] in self.eos_ids
        return Completion(tokens, ended and not ignore_eos)


@dataclass(frozen=True)
class _Run:
    fixed: tuple[_Static, Weights]
    rules: _Rules
    state: _State


@partial(jax.jit, static_argnames=("static", "new", "dtype"))
def _prefill(
    static: _Static,
    weights: Weights,
    rules: _Rules,
    tokens_BP: Array,
    new: int,
    dtype: str,
) -> _State:
    """Reads the prompts and draws each row's first new token."""
    rows, width = tokens_BP.shape
    cache = init_cache(static.spec, rows, width + new, jnp.dtype(dtype), weights)
    start = jnp.zeros((), jnp.int32)
    logits, cache = cached_logits(
        static.spec, weights, tokens_BP, start, rules.start_B, cache
    )
    state = _State(
        slot=start + (width - 1),
        count=start,
        token_B=jnp.zeros(rows, jnp.int32),
        done_B=jnp.zeros(rows, bool),
        out_BM=jnp.full((rows, new), NOTHING),
        cache=cache,
    )
    return _advance(static, rules, state, logits)


@partial(jax.jit, static_argnames="static", donate_argnames="state")
def _decode(
    static: _Static, weights: Weights, rules: _Rules, state: _State, until: Array
) -> _State:
    """Goes on until there are `until` new tokens or every row is done."""

    def more(state: _State) -> Array:
        return (state.count < until) & ~jnp.all(state.done_B)

    def body(state: _State) -> _State:
        logits, cache = cached_logits(
            static.spec,
            weights,
            state.token_B[:, None],
            state.slot,
            rules.start_B,
            state.cache,
        )
        return _advance(static, rules, replace(state, cache=cache), logits)

    return jax.lax.while_loop(more, body, state)


def _advance(static: _Static, rules: _Rules, state: _State, logits: Array) -> _State:
    """Draws the next token of every row that is not done."""
    drawn = _draw(static, rules, state.count, logits)
    token = jnp.where(state.done_B, NOTHING, drawn)
    count = state.count + 1
    ended = jnp.any(drawn[:, None] == rules.eos_E[None, :], axis=1)
    return _State(
        slot=state.slot + 1,
        count=count,
        token_B=jnp.maximum(token, 0),
        done_B=state.done_B | ended | (count >= rules.limit_B),
        out_BM=jax.lax.dynamic_update_slice_in_dim(
            state.out_BM, token[:, None], state.count, axis=1
        ),
        cache=state.cache,
    )


def _draw(static: _Static, rules: _Rules, count: Array, logits: Array) -> Array:
    """One token per row; each row has its own stream of random numbers."""
    if static.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / rules.temperature
    if static.top_k or static.top_p:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        if static.top_k:
            kth = jnp.take(ranked, rules.top_k - 1, axis=-1)[:, None]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
            ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
        if static.top_p:
            logits = _nucleus(logits, ranked, rules.top_p)
    step = jax.random.fold_in(jax.random.wrap_key_data(rules.key), count)
    keys = jax.vmap(partial(jax.random.fold_in, step))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits_BV: Array, ranked_BV: Array, top_p: Array) -> Array:
    """Keeps a token if those likelier than it have less than `top_p` together."""
    probs = jax.nn.softmax(ranked_BV, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    last = jnp.sum(before < top_p, axis=-1) - 1
    least = jnp.take_along_axis(ranked_BV, last[:, None], axis=-1)
    return jnp.where(logits_BV < least, -jnp.inf, logits_BV)
