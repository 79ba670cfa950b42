"""The order is a function; packing loses nothing and mixes nothing."""

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.loader import Loader, row_length, slots
from ftjax.data.order import permutation
from ftjax.data.pack import fill, pack
from ftjax.data.report import DataReport
from tests.conftest import ROOT


def dataset(count: int = 50, longest: int = 30, seed: int = 0) -> Dataset:
    random = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        length = int(random.integers(2, longest + 1))
        ids = random.integers(1, 1000, length).astype(np.int32)
        trained = random.random(length) < 0.7
        trained[0], trained[-1] = False, True
        examples.append(Example(ids, trained, f"d:{i}"))
    return Dataset(examples, DataReport("d", "train", longest))


def loader(data: Dataset, length: int = 32, **options: Any) -> Loader:
    options = {"packing": True, "seed": 0, "shuffle": True, **options}
    return Loader(data, length=length, **options)


def flat(load: Loader, start: int, rows: int) -> list[int]:
    return [i for row in load.groups(start, rows) for i in row]


def triples(batches):
    """How often each (token, target, weight) occurs outside the padding."""
    found: Counter = Counter()
    for b in batches:
        real = b["segments"] > 0
        arrays = (b["tokens"], b["targets"], b["weights"])
        found.update(zip(*(a[real].tolist() for a in arrays), strict=True))
    return found


def test_packed_and_plain_rows_hold_the_same():
    data = dataset()
    packed, plain = (loader(data, packing=p) for p in (True, False))
    assert packed.rows_per_epoch < plain.rows_per_epoch == 50
    one, two = (
        triples(x.batch(3 * x.rows_per_epoch, x.rows_per_epoch) for _ in range(1))
        for x in (packed, plain)
    )
    assert one == two
    assert sum(one.values()) == sum(slots(e) for e in data.examples)
    expected = sum(e.trained.sum() for e in data.examples)
    assert sum(n for (_, _, w), n in one.items() if w) == expected


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_documents_one_after_another(packing):
    data = dataset()
    load = loader(data, packing=packing)
    for number in range(load.rows_per_epoch):
        batch = {k: v[0] for k, v in load.batch(number, 1).items()}
        [members] = load.groups(number, 1)
        start = 0
        for segment, index in enumerate(members, 1):
            e, end = data.examples[index], start + slots(data.examples[index])
            here = slice(start, end)
            assert (batch["tokens"][here] == e.ids[:-1]).all()
            assert (batch["targets"][here] == e.ids[1:]).all()
            assert (batch["weights"][here] == e.trained[1:]).all()
            assert (batch["segments"][here] == segment).all()
            assert batch["positions"][here].tolist() == list(range(end - start))
            start = end
        assert not any(v[start:].any() for v in batch.values())
    assert batch["weights"].dtype == np.float32
    assert {batch[k].dtype for k in batch if k != "weights"} == {np.dtype(np.int32)}


@pytest.mark.parametrize("packing", [True, False])
def test_any_batch_size_reads_the_same_rows(packing):
    data = dataset(13)
    load = loader(data, packing=packing)
    total = 2 * load.rows_per_epoch + 3
    whole = load.batch(0, total)
    for size in (1, 4, 7):
        fresh = loader(data, packing=packing)
        for start in range(0, total - size, size):
            part = fresh.batch(start, size)
            for name, array in part.items():
                assert (array == whole[name][start : start + size]).all()


def test_every_epoch_holds_every_example_once_in_its_own_order():
    load = loader(dataset(), packing=False)
    epochs = [flat(load, e * 50, 50) for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader(dataset(), packing=False, seed=1).groups(0, 50) != epochs[0]
    in_order = loader(dataset(), packing=False, shuffle=False)
    assert flat(in_order, 50, 50) == list(range(50))


def test_fewer_rows_than_a_batch_go_on_into_the_next_epoch():
    load = loader(dataset(3), packing=False)
    rows = flat(load, 0, 8)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
    assert load.batch(0, 8)["weights"].any(axis=1).all()


@pytest.mark.parametrize("packing", [True, False])
def test_one_pass_in_file_order_ends_in_rows_of_weight_zero(packing):
    data = dataset(10)
    load = loader(data, packing=packing)
    batches = list(load.epoch(4))
    assert all(b["tokens"].shape == (4, 32) for b in batches)
    assert triples(batches) == triples([load.batch(0, load.rows_per_epoch)])
    rest = load.rows_per_epoch % 4
    if rest:
        assert not batches[-1]["weights"][rest:].any()
    if not packing:
        first = data.examples[0]
        assert (batches[0]["tokens"][0, : slots(first)] == first.ids[:-1]).all()


ORDER = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from ftjax.data.order import permutation
order = [permutation(1000, seed, epoch) for seed in (0, -3, 2**70) for epoch in (0, 5)]
print(hashlib.sha256(b"".join(o.astype("<i8").tobytes() for o in order)).hexdigest())
"""


def test_the_order_depends_on_nothing_but_seed_and_epoch():
    order = [
        permutation(1000, seed, epoch) for seed in (0, -3, 2**70) for epoch in (0, 5)
    ]
    data = b"".join(o.astype("<i8").tobytes() for o in order)
    found = hashlib.sha256(data).hexdigest()
    for changes in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "LC_ALL": "C"}):
        result = subprocess.run(
            [sys.executable, "-c", ORDER, str(ROOT)],
            env={**os.environ, **changes},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == found
    # The same on every platform and with every NumPy.
    assert permutation(8, 0, 0).tolist() == GOLDEN_ORDER


GOLDEN_ORDER = [0, 2, 1, 5, 4, 3, 6, 7]


def test_packing_is_full_fast_and_complete():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5, 0.7, 100_000).astype(np.int64) + 1, 1024)
    start = time.perf_counter()
    rows = pack(lengths, permutation(len(lengths), 0, -1), 1024)
    assert time.perf_counter() - start < 10  # 0.2 s on an idle core
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(int(lengths[list(row)].sum()) for row in rows) <= 1024
    assert fill(lengths, rows, 1024) > 0.98


def test_row_length():
    data = dataset(longest=30)
    longest = max(slots(e) for e in data.examples)
    assert row_length(data, max_length=512, packing=True) == 512
    assert row_length(data, max_length=512, packing=False) == 32
    assert row_length(data, max_length=30, packing=False) == 30
    with pytest.raises(ValueError, match="examples of up to"):
        loader(data, length=longest - 1)
    load = loader(data)
    assert data.report.rows == (load.rows_per_epoch, 32, load.fill)
    assert f"{load.fill:.1%} filled" not in data.report.text()  # nothing kept: no table
