"""Reward models in files: out and in again, the same scores, or a screen that says why.

That transformers and PEFT read the same scores is what `goldens.check_reward` measures.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import reward, sft
from ftjax import cli, evaluate, export, generate, train
from ftjax.checkpoints.peft import HASH_KEY, read_metadata
from ftjax.errors import UserError
from ftjax.loading import open_base
from ftjax.models.names import count_params
from ftjax.prepare import load_variables, prepare
from tests.runs import make_run
from tests.tiny import make_tiny_checkpoint

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "base_model.model.score.weight"
PAIRS = [
    {"prompt": "the", "chosen": " thing", "rejected": " end in the end"},
    {"prompt": "on the", "chosen": " in a", "rejected": " re"},
] * 4


class Commands:
    """The commands, in this process; a screen where one refuses."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.capsys, self.count = folder, capsys, 0
        self.rows = folder / "pairs.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:2]))

    def __call__(self, entry: Any, *argv: str, refused: bool = False) -> str:
        got = cli.run(entry.main, list(argv), entry.define, config=entry is evaluate)
        _, err = self.capsys.readouterr()
        assert got == (2 if refused else 0), err
        return err

    def export(self, to: str, *argv: str, refused: bool = False) -> tuple[Path, str]:
        self.count += 1
        out = self.folder / f"out-{self.count}"
        wide = ["--dtype=float32"] if to == "merged" else []
        flags = [f"--to={to}", f"--out={out}", *wide, *argv]
        return out, self(export, *flags, refused=refused)

    def scores(self, *argv: str) -> np.ndarray:
        """[rows, (chosen, rejected)]."""
        self.count += 1
        out = self.folder / f"{self.count}.jsonl"
        flags = [f"--data={self.rows}", "--to=scores", f"--out={out}"]
        self(evaluate, *argv, *flags)
        lines = map(json.loads, out.read_text().splitlines())
        return np.array([[row["chosen"], row["rejected"]] for row in lines])


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, capsys)


def made(folder: Path, model: Path, method: str, **values: Any) -> str:
    run = make_run(folder, model, method=method, task="reward", **values)
    return f"--workdir={run}"


@pytest.mark.parametrize(
    ("method", "tied", "values"),
    [
        ("lora", True, {"targets": "v_proj", "also_train": "embed_tokens,.*norm"}),
        ("qlora", False, {"rank": 2}),
    ],
)
def test_an_adapter_has_its_head(
    method: str, tied: bool, values: dict[str, Any], tmp_path: Path, run: Commands
) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    source = made(tmp_path / "run", model, method, **values)
    wanted = run.scores(source)
    assert np.abs(wanted[:, 0] - wanted[:, 1]).min() > 0.1
    out, _ = run.export("peft", source)
    config, tensors = json.loads((out / CONFIG).read_text()), load_file(out / ADAPTER)
    assert config["task_type"] == "SEQ_CLS" and "score" in config["modules_to_save"]
    assert tensors[HEAD].shape == (1, 64)
    assert not any("lm_head" in name for name in tensors)
    assert "num_labels=1, pad_token_id=0" in (out / "README.md").read_text()
    if method != "qlora":  # whose adapter goes over other weights than the run's
        both = (f"--model={model}", f"--adapter={out}")
        np.testing.assert_allclose(run.scores(*both), wanted, atol=1e-5)
    merged, _ = run.export("merged", source)
    again = run.scores(f"--model={merged}")
    np.testing.assert_allclose(again, wanted, atol=1e-4)


@pytest.mark.parametrize("pad", ["<|pad|>", "<|im_end|>"])
def test_a_full_run_is_a_model_for_sequence_classification(
    pad: str, tmp_path: Path, run: Commands
) -> None:
    """Rows are filled up by no token that ends an answer: its score is read there."""
    model = make_tiny_checkpoint(tmp_path / "model", pad_token_id=None)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["pad_token"] = pad
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    source = made(tmp_path / "run", model, "full")
    out, _ = run.export("merged", source)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["num_labels"] == len(config["id2label"]) == 1
    assert config["pad_token_id"] == (0 if pad == "<|pad|>" else None)
    assert ("one row at a time" in (out / "README.md").read_text()) == (
        pad == "<|im_end|>"
    )
    assert not {"lm_head.weight"} & load_file(out / "model.safetensors").keys()
    own = run.scores(f"--model={out}")
    np.testing.assert_allclose(own, run.scores(source), atol=1e-6)
    again, _ = run.export("merged", f"--model={out}")
    stored = [load_file(folder / "model.safetensors") for folder in (out, again)]
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        np.testing.assert_array_equal(stored[1][name], tensor)


