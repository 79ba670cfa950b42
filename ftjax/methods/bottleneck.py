"""Adapters: small new hidden layers in the blocks (arXiv 1902.00751, 2005.00247)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.methods.parts import Method, Part, PyTree, Row
from ftjax.methods.streams import stream
from ftjax.models.decoder import ADAPTERS, Decoder
from ftjax.models.names import count_params
from ftjax.models.proj import Path, Site
from ftjax.weights import Hidden

PLACES = {"houlsby": ADAPTERS, "pfeiffer": ADAPTERS[1:]}


def plan_bottleneck(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    """y + up(activation(down(y))) on the output y of a block's parts.

    `kind` houlsby has one after the attention and one after the MLP, pfeiffer only the
    second. `up` is zero at the start, so that the model begins as its base.

    Args:
      model: of any family.
      sites: not used: an adapter stands beside no projection.
      config: `kind`, `size` of the hidden layer, `activation`.
    """
    spec, size = model.spec, config.size
    layers, width = spec.n_layers, spec.d_model
    shape = (layers, width, size)

    def init(base: PyTree, seed: int) -> PyTree:
        return {"adapters": _init(config, shape, seed)}

    sizes = {
        "down": shape,
        "down_bias": (layers, size),
        "up": (layers, size, width),
        "up_bias": (layers, width),
    }
    leaves: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in sizes.items()
    }
    shapes = Hidden(**leaves, activation=config.activation)
    axes = Hidden(
        (None, "embed", None),  # type: ignore[arg-type]
        (None, None),  # type: ignore[arg-type]
        (None, None, "embed"),  # type: ignore[arg-type]
        (None, "embed"),  # type: ignore[arg-type]
        config.activation,
    )
    places = PLACES[config.kind]
    part = Part(*({"layers": {n: {"w": x} for n in places}} for x in (shapes, axes)))
    count = layers * (2 * width * size + width + size)
    share = 100 * count / count_params(spec)
    size_text = f"{width} x {size} x {width}"
    rows = [Row(name, size_text, "", layers, count, share) for name in places]
    return Method("bottleneck", {"adapters": part}, init, rows=rows)


def _init(config: Any, shape: tuple[int, int, int], seed: int) -> PyTree:
    """`down` is U(-1/sqrt(D), 1/sqrt(D)), a stream for each layer; the rest is zero."""
    layers, width, size = shape
    tree = {}
    for name in PLACES[config.kind]:
        down = np.stack(
            [
                stream(seed, f"layers.{i}.{name}").uniform(-1, 1, (width, size))
                for i in range(layers)
            ]
        )
        hidden = Hidden(
            jnp.asarray(down / np.sqrt(width), jnp.float32),
            jnp.zeros((layers, size), jnp.float32),
            jnp.zeros((layers, size, width), jnp.float32),
            jnp.zeros((layers, width), jnp.float32),
            config.activation,
        )
        tree[name] = {"w": hidden}
    return {"layers": tree}
