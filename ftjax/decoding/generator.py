"""Generation from a model: prompts in, completions out.

Shapes are rounded up, so that another prompt of about the same length does not compile
again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ftjax.decoding.lanes import Lanes, Model, Prompt
from ftjax.decoding.loop import EMPTY, Program, Rules
from ftjax.decoding.sampling import Sampling, kind_of, settings_of
from ftjax.errors import UserError
from ftjax.models.cached import split_layers, virtual_tokens, with_lora
from ftjax.models.spec import ModelSpec


@dataclass(frozen=True)
class Completion:
    """The new tokens of one prompt; the last is an eos token where it `stopped`."""

    tokens: list[int]
    stopped: bool


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
        max_num_seqs: int = 0,
    ) -> list[Completion]:
        """Continues every prompt until an eos token, `max_new_tokens` or the context.

        Args:
          prompts: token ids.
          max_new_tokens: at most.
          sampling: how tokens are drawn; None: greedily.
          ignore_eos: no token ends a text.
          use: each prompt's choice, where updates are stacked (`weights.Stack`).
          max_num_seqs: rows side by side (vLLM's name); when one is done, the next
            prompt takes its place. 0: all prompts at once. The tokens of a prompt do
            not depend on it, but for rounding.

        Raises:
          UserError: an empty prompt, or one that leaves no room in the context.
        """
        if not prompts:
            return []
        model = self._model(sampling or Sampling(), ignore_eos)
        lanes = Lanes(model, self._prompts(prompts, max_new_tokens, use), max_num_seqs)
        made: dict[int, list[int]] = {}
        while lanes.busy:
            lanes.fill()
            lanes.decode()
            made |= lanes.take()
        return [self._completion(made[i], ignore_eos) for i in range(len(prompts))]

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        block: int = 4,
    ) -> Iterator[list[int]]:
        """Continues one prompt, giving the new tokens a few at a time."""
        model = self._model(sampling or Sampling(), ignore_eos=False)
        lanes, given = Lanes(model, self._prompts([prompt], max_new_tokens)), 0
        lanes.fill()
        while lanes.busy:
            tokens = lanes.tokens()[0]
            yield tokens[given:]
            given = len(tokens)
            if not lanes.take():
                lanes.decode(block)

    def _model(self, sampling: Sampling, ignore_eos: bool) -> Model:
        vocab, dtype = self.spec.vocab_size, jnp.dtype(self.dtype).name
        program = Program(self.spec, kind_of(sampling, vocab), dtype)
        eos = () if ignore_eos else self.eos_ids
        rules = Rules(settings_of(sampling, vocab), jnp.asarray(eos or (EMPTY,)))
        return Model(program, self._weights, rules)

    def _prompts(
        self, prompts: Sequence[Sequence[int]], new: int, use: Sequence[int] = ()
    ) -> list[Prompt]:
        uses: Sequence[int | None] = use or [None] * len(prompts)
        return [
            Prompt(prompt, min(new, self._room(prompt)), number)
            for prompt, number in zip(prompts, uses, strict=True)
        ]

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

    def _completion(self, tokens: list[int], ignore_eos: bool) -> Completion:
        ended = bool(tokens) and tokens[-1] in self.eos_ids
        return Completion(tokens, ended and not ignore_eos)