def test_it_scores_and_does_nothing_else(tmp_path: Path, run: Commands) -> None:
    model = make_tiny_checkpoint(tmp_path / "model")
    source = made(tmp_path / "run", model, "lora", rank=2)
    adapter, _ = run.export("peft", source)
    merged, _ = run.export("merged", source)
    over = (f"--model={model}", f"--adapter={adapter}")
    for what in ((source,), over, (f"--model={merged}",)):
        screen = run(generate, *what, "--prompt=the", refused=True)
        assert "writes nothing" in screen and "--to=scores" in screen
    task = "--config=configs/reward.py"
    data = f"--data={run.rows}"
    run(evaluate, task, f"--model={merged}", data)
    screen = run(evaluate, f"--model={merged}", data, refused=True)
    assert "configs/reward.py" in screen
    _, screen = run.export("merged", source, "--requantize=nf4", refused=True)
    assert "does not fit" in screen and "score" in screen
    weights = (f"--adapter={adapter},{adapter}", f"--model={model}")
    _, screen = run.export("peft", *weights, refused=True)
    assert "with score" in screen
    config = sft.get_config(f"model={merged}")
    config.data.train = str(run.rows)
    with pytest.raises(UserError, match="not a causal language model"):
        train.run(config, str(tmp_path / "no"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_head_of_logits_is_not_even_read(
    method: str, tmp_path: Path, run: Commands
) -> None:
    """Of an untied model; it stays the same base to its adapter."""
    model = make_tiny_checkpoint(tmp_path / "model")
    config = reward.get_config(f"model={model},method={method}")
    config.data.update({"train": str(run.rows), "eval": "", "max_length": 32})
    config.optim.warmup = 0
    ready = prepare(config)
    trained, frozen, _ = load_variables(config, ready.base, ready.shape, ready.mesh)
    whole = open_base(str(model))
    assert "lm_head" not in {**trained, **frozen}.get("params", {})
    assert not whole.spec.tied and ready.base.hash == whole.hash
    both = jax.tree.leaves(ready.shape.params)
    head = whole.spec.d_model * whole.spec.vocab_size
    assert sum(x.size for x in both) == count_params(whole.spec) - head


@pytest.mark.parametrize("method", ["bottleneck", "prompt"])
def test_what_has_no_place_in_the_files_says_so(
    method: str, tiny_llama: Path, tmp_path: Path, run: Commands
) -> None:
    source = made(tmp_path / "run", tiny_llama, method)
    assert np.isfinite(run.scores(source)).all()
    _, screen = run.export("peft", source, refused=True)
    assert {"bottleneck": "no adapter", "prompt": "reward model"}[method] in screen
    run.export("merged", source, refused=True)


def test_a_run_leaves_an_adapter_with_its_head(tmp_path: Path, run: Commands) -> None:
    """Also of a method that writes another update than it has trained."""
    model = make_tiny_checkpoint(tmp_path / "model", pad_token_id=None)
    config = reward.get_config(f"model={model}")
    config.data.train = str(run.rows)
    run.rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    config.data.eval, config.data.max_length = "", 32
    config.method.init, config.method.rank = "pissa", 2
    config.optim.lr, config.optim.warmup = 0.05, 0
    config.train.steps, config.train.batch_size = 1, 4
    config.log.tensorboard = False
    folder = tmp_path / "run"
    train.run(config, str(folder))
    adapter = folder / "adapter"
    head = load_file(adapter / ADAPTER)[HEAD]
    assert np.abs(head).max() > 0.01
    wanted = run.scores(f"--workdir={folder}")
    found = run.scores(f"--model={model}", f"--adapter={adapter}")
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_an_adapter_of_another_program(tmp_path: Path, run: Commands) -> None:
    """PEFT also names the head of other models, and may have more than one label."""
    model = make_tiny_checkpoint(tmp_path / "model")
    source = made(tmp_path / "run", model, "lora", rank=2)
    out, _ = run.export("peft", source)
    config, tensors = json.loads((out / CONFIG).read_text()), load_file(out / ADAPTER)
    assert read_metadata(out / ADAPTER)[HASH_KEY]
    config["modules_to_save"] = ["classifier", "score"]
    (out / CONFIG).write_text(json.dumps(config))
    save_file(tensors, out / ADAPTER)
    both = (f"--model={model}", f"--adapter={out}")
    np.testing.assert_allclose(run.scores(*both), run.scores(source), atol=1e-6)
    data = (f"--data={run.rows}", "--to=scores", f"--out={tmp_path / 'none'}")
    for head in (None, np.zeros((2, 64), np.float32)):
        other = {name: x for name, x in tensors.items() if name != HEAD}
        save_file(other | ({} if head is None else {HEAD: head}), out / ADAPTER)
        screen = run(evaluate, *both, *data, refused=True)
        assert HEAD in screen and "[1, 64]" in screen
    merged, _ = run.export("merged", source)
    file = merged / "model.safetensors"
    for size in (0, 3):
        other = load_file(file)
        other.pop("score.weight", None)
        if size:
            other["score.weight"] = np.zeros((size, 64), np.float32)
        save_file(other, file)
        screen = run(evaluate, f"--model={merged}", *data, refused=True)
        assert "no reward model" in screen and "[1, 64]" in screen
