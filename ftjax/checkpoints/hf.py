"""Hugging Face checkpoints in and out: safetensors to a tree of arrays, and back.

    folder = find_model("base")
    config = read_config(folder)
    weights = open_weights(folder, spec_from_config(config, ...))   # checks everything
    params = load_params(weights, dtype="bfloat16", put=put)        # then reads

One leaf is in host memory at a time: it is filled from its tensors in the wanted
dtype, put on its devices, and let go.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from ftjax.checkpoints.files import find_tensors, listed
from ftjax.checkpoints.fill import fill
from ftjax.checkpoints.heads import split_head, without_logits
from ftjax.checkpoints.hf_save import DTYPES, save_params
from ftjax.checkpoints.hub import find_model
from ftjax.checkpoints.jsonfile import inside, read_json
from ftjax.checkpoints.packed import Packed, weight_of
from ftjax.checkpoints.quantized import find_packed
from ftjax.checkpoints.sums import check_sums
from ftjax.checkpoints.tensors import FLOATS, Tensor
from ftjax.errors import UserError
from ftjax.methods.residual import Change
from ftjax.models.config_reader import say
from ftjax.models.names import Path as LeafPath
from ftjax.models.names import Weight, model_weights
from ftjax.models.proj import put as set_leaf
from ftjax.models.spec import ModelSpec
from ftjax.quant.formats import Format
from ftjax.quant.qtensor import QTensor, abstract, pack, quantize

__all__ = [
    "Weights",
    "find_model",
    "load_params",
    "open_weights",
    "read_config",
    "save_params",
]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IGNORABLE = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_scale(_inv)?|SCB|absmax|quant_map|"
    r"weight_packed|weight_blocks|bitsandbytes__\w+)$|\.quant_state\."
)
Note = Callable[[str], None]
Put = Callable[[LeafPath, Any], Any]


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder, as a dict.

    Raises:
      UserError: if it is missing, leads out of the folder, or is not a JSON object.
    """
    return read_json(inside(folder, "config.json", named_by=str(folder)))


@dataclass(frozen=True)
class Weights:
    """The weights of a model folder, all found and all of the right shape.

    Attributes:
      folder: where they are.
      spec: the model; untied where the folder has an output head of its own although
        the configuration says that it is the embedding.
      tensors: by published name, exactly those that `spec` needs, and those beside
        the weights that are stored quantized.
      dtype: in which most floats are stored, as the format names it ('BF16').
      packed: the weights that are stored quantized, by name.
      formats: theirs, by the path of the projection.
      head: of a reward model; the spec is then that of a model without logits.
      unread: tensors that are there, and that nothing asks for.
    """

    folder: Path
    spec: ModelSpec
    tensors: dict[str, Tensor]
    dtype: str
    packed: dict[str, Packed] = field(default_factory=dict)
    formats: dict[LeafPath, Format] = field(default_factory=dict)
    head: Tensor | None = None
    unread: dict[str, Tensor] = field(default_factory=dict)

    def without_logits(self) -> "Weights":
        """The same without an output head of its own, which is left unread."""
        if self.spec.tied:
            return self
        unread = {n: t for n, t in self.tensors.items() if HEAD in (n, weight_of(n))}
        spec = without_logits(self.spec)
        paths = model_weights(spec)
        return replace(
            self,
            spec=spec,
            tensors={n: t for n, t in self.tensors.items() if n not in unread},
            packed={n: packed for n, packed in self.packed.items() if n != HEAD},
            formats={p: f for p, f in self.formats.items() if (*p, "w") in paths},
            unread=unread,
        )


def open_weights(
    folder: Path,
    spec: ModelSpec,
    *,
    quantization: dict[str, Any] | None = None,
    reward: bool = False,
    note: Note = say,
) -> Weights:
    """Checks every file and tensor of a checkpoint against `spec`; reads headers only.

    (A tied model that also stores its head is the exception: the two are compared.)

    Args:
      quantization: the `quantization_config` of config.json, if it has one.
      reward: it is a reward model: it has a head of its own, and no other.
      note: told what is worth knowing about the files.

    Raises:
      UserError: for damaged or missing files, and tensors that are missing, left over,
        of another shape, or not floating point.
    """
    tensors = find_tensors(folder, note)
    tensors = {n: t for n, t in tensors.items() if not IGNORABLE.search(n)}
    head = None
    if reward:
        spec = without_logits(spec)
        tensors, head = split_head(folder, spec, tensors)
    spec, tensors = _settle_head(folder, spec, tensors, note)
    weights = model_weights(spec)
    packed, formats = find_packed(folder, weights, tensors, quantization, note)
    wanted = {name: weight for weight in weights.values() for name in weight.names}
    floats = {n: t for n, t in tensors.items() if not _is_part(n, packed)}
    _check_names(folder, {n: w for n, w in wanted.items() if n not in packed}, floats)
    _check_floats(floats, wanted)
    sizes: Counter[str] = Counter()
    for tensor in floats.values():
        sizes[tensor.dtype] += tensor.nbytes
    stored = sizes.most_common(1)[0][0]
    return Weights(folder, spec, tensors, stored, packed, formats, head)


