"""Which files of a model folder hold which tensors: one file, or shards and an index.

Everything is checked against the headers before a weight is read. The rules of names
are in `jsonfile.inside`: an index is written by a stranger.
"""

from collections.abc import Callable
from pathlib import Path

from ftjax.checkpoints.jsonfile import inside, read_json
from ftjax.checkpoints.tensors import Tensor, read_header
from ftjax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    "convert it where torch is installed: AutoModelForCausalLM.from_pretrained(DIR)"
    ".save_pretrained(NEW_DIR) writes safetensors; or download the safetensors files"
)


def find_tensors(folder: Path, note: Callable[[str], None]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in `folder`, by name, from the headers alone.

    Raises:
      UserError: for files that are missing, damaged, or contradict the index.
    """
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        if (folder / INDEX).exists():
            note(f"{folder}: {SINGLE} is read; {INDEX} beside it is not")
        return read_header(inside(folder, SINGLE, named_by=str(folder)))
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        return _sharded(folder)
    raise _no_weights(folder)


def _sharded(folder: Path) -> dict[str, Tensor]:
    index = inside(folder, INDEX, named_by=str(folder))
    shards = _weight_map(index)
    paths = {
        shard: inside(folder, shard, named_by=f"{index}: weight_map")
        for shard in dict.fromkeys(shards.values())
    }
    missing = [shard for shard, path in paths.items() if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} weight files are missing",
            where=folder,
            expected="every file that the index names",
            got="missing: " + listed(missing),
            fix="download them again",
        )
    found: dict[str, Tensor] = {}
    for shard, path in paths.items():
        for name, tensor in read_header(path).items():
            if name in found or shards.get(name, shard) != shard:
                other = found[name].file.name if name in found else shards[name]
                raise UserError(
                    "a tensor is in two weight files",
                    where=f"{folder}: {name!r}",
                    expected=f"only in {shards.get(name, 'one of them')}",
                    got=f"{other} and {shard}",
                    fix="download the checkpoint again, into an empty folder",
                )
            if name not in shards:
                raise UserError(
                    "a weight file holds a tensor that the index does not name",
                    where=f"{path}: {name!r}",
                    fix="download the checkpoint again, into an empty folder",
                )
            found[name] = tensor
    lost = [name for name in shards if name not in found]
    if lost:
        raise UserError(
            f"the index names {len(lost)} tensors that are not in the files",
            where=index,
            expected="each tensor in the file that the index names",
            got="missing: " + listed([f"{n} in {shards[n]}" for n in lost]),
            fix="download the checkpoint again",
        )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    shards = read_json(index).get("weight_map")
    good = isinstance(shards, dict) and all(isinstance(v, str) for v in shards.values())
    if not good or not shards:
        raise UserError(
            "the index of the weight files has no usable weight_map",
            where=f"{index}: weight_map",
            expected='{"tensor name": "file name", ...}',
            got=type(shards).__name__ if not good else "nothing in it",
            fix="download it again",
        )
    for name, shard in shards.items():
        if not shard.endswith(".safetensors"):
            raise UserError(
                "the index names a file that is not a safetensors file",
                where=f"{index}: {name!r}",
                expected="files that end in .safetensors",
                got=repr(shard[:200]),
                fix=_CONVERT,
            )
    return shards


def _no_weights(folder: Path) -> UserError:
    """Says why there is nothing to read, by what else is in the folder."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return UserError(
            "the model folder cannot be read", where=folder, got=error.strerror
        )
    expected = f"{SINGLE}, or {INDEX} and its files"
    tensors = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names:
        return UserError(
            "this folder holds an adapter, not a model",
            where=folder,
            expected=expected,
            fix="pass the model it was made for, and this folder as --adapter",
        )
    if tensors:
        return UserError(
            f"the weight files have no index ({INDEX})"
            if len(tensors) > 1
            else "the weight file has an unexpected name",
            where=folder,
            expected=expected,
            got=listed(tensors),
            fix=f"download {INDEX} too" if len(tensors) > 1 else f"name it {SINGLE}",
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return UserError(
            "the weights are pickles, which can run code and are never opened",
            where=folder,
            expected=expected,
            got=listed(pickles),
            fix=_CONVERT,
        )
    return UserError(
        "there are no weights in the model folder",
        where=folder,
        expected=expected,
        got=listed(names) or "an empty folder",
    )


def listed(names: list[str], most: int = 10) -> str:
    """The first names, one a line, and how many more there are."""
    more = [f"... and {len(names) - most} more"] if len(names) > most else []
    return "\n".join(names[:most] + more)
