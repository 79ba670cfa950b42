"""Reads PEFT's `adapter_config.json`: computed as it says, or refused by name."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ftjax.checkpoints.jsonfile import inside, read_json
from ftjax.errors import UserError

CONFIG = "adapter_config.json"
LARGEST = 1e30  # of a number; what is larger is soon infinite in 32 bits

# Keys that change what an adapter computes -> the values that mean 'off'.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "kasa_config": (),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "monteclora_config": (),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_bdlora": (False,),
    "use_qalora": (False,),
    "velora_config": (),
}
# Starts that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) change it.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "true", "True")


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        raise UserError(
            "this is not the folder of an adapter",
            where=folder,
            expected=f"{CONFIG} and adapter_model.safetensors",
            got="no such folder" if not folder.is_dir() else f"no {CONFIG}",
            fix="pass the folder that PEFT's save_pretrained or ftjax.export wrote",
        )
    where = folder / CONFIG
    config = read_json(inside(folder, CONFIG, named_by=str(folder)))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise refuse(where, "peft_type", kind, "LORA")
    for key, off in UNSUPPORTED.items():
        value = config.get(key)
        if value is not None and value not in off:
            raise refuse(where, key, value, " or ".join(map(repr, (None, *off))))
    start = config.get("init_lora_weights", True)
    if start is not None and start not in PLAIN_STARTS:
        raise UserError(
            "this adapter changed its base when it was initialised",
            where=f"{where}: init_lora_weights",
            expected="true, 'gaussian' or another start that leaves the base alone",
            got=repr(start),
            fix="convert it with PEFT first (save_pretrained with "
            "path_initial_model_for_weight_conversion)",
        )
    defaults: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for key, usual in defaults.items():
        value = config.get(key)
        value = usual if value is None else value
        number = isinstance(usual, (int, float)) and not isinstance(usual, bool)
        good = (
            isinstance(value, (int, float)) and not isinstance(value, bool)
            if number
            else isinstance(value, type(usual))
        )
        if not good or not _in_range(key, value):
            raise refuse(where, key, value, f"such as {usual!r}")
        config[key] = value
    return config


def _in_range(key: str, value: Any) -> bool:
    if key == "lora_dropout":
        return 0 <= value < 1
    return key not in ("r", "lora_alpha") or 0 < value <= LARGEST


def refuse(where: Path, key: str, value: Any, expected: str) -> UserError:
    return UserError(
        "this kind of adapter is not supported",
        where=f"{where}: {key}",
        expected=expected,
        got=repr(value)[:200],
        fix="merge it into its base with PEFT and pass the merged model",
    )


def targeted(targets: Any, name: str, where: Path) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return _matches(targets, name, where)
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise refuse(where, "module names", targets, "a regex, or a list of names")
    return any(name == t or name.endswith(f".{t}") for t in targets)


def saves(config: Mapping[str, Any], name: str) -> bool:
    """Whether a module's weights are saved whole, so that it has no update."""
    parts = name.split(".")
    inside_of = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    modules = config.get("modules_to_save") or []
    return any(at == m or at.endswith(f".{m}") for at in inside_of for m in modules)


def check_targets(
    config: Mapping[str, Any],
    pairs: Mapping[str, Any],
    layers: Collection[str],
    where: Path,
) -> None:
    """What the configuration targets must be what the tensors are for, as in PEFT."""
    targets = config.get("target_modules")
    if not isinstance(targets, str | list):
        raise refuse(where, "target_modules", targets, "a list of module names")
    for target in [] if isinstance(targets, str) else targets:
        if not any(targeted([target], name, where) for name in layers):
            raise refuse(where, "target_modules", target, "projections in the layers")
    kept = config.get("layers_to_transform")
    kept = [kept] if isinstance(kept, int) else kept
    if not isinstance(kept or [], list):
        raise refuse(where, "layers_to_transform", kept, "a list of layers")
    wanted = {
        name
        for name in layers
        if targeted(targets, name, where)
        and not targeted(config.get("exclude_modules") or [], name, where)
        and not saves(config, name)
        and (not kept or int(name.split(".")[2]) in kept)
    }
    lost, extra = wanted - pairs.keys(), pairs.keys() - wanted
    if lost or extra:
        names = sorted(lost or extra)
        raise UserError(
            "the adapter's tensors are not those that its configuration targets",
            where=f"{where}: target_modules",
            expected=f"an update of {len(wanted)} modules: {targets!r}"[:300],
            got=f"{'no' if lost else 'an unexpected'} update of {names[0]}"
            + (f" and {len(names) - 1} more" if names[1:] else ""),
            fix="save the adapter again, or pass the model that it was trained on",
        )


def lookup(pattern: Mapping[str, Any], name: str, usual: Any, where: Path) -> Any:
    """The value of the first key that matches the end of the name, as in PEFT."""
    for key, value in pattern.items():
        if _matches(rf"(.*\.)?({key})", name, where):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= LARGEST:
                raise refuse(where, key, value, "a positive number")
            return value
    return usual


def _matches(pattern: str, name: str, where: Path) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(
            "a pattern is no regular expression",
            where=where,
            got=f"{pattern!r}: {error}",
        ) from error
