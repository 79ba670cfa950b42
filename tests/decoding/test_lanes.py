"""Lanes: a prompt's tokens do not depend on what it shares the batch with."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.decoding import lanes as lanes_file
from ftjax.decoding import loop
from ftjax.decoding.generator import Generator
from ftjax.decoding.sampling import Sampling
from tests.decoding.small import SPEC

NEW = 12
GREEDY, WARM = Sampling(), Sampling(1.2, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, 48, rng.integers(1, 30)).tolist() for _ in range(23)]


@pytest.fixture(scope="module")
def generator(params: Any, prompts: list[list[int]]) -> Generator:
    """Of a model whose rows end early and late."""
    free = Generator(SPEC, {"params": params}).generate(prompts, NEW)
    eos = (free[0].tokens[1], free[3].tokens[4], free[9].tokens[7])
    made = Generator(SPEC, {"params": params}, eos_ids=eos)
    lengths = {len(one.tokens) for one in made.generate(prompts, NEW)}
    assert len(lengths) > 3
    return made


@pytest.mark.parametrize(
    ("lanes", "how"), [(1, GREEDY), (3, WARM), (8, GREEDY), (40, WARM)]
)
def test_lanes_change_no_token(
    generator: Generator, prompts: list[list[int]], lanes: int, how: Sampling
) -> None:
    whole = generator.generate(prompts, NEW, how)
    assert generator.generate(prompts, NEW, how, max_num_seqs=lanes) == whole


def test_the_ring_goes_round(
    generator: Generator, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lane takes 23 prompts: the slots rise far beyond the cache."""
    monkeypatch.setattr(lanes_file, "NEW_STEP", 1)
    model = generator._model(Sampling(), ignore_eos=False)
    work = lanes_file.Lanes(model, generator._prompts(prompts, NEW), 1)
    made: dict[int, list[int]] = {}
    while work.busy:
        work.fill()
        work.decode()
        made |= work.take()
    size = work._state.out_BS.shape[1]
    assert size == 32 + NEW and int(work._state.slot) > 2 * size
    whole = generator.generate(prompts, NEW)
    assert [made[i] for i in range(len(prompts))] == [one.tokens for one in whole]


def test_a_lane_is_filled_while_others_go_on(
    generator: Generator, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer steps than waves take, whose every wave waits for its longest row."""
    slots: list[int] = []
    decode = lanes_file.Lanes.decode

    def counted(self: lanes_file.Lanes, *args: Any) -> None:
        decode(self, *args)
        slots.append(int(self._state.slot))

    monkeypatch.setattr(lanes_file.Lanes, "decode", counted)
    lengths = [len(one.tokens) for one in generator.generate(prompts, NEW)]
    slots.clear()
    generator.generate(prompts, NEW, max_num_seqs=4)
    waves = sum(max(lengths[i : i + 4]) - 1 for i in range(0, len(lengths), 4))
    assert slots[-1] - 32 < waves


def test_two_shapes_are_compiled_whatever_ends_when(
    generator: Generator, prompts: list[list[int]]
) -> None:
    jitted: list[Any] = [loop.start, loop.fill, loop.decode]
    jax.clear_caches()
    generator.generate(prompts, NEW, max_num_seqs=8)
    assert [f._cache_size() for f in jitted] == [1, 2, 1]
    generator.generate(prompts[::-1], NEW - 1, max_num_seqs=8)
    assert [f._cache_size() for f in jitted] == [1, 2, 1]


def test_no_prompts(generator: Generator) -> None:
    assert generator.generate([], NEW) == []


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_stay_before_the_ring(
    params: Any,
    prompts: list[list[int]],
    kind: str,
) -> None:
    n, key = 3, jax.random.key(2)
    if kind == "prompt":
        more = {"tokens": jax.random.normal(key, (n, SPEC.d_model))}
    else:
        shape = (SPEC.n_layers, n, SPEC.n_kv_heads, SPEC.head_dim)
        more = {"k": jax.random.normal(key, shape), "v": jnp.ones(shape)}
    spec = replace(SPEC, windows=())
    variables = {"params": params, kind: more}
    made = Generator(spec, variables)
    whole = made.generate(prompts, NEW)
    assert made.generate(prompts, NEW, max_num_seqs=2) == whole
    assert Generator(spec, {"params": params}).generate(prompts, NEW) != whole
