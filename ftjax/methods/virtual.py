"""Virtual tokens: prompt tuning (2104.08691) and prefix tuning (2101.00190).

A prompt is n vectors in place of embeddings. A prefix is n keys and values in each
layer; as in PEFT they are trained themselves, without an MLP that makes them, and the
keys are not rotated. Either stands before every document, also of a packed row, where
each sees it and none sees another; a document's positions begin at n.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ftjax.errors import UserError
from ftjax.methods.parts import Method, Part, PyTree, Row
from ftjax.methods.streams import stream
from ftjax.models.decoder import Decoder
from ftjax.models.names import count_params
from ftjax.models.proj import Path, Site


def plan_prompt(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    """A prompt that begins as the embeddings of random tokens; see `begin_with`.

    Args:
      model: of any family.
      sites: not used: virtual tokens stand before the row.
      config: `tokens`, how many.

    Raises:
      UserError: they leave no room in the model's context.
    """
    _require_room(model, config.tokens)
    vocab, n = model.spec.vocab_size, config.tokens

    def init(base: PyTree, seed: int) -> PyTree:
        return _embedded(base, stream(seed, "prompt").integers(0, vocab, n).tolist())

    shape = (n, model.spec.d_model)
    part = Part({"tokens": _float(shape)}, {"tokens": (None, "embed")})
    rows = _rows(model, "prompt", 0, shape)
    return Method("prompt", {"prompt": part}, init, rows=rows)


def begin_with(method: Method, ids: Sequence[int]) -> Method:
    """The prompt that begins as a text: cut off, or repeated, as in PEFT."""
    if not ids:
        raise UserError("the text has no tokens", where="config.method.text")
    n = method.parts["prompt"].shapes["tokens"].shape[0]
    chosen = [ids[i % len(ids)] for i in range(n)]

    def init(base: PyTree, seed: int) -> PyTree:
        return {**method.init(base, seed), **_embedded(base, chosen)}

    return replace(method, init=init)


def _embedded(base: PyTree, ids: list[int]) -> PyTree:
    table_VD = base["params"]["embed_tokens"]["embedding"]
    rows_nD = jnp.take(table_VD, jnp.asarray(ids, jnp.int32), axis=0)
    return {"prompt": {"tokens": rows_nD.astype(jnp.float32)}}


def plan_prefix(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    """A prefix that begins as N(0, std^2).

    Args:
      model: of any family.
      sites: not used: a prefix stands before the row.
      config: `tokens`, how many keys and values a layer has; `std`.

    Raises:
      UserError: they leave no room in the model's context.
    """
    _require_room(model, config.tokens)
    s = model.spec
    shape = (s.n_layers, config.tokens, s.n_kv_heads, s.head_dim)

    def init(base: PyTree, seed: int) -> PyTree:
        tree = {
            name: jnp.asarray(
                stream(seed, f"prefix.{name}").normal(0, config.std, shape),
                jnp.float32,
            )
            for name in "kv"
        }
        return {"prefix": tree}

    axes = (None, None, "kv_heads", "head")
    part = Part(dict.fromkeys("kv", _float(shape)), dict.fromkeys("kv", axes))
    rows = _rows(model, "keys", s.n_layers, shape)
    rows += _rows(model, "values", s.n_layers, shape)
    return Method("prefix", {"prefix": part}, init, rows=rows)


def virtual_count(method: Method) -> int:
    """How many positions of the model's context a method takes for itself."""
    if "prompt" in method.parts:
        return method.parts["prompt"].shapes["tokens"].shape[0]
    return (
        method.parts["prefix"].shapes["k"].shape[1] if "prefix" in method.parts else 0
    )


def _float(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, "float32")


def _rows(model: Decoder, label: str, layers: int, shape: tuple[int, ...]) -> list[Row]:
    count = math.prod(shape)
    inner = " x ".join(map(str, shape[1:] if layers else shape))
    share = 100 * count / count_params(model.spec)
    return [Row(label, inner, "", layers, count, share)]


def _require_room(model: Decoder, n: int) -> None:
    most = model.spec.max_positions - 2
    if n > most:
        raise UserError(
            "the virtual tokens fill the model's context",
            where="config.method.tokens",
            expected=f"at most {most}, so that a row fits behind them",
            got=str(n),
        )
