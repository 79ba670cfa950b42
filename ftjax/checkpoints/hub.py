"""Where a model comes from: what ships, a folder, a preset, or a name on the Hub."""

import difflib
import re
from pathlib import Path
from typing import NoReturn

import ftjax
from ftjax.errors import UserError
from ftjax.models.presets import PRESETS

_WANTED = ["*.json", "*.jinja", "*.safetensors", "tokenizer*", "*.model", "*.txt"]
_UNWANTED = ["*/*", "consolidated*", "*.bin", "*.py", "training_args*", "optimizer*"]
_SECONDS = 5.0


def find_model(path: str, revision: str = "main") -> Path:
    """The folder of a model; downloads it first where `path` is a name on the Hub.

    Args:
      path: 'base' (the model that ships), a folder, a preset, or 'org/name'.
      revision: branch, tag or commit on the Hub; folders have none.

    Raises:
      UserError: within seconds, also offline, saying what else would work.
    """
    if path == "base":
        return _base()
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(
            "the model path is a file",
            where=path,
            expected="the folder that holds config.json and the weights",
            fix=f"pass {folder.parent}",
        )
    if path in PRESETS:
        return _download(PRESETS[path].hub, revision)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", path) and ".." not in path:
        return _download(path, revision)
    near = difflib.get_close_matches(path, [*PRESETS, "base"], n=3)
    raise UserError(
        "there is no such model",
        where=path or "(empty)",
        expected="'base', a folder, a preset, or a Hub name such as Qwen/Qwen3-0.6B",
        got="a link to something that is gone" if folder.is_symlink() else None,
        fix=f"did you mean {', '.join(near)}?"
        if near
        else "presets: " + ", ".join(PRESETS),
    )


def _base() -> Path:
    folder = Path(ftjax.__file__).parent / "base"
    if not (folder / "config.json").is_file():
        raise UserError(
            "the model that ships with ftjax is not here",
            where=folder,
            fix="reinstall ftjax, or pass another model",
        )
    return folder


def _download(name: str, revision: str) -> Path:
    """A snapshot in the Hub's cache; asks the Hub once, briefly, before anything."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    where = f"{name}, revision {revision}"
    unreachable: Exception | None = None
    if constants.HF_HUB_OFFLINE:
        unreachable = errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    else:
        try:
            api = huggingface_hub.HfApi()
            api.model_info(name, revision=revision, timeout=_SECONDS)
        # No connection shows as one of many classes of the HTTP library.
        except Exception as error:
            _refuse_answer(where, error)
            unreachable = error
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            etag_timeout=_SECONDS,
            local_files_only=unreachable is not None,
        )
    except Exception as error:
        _refuse_answer(where, error)
        what = "the download from the Hub failed"
        if unreachable:
            what = "the model is not in the local cache, and the Hub cannot be reached"
        cause = unreachable or error
        text = next(iter(str(cause).splitlines()), "")[:200]
        _refuse(where, what, "check the connection", f"{type(cause).__name__}: {text}")
    return Path(folder)


def _refuse_answer(where: str, error: Exception) -> None:
    """Raises if the Hub was reached and said no; returns if it was not reached."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        _refuse(
            where,
            "this model is gated: its licence must be accepted first",
            "accept it on huggingface.co, then `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        _refuse(where, "the Hub has no such revision", "check model.revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        _refuse(
            where,
            "the Hub has no such model, or it is private",
            "check the spelling; for a private one, `hf auth login`",
        )


def _refuse(where: str, what: str, fix: str, got: str | None = None) -> NoReturn:
    local = "or download it where there is a connection (`hf download NAME"
    raise UserError(
        what,
        where=where,
        got=got,
        fix=f"{fix},\n{local} --local-dir DIR`) and pass DIR as the model",
    )
