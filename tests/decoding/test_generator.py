"""Generation: cached equals uncached, and every way to stop and to draw."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.decoding import loop
from ftjax.decoding.generator import Generator
from ftjax.decoding.sampling import Sampling, draw, kind_of, settings_of
from ftjax.errors import UserError
from ftjax.models.cached import cached_logits, init_cache, split_layers
from ftjax.models.decoder import Decoder
from tests.decoding.small import SPEC
from tests.goldens.check_peft import random_adapter

PROMPTS = [[5, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [40]]


@pytest.fixture(scope="module")
def generator(params: Any) -> Generator:
    return Generator(SPEC, {"params": params})


def full_logits(variables: Any, ids: list[int]) -> np.ndarray:
    tokens = jnp.asarray([ids], jnp.int32)
    rows = (tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
    return np.asarray(_whole(variables, *rows)[0])


_whole = jax.jit(partial(Decoder(SPEC).apply, method="logits"))


def naive(variables: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy, by the whole row each time; causal, so that padding is no matter."""
    ids, padded = list(prompt), 64
    for _ in range(count):
        logits = full_logits(variables, ids + [0] * (padded - len(ids)))
        ids.append(int(logits[len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_cached_logits_equal_uncached(params: Any) -> None:
    weights = split_layers({"params": params}, jnp.float32)
    ids = np.random.default_rng(0).integers(0, 48, (2, 12))
    cache = init_cache(SPEC, 2, 16, jnp.float32)
    start = jnp.asarray([0, 3])
    step = jax.jit(partial(cached_logits, SPEC))
    at, rows = 0, []
    for tokens in (ids[:, :8], *np.split(ids[:, 8:], 4, axis=1)):
        got, cache = step(
            weights, jnp.asarray(tokens), jnp.asarray(at, jnp.int32), start, cache
        )
        at += tokens.shape[1]
        rows.append((at, np.asarray(got)))
    for b, pad in enumerate((0, 3)):
        whole = full_logits({"params": params}, ids[b, pad:].tolist())
        for end, got in rows:
            np.testing.assert_allclose(got[b], whole[end - pad - 1], atol=2e-5)


def test_greedy_batch_equals_the_naive_loop(params: Any, generator: Generator) -> None:
    made = generator.generate(PROMPTS, 10)
    assert len({tuple(m.tokens) for m in made}) == 3
    for prompt, completion in zip(PROMPTS, made, strict=True):
        assert completion.tokens == naive({"params": params}, prompt, 10)
        assert not completion.stopped


def test_stories_token_for_token(shared: Path) -> None:
    from ftjax.policy import open_policy

    folder = shared / "models" / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    policy = open_policy(model=str(folder))
    made = Generator(policy.base.spec, policy.variables, eos_ids=policy.base.eos_ids)
    bos, *rest = reference["greedy_from_bos_ids"]
    prompts = [[bos], [bos, *rest[:40]], [bos, *rest[:7]]]
    out = made.generate(prompts, len(rest))
    for prompt, completion in zip(prompts, out, strict=True):
        wanted = rest[len(prompt) - 1 :]
        assert completion.tokens[: len(wanted)] == wanted


def test_an_update_is_merged(params: Any) -> None:
    _, _, lora = random_adapter(SPEC, {})
    variables = {"params": params, "lora": lora}
    [made] = Generator(SPEC, variables).generate([PROMPTS[0]], 6)
    assert made.tokens == naive(variables, PROMPTS[0], 6)
    assert made.tokens != naive({"params": params}, PROMPTS[0], 6)


def test_stops_at_every_eos(params: Any) -> None:
    plain = Generator(SPEC, {"params": params}).generate(PROMPTS, 10)
    eos = (plain[0].tokens[2], plain[1].tokens[4])
    generator = Generator(SPEC, {"params": params}, eos_ids=eos)
    for free, made in zip(plain, generator.generate(PROMPTS, 10), strict=True):
        hits = [i for i, token in enumerate(free.tokens) if token in eos]
        end = hits[0] + 1 if hits else 10
        assert made.tokens == free.tokens[:end]
        assert made.stopped == bool(hits)
    ignoring = generator.generate(PROMPTS, 10, ignore_eos=True)
    assert [m.tokens for m in ignoring] == [m.tokens for m in plain]
    assert not any(m.stopped for m in ignoring)


def test_stops_at_the_end_of_the_context(generator: Generator) -> None:
    long = [1] * 60
    made = generator.generate([long, [1]], 20)
    assert [len(m.tokens) for m in made] == [4, 20]
    with pytest.raises(UserError, match="longer than the model's context"):
        generator.generate([[1] * 64], 5)
    with pytest.raises(UserError, match="no tokens"):
        generator.generate([[]], 5)


def test_stream_gives_the_same_tokens(generator: Generator) -> None:
    blocks = list(generator.stream(PROMPTS[0], 11, block=4))
    [whole] = generator.generate([PROMPTS[0]], 11)
    assert [token for block in blocks for token in block] == whole.tokens
    assert len(blocks) == 4


def test_near_lengths_do_not_compile_again(generator: Generator) -> None:
    jitted: list[Any] = [loop.start, loop.fill, loop.decode]
    generator.generate([[1, 2, 3]], 10)
    before = [f._cache_size() for f in jitted]
    generator.generate([[4] * 30], 33)
    assert before == [f._cache_size() for f in jitted]


def test_sampling_is_a_function_of_the_seed_and_the_row(generator: Generator) -> None:
    warm = Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=3)
    one = generator.generate(PROMPTS, 12, warm)
    two = generator.generate(PROMPTS, 12, warm)
    assert one == two
    assert one != generator.generate(PROMPTS, 12, Sampling(1.5, 20, 0.95, seed=4))
    same = generator.generate([PROMPTS[0]] * 3, 12, warm)
    assert len({tuple(m.tokens) for m in same}) == 3
    assert same[0].tokens == one[0].tokens


def test_one_candidate_is_greedy(generator: Generator) -> None:
    greedy = generator.generate(PROMPTS, 8)
    assert generator.generate(PROMPTS, 8, Sampling(2.0, top_k=1)) == greedy
    assert generator.generate(PROMPTS, 8, Sampling(2.0, top_p=1e-6)) == greedy


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.8)])
def test_draws_have_the_right_distribution(top_k: int, top_p: float) -> None:
    logits = np.log([0.4, 0.05, 0.25, 0.2, 0.07, 0.03]) * 1.3
    temperature, count = 1.3, 20000
    how = Sampling(temperature, top_k, top_p)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (count, 1))
    zeros = jnp.zeros(count, jnp.int32)
    kind, told = kind_of(how, 6), settings_of(how, 6)
    drawn = np.asarray(draw(kind, told, rows, jnp.arange(count), zeros))
    wanted = np.array([0.4, 0.05, 0.25, 0.2, 0.07, 0.03])
    order = np.argsort(-wanted)
    kept = order[: top_k or 6]
    wanted[order[len(kept) :]] = 0
    wanted /= wanted.sum()
    before = np.cumsum(wanted[order]) - wanted[order]
    wanted[order[before >= top_p]] = 0
    wanted /= wanted.sum()
    found = np.bincount(drawn, minlength=6) / count
    np.testing.assert_allclose(found, wanted, atol=0.015)
    assert (found[wanted == 0] == 0).all()


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="out of range"):
        Sampling(**setting)
