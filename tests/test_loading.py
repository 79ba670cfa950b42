"""Opening bases, runs and adapters: what is loaded, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sft
from ftjax.checkpoints.peft import save_adapter
from ftjax.errors import UserError
from ftjax.export import write_adapter
from ftjax.loading import load_base, open_base
from ftjax.memory import estimate
from ftjax.methods.lora import merge
from ftjax.policy import open_policy
from ftjax.prepare import load_variables, prepare_shape
from ftjax.sharding import make_mesh
from ftjax.switch import with_adapter
from tests.runs import make_run
from tests.tiny import IM_END, make_tiny_checkpoint

IDS = [1, 70, 80, 90, 100, 110]
quiet: dict[str, Any] = {"note": lambda text: None}


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return make_run(folder, tiny_llama, steps=((10, 2.0), (20, 1.0), (30, 1.5)), rank=3)


def logits(policy: Any) -> np.ndarray:
    tokens = jnp.asarray([IDS], jnp.int32)
    rows = (tokens, jnp.arange(len(IDS))[None], jnp.ones_like(tokens))
    return np.asarray(policy.model.apply(policy.variables, *rows, method="logits")[0])


def test_open_base_reads_no_weight(tiny_llama: Path) -> None:
    base = open_base(str(tiny_llama))
    assert base.spec.family == "llama"
    assert base.eos_ids == (IM_END,)
    assert base.tokenizer.template is not None


def test_weights_are_split_over_the_mesh(tiny_llama: Path) -> None:
    base = open_base(str(tiny_llama))
    one = load_base(base, jnp.float32, make_mesh())
    four = load_base(base, jnp.float32, make_mesh(data=1, fsdp=4))
    w = four["params"]["layers"]["mlp"]["up_proj"]["w"]
    assert w.sharding.shard_shape(w.shape)[1] == w.shape[1] // 4
    jax.tree.map(np.testing.assert_array_equal, one, four)
    narrow = load_base(base, jnp.bfloat16, make_mesh())["params"]
    assert narrow["norm"]["scale"].dtype == jnp.dtype(jnp.bfloat16)


def test_a_dora_run_and_its_adapter_are_one_policy(
    tiny_llama: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"use_dora": True, "rank": 3, "dtype": "bfloat16"}
    run = make_run(tmp_path / "run", tiny_llama, **values)
    policy = open_policy(workdir=str(run), **quiet)
    write_adapter(tmp_path / "out", policy)
    wanted, again = logits(policy), str(tmp_path / "out")
    other = open_policy(model=str(tiny_llama), adapter=again, **quiet)
    np.testing.assert_allclose(logits(other), wanted, atol=1e-5)
    base = open_policy(model=str(tiny_llama), **quiet)
    assert np.abs(wanted - logits(base)).max() > 0.01
    switched = with_adapter(base, again, **quiet)
    np.testing.assert_allclose(logits(switched), wanted, atol=1e-5)
    with pytest.raises(UserError, match="cannot be combined") as error:
        with_adapter(base, again, "0.5", **quiet)
    assert "DoRA" in error.value.screen()


@pytest.mark.parametrize("tied", [False, True])
def test_norms_and_head_have_a_dtype_of_their_own(tied: bool, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    base, mesh = open_base(str(folder)), make_mesh()
    config = sft.get_config(f"model={folder},method=lora")
    config.model.update(
        {"param_dtype": "bfloat16", "norm_dtype": "float32", "head_dtype": "float32"}
    )
    shape = prepare_shape(config, base, mesh)
    _, frozen, _ = load_variables(config, base, shape, mesh)
    exact = dict(jax.tree.leaves_with_path(load_base(base, jnp.float32, mesh)))
    wide = set()
    for path, leaf in jax.tree.leaves_with_path(frozen):
        _, *names = (key.key for key in path)
        if leaf.dtype == jnp.float32:
            wide.add("norms" if names[-1] == "scale" else names[0])
            np.testing.assert_array_equal(leaf, exact[path])
        else:
            assert leaf.dtype == jnp.bfloat16 and names[-1] != "scale"
    assert wide == {"norms", "embed_tokens" if tied else "lm_head"}
    sizes = estimate(config, shape, 16, mesh)
    assert sizes["frozen weights"] == sum(
        leaf.nbytes for leaf in jax.tree.leaves(frozen)
    )


def test_base_hash_is_of_the_weights_alone(tiny_llama: Path, tmp_path: Path) -> None:
    wanted = open_base(str(tiny_llama)).hash
    sharded = make_tiny_checkpoint(tmp_path / "sharded", shards=3)
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    assert open_base(str(sharded)).hash == wanted
    assert open_base(str(other)).hash != wanted


@pytest.mark.parametrize("named", ["neither", "both"])
def test_one_of_model_and_workdir(named: str, tiny_llama: Path, run: Path) -> None:
    both: dict[str, Any] = {}
    if named == "both":
        both = {"model": str(tiny_llama), "workdir": str(run)}
    with pytest.raises(UserError, match="say what to use"):
        open_policy(**both)


def test_a_run_gives_its_best_step_or_its_last(run: Path) -> None:
    best = open_policy(workdir=str(run), **quiet)
    last = open_policy(workdir=str(run), weights="last", **quiet)
    assert (best.step, last.step) == (20, 30)
    assert "step 20 (best by eval loss)" in best.label
    assert np.abs(logits(best) - logits(last)).max() > 1e-3


def test_a_run_without_a_best(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, steps=((5, None), (6, None)))
    assert open_policy(workdir=str(run), **quiet).step == 6
    with pytest.raises(UserError, match="no best checkpoint"):
        open_policy(workdir=str(run), weights="best", **quiet)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint to use"):
        open_policy(workdir=str(run), **quiet)


def test_a_full_run_has_its_own_weights(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, method="full")
    tuned = open_policy(workdir=str(run), **quiet)
    assert set(tuned.variables) == {"params"}
    assert tuned.plan is None
    base = open_policy(model=str(tiny_llama), **quiet)
    assert np.abs(logits(tuned) - logits(base)).max() > 1e-3


def test_an_adapter_on_its_base_equals_the_run(
    run: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    policy = open_policy(workdir=str(run), **quiet)
    assert policy.plan is not None
    found = policy.base.hash
    save_adapter(tmp_path / "a", policy.variables["lora"], policy.plan, "x", found)
    sources: list[dict[str, Any]] = [{"model": str(tiny_llama)}, {"workdir": str(run)}]
    for source in sources:
        again = open_policy(**source, adapter=str(tmp_path / "a"), **quiet)
        np.testing.assert_array_equal(logits(again), logits(policy))
    merged = {"params": merge(policy.variables["params"], policy.variables["lora"])}
    tokens = jnp.asarray([IDS], jnp.int32)
    rows = (tokens, jnp.arange(len(IDS))[None], jnp.ones_like(tokens))
    plain = policy.model.apply(merged, *rows, method="logits")[0]
    np.testing.assert_allclose(np.asarray(plain), logits(policy), atol=2e-5)


def test_an_adapter_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    policy = open_policy(workdir=str(run), **quiet)
    assert policy.plan is not None
    lora, found = policy.variables["lora"], policy.base.hash
    save_adapter(tmp_path / "a", lora, policy.plan, "x", found)
    with pytest.raises(UserError, match="another base: same shapes, other weights"):
        open_policy(model=str(other), adapter=str(tmp_path / "a"), **quiet)
    notes: list[str] = []
    save_adapter(tmp_path / "b", lora, policy.plan, "x", None)
    open_policy(model=str(other), adapter=str(tmp_path / "b"), note=notes.append)
    assert any("unverified" in note for note in notes)


def test_a_run_whose_base_was_replaced_is_refused(tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base")
    run = make_run(tmp_path / "run", base)
    shutil.rmtree(base)
    make_tiny_checkpoint(base, seed=1)
    with pytest.raises(UserError, match="another base"):
        open_policy(workdir=str(run), **quiet)


def test_an_adapter_on_a_full_run_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, method="full")
    with pytest.raises(UserError, match="belongs to the model"):
        open_policy(workdir=str(run), adapter=str(tmp_path), **quiet)


def test_what_is_no_run(tiny_llama: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "gone", tmp_path, tiny_llama):
        with pytest.raises(UserError, match="not the folder of a run") as error:
            open_policy(workdir=str(folder), **quiet)
    assert f"--model={tiny_llama}" in error.value.screen()


def test_no_config_inside_a_run_is_executed(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\n"
    for name in ("config.py", "sft.py", "get_config.py", "conftest.py", "__init__.py"):
        (copy / name).write_text(code)
    open_policy(workdir=str(copy), **quiet)
    assert not canary.exists()


@pytest.mark.parametrize("chat", [True, False])
def test_a_run_on_conversations_is_a_chat(
    chat: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, chat=chat)
    assert open_policy(workdir=str(run), **quiet).chat is chat
