"""A checkpoint that is right is read right, and its tensors are checked one by one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from ftjax.checkpoints.files import SINGLE
from ftjax.checkpoints.hf import load_params, read_config, save_params
from ftjax.errors import UserError
from ftjax.loading import check_vocab
from ftjax.models.names import model_weights
from tests.checkpoints.stored import (
    CONFIG,
    EMBEDDING,
    HEAD,
    UP,
    Tensors,
    opened,
    pack,
    refused,
    shard,
    spec_of,
    tensors_of,
)


def flat(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}


# --- what is right


def test_layout_of_each_weight(folder: Path) -> None:
    stored = tensors_of(spec_of(CONFIG))
    params = flat(load_params(opened(folder), dtype="float32"))
    layer = "model.layers.1.self_attn."
    q = params["layers", "self_attn", "q_proj", "w"]
    assert q.shape == (2, 16, 4, 4)
    np.testing.assert_array_equal(
        q[1].reshape(16, 16), stored[layer + "q_proj.weight"].T
    )
    o = params["layers", "self_attn", "o_proj", "w"]
    assert o.shape == (2, 4, 4, 16)
    np.testing.assert_array_equal(
        o[1].reshape(16, 16), stored[layer + "o_proj.weight"].T
    )
    k_bias = params["layers", "self_attn", "k_proj", "b"]
    np.testing.assert_array_equal(
        k_bias[1], stored[layer + "k_proj.bias"].reshape(2, 4)
    )
    np.testing.assert_array_equal(params["lm_head", "w"], stored[HEAD].T)
    np.testing.assert_array_equal(
        params["embed_tokens", "embedding"], stored[EMBEDDING]
    )
    assert sum(p.size for p in params.values()) == sum(t.size for t in stored.values())


def test_put_gets_one_host_leaf_at_a_time(folder: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def put(path: tuple[str, ...], host: np.ndarray) -> str:
        assert host.dtype == ml_dtypes.bfloat16 and host.flags.c_contiguous
        seen.append(path)
        return "/".join(path)

    tree = load_params(opened(folder), dtype="bfloat16", put=put, note=lambda _: None)
    assert seen == list(model_weights(spec_of(CONFIG)))
    assert tree["layers"]["mlp"]["up_proj"]["w"] == "layers/mlp/up_proj/w"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("most", [10**9, 3000])
def test_saved_and_read_again_bit_for_bit(
    folder: Path, tmp_path: Path, dtype: str, most: int
) -> None:
    weights = opened(folder)
    params = load_params(weights, dtype=dtype, note=lambda _: None)
    new = tmp_path / "new"
    new.mkdir()
    config = CONFIG | {"auto_map": {"AutoModel": "x.X"}, "dtype": "float16"}
    save_params(
        new, params, weights.spec, config=config, dtype=dtype, max_shard_bytes=most
    )
    assert (new / SINGLE).exists() == (most == 10**9)
    config = read_config(new)
    assert "auto_map" not in config and "dtype" not in config
    assert config["torch_dtype"] == dtype
    again = opened(new)
    assert again.dtype == {"float32": "F32", "bfloat16": "BF16"}[dtype]
    same = jax.tree.map(
        lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype,
        params,
        load_params(again, dtype=dtype),
    )
    assert all(jax.tree.leaves(same))
    if most < 10**9:
        assert max(p.stat().st_size for p in new.glob("*.safetensors")) < 2 * most
    with pytest.raises(FileExistsError):
        save_params(new, params, weights.spec, config=config, dtype=dtype)


def test_what_is_saved_is_read_by_the_safetensors_library(
    folder: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    weights = opened(folder)
    params = load_params(weights, dtype="float32")
    new = tmp_path / "new"
    new.mkdir()
    save_params(new, params, weights.spec, config=CONFIG, dtype="float32")
    theirs, ours = load_file(new / SINGLE), tensors_of(weights.spec)
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(theirs[name], value)


def test_shards(folder: Path) -> None:
    whole = load_params(opened(folder), dtype="float32")
    shard(folder)
    parts = load_params(opened(folder), dtype="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, parts))


@pytest.mark.parametrize(
    ("stored", "wanted", "remark"),
    [
        (np.float16, "float32", None),
        (ml_dtypes.bfloat16, "float32", None),
        (ml_dtypes.bfloat16, "bfloat16", None),
        (np.float32, "bfloat16", "F32 tensors are rounded to bfloat16"),
        (np.float16, "bfloat16", "F16 tensors are rounded to bfloat16"),
        (np.float64, "float32", "F64 tensors are rounded to float32"),
    ],
)
def test_the_policy_for_each_dtype(
    folder: Path, stored: Any, wanted: str, remark: str | None
) -> None:
    tensors = {k: v.astype(stored) for k, v in tensors_of(spec_of(CONFIG)).items()}
    (folder / SINGLE).write_bytes(pack(tensors))
    notes: list[str] = []
    params = flat(load_params(opened(folder), dtype=wanted, note=notes.append))
    got = params["norm", "scale"]
    np.testing.assert_array_equal(got, tensors["model.norm.weight"].astype(wanted))
    assert [remark in n for n in notes if remark] == ([True] if remark else [])
    assert bool(notes) == bool(remark)


@pytest.mark.parametrize("dtype", ["float16", "int8", ""])
def test_other_dtypes_are_not_offered(folder: Path, dtype: str) -> None:
    with pytest.raises(UserError, match="dtype"):
        load_params(opened(folder), dtype=dtype)


# --- the tied head


def write_tied(folder: Path, *, flag: bool, drop: str = "", same: bool = True) -> None:
    config = CONFIG | {"tie_word_embeddings": flag}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(spec_of(CONFIG))
    if same:
        tensors[HEAD] = tensors[EMBEDDING]
    tensors.pop(drop, None)
    (folder / SINGLE).write_bytes(pack(tensors))


def test_tied_and_stored_alike_is_read_once(folder: Path) -> None:
    write_tied(folder, flag=True)
    notes: list[str] = []
    weights = opened(folder, note=notes.append)
    assert weights.spec.tied and HEAD not in weights.tensors and not notes


def test_tied_but_the_stored_head_differs(folder: Path) -> None:
    write_tied(folder, flag=True, same=False)
    notes: list[str] = []
    weights = opened(folder, note=notes.append)
    assert not weights.spec.tied and "the stored head is used" in notes[0]
    params = load_params(weights, dtype="float32")
    np.testing.assert_array_equal(
        params["lm_head"]["w"], tensors_of(spec_of(CONFIG))[HEAD].T
    )


def test_tied_and_only_the_head_is_stored(folder: Path) -> None:
    write_tied(folder, flag=True, drop=EMBEDDING)
    notes: list[str] = []
    weights = opened(folder, note=notes.append)
    assert "read as the embedding too" in notes[0]
    params = load_params(weights, dtype="float32")
    assert params["embed_tokens"]["embedding"].shape == (20, 16)
    assert "lm_head" not in params


def test_untied_but_the_head_is_missing(folder: Path) -> None:
    write_tied(folder, flag=False, drop=HEAD)
    refused(folder, "output head is missing", HEAD, "tie_word_embeddings is false")


# --- tensors


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = tensors_of(spec_of(CONFIG))
    change(tensors)
    (folder / SINGLE).write_bytes(pack(tensors))


def test_a_missing_tensor(folder: Path) -> None:
    edit(folder, lambda t: t.pop(UP))
    refused(folder, "1 of 29 tensors are missing", UP)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in list(t)[1:]])
    assert refused(folder, "28 of 29", "... and 18 more").count("model.layers") == 10


def test_names_without_their_prefix(folder: Path) -> None:
    tensors = {
        k.removeprefix("model."): v for k, v in tensors_of(spec_of(CONFIG)).items()
    }
    (folder / SINGLE).write_bytes(pack(tensors))
    refused(folder, "are missing", "the names lack 'model.'")


def test_an_extra_tensor(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.extra.weight": np.ones(3, np.float32)}))
    refused(folder, "1 tensors", "no place for", "model.extra.weight")


def test_old_rotary_tables_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda t: t.update({name: np.ones(2, np.float32)}))
    assert name not in opened(folder).tensors


def test_a_wrong_shape(folder: Path) -> None:
    edit(folder, lambda t: t.update({UP: t[UP].T.copy()}))
    refused(folder, UP, "expected: (24, 16)", "got:      (16, 24)")


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")]
)
def test_a_dtype_that_is_not_a_plain_float(folder: Path, dtype: Any, name: str) -> None:
    edit(folder, lambda t: t.update({UP: t[UP].astype(dtype)}))
    refused(folder, UP, name, "F32", "before its quantization")


def test_packed_weights_of_a_quantizer(folder: Path) -> None:
    packed = {UP.replace("weight", "qweight"): np.ones(3, np.int8)}
    edit(folder, lambda t: t.update(packed))
    refused(folder, "quantized", "qweight")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "stored", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
)
def test_values_that_are_not_finite(folder: Path, bad: float, stored: Any) -> None:
    def poke(tensors: Tensors) -> None:
        tensors[UP][3, 5] = tensors[UP][23, 15] = bad
        tensors[UP] = tensors[UP].astype(stored)

    edit(folder, poke)
    with pytest.raises(UserError, match="2 values that are NaN or infinite") as caught:
        load_params(opened(folder), dtype="float32", note=lambda _: None)
    assert UP in caught.value.screen() and "2 of 384" in caught.value.screen()


@pytest.mark.parametrize(
    ("stored", "wanted", "value"),
    [(np.float64, "float32", 1e300), (np.float32, "bfloat16", 3.4e38)],
)
def test_values_that_overflow_when_narrowed(
    folder: Path, stored: Any, wanted: str, value: float
) -> None:
    def poke(tensors: Tensors) -> None:
        tensors[UP] = tensors[UP].astype(stored)
        tensors[UP][0, 0] = value

    edit(folder, poke)
    with pytest.raises(UserError, match="1 values") as caught:
        load_params(opened(folder), dtype=wanted, note=lambda _: None)
    assert f"in the range of {wanted}" in caught.value.screen()


def test_a_matrix_of_zeros_is_remarked_on(folder: Path) -> None:
    edit(folder, lambda t: t.update({UP: np.zeros_like(t[UP])}))
    notes: list[str] = []
    load_params(opened(folder), dtype="float32", note=notes.append)
    assert len(notes) == 1 and notes[0].endswith(f"{UP} is all zero")


def test_vocabulary_rule() -> None:
    spec = spec_of(CONFIG)
    check_vocab(spec, 20, "m")
    check_vocab(spec, 7, "m")
    with pytest.raises(UserError, match="more tokens than the model") as caught:
        check_vocab(spec, 21, "m")
    assert "20" in caught.value.screen() and "21" in caught.value.screen()
