"""Parquet files and `datasets` names."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftjax.data.files import Faults, Found
from ftjax.data.words import clip
from ftjax.errors import UserError

ONLINE_SECONDS = 5.0


def parquet(path: Path, faults: Faults) -> Found:
    """Yields the rows of a Parquet file, one row group at a time."""
    del faults  # a Parquet file is readable as a whole or not at all
    try:
        import pyarrow as pa
        from pyarrow import parquet as pq
    except ImportError as error:
        raise UserError(
            "reading Parquet needs pyarrow", where=path, fix="pip install pyarrow"
        ) from error
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path.name}:row {number}"
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            "the Parquet file is damaged",
            where=f"{path} after row {number}",
            got=clip(error, 200),
            fix="copy or download it again",
        ) from error


def hub(name: str, split: str) -> Found:
    """Yields the rows of a `datasets` data set; `owner/name:subset` names a subset."""
    repo, _, subset = name.partition(":")
    where = f"{name}[{split}]"
    online = _reachable()
    rows = _load(repo, subset or None, split, where, online)
    return _numbered(rows, where)


def _numbered(rows: Any, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, row in enumerate(rows, 1):
        yield row, f"{where}:row {number}"


def _load(repo: str, subset: str | None, split: str, where: str, online: bool) -> Any:
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise UserError(
            "reading a data set by name needs the `datasets` library",
            where=where,
            fix="pip install datasets, or name a local .jsonl or .parquet file",
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UserError(
            "this `datasets` could run a data set's own script",
            where=where,
            expected="datasets 4 or newer",
            got=datasets.__version__,
            fix="pip install -U datasets",
        )
    was = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if not online:  # what was downloaded before still loads
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        datasets.disable_progress_bars()
        return datasets.load_dataset(repo, subset, split=split)
    # Everything from a wrong split to a broken proxy ends here, each as its own type.
    except Exception as error:
        raise UserError(
            "the data set cannot be loaded" if online else "the Hub cannot be reached",
            where=where,
            expected=f"a file of that name, or a data set with a split `{split}`",
            got=clip(f"{type(error).__name__}: {error}", 240),
            fix="check the name"
            if online
            else "name a local file: --config.data.train=FILE.jsonl (or .jsonl.gz, "
            ".parquet);\non a machine with a network: datasets.load_dataset("
            f'"{repo}", split="{split}").to_json("FILE.jsonl")',
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = was


def _reachable() -> bool:
    """Whether the Hub answers at all, asked once and briefly (its client retries)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=ONLINE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