def _check_floats(floats: Mapping[str, Tensor], wanted: Mapping[str, Weight]) -> None:
    """Every tensor that is not quantized holds floats, in its published shape."""
    for name, tensor in floats.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                "a weight is not a plain floating-point tensor",
                where=f"{tensor.file}: {name}",
                expected=", ".join(FLOATS),
                got=f"{tensor.dtype} (a quantized checkpoint, perhaps)",
                fix="use the checkpoint before its quantization",
            )
        if tensor.shape != wanted[name].stored_shape:
            raise UserError(
                "a weight has another shape than config.json says",
                where=f"{tensor.file}: {name}",
                expected=str(wanted[name].stored_shape),
                got=str(tensor.shape),
                fix="use the config.json that was published with these weights",
            )


def _is_part(name: str, packed: Mapping[str, Packed]) -> bool:
    """Whether a tensor is, or lies beside, a weight that is stored quantized."""
    return name in packed or weight_of(name) in packed


def _settle_head(
    folder: Path, spec: ModelSpec, tensors: dict[str, Tensor], note: Note
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Decides what the output head of a tied model is; transformers' rule."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if not spec.tied or head is None:
        return spec, tensors
    rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    if embedding is None:
        note(f"{folder}: {HEAD} is read as the embedding too: they are tied")
        return spec, rest | {EMBEDDING: head}
    if head.shape != embedding.shape or not _equal(head, embedding):
        note(
            f"{folder}: tie_word_embeddings is true, but {HEAD} is stored and differs"
            f" from {EMBEDDING}: the stored head is used, as transformers does"
        )
        return replace(spec, tied=False), tensors
    return spec, rest


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        return False
    left, right = a.read(), b.read()
    blocks = range(0, left.shape[0], 4096)
    return all(np.array_equal(left[i : i + 4096], right[i : i + 4096]) for i in blocks)


def _check_names(
    folder: Path, wanted: dict[str, Weight], tensors: dict[str, Tensor]
) -> None:
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    packed = [name for name in extra if _PACKED.search(name)]
    if packed:
        raise UserError(
            "the checkpoint is quantized in a way that ftjax does not read",
            where=folder,
            expected="float weights, or those of bitsandbytes or ftjax with their"
            " quantization_config in config.json",
            got=listed(packed, 3),
            fix="use the checkpoint before its quantization",
        )
    if missing == [HEAD] and not extra:
        raise UserError(
            "the output head is missing",
            where=f"{folder}: {HEAD}",
            expected=f"{HEAD}, as tie_word_embeddings is false in config.json",
            got="no such tensor",
            fix="if the head is the embedding, set tie_word_embeddings to true",
        )
    if missing:
        bare = {f"model.{name}" for name in extra} & set(missing)
        raise UserError(
            f"{len(missing)} of {len(wanted)} tensors are missing",
            where=folder,
            expected="every tensor that config.json implies; none is made up",
            got="missing: " + listed(missing),
            fix="the names lack 'model.': save the model with its language-model head"
            if bare
            else "download the checkpoint again, or use its own config.json",
        )
    if extra:
        raise UserError(
            f"there are {len(extra)} tensors that this model has no place for",
            where=folder,
            expected=f"the {len(wanted)} tensors that config.json implies",
            got="left over: " + listed(extra),
            fix="use the config.json that was published with these weights",
        )


def load_params(
    weights: Weights,
    *,
    dtype: str,
    dtypes: Mapping[LeafPath, str] | None = None,
    put: Put | None = None,
    formats: Mapping[LeafPath, Format] | None = None,
    changes: Mapping[LeafPath, Change] | None = None,
    note: Note = say,
) -> dict[str, Any]:
    """Reads the weights into the tree of `Decoder`, leaf by leaf.

    Args:
      weights: from `open_weights`; its `spec` describes the tree that comes back.
      dtype: 'float32' or 'bfloat16'.
      dtypes: of single leaves, by path, instead.
      put: (path, host array of that dtype) -> array on its devices; `jax.device_put`
        where it is None. The host array is not used again.
      formats: of the projections, by path, that are quantized while they are read:
        one tensor is in memory as floats at a time. Their leaves are `QTensor`s, as
        are those of what is stored quantized.
      changes: of projections, by path: what to keep, or quantize, in place of a weight;
        one is in memory as floats at a time here too.
      note: told when weights lose precision, and of matrices that are all zero.

    Raises:
      UserError: a file has changed, or at the first NaN or infinity.
    """
    _require_dtype(dtype)
    plan = {**(formats or {}), **weights.formats}
    own = dtypes or {}
    tell_policy(weights, dtype, plan, note, own)
    check_sums(weights.folder, (tensor.file for tensor in weights.tensors.values()))
    tree: dict[str, Any] = {}
    for path, weight in model_weights(weights.spec).items():
        site = path[:-1] if path[-1] == "w" else ()
        fmt, change = plan.get(site), (changes or {}).get(site)
        host: Any
        if fmt is None:
            host = _floats(weights, weight, DTYPES[own.get(path, dtype)], change, note)
        else:
            host = _codes(weights, weight, fmt, change, note)
        leaf = jax.device_put(host) if put is None else put(path, host)
        # Transfers run behind our back: wait, or the host copies pile up.
        jax.block_until_ready(leaf)
        del host
        set_leaf(tree, path, leaf)
    return tree


def _require_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(
            "weights cannot be kept in this dtype",
            where="config.model.param_dtype",
            expected=" or ".join(DTYPES),
            got=repr(dtype),
        )


def _floats(
    weights: Weights,
    weight: Weight,
    dtype: np.dtype[Any],
    change: Change | None,
    note: Note,
) -> np.ndarray:
    """A leaf, as floats."""
    host = np.empty(weight.leaf_shape, dtype)
    rows = host if weight.layers else host[None]
    for i, (row, name) in enumerate(zip(rows, weight.names, strict=True)):
        if change is None:
            fill(row, weight, weights.tensors[name], name, note)
        else:
            matrix_OI = change(i, read_matrix(weights, weight, i, note))
            row[...] = matrix_OI.T.reshape(row.shape)
    return host


def _codes(
    weights: Weights, weight: Weight, fmt: Format, change: Change | None, note: Note
) -> QTensor:
    """A leaf, layer by layer: quantized now, or read as it is stored."""
    inputs, outputs = weight.shape[: weight.inputs], weight.shape[weight.inputs :]
    stack = (weight.layers,) if weight.layers else ()
    shapes = abstract(inputs, outputs, fmt, stack)
    host = jax.tree.map(lambda s: np.empty(s.shape, s.dtype), shapes)
    for i, name in enumerate(weight.names):
        if name in weights.packed:
            layer = pack(weights.packed[name].read(), inputs, outputs, fmt)
        else:
            matrix_OI = read_matrix(weights, weight, i, note)
            matrix_OI = matrix_OI if change is None else change(i, matrix_OI)
            layer = quantize(matrix_OI, inputs, outputs, fmt)

        def keep(all_layers: np.ndarray, one: np.ndarray, i: int = i) -> None:
            all_layers[i if weight.layers else ...] = one

        jax.tree.map(keep, host, layer)
    return host


def read_matrix(weights: Weights, weight: Weight, i: int, note: Note) -> np.ndarray:
    """The matrix [outputs, inputs] of layer `i`, float32, every value looked at."""
    return read_plain(weights, weight, i, "float32", note)


def read_plain(
    weights: Weights, weight: Weight, i: int, dtype: str, note: Note
) -> np.ndarray:
    """A tensor as published, in a dtype of `DTYPES`, every value looked at."""
    stored = np.empty(weight.stored_shape, DTYPES[dtype])
    name = weight.names[i]
    row = stored.T if weight.inputs else stored
    fill(row, weight, weights.tensors[name], name, note)
    return stored


def tell_policy(
    weights: Weights,
    dtype: str,
    plan: Mapping[LeafPath, Format],
    note: Note,
    own: Mapping[LeafPath, str] = MappingProxyType({}),
) -> None:
    """One line for each stored dtype that the wanted one cannot hold exactly.

    Of what stays floating point; codes are made from float32.
    """
    exact = {"float32": ("F32", "BF16", "F16"), "bfloat16": ("BF16",)}
    stored = Counter(
        (weights.tensors[name].dtype, own.get(path, dtype))
        for path, weight in model_weights(weights.spec).items()
        if path[-1] != "w" or path[:-1] not in plan
        for name in weight.names
    )
    for (name, wanted), count in stored.items():
        if name not in exact[wanted]:
            note(f"{weights.folder}: {count} {name} tensors are rounded to {wanted}")
