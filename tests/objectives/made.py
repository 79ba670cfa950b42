"""Made-up groups of token sequences, packed into rows, and objectives run on them."""

from functools import cache
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.loader import Loader
from ftjax.data.report import DataReport
from ftjax.losses.sums import Sums
from ftjax.models.decoder import Decoder
from ftjax.step import Objective, mean_loss, sum_micro_batches
from tests.models_small import SPEC, micro, small_lora, small_model

CHUNK = 8
LENGTH = 48  # of a packed row
PAIR = {"pair": 1.0}
KINDS = ("pair", "answer", "text")


def loss_config(name: str, **changes: Any) -> Any:
    """`loss` of configs/NAME.py, with some values changed."""
    config = import_module(f"configs.{name}").get_config("").loss
    config.update({"chunk": CHUNK} | changes)
    return config


def sequence(rng: np.random.Generator, prompt: np.ndarray, size: int) -> Example:
    """A prompt and an answer of `size` random tokens, which alone are trained on."""
    answer = rng.integers(0, SPEC.vocab_size, size)
    ids = np.array([*prompt, *answer], np.int32)
    trained = np.arange(len(ids)) >= max(1, len(prompt))
    return Example(ids, trained, "made")


def groups(kinds: str, seed: int = 0, **numbers: Any) -> Dataset:
    """Groups of random sequences of unequal lengths.

    Args:
      kinds: a letter a group: p a pair, a an answer, t a text.
      seed: of the tokens.
      numbers: of the groups, by name, instead of 1 for each one's own kind.
    """
    rng = np.random.default_rng(seed)
    examples: list[Example] = []
    places: list[tuple[int, ...]] = []
    for kind in kinds:
        prompt = rng.integers(0, SPEC.vocab_size, rng.integers(1, 6))
        prompt = prompt[: 0 if kind == "t" else None]
        sizes = rng.integers(2, 10, 2 if kind == "p" else 1)
        places.append(tuple(range(len(examples), len(examples) + len(sizes))))
        examples += [sequence(rng, prompt, int(size)) for size in sizes]
    own = {name: [float(kind == name[0]) for kind in kinds] for name in KINDS}
    values = {k: np.asarray(v, np.float32) for k, v in (own | numbers).items()}
    return gathered(examples, places, values)


def gathered(
    examples: list[Example], places: list[tuple[int, ...]], values: dict[str, Any]
) -> Dataset:
    report = DataReport("made", "train", LENGTH)
    return Dataset(examples, report, groups=places, values=values, members=2)


def rows(data: Dataset, *, packing: bool = True, ends: bool = False) -> Any:
    """Every group once, in rows of `LENGTH`, their number a multiple of 4."""
    data.ends = ends
    loader = Loader(data, length=LENGTH, packing=packing, seed=0, shuffle=False)
    return next(loader.epoch(-(-loader.rows_per_epoch // 4) * 4))


@cache
def policy() -> tuple[Decoder, Any, Any]:
    """(model, trained, frozen): LoRA away from its start, over the small base."""
    model, params = small_model()
    lora = small_lora(model, live=True)[1]
    lora = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, lora)
    return model, {"lora": lora}, {"params": params}


def measured(
    objective: Objective, trained: Any, frozen: Any, batch: Any, k: int = 1
) -> tuple[float, Sums, Any]:
    """(loss, sums, gradient) of one step of `k` micro-batches."""
    run = runner(objective.loss, tuple(objective.over.items()))
    found = run(trained, frozen, micro(batch, k))
    return float(found[0]), found[1], found[2]


@cache
def runner(loss: Any, over: Any) -> Any:
    """Compiled once for every shape."""
    objective = Objective(loss, dict(over))

    def run(trained: Any, frozen: Any, batch: Any) -> Any:
        totals = objective.totals(batch)
        key = jax.random.key(0)
        sums, grads = sum_micro_batches(objective, totals, trained, frozen, batch, key)
        return mean_loss(sums, totals), sums, grads

    return jax.jit(run)


def assert_near(a: Any, b: Any, *, atol: float) -> None:
    """Every leaf, relative to the largest number of the leaf."""

    def near(x: Any, y: Any) -> None:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(np.abs(y).max(), 1e-3)
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=atol)

    jax.tree.map(near, a, b)


def largest(tree: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
