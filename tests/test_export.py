"""The command that exports: whole or not at all, self-contained, the same logits."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from ftjax import cli, export
from ftjax.checkpoints.folder import write_folder
from ftjax.errors import UserError
from ftjax.policy import open_policy
from tests.runs import make_run
from tests.tiny import make_tiny_checkpoint

IDS = [1, 70, 80, 90, 100, 110]
TEXT_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values: dict[str, Any] = {
        "rank": 3,
        "rank_pattern": "down_proj=2",
        "alpha_pattern": "k_proj=5",
    }
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return make_run(folder, tiny_llama, steps=((20, 1.0), (30, 2.0)), **values)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*argv: str, code: int = 0) -> dict[str, Any]:
        got = cli.run(export.main, [*argv, "--json"], export.define)
        out, err = capsys.readouterr()
        assert got == code, err
        return json.loads(out) if code == 0 else {"screen": err}

    return call


def logits(**source: Any) -> np.ndarray:
    policy = open_policy(**source)
    tokens = jnp.asarray([IDS], jnp.int32)
    rows = (tokens, jnp.arange(len(IDS))[None], jnp.ones_like(tokens))
    return np.asarray(policy.model.apply(policy.variables, *rows, method="logits")[0])


def test_an_adapter(run: Path, tiny_llama: Path, tmp_path: Path, call: Any) -> None:
    out = tmp_path / "new" / "adapter"
    result = call(f"--workdir={run}", "--to=peft", f"--out={out}")
    assert result["step"] == 20
    assert "step 20" in result["from"]
    names = {path.name for path in out.iterdir()}
    assert names == TEXT_FILES | {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    }
    again = logits(model=str(tiny_llama), adapter=str(out))
    np.testing.assert_array_equal(again, logits(workdir=str(run)))
    with safe_open(out / "adapter_model.safetensors", "np") as file:
        assert len(file.metadata()["ftjax_base_hash"]) == 64
    assert json.loads((out / "adapter_config.json").read_text())["rank_pattern"] == {
        "down_proj": 2
    }


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_was_taken_off_its_base(
    init: str, tiny_llama: Path, tmp_path: Path, call: Any
) -> None:
    """Of twice the rank, over the published base; merged, it is the same model."""
    rank: dict[str, Any] = {
        "rank": 3,
        "rank_pattern": "down_proj=2",
        "use_rslora": True,
    }
    run = make_run(tmp_path / "run", tiny_llama, init=init, **rank)
    wanted = logits(workdir=str(run))
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    call(f"--workdir={run}", "--to=peft", f"--out={out}")
    again = logits(model=str(tiny_llama), adapter=str(out))
    np.testing.assert_allclose(again, wanted, atol=5e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["rank_pattern"] == {"down_proj": 4}
    assert config["init_lora_weights"] is True and not config["use_rslora"]
    assert "twice the rank" in (out / "README.md").read_text()
    call(f"--workdir={run}", "--to=merged", "--dtype=float32", f"--out={merged}")
    np.testing.assert_allclose(logits(model=str(merged)), wanted, atol=5e-5)
    assert np.abs(logits(model=str(tiny_llama)) - wanted).max() > 0.05


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_quantized_base_and_its_adapter(init: str, tmp_path: Path, call: Any) -> None:
    """Together they are the run; the codes are those that it had."""
    model = make_tiny_checkpoint(tmp_path / "model", dtype="bfloat16")
    values: dict[str, Any] = {"init": init, "rank": 4}
    if init == "loftq":
        values["loftq_iters"] = 3
    run = make_run(tmp_path / "run", model, method="qlora", **values)
    out = tmp_path / "pair"
    assert call(f"--workdir={run}", "--to=pair", f"--out={out}")["dtype"] == "bfloat16"
    adapter = out / "adapter"
    kept = open_policy(model=str(out), adapter=str(adapter))
    own = open_policy(workdir=str(run))
    for name in ("params", "quant"):
        jax.tree.map(
            np.testing.assert_array_equal, kept.variables[name], own.variables[name]
        )
    wanted = logits(workdir=str(run))
    found = logits(model=str(out), adapter=str(adapter))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    with pytest.raises(UserError, match="another base"):
        open_policy(model=str(model), adapter=str(adapter))


@pytest.mark.parametrize("method", ["ia3", "vera", "prompt", "prefix"])
def test_other_adapters(
    method: str, tiny_llama: Path, tmp_path: Path, call: Any
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, method=method)
    out, merged = tmp_path / "adapter", tmp_path / "merged"
    call(f"--workdir={run}", "--to=peft", f"--out={out}")
    wanted = logits(workdir=str(run))
    again = logits(model=str(tiny_llama), adapter=str(out))
    np.testing.assert_array_equal(again, wanted)
    assert np.abs(logits(model=str(tiny_llama)) - wanted).max() > 0.05
    flags = ("--to=merged", "--dtype=float32", f"--out={merged}")
    if method in ("ia3", "vera"):
        call(f"--workdir={run}", *flags)
        np.testing.assert_allclose(logits(model=str(merged)), wanted, atol=2e-5)
        return
    screen = call(f"--workdir={run}", *flags, code=2)["screen"]
    assert f"method={method}" in screen and "--to=peft" in screen
    sources = (f"--model={tiny_llama}", f"--adapter={out}")
    assert "does not fit into the weights" in call(*sources, *flags, code=2)["screen"]


@pytest.mark.parametrize("pattern", ["lm_head,.*norm", r"layers\.1.*norm,q_proj"])
def test_weights_beside_an_adapter(pattern: str, tmp_path: Path, call: Any) -> None:
    base = make_tiny_checkpoint(tmp_path / "base")
    values: dict[str, Any] = {"targets": "v_proj", "also_train": pattern}
    run = make_run(tmp_path / "run", base, **values)
    out, again = tmp_path / "adapter", tmp_path / "again"
    call(f"--workdir={run}", "--to=peft", f"--out={out}")
    wanted = logits(workdir=str(run))
    source = (f"--model={base}", f"--adapter={out}")
    np.testing.assert_array_equal(logits(model=str(base), adapter=str(out)), wanted)
    call(*source, "--to=peft", f"--out={again}")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert all((out / n).read_bytes() == (again / n).read_bytes() for n in names)
    both = (f"--model={base}", f"--adapter={out},{again}", "--to=peft", "--out=x")
    assert "use it alone" in call(*both, code=2)["screen"]


def test_an_update_of_a_weight_that_is_trained_too(tmp_path: Path, call: Any) -> None:
    base = make_tiny_checkpoint(tmp_path / "base")
    values: dict[str, Any] = {"targets": "v_proj", "also_train": ".*v_proj"}
    run = make_run(tmp_path / "run", base, **values)
    out = f"--out={tmp_path / 'out'}"
    screen = call(f"--workdir={run}", "--to=peft", out, code=2)["screen"]
    assert "layers.0.self_attn.v_proj.weight is trained, and has an update" in screen
    call(f"--workdir={run}", "--to=merged", out)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model(tied: bool, tmp_path: Path, call: Any) -> None:
    base = make_tiny_checkpoint(
        tmp_path / "base", dtype="bfloat16", tie_word_embeddings=tied
    )
    run = make_run(tmp_path / "run", base, rank=2)
    exact, stored = tmp_path / "exact", tmp_path / "stored"
    common = (f"--workdir={run}", "--to=merged")
    assert call(*common, f"--out={exact}", "--dtype=float32")["dtype"] == "float32"
    assert call(*common, f"--out={stored}")["dtype"] == "bfloat16"
    wanted = logits(workdir=str(run))
    np.testing.assert_allclose(logits(model=str(exact)), wanted, atol=2e-5)
    rounded = np.abs(logits(model=str(stored)) - wanted).max()
    assert 0 < rounded < 0.1
    assert np.abs(logits(model=str(base)) - wanted).max() > 0.1
    config = json.loads((exact / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert {path.name for path in exact.iterdir()} == TEXT_FILES | {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_a_full_run(tiny_llama: Path, tmp_path: Path, call: Any) -> None:
    run = make_run(tmp_path / "run", tiny_llama, method="full")
    out = tmp_path / "out"
    screen = call(f"--workdir={run}", "--to=peft", f"--out={out}", code=2)["screen"]
    assert "no adapter to export" in screen
    assert not out.exists()
    call(f"--workdir={run}", "--to=merged", f"--out={out}")
    np.testing.assert_array_equal(logits(model=str(out)), logits(workdir=str(run)))


def test_every_eos_is_written(tmp_path: Path, call: Any) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", eos_token_id=[1, 5])
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    run = make_run(tmp_path / "run", base, rank=2)
    call(f"--workdir={run}", "--to=peft", f"--out={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert sorted(found["eos_token_id"]) == [1, 3, 5]
    assert found["temperature"] == 0.6


def test_the_card_tells_no_secrets(run: Path, tmp_path: Path, call: Any) -> None:
    call(f"--workdir={run}", "--to=peft", f"--out={tmp_path / 'out'}")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "step 20 (best by eval loss)" in card
    assert "rank 2/3" in card


def test_nothing_is_overwritten(run: Path, tmp_path: Path, call: Any) -> None:
    common = (f"--workdir={run}", "--to=peft")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        screen = call(*common, f"--out={tmp_path / name}", code=2)["screen"]
        assert "not overwritten" in screen
    assert (tmp_path / "file").read_text() == "mine"


def test_never_into_the_source(tiny_llama: Path, tmp_path: Path, call: Any) -> None:
    run = make_run(tmp_path / "run", tiny_llama, rank=2)
    for out in (tiny_llama, tiny_llama / "sub"):
        call(f"--workdir={run}", "--to=peft", f"--out={out}", code=2)
    assert not (tiny_llama / "sub").exists()


def test_an_adapter_that_learned_nothing(
    tiny_llama: Path, tmp_path: Path, call: Any
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, rank=2, zero=True)
    flags = (f"--workdir={run}", "--to=peft", f"--out={tmp_path / 'out'}")
    assert "B is zero everywhere" in call(*flags, code=2)["screen"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--out=OUT"], "--to is not given"),
        (["--to=peft"], "--out is not given"),
        (["--to=onnx", "--out=OUT"], "peft|merged|gguf"),
        (["--to=merged", "--out=OUT", "--dtype=int8"], "--dtype"),
        (["--to=merged", "--out=OUT", "--dtype=q8_0"], "--to=gguf"),
        (["--to=merged", "--out=OUT", "--group=32"], "--requantize"),
    ],
)
def test_refused(flags: list[str], part: str, tmp_path: Path, call: Any) -> None:
    named = [flag.replace("OUT", str(tmp_path / "out")) for flag in flags]
    assert part in call(*named, code=2)["screen"]


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError) as error:
        write_folder(tmp_path / "out", fill)
    assert error.value.code == 4
    assert list(tmp_path.iterdir()) == []
