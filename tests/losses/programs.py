"""What a traced program makes, for tests of what must never exist."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


def sizes(jaxpr: Jaxpr) -> Iterator[tuple[int, str]]:
    """(elements, primitive) of everything that a program makes, however deep."""
    for eqn in jaxpr.eqns:
        for out in eqn.outvars:
            yield int(np.prod(getattr(out.aval, "shape", ()))), str(eqn.primitive)
        for param in jax.tree.leaves(eqn.params, is_leaf=_is_program):
            if isinstance(param, ClosedJaxpr):
                yield from sizes(param.jaxpr)
            elif isinstance(param, Jaxpr):
                yield from sizes(param)


def _is_program(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)
