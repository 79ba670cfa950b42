"""Which weights of a model folder are stored quantized, and what config.json says.

`quantization_config` names a method: 'bitsandbytes' (nf4, fp4, int8 per channel), or
'ftjax' (those, and int4 and int8 in groups or with a zero point), which lists a format
for each projection. Every layer of a stack must have the same format.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftjax.checkpoints.packed import Packed, group_parts, open_packed
from ftjax.checkpoints.tensors import FLOATS, Tensor
from ftjax.errors import UserError
from ftjax.models.names import Path as LeafPath
from ftjax.models.names import Weight
from ftjax.models.registry import quant_method
from ftjax.quant.formats import Format, make_format

KEY = "quantization_config"
Formats = dict[LeafPath, Format]


def find_packed(
    folder: Path,
    weights: Mapping[LeafPath, Weight],
    tensors: Mapping[str, Tensor],
    config: dict[str, Any] | None,
    note: Callable[[str], None],
) -> tuple[dict[str, Packed], Formats]:
    """(quantized weights by name, formats by the path of their projection).

    Args:
      folder: of the model; for messages.
      weights: every weight of the model.
      tensors: of the checkpoint, by name.
      config: the `quantization_config`; None or empty finds nothing.
      note: told what is computed in another way than the method's own library does.

    Raises:
      UserError: for whatever does not agree with the shapes or with `config`.
    """
    if not config:
        return {}, {}
    where = f"{folder}/config.json: {KEY}"
    method = quant_method(config)
    declared = _declared(config, where) if method == "ftjax" else {}
    parts = group_parts(tensors)
    found: dict[str, Packed] = {}
    formats: Formats = {}
    for path, weight in weights.items():
        for name in weight.names:
            if name not in parts or name not in tensors:
                continue
            _require_matrix(weight, name, tensors[name])
            rows, columns = weight.stored_shape[0], weight.stored_shape[-1]
            found[name] = open_packed(
                name,
                (rows, columns),
                tensors[name],
                parts[name],
                declared.get(path[:-1]),
            )
        own = [found[name].format if name in found else None for name in weight.names]
        if any(fmt != own[0] for fmt in own):
            raise _mixed(folder, weight, own)
        if own[0] is not None:
            formats[path[:-1]] = own[0]
    _agree(formats, declared, config, method, where)
    if any(fmt == Format("int8", 0) for fmt in formats.values()):
        _tell_int8(folder, config, note)
    return found, formats


def _require_matrix(weight: Weight, name: str, tensor: Tensor) -> None:
    if not weight.inputs:
        raise UserError(
            "only projections are read quantized, no embeddings and no norms",
            where=f"{tensor.file}: {name}",
            expected=", ".join(FLOATS),
            got=f"{tensor.dtype} with scales",
            fix="quantize the original anew, without this module",
        )


def _mixed(folder: Path, weight: Weight, own: list[Format | None]) -> UserError:
    kinds = {str(fmt or "floats"): i for i, fmt in reversed(list(enumerate(own)))}
    return UserError(
        "the layers of a projection are stored in different ways",
        where=f"{folder}: {weight.template}",
        expected="one format for all layers, which are one stack here",
        got="; ".join(f"layer {i}: {kind}" for kind, i in kinds.items()),
        fix="quantize the original anew: python -m ftjax.quantize --model=DIR",
    )


def _agree(
    formats: Formats,
    declared: Formats,
    config: dict[str, Any],
    method: str | None,
    where: str,
) -> None:
    """What config.json promises must be there."""
    names = {fmt.name for fmt in formats.values()}
    if method == "ftjax":
        lost = [".".join(path) for path in declared if path not in formats]
        extra = [".".join(path) for path in formats if path not in declared]
        good, wanted = not lost and not extra, "each of its formats in the weights"
        got = f"floats: {', '.join(lost)}; not listed: {', '.join(extra)}"
    else:
        four = bool(config.get("load_in_4bit") or config.get("_load_in_4bit"))
        kind = config.get("bnb_4bit_quant_type", "fp4") if four else "int8"
        good, wanted = list(names) == [kind], f"{kind} weights"
        got = ", ".join(sorted(names)) or "floats only"
    if not good:
        raise UserError(
            "the weights are not quantized as config.json says",
            where=where,
            expected=wanted,
            got=got,
            fix=f"remove {KEY} if the weights are plain floats"
            if not formats
            else "use the config.json that was published with these weights",
        )
    if config.get("llm_int8_has_fp16_weight"):
        raise UserError(
            "8-bit weights with float16 copies are not read",
            where=f"{where}.llm_int8_has_fp16_weight",
            expected="false",
            got="true",
        )


def _tell_int8(
    folder: Path, config: dict[str, Any], note: Callable[[str], None]
) -> None:
    threshold = config.get("llm_int8_threshold")
    if quant_method(config) == "bitsandbytes" and threshold is not None:
        note(
            f"{folder}: 8-bit weights are multiplied dequantized; bitsandbytes also"
            f" rounds activations to 8 bits, but for outliers (llm_int8_threshold"
            f" {threshold}): its logits differ a little"
        )


def _declared(config: dict[str, Any], where: str) -> Formats:
    """The formats that a `quantization_config` of our own lists."""
    listed = config.get("formats")
    if not isinstance(listed, dict) or not listed:
        raise _bad_entry(f"{where}.formats", "{projection: {name, group, ...}}", listed)
    found: Formats = {}
    for module, entry in listed.items():
        at = f"{where}.formats.{module[:100]}"
        if not isinstance(entry, dict):
            raise _bad_entry(at, "{name, group, scheme, double_quant}", entry)
        name, group = entry.get("name"), entry.get("group")
        scheme, double = entry.get("scheme"), entry.get("double_quant")
        whole = isinstance(group, int) and not isinstance(group, bool) and group >= 0
        if not isinstance(name, str) or not whole or not isinstance(double, bool):
            raise _bad_entry(at, "{name, group, scheme, double_quant}", entry)
        found[tuple(module.split("."))] = make_format(
            name,
            group=int(group or 0),
            scheme=str(scheme),
            double=double,
            prefix=f"{at}.",
        )
    return found


def _bad_entry(where: str, expected: str, got: Any) -> UserError:
    return UserError(
        "a quantization_config is not as ftjax writes it",
        where=where,
        expected=expected,
        got=repr(got)[:200],
        fix="use the config.json that was written with these weights",
    )


def describe_formats(formats: Mapping[LeafPath, Format]) -> dict[str, Any]:
    """What `_declared` reads again."""
    return {
        ".".join(path): {
            "name": fmt.name,
            "group": fmt.group,
            "scheme": "affine" if fmt.affine else "symmetric",
            "double_quant": fmt.double,
        }
        for path, fmt in formats.items()
    }
