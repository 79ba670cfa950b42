"""Prompts in lanes: a lane whose row is done takes the next prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ftjax.decoding.loop import EMPTY, Program, Rows, Rules, decode, fill, start
from ftjax.models.cached import Weights
from ftjax.weights import choose

PROMPT_STEP = 32  # prompts are padded to a multiple of this
NEW_STEP = 64  # room for new tokens is a multiple of this
REFILL = 4  # prompts are read when one lane in so many is free
NO_END = 2**30


class Prompt(NamedTuple):
    """A prompt, how many tokens it may get, and its choice of stacked updates."""

    tokens: Sequence[int]
    limit: int
    use: int | None = None


@dataclass(frozen=True)
class Model:
    """What generates: a program, and what it is given at every call."""

    program: Program
    weights: Weights
    rules: Rules


class Lanes:
    """Rows that are generated side by side.

    Args:
      model: what generates.
      prompts: all of them, in the order in which they are begun.
      count: of lanes, at most; 0: one for each prompt.
    """

    def __init__(self, model: Model, prompts: Sequence[Prompt], count: int = 0):
        self.model, self.prompts = model, prompts
        lanes = min(count or len(prompts), len(prompts))
        longest = max(len(prompt.tokens) for prompt in prompts)
        self._width = -(-longest // PROMPT_STEP) * PROMPT_STEP
        most = max(prompt.limit for prompt in prompts)
        new = -(-most // NEW_STEP) * NEW_STEP
        self._holds = np.full(lanes, EMPTY)  # the prompt of each lane
        self._begun = 0
        self._group = lanes
        weights = self.model.weights
        self._state = start(self.model.program, weights, lanes, self._width, new)

    @property
    def busy(self) -> bool:
        """Whether a lane holds a prompt, or one waits."""
        return bool((self._holds != EMPTY).any()) or self._waiting > 0

    @property
    def _waiting(self) -> int:
        return len(self.prompts) - self._begun

    @property
    def _next(self) -> int:
        """How many prompts are read next."""
        return min(self._group, self._waiting)

    def fill(self) -> None:
        """Begins prompts, a group at a time, while enough lanes are free."""
        while self._waiting:
            free = np.flatnonzero(self._holds == EMPTY)
            if len(free) < self._next:
                return
            self._begin(free[: self._next])
            self._group = max(1, len(self._holds) // REFILL)

    def _begin(self, lanes: np.ndarray) -> None:
        """Reads the next prompts into these lanes, in a batch of the usual size."""
        group, width = self._group, self._width
        numbers = [self._begun + min(i, len(lanes) - 1) for i in range(group)]
        chosen = [self.prompts[number] for number in numbers]
        tokens = np.zeros((group, width), np.int32)
        for row, prompt in zip(tokens, chosen, strict=True):
            row[width - len(prompt.tokens) :] = prompt.tokens
        starts = [width - len(prompt.tokens) for prompt in chosen]
        limits = [prompt.limit for prompt in chosen]
        rows = Rows(*(jnp.asarray(x, jnp.int32) for x in (numbers, starts, limits)))
        place = np.full(len(self._holds), EMPTY, np.int32)
        place[lanes] = np.arange(len(lanes))
        model = self.model
        weights = _chosen(model.weights, chosen)
        self._state = fill(
            model.program, weights, model.rules, self._state, tokens, rows, place
        )
        self._holds[lanes] = numbers[: len(lanes)]
        self._begun += len(lanes)

    def decode(self, steps: int = NO_END) -> None:
        """Draws up to `steps` tokens a lane, until it is time to fill lanes."""
        model, lanes = self.model, len(self._holds)
        held = [self.prompts[max(number, 0)] for number in self._holds]
        enough = self._next if self._waiting else lanes
        self._state = decode(
            model.program,
            _chosen(model.weights, held),
            model.rules,
            self._state,
            jnp.int32(steps),
            jnp.int32(enough),
        )

    def tokens(self) -> dict[int, list[int]]:
        """The new tokens so far of every prompt that is in a lane."""
        state, found = self._state, {}
        out_BS, ends, counts = map(
            np.asarray, (state.out_BS, state.end_B, state.count_B)
        )
        for b in np.flatnonzero(self._holds != EMPTY):
            slots = np.arange(ends[b] - counts[b], ends[b]) % out_BS.shape[1]
            found[int(self._holds[b])] = out_BS[b, slots].tolist()
        return found

    def take(self) -> dict[int, list[int]]:
        """The new tokens of the prompts that are done, whose lanes are free then."""
        found, done = self.tokens(), np.asarray(self._state.done_B)
        taken = [int(number) for number in self._holds[done] if number != EMPTY]
        self._holds[done] = EMPTY
        return {number: found[number] for number in taken}


def _chosen(weights: Weights, rows: Sequence[Prompt]) -> Weights:
    uses = [prompt.use for prompt in rows if prompt.use is not None]
    return choose(weights, uses) if uses else weights
