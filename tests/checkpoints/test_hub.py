"""Finding a model and reading its config.json; the Hub itself is never asked."""

from pathlib import Path
from typing import Any

import pytest

from ftjax.checkpoints.files import SINGLE
from ftjax.checkpoints.hf import find_model, read_config
from ftjax.errors import UserError


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON", "line 1 column 2"]),
        (b"[1]", ["not hold a JSON object", "list"]),
        (b'{"a": NaN}', ["NaN"]),
        (b'{"a": 1, "a": 2}', ["'a' occurs twice"]),
        (b"\xff\xfe{\0}\0", ["not valid JSON"]),
        (b'{"a":' * 100_000, ["not valid JSON"]),
        (b"<html></html>", ["HTML page"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["git-LFS"]),
        (b" " * (17 * 2**20), ["too large"]),
    ],
)
def test_a_damaged_configuration(folder: Path, data: bytes, words: list[str]) -> None:
    (folder / "config.json").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_config(folder)
    for word in ["config.json", *words]:
        assert word in caught.value.screen()


def test_a_missing_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="missing"):
        read_config(folder)
    (folder / "config.json").mkdir()
    with pytest.raises(UserError, match="missing") as caught:
        read_config(folder)
    assert "a folder" in caught.value.screen()


def test_finding_a_model(folder: Path) -> None:
    assert find_model(str(folder)) == folder
    with pytest.raises(UserError, match="is a file") as caught:
        find_model(str(folder / SINGLE))
    assert str(folder) in caught.value.screen()
    for path in ("", "/no/such/folder", "qwen3_0.6b", "a/b/c", "../x/y", "-x/y"):
        with pytest.raises(UserError, match="no such model") as caught:
            find_model(path)
        assert "qwen3_0_6b" in caught.value.screen()


@pytest.mark.parametrize("path", ["qwen3_0_6b", "org/name"])
def test_the_hub_offline(path: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be reached") as caught:
        find_model(path, "v2")
    screen = caught.value.screen()
    for word in ("revision v2", "HF_HUB_OFFLINE", "--local-dir DIR", "pass DIR"):
        assert word in screen


class FakeHub:
    """Answers the one question that is asked before a download."""

    def __init__(self, answer: Exception | None):
        self.answer = answer

    def model_info(self, *_: Any, timeout: float, **__: Any) -> None:
        assert timeout <= 5
        if self.answer:
            raise self.answer


def answer_with(monkeypatch: Any, info: Exception | None, download: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeHub(info))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


def answer(kind: str) -> Exception:
    from huggingface_hub import errors

    cls = getattr(errors, kind)
    error: Exception = cls.__new__(cls, "the server's own words")
    return error


@pytest.mark.parametrize("when", ["asking", "downloading"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "gated"),
        ("RevisionNotFoundError", "no such revision"),
        ("RepositoryNotFoundError", "no such model, or it is private"),
    ],
)
def test_the_hub_refuses(monkeypatch: Any, kind: str, words: str, when: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise answer(kind)

    answer_with(monkeypatch, answer(kind) if when == "asking" else None, download)
    with pytest.raises(UserError, match=words) as caught:
        find_model("org/name", "v2")
    assert "org/name, revision v2" in caught.value.screen()
    assert "--local-dir DIR" in caught.value.screen()


def test_the_cache_serves_when_the_hub_is_not_reached(
    monkeypatch: Any, tmp_path: Path
) -> None:
    def download(*_: Any, local_files_only: bool, **__: Any) -> str:
        assert local_files_only
        return str(tmp_path)

    answer_with(monkeypatch, ConnectionError("no route"), download)
    assert find_model("org/name") == tmp_path


def test_a_download_takes_no_code_and_no_pickles(
    monkeypatch: Any, tmp_path: Path
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model.safetensors", "tokenizer.model", "a.jinja",
             "pytorch_model.bin", "modeling_x.py", "original/params.json",
             "consolidated.safetensors", "README.md"]  # fmt: skip

    def download(
        *_: Any,
        allow_patterns: Any,
        ignore_patterns: Any,
        local_files_only: bool,
        **__: Any,
    ) -> str:
        assert not local_files_only
        patterns = {
            "allow_patterns": allow_patterns,
            "ignore_patterns": ignore_patterns,
        }
        assert list(filter_repo_objects(files, **patterns)) == files[:4]
        return str(tmp_path)

    answer_with(monkeypatch, None, download)
    assert find_model("qwen3_0_6b") == tmp_path
