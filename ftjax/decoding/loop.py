"""The compiled programs of generation: prompts into lanes, and a loop over tokens.

All lanes write to the same slot of the cache, the next one each time, round and round:
prompts of unequal length end at the same slot. A lane whose row is done takes another
prompt, which ends at the slot where the others are by then.
"""

from dataclasses import dataclass, replace
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from ftjax.decoding.sampling import Kind, Settings, draw
from ftjax.models.cached import (
    Cache,
    Weights,
    cached_logits,
    init_cache,
    virtual_tokens,
)
from ftjax.models.spec import ModelSpec
from ftjax.weights import Array

EMPTY = -1  # a lane that takes no prompt; an eos token that there is not


@dataclass(frozen=True)
class Program:
    """What the programs are compiled for, beside shapes."""

    spec: ModelSpec
    kind: Kind
    dtype: str  # of the computation


@flax.struct.dataclass
class Rules:
    """What a loop is told, and does not change."""

    settings: Settings
    eos_E: Array


@flax.struct.dataclass
class Rows:
    """What each row is told; int32 [B]."""

    number: Array  # for its random numbers
    start: Array  # the slot of its first token
    limit: Array  # how many new tokens at most


@flax.struct.dataclass
class State:
    """What a loop changes; a lane's new tokens end at its slot `end`."""

    slot: Array  # [], where the last tokens go; it only rises
    token_B: Array  # the last tokens, not yet in the cache
    done_B: Array
    count_B: Array  # new tokens
    end_B: Array  # the slot behind the last of them
    rows: Rows
    out_BS: Array  # the tokens at their slots, round and round as in the cache
    cache: Cache


@partial(jax.jit, static_argnames=("program", "lanes", "width", "new"))
def start(
    program: Program, weights: Weights, lanes: int, width: int, new: int
) -> State:
    """Empty lanes for prompts of up to `width` tokens and `new` more."""
    nothing = jnp.zeros(lanes, jnp.int32)
    size = width + new
    return State(
        slot=jnp.asarray(width, jnp.int32),
        token_B=nothing,
        done_B=jnp.ones(lanes, bool),
        count_B=nothing,
        end_B=nothing,
        rows=Rows(nothing, nothing, nothing),
        out_BS=jnp.zeros((lanes, size), jnp.int32),
        cache=init_cache(program.spec, lanes, size, jnp.dtype(program.dtype), weights),
    )


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def fill(
    program: Program,
    weights: Weights,
    rules: Rules,
    state: State,
    tokens_RP: Array,
    rows: Rows,
    place_B: Array,
) -> State:
    """Reads R prompts, and draws the first new token of each.

    Args:
      program: what is computed.
      weights: from `split_layers`.
      rules: of the loop.
      state: of the lanes.
      tokens_RP: prompts, padded on the left.
      rows: of these prompts, [R]; their starts are columns of `tokens_RP`.
      place_B: which prompt each lane takes, or EMPTY: it goes on as it is.
    """
    count, width = tokens_RP.shape
    dtype = jnp.dtype(program.dtype)
    fresh = init_cache(program.spec, count, width, dtype, weights)
    zero = jnp.zeros((), jnp.int32)
    logits_RV, fresh = cached_logits(
        program.spec, weights, tokens_RP, zero, rows.start, fresh
    )
    new_B, source_B = place_B >= 0, jnp.maximum(place_B, 0)
    first = state.slot - width  # the slot of the first column
    rows = replace(rows, start=rows.start + first)

    def taken(new_R: Array, old_B: Array) -> Array:
        return jnp.where(new_B, new_R[source_B], old_B)

    n = virtual_tokens(weights)

    def written(old: Array, new: Array) -> Array:
        ring = _insert(old[:, :, n:], new[source_B][:, :, n:], first, new_B)
        return jnp.concatenate([old[:, :, :n], ring], axis=2) if n else ring

    filled = replace(
        state,
        done_B=state.done_B & ~new_B,
        count_B=jnp.where(new_B, 0, state.count_B),
        rows=jax.tree.map(taken, rows, state.rows),
        cache=jax.tree.map(written, state.cache, fresh),
    )
    return _advance(program, rules, filled, logits_RV[source_B], new_B)


def _insert(ring_BKSH: Array, new_BKPH: Array, first: Array, who_B: Array) -> Array:
    """A ring in which some lanes have P new slots, from slot `first` on."""
    size, width = ring_BKSH.shape[2], new_BKPH.shape[2]
    column_S = (jnp.arange(size) - first) % size
    moved = jnp.take(new_BKPH, jnp.minimum(column_S, width - 1), axis=2)
    inside_BS = who_B[:, None] & (column_S < width)[None]
    return jnp.where(inside_BS[:, None, :, None], moved, ring_BKSH)


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def decode(
    program: Program,
    weights: Weights,
    rules: Rules,
    state: State,
    steps: Array,
    enough: Array,
) -> State:
    """Goes on for `steps` tokens at most, until `enough` lanes are done."""
    until = state.slot + steps

    def more(state: State) -> Array:
        return (state.slot < until) & (jnp.sum(state.done_B) < enough)

    def body(state: State) -> State:
        logits_BV, cache = cached_logits(
            program.spec,
            weights,
            state.token_B[:, None],
            state.slot,
            state.rows.start,
            state.cache,
        )
        state = replace(state, cache=cache, slot=state.slot + 1)
        return _advance(program, rules, state, logits_BV, ~state.done_B)

    return jax.lax.while_loop(more, body, state)


def _advance(
    program: Program, rules: Rules, state: State, logits_BV: Array, who_B: Array
) -> State:
    """Draws the next token of some lanes, for the slot where the state is."""
    rows, count_B = state.rows, state.count_B + who_B.astype(jnp.int32)
    drawn = draw(program.kind, rules.settings, logits_BV, rows.number, state.count_B)
    ended = jnp.any(drawn[:, None] == rules.eos_E[None, :], axis=1)
    token_B = jnp.where(who_B, drawn, state.token_B)
    at = state.slot % state.out_BS.shape[1]
    column = jax.lax.dynamic_slice_in_dim(state.out_BS, at, 1, axis=1)
    column = jnp.where(who_B[:, None], token_B[:, None], column)
    return replace(
        state,
        token_B=token_B,
        done_B=state.done_B | (who_B & (ended | (count_B >= rows.limit))),
        count_B=count_B,
        end_B=jnp.where(who_B, state.slot + 1, state.end_B),
        out_BS=jax.lax.dynamic_update_slice_in_dim(state.out_BS, column, at, axis=1),
    )
