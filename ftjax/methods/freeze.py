"""Training some of the base's own weights: the last layers, or those that are named.

The trained ones are float32 masters in a part of `params`; the others stay as they are
stored. Of a stack of layers the last ones can be trained: it is parted, and `join` puts
it together again in the step.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from ftjax.errors import UserError
from ftjax.methods.parts import Method, Part, PyTree, Row, master
from ftjax.methods.patterns import each_matches, matches, split_list
from ftjax.models.decoder import Decoder
from ftjax.models.names import Path as LeafPath
from ftjax.models.names import model_weights
from ftjax.models.proj import Path, Site, abstract_params, params_axes, put

Pick = dict[LeafPath, int]  # how many of a leaf's last layers; 0: a leaf without layers


def plan_freeze(model: Decoder, sites: Mapping[Path, Site], config: Any) -> Method:
    """Trains the last `layers` layers, and every weight that matches `pattern`.

    Args:
      model: of any family.
      sites: not used: any weight can be trained.
      config: `layers`, and `pattern`, regexes separated by commas over published names
        without their '.weight' or '.bias', or a dotted end of them: 'lm_head',
        'layers.[67].*', '.*norm'.

    Raises:
      UserError: nothing is trained, a regex matches nothing, or parts a stack
        elsewhere than before its last layers.
    """
    layers, spec = config.layers, model.spec
    if layers > spec.n_layers:
        raise UserError(
            "there are not so many layers",
            where="config.method.layers",
            expected=f"at most {spec.n_layers}",
            got=str(layers),
        )
    pick = pick_weights(model, config.pattern, "config.method.pattern")
    for path, weight in model_weights(spec).items():
        if layers and weight.layers:
            pick[path] = max(layers, pick.get(path, 0))
    if not pick:
        raise UserError(
            "nothing would be trained",
            where="config.method.layers, config.method.pattern",
            expected="layers=N, the last ones, or regexes of weights",
            got=f"layers={layers}, pattern={config.pattern!r}",
            fix="--config.method.layers=2",
        )

    return _with_params(Method("freeze", {}, lambda base, seed: {}), model, pick)


def train_also(method: Method, model: Decoder, pattern: str) -> Method:
    """A method, and beside it weights of the base: embeddings, norms, the head.

    It is what PEFT calls `modules_to_save`, but for weights. A tied head is the
    embedding: it is trained with it, and stays tied.
    """
    if not split_list(pattern):
        return method
    pick = pick_weights(model, pattern, "config.method.also_train")
    return replace(_with_params(method, model, pick), lora=None)


def pick_weights(model: Decoder, pattern: str, key: str) -> Pick:
    """The weights that the regexes of a list match, each of which must."""
    regexes = split_list(pattern)
    weights = model_weights(model.spec)
    names = {path: [_bare(n) for n in w.names] for path, w in weights.items()}
    each_matches(regexes, [n for own in names.values() for n in own], key)
    pick: Pick = {}
    for path, own in names.items():
        hit = [any(matches(r, name) for r in regexes) for name in own]
        if not any(hit):
            continue
        first = hit.index(True)
        if not all(hit[first:]):
            raise UserError(
                "the trained layers of a stack must be its last ones",
                where=key,
                expected=f"layers {first} to {len(hit) - 1} of {path[-2]}, or fewer",
                got="layers " + ", ".join(str(i) for i, h in enumerate(hit) if h),
            )
        pick[path] = len(hit) - first if weights[path].layers else 0
    return pick


def _bare(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _with_params(method: Method, model: Decoder, pick: Pick) -> Method:
    """The method with a part of `params` that is trained too."""
    shapes, axes = abstract_params(model), params_axes(model)
    part = Part({}, {})
    rows = []
    for path, layers in pick.items():
        whole = _get(shapes, path)
        shape = (layers, *whole.shape[1:]) if layers else whole.shape
        put(part.shapes, path, jax.ShapeDtypeStruct(shape, "float32"))
        put(part.axes, path, _get(axes, path))
        size = " x ".join(map(str, shape[1:] if layers else shape))
        count = math.prod(shape)
        share = 100 * count / whole.size
        rows.append(Row(_label(path), size, "", layers, count, share))

    def init(base: PyTree, seed: int) -> PyTree:
        chosen: dict[str, Any] = {}
        for path, layers in pick.items():
            leaf = _get(base["params"], path)
            put(chosen, path, master(leaf[-layers:] if layers else leaf))
        return {**method.init(base, seed), "params": chosen}

    def rest(base: PyTree) -> PyTree:
        left = method.rest(base)["params"]
        for path, layers in pick.items():
            leaf = _get(left, path)
            kept = leaf[:-layers] if 0 < layers < leaf.shape[0] else None
            left = _replaced(left, path, kept)
        return {**method.rest(base), "params": left}

    parts = {**method.parts, "params": part}
    rows = [*method.rows, *rows]
    changed = replace(method, parts=parts, init=init, rest=rest, rows=rows)
    return replace(changed, frozen_is_base=False)


def _label(path: LeafPath) -> str:
    return path[-2] if path[-1] in ("w", "scale", "embedding") else ".".join(path[-2:])


def _replaced(tree: Any, path: LeafPath, leaf: Any) -> Any:
    """The tree with another leaf at `path`; without it, if that is None."""
    head, *rest = path
    if not rest:
        others = {key: value for key, value in tree.items() if key != head}
        return others if leaf is None else {**others, head: leaf}
    inner = _replaced(tree[head], tuple(rest), leaf)
    others = {key: value for key, value in tree.items() if key != head}
    return {**others, head: inner} if inner else others


def _get(tree: Any, path: LeafPath) -> Any:
    for name in path:
        tree = tree[name]
    return tree
