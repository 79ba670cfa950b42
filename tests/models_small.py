"""A small model and batches for tests of the step, in process."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.methods.lora import LoraPlan, init_lora, plan_lora
from ftjax.methods.method import plan_method
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites, init_params
from ftjax.models.spec import ModelSpec
from ftjax.objectives.causal import causal

SPEC = ModelSpec("llama", 96, 32, 2, 4, 2, 8, 48, tied=True)


def lora_config(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "targets": "all-linear",
        "rank": 4,
        "alpha": 8.0,
        "rank_pattern": "",
        "alpha_pattern": "",
        "use_rslora": False,
        "use_dora": False,
        "dropout": 0.0,
    }
    return SimpleNamespace(**(values | changes))


def optim_config(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "name": "adamw",
        "lr": 1e-2,
        "b_lr_ratio": 1.0,
        "schedule": "constant",
        "warmup": 0,
        "decay": 0.2,
        "final": 0.1,
        "b1": -1.0,
        "b2": -1.0,
        "eps": -1.0,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    return SimpleNamespace(**(values | changes))


@cache
def small_params() -> Any:
    with jax.enable_x64(False):  # whoever asks first: they are kept
        return jax.jit(partial(init_params, Decoder(SPEC)))(jax.random.key(0))


def small_model(**changes: Any) -> tuple[Decoder, Any]:
    return Decoder(SPEC, **changes), small_params()


def small_lora(model: Decoder, *, live: bool = False, **changes: Any) -> Any:
    """(plan, tree); `live` makes `b` non-zero, so that the update acts."""
    plan: LoraPlan = plan_lora(find_sites(model), lora_config(**changes))
    tree = init_lora(plan, 0)
    if live:
        tree = jax.tree.map(moved, tree)
    return plan, tree


def split(method: str, base: Any, lora: Any) -> tuple[Any, Any]:
    """(trained, frozen) of a base and an update that the test has made."""
    if method == "lora":
        return {"lora": lora}, base
    spec = replace(SPEC, tied="lm_head" not in base["params"])
    return plan_method(Decoder(spec), SimpleNamespace(name=method)).start(base, 0)


def moved(leaf: Any) -> Any:
    """A matrix, away from where it was; a scale as it is."""
    if leaf.ndim < 2:
        return leaf
    wave = np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
    return jnp.asarray(np.asarray(leaf) + np.float32(0.02) * wave)


def small_batch(
    rows: int = 8, length: int = 24, seed: int = 0
) -> dict[str, np.ndarray]:
    """Packed rows of two documents, prompts of unequal lengths, some padding."""
    rng = np.random.default_rng(seed)
    batch = {
        name: np.zeros((rows, length), np.int32)
        for name in ("tokens", "targets", "positions", "segments")
    }
    batch["weights"] = np.zeros((rows, length), np.float32)
    for row in range(rows):
        start = 0
        for segment in (1, 2):
            n = int(rng.integers(4, length // 2))
            ids = rng.integers(0, SPEC.vocab_size, n + 1)
            span = slice(start, start + n)
            batch["tokens"][row, span], batch["targets"][row, span] = ids[:-1], ids[1:]
            batch["positions"][row, span] = np.arange(n)
            batch["segments"][row, span] = segment
            batch["weights"][row, start + int(rng.integers(0, n)) : start + n] = 1
            start += n
    return batch


def micro(batch: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """The batch as `k` micro-batches."""
    return {n: x.reshape(k, -1, *x.shape[1:]) for n, x in batch.items()}


def nll(model: Decoder, variables: Any, batch: Any, key: Any = None) -> Any:
    """The summed negative log-likelihood of the trained tokens."""
    return causal(model, 8).loss(variables, {}, batch, key).terms["nll"]
