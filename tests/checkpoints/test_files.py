"""Weight files that are damaged, missing, hostile, or not weights at all."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftjax.checkpoints.files import INDEX, SINGLE
from ftjax.checkpoints.hf import load_params, read_config
from ftjax.checkpoints.tensors import BITS, read_header
from ftjax.errors import UserError
from tests.checkpoints.stored import (
    CONFIG,
    NAMES,
    UP,
    opened,
    pack,
    refused,
    shard,
    spec_of,
    tensors_of,
    write_index,
)


def damaged(folder: Path, data: bytes, *words: str) -> None:
    (folder / SINGLE).write_bytes(data)
    refused(folder, SINGLE, *words)


def test_a_file_that_is_cut_off_or_too_long(folder: Path) -> None:
    good = (folder / SINGLE).read_bytes()
    size = f"{len(good):,} bytes"
    damaged(folder, good[:-1], "cut off", size, f"{len(good) - 1:,} bytes", "again")
    damaged(folder, good[: len(good) // 2], "cut off", size)
    damaged(folder, good + b"\0", "behind its last tensor", size)
    damaged(folder, good[:100], "cut off inside its header", "100 bytes", "again")
    damaged(folder, good[:6], "not a safetensors file", "6 bytes")
    damaged(folder, b"", "is empty", "0 bytes", "again")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML page"),
        (b"  <html><body>504</body></html>", "HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "git-LFS",
        ),
        (b"PK\x03\x04" + b"0" * 100, "PyTorch"),
        (b"\x80\x02}q\x00." + b"0" * 100, "PyTorch"),
        (b"Entry not found", "Entry not found"),
        (b"\0" * 64, "not a safetensors file"),
    ],
)
def test_something_else_in_place_of_the_weights(
    folder: Path, data: bytes, cause: str
) -> None:
    damaged(folder, data, cause, "again")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h[UP].update(data_offsets=[0, 1536]), ["overlap"]),
        (lambda h: h[UP].update(data_offsets=[2**62, 2**62 + 1536]), ["data_offsets"]),
        (lambda h: h[UP].update(data_offsets=[-1536, 0]), ["data_offsets"]),
        (lambda h: h[UP].update(data_offsets=[1536, 0]), ["data_offsets"]),
        (lambda h: h[UP].update(data_offsets=[0]), ["data_offsets"]),
        (lambda h: h[UP].update(data_offsets=["0", "1"]), ["data_offsets"]),
        (lambda h: h[UP].update(shape=[24, 17]), ["1,632 bytes"]),
        (lambda h: h[UP].update(shape=[2**61] * 8), ["bytes for F32"]),
        (lambda h: h[UP].update(shape=[-24, -16]), ["shape"]),
        (lambda h: h[UP].update(shape=[True]), ["shape"]),
        (lambda h: h[UP].update(dtype="F31"), ["dtype", "F31"]),
        (lambda h: h[UP].update(dtype="F16"), ["768 bytes for F16"]),
        (lambda h: h[UP].update(dtype=None), ["dtype"]),
        (lambda h: h.update({UP: 3}), [UP]),
        (lambda h: h.pop(UP), ["leave a gap"]),
    ],
)
def test_a_header_that_lies(
    folder: Path, change: Callable[[dict], Any], words: list[str]
) -> None:
    damaged(folder, pack(tensors_of(spec_of(CONFIG)), change), *words)


@pytest.mark.parametrize(
    "text",
    [b'{"a":' * 100_000, b'{"a": 1, "a": 2}', b"{\xff}", b'{"a": ' + b"9" * 9999],
)
def test_a_header_that_is_hostile(folder: Path, text: bytes) -> None:
    damaged(folder, struct.pack("<Q", len(text)) + text, "header", "not valid JSON")


@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 10**9])
def test_a_header_of_absurd_length(folder: Path, length: int) -> None:
    damaged(folder, struct.pack("<Q", length) + b'{"a": 1}', "header")


def test_random_damage_to_a_header_is_always_a_user_error(folder: Path) -> None:
    good = (folder / SINGLE).read_bytes()
    rng = np.random.default_rng(0)
    length = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(500):
        data = bytearray(good)
        for at in rng.integers(0, length, rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        (folder / SINGLE).write_bytes(bytes(data))
        try:
            opened(folder)
        except UserError as error:
            assert error.code == 2


def test_every_dtype_of_the_format_has_a_size(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}
    text = json.dumps({"a": entry}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0\0")
    assert read_header(file)["a"].nbytes == 3
    assert {BITS[name] for name in NAMES.values()} == {8, 16, 32, 64}


# --- the index


@pytest.mark.parametrize("length", [640, 896, 1152])
def test_a_length_that_looks_like_a_pickle(tmp_path: Path, length: int) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + text + b"\1")
    assert read_header(tmp_path / SINGLE)["a"].shape == (1,)


def test_a_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "1 of 2 weight files are missing", "model-00002-of-00002")


def test_an_index_that_names_a_missing_tensor(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, weight_map | {"odd.weight": weight_map[UP]})
    refused(folder, "index names 1 tensors", "odd.weight in model-0000")


def test_an_index_that_forgets_a_tensor(folder: Path) -> None:
    weight_map = shard(folder)
    del weight_map[UP]
    write_index(folder, weight_map)
    refused(folder, "does not name", UP)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    weight_map = shard(folder)
    tensors = tensors_of(spec_of(CONFIG))
    first = "model-00001-of-00002.safetensors"
    both = [name for name, file in weight_map.items() if file == first] + [UP]
    (folder / first).write_bytes(pack({name: tensors[name] for name in both}))
    refused(folder, "in two weight files", UP, "00001-of-00002", "00002-of-00002")


def test_a_missing_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()
    refused(folder, "have no index", INDEX, "model-00001-of-00002")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map(folder: Path, weight_map: Any) -> None:
    shard(folder)
    write_index(folder, weight_map)
    refused(folder, INDEX, "weight_map")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "/etc/passwd.safetensors",
        "..\\outside.safetensors",
        "nul\0.safetensors",
    ],
)
def test_an_index_that_leads_out_of_the_folder(folder: Path, name: str) -> None:
    weight_map = shard(folder)
    (folder.parent / "outside.safetensors").write_bytes(b"secret")
    write_index(folder, weight_map | {UP: name})
    assert "secret" not in refused(folder, "leads out", "weight_map")


def test_an_index_that_names_a_pickle(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, dict.fromkeys(weight_map, "pytorch_model.bin"))
    refused(folder, "not a safetensors file", "pytorch_model.bin")


def test_a_link_that_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.safetensors"
    (folder / SINGLE).rename(outside)
    (folder / SINGLE).symlink_to(outside)
    refused(folder, "leads out")
    shard_name = "model-00001-of-00001.safetensors"
    (folder / SINGLE).rename(folder / shard_name)
    write_index(folder, dict.fromkeys(tensors_of(spec_of(CONFIG)), shard_name))
    refused(folder, "leads out", shard_name)


def test_the_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / "c0ffee", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(folder.iterdir()):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert load_params(opened(snapshot), dtype="float32")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(folder / SINGLE)
    refused(snapshot, "leads out")


def test_a_link_to_nothing(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("gone.safetensors")
    refused(folder, SINGLE)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("gone.json")
    with pytest.raises(UserError, match="missing") as caught:
        read_config(folder)
    assert "a link to a file that is gone" in caught.value.screen()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"]
)
def test_pickles_are_never_opened(folder: Path, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / SINGLE).unlink()
    code = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    (folder / name).write_bytes(code)
    refused(folder, "pickles", name, "save_pretrained")
    (folder / SINGLE).write_bytes(code)
    refused(folder, "not a safetensors file")
    assert not canary.exists()


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "odd.safetensors")
    refused(folder, "unexpected name", "odd.safetensors", SINGLE)
    (folder / "odd.safetensors").unlink()
    refused(folder, "no weights", "config.json")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter, not a model", "--adapter")
