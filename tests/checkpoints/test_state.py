"""Saving, choosing, restoring and retiring steps; damage is found, never used."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ftjax.checkpoints.fingerprint import tree_hash
from ftjax.errors import EXIT_RESOURCES, EXIT_USER, UserError
from tests.checkpoints.states import (
    Run,
    abstract,
    assert_same,
    files_of,
    flip,
    make_state,
)


def test_round_trip_is_bitwise(run: Run) -> None:
    state = make_state(7)
    odd = jnp.asarray([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32)
    tree = {
        "state": state,
        "odd": odd,
        "bool": jnp.array([True, False]),
        "none": jnp.zeros((0, 3)),
        "host": np.arange(4, dtype=np.int8),
    }
    run.checkpoints.save(3, tree, {"rank": 4, "targets": ["q_proj"]}, 1.5)
    fresh = Run(run.checkpoints.dir).checkpoints
    assert fresh.latest() == 3
    assert_same(fresh.restore(3, abstract(tree)), tree)
    meta = fresh.meta(3)
    assert meta == {"rank": 4, "targets": ["q_proj"], "step": 3, "format": 1}


def test_restores_onto_another_mesh(run: Run) -> None:
    run.save(1)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    state = make_state(1)
    like = abstract(state, whole)
    w = state.trained["layers"]["q_proj"]["w"]
    like.trained["layers"]["q_proj"]["w"] = jax.ShapeDtypeStruct(
        w.shape, w.dtype, sharding=split
    )
    restored = run.checkpoints.restore(1, like)
    assert_same(restored, state)
    assert restored.trained["layers"]["q_proj"]["w"].sharding == split
    assert restored.key.sharding == whole
    run.checkpoints.save(2, restored, {})
    assert_same(run.checkpoints.restore(2, abstract(state)), state)


def test_a_part_of_the_state(run: Run) -> None:
    run.save(1)
    state = make_state(1)
    like = {"trained": abstract(state.trained)}
    with pytest.raises(UserError, match="do not fit"):
        run.checkpoints.restore(1, like)
    part = run.checkpoints.restore(1, like, partial=True)
    assert_same(part["trained"], state.trained)
    with pytest.raises(UserError, match="do not fit"):
        run.checkpoints.restore(1, {"other": like["trained"]}, partial=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "wanted"),
    [
        ((3, 8, 4), jnp.bfloat16, "bfloat16[3,8,4]"),
        ((3, 4, 8), jnp.float32, "float32[3,4,8]"),
    ],
)
def test_another_shape_or_dtype_is_refused(
    run: Run, shape: tuple[int, ...], dtype: Any, wanted: str
) -> None:
    run.save(1)
    like = abstract(make_state(1))
    like.trained["layers"]["q_proj"]["w"] = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(UserError) as caught:
        run.checkpoints.restore(1, like)
    got = "trained/layers/q_proj/w: saved float32[3,8,4], wanted " + wanted
    assert caught.value.got == got
    assert caught.value.code == EXIT_USER


def test_missing_and_extra_leaves_are_named(run: Run) -> None:
    run.save(1)
    like = abstract(make_state(1))
    like.trained["layers"]["k_proj"] = like.trained["layers"].pop("q_proj")
    with pytest.raises(UserError) as caught:
        run.checkpoints.restore(1, like)
    assert "trained/layers/k_proj/w: saved none" in str(caught.value.got)
    assert "trained/layers/q_proj/w: saved float32[3,8,4], wanted none" in str(
        caught.value.got
    )


def test_nothing_saved_yet(run: Run) -> None:
    assert run.checkpoints.latest() is None
    assert run.checkpoints.best() is None
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        run.checkpoints.meta(3)
    assert not run.checkpoints.dir.exists()


def test_every_flipped_byte_is_found(run: Run) -> None:
    run.save(30, 40)
    folder = run.checkpoints.dir / "40"
    rng = np.random.default_rng(0)
    for path in files_of(folder):
        before = path.read_bytes()
        for place in rng.integers(0, len(before), 3):
            flip(path, int(place))
            other = Run(run.checkpoints.dir)
            assert other.checkpoints.latest() == 30, (path, place)
            name = path.relative_to(folder).as_posix()
            assert len(other.said) == 1
            assert other.said[0].startswith(f"step 40 is damaged (file {name}")
            assert other.said[0].endswith(": using step 30")
            assert other.checkpoints.latest() == 30
            assert len(other.said) == 1, "reported once"
            with pytest.raises(UserError, match="step 40 is damaged"):
                other.checkpoints.restore(40, abstract(make_state()))
            path.write_bytes(before)
    assert Run(run.checkpoints.dir).checkpoints.latest() == 40


def test_a_byte_flipped_after_it_was_verified(run: Run) -> None:
    run.save(1)
    assert run.checkpoints.latest() == 1
    flip(max(files_of(run.checkpoints.dir / "1"), key=lambda f: f.stat().st_size), 99)
    with pytest.raises(UserError, match="damaged"):
        run.checkpoints.restore(1, abstract(make_state(1)))


def test_a_lost_or_cut_file_is_found(run: Run) -> None:
    run.save(30, 40)
    folder = run.checkpoints.dir / "40"
    for path in files_of(folder):
        before = path.read_bytes()
        path.unlink()
        assert Run(run.checkpoints.dir).checkpoints.latest() == 30
        path.write_bytes(before[:-1])
        assert Run(run.checkpoints.dir).checkpoints.latest() == 30
        path.write_bytes(before)
    shutil.rmtree(folder / "state")
    assert Run(run.checkpoints.dir).checkpoints.latest() == 30
    assert folder.is_dir(), "damaged steps are never deleted"


def test_a_step_under_another_number_is_damaged(run: Run) -> None:
    run.save(30)
    shutil.copytree(run.checkpoints.dir / "30", run.checkpoints.dir / "50")
    assert run.checkpoints.latest() == 30
    assert "is of step 30" in run.said[0]


def test_foreign_entries_are_ignored(run: Run) -> None:
    run.save(30)
    for name in ("7", "99", "tmp", "40.orbax-checkpoint-tmp", "-3", "031"):
        (run.checkpoints.dir / name).mkdir()
    (run.checkpoints.dir / "031" / "x").touch()
    (run.checkpoints.dir / "50").touch()
    assert run.checkpoints.steps() == [30]
    assert run.checkpoints.latest() == 30
    run.save(99)
    assert run.checkpoints.steps() == [30, 99]


def test_all_damaged_is_an_error(run: Run) -> None:
    run.save(30, 40)
    for step in (30, 40):
        (run.checkpoints.dir / str(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint") as caught:
        Run(run.checkpoints.dir).checkpoints.latest()
    assert caught.value.code == EXIT_USER
    assert "step 30" in str(caught.value.got) and "step 40" in str(caught.value.got)
    assert run.checkpoints.steps() == [30, 40]


def test_a_damaged_step_is_moved_when_its_turn_comes_again(run: Run) -> None:
    run.save(30, 40)
    (run.checkpoints.dir / "40" / "meta.json").write_text("{}")
    other = Run(run.checkpoints.dir, keep_last=1)
    assert other.checkpoints.latest() == 30
    other.save(35)
    assert other.checkpoints.steps() == [35, 40], "nor is it retired"
    other.save(40)
    assert other.checkpoints.steps() == [40]
    assert other.checkpoints.latest() == 40
    (moved,) = other.checkpoints.dir.glob("40.damaged-*")
    assert (moved / "meta.json").read_text() == "{}"
    assert str(moved) in other.said[-1]


def test_another_format_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(30)
    monkeypatch.setattr("ftjax.checkpoints.manifest.FORMAT", 9)
    run.save(40)
    monkeypatch.undo()
    with pytest.raises(UserError, match="another version") as caught:
        Run(run.checkpoints.dir).checkpoints.latest()
    assert caught.value.got == "checkpoint format 9"
    assert caught.value.expected == "checkpoint format 1"


def test_what_cannot_be_saved_leaves_nothing(run: Run) -> None:
    run.save(1)
    x = jnp.zeros((2,))
    with pytest.raises(TypeError, match="step is int"):
        run.checkpoints.save(2, {"step": 3, "x": x}, {})
    with pytest.raises(TypeError, match="typed key"):
        run.checkpoints.save(2, {"key": jax.random.key(0)}, {})
    with pytest.raises(TypeError):
        run.checkpoints.save(2, {"x": x}, {"path": Path()})
    with pytest.raises(ValueError, match="no arrays"):
        run.checkpoints.save(2, {"x": jnp.zeros((0,))}, {})
    with pytest.raises(ValueError, match="two leaves"):
        run.checkpoints.save(2, {"a/b": x, "a": {"b": x}}, {})
    assert [p.name for p in run.checkpoints.dir.iterdir()] == ["1"]


def test_the_folder_is_gone(run: Run) -> None:
    run.save(1)
    shutil.rmtree(run.checkpoints.dir.parent)
    with pytest.raises(UserError, match="no longer") as caught:
        run.save(2)
    assert caught.value.code == EXIT_USER


def test_no_space_is_seen_before_a_byte_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1)
    usage = shutil.disk_usage(run.checkpoints.dir)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="disk space") as caught:
        run.save(2)
    assert caught.value.code == EXIT_RESOURCES
    assert [p.name for p in run.checkpoints.dir.iterdir()] == ["1"]


def test_hash_does_not_depend_on_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_state(3).trained
    tree["scalar"] = jnp.asarray(2.5, jnp.bfloat16)
    tree["empty"] = jnp.zeros((0, 2))
    expected = tree_hash(tree)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    w = tree["layers"]["q_proj"]["w"]
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    tree["layers"]["q_proj"]["w"] = jax.device_put(w, split)
    assert tree_hash(tree) == expected
    monkeypatch.setattr("ftjax.checkpoints.fingerprint._CHUNK_BYTES", 128)
    assert tree_hash(tree) == expected, "in blocks of rows"
    assert tree_hash(jax.tree.map(np.asarray, tree)) == expected
    assert tree_hash(dict(reversed(tree.items()))) == expected


def test_hash_sees_values_names_shapes_and_dtypes() -> None:
    x = jnp.arange(6, dtype=jnp.float32)
    trees = [
        {"w": x},
        {"v": x},
        {"w": x.reshape(2, 3)},
        {"w": x.view(jnp.int32)},
        {"w": x.at[5].set(5.0000005)},
        {"w": x, "v": x},
    ]
    assert len({tree_hash(tree) for tree in trees}) == len(trees)


def test_manifest_is_plain_json(run: Run) -> None:
    run.save(2, metric=0.25)
    folder = run.checkpoints.dir / "2"
    body = json.loads((folder / "manifest.json").read_text())["body"]
    assert body["step"] == 2 and body["metric"] == 0.25
    assert body["leaves"]["trained/norm/scale"] == {"shape": [8], "dtype": "bfloat16"}
    names = {path.relative_to(folder).as_posix() for path in files_of(folder)}
    assert set(body["files"]) == names - {"manifest.json"}
