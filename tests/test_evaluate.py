"""The command that evaluates: exact sums over every trained token."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from configs import sft
from ftjax import cli, evaluate, train
from ftjax.export import write_adapter
from ftjax.policy import open_policy
from tests.runs import make_run
from tests.tiny import make_tiny_checkpoint

TEXTS = ["the thing in the end", "on", "a re er on the the in", "thing " * 40]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: str, code: int = 0) -> dict[str, Any]:
        got = cli.run(evaluate.main, [*argv, "--json"], evaluate.define, config=True)
        out, err = capsys.readouterr()
        assert got == code, err
        return json.loads(out.splitlines()[-1]) if code == 0 else {"screen": err}

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def naive(folder: Path, texts: list[str], most: int = 512) -> tuple[float, int, int]:
    """(sum of -log p, tokens right, tokens) of every token after the first."""
    policy = open_policy(model=str(folder))
    tokenizer = policy.base.tokenizer
    total, right, count = 0.0, 0, 0
    for text in texts:
        ids = tokenizer.encode([text], add_special=True)[0]
        assert tokenizer.eos_id is not None
        ids += [tokenizer.eos_id] if ids[-1] != tokenizer.eos_id else []
        row = jnp.asarray([ids[:most]], jnp.int32)
        rest = (jnp.arange(row.shape[1])[None], jnp.ones_like(row))
        logits = policy.model.apply(policy.variables, row, *rest, method="logits")[0]
        logp = jax.nn.log_softmax(logits[:-1])
        targets = row[0, 1:]
        total -= float(jnp.take_along_axis(logp, targets[:, None], axis=1).sum())
        right += int((logits[:-1].argmax(-1) == targets).sum())
        count += len(targets)
    return total, right, count


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_rows(batch_size: int, tiny_llama: Path, tmp_path: Path, run: Any) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    found = run(f"--model={tiny_llama}", f"--data={data}", f"--batch_size={batch_size}")
    total, right, count = naive(tiny_llama, TEXTS)
    assert found["tokens"] == count
    assert found["rows"] == 4
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(right / count)


def test_a_text_file_loses_no_token(tiny_llama: Path, tmp_path: Path, run: Any) -> None:
    """As configs/generic.py reads it: whole documents, in windows."""
    data = tmp_path / "d.txt"
    data.write_text("the thing\nin the end\n<|endoftext|>\n" + "on a re " * 40)
    own = run(f"--model={tiny_llama}", f"--data={data}", "--max_length=32")
    config = f"--config=configs/generic.py:model={tiny_llama}"
    assert own == run(config, f"--data={data}", "--max_length=32")
    assert own["rows"] == 2 and own["truncated"] == 0 and own["bits_per_byte"] > 0


def test_a_run_reads_its_own_held_out_rows_as_it_read_them(
    tiny_llama: Path, tmp_path: Path, run: Any
) -> None:
    rows = [{"prompt": f"on {i}", "completion": "the thing " * i} for i in range(9)]
    config = sft.get_config(f"model={tiny_llama}")
    data = write(tmp_path / "d.jsonl", [*rows, {"odd": 1}])
    config.data.update({"train": data, "eval": data, "on_bad_row": "skip"})
    config.data.update({"max_length": 24, "eval_rows": 7, "completion_only": False})
    config.train.update({"steps": 2, "batch_size": 4})
    config.log.tensorboard = False
    told = train.run(config, str(tmp_path / "run"))["eval"]
    found = run(f"--workdir={tmp_path / 'run'}", "--weights=last")
    assert found["truncated"] > 0
    for name in ("loss", "tokens", "token_accuracy"):
        assert found[name] == pytest.approx(told[name], rel=1e-5), name
    longer = run(f"--workdir={tmp_path / 'run'}", "--max_length=200")
    assert longer["truncated"] == 0 and longer["tokens"] > found["tokens"]


def test_long_rows_are_cut_and_counted(
    tiny_llama: Path, tmp_path: Path, run: Any
) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    found = run(f"--model={tiny_llama}", f"--data={data}", "--max_length=16")
    total, _, count = naive(tiny_llama, TEXTS, 16)
    assert (found["tokens"], found["truncated"]) == (count, 2)
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)


def test_completions_only_or_not(tiny_llama: Path, tmp_path: Path, run: Any) -> None:
    rows = [{"prompt": "the thing", "completion": " in the end"}]
    data = write(tmp_path / "d.jsonl", rows)
    common = (f"--model={tiny_llama}", f"--data={data}")
    only, whole = run(*common), run(*common, "--nocompletion_only")
    assert 0 < only["tokens"] < whole["tokens"]


def test_a_run_says_which_step(tiny_llama: Path, tmp_path: Path, run: Any) -> None:
    folder = make_run(tmp_path / "run", tiny_llama, rank=2, steps=((7, None),))
    data = write(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    tuned = run(f"--workdir={folder}", f"--data={data}")
    base = run(f"--model={tiny_llama}", f"--data={data}")
    assert "step 7" in tuned["model"]
    assert tuned["tokens"] == base["tokens"]
    assert abs(tuned["loss"] - base["loss"]) > 1e-3


def test_one_adapter_after_another(tiny_llama: Path, tmp_path: Path, run: Any) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": text} for text in TEXTS])
    common = (f"--model={tiny_llama}", f"--data={data}")
    folders = []
    for name in ("ia3", "lora"):
        made = make_run(tmp_path / f"{name}-run", tiny_llama, method=name)
        folders.append(str(tmp_path / name))
        write_adapter(tmp_path / name, open_policy(workdir=str(made)))
    alone = [run(*common)] + [run(*common, f"--adapter={f}") for f in folders]
    several = f"--adapter=none,{','.join(folders)}"
    found = run(*common, several, "--use=2,0,1")
    assert [r["adapter"] for r in found["results"]] == [folders[1], "none", folders[0]]
    wanted = [alone[i]["loss"] for i in (2, 0, 1)]
    assert [r["loss"] for r in found["results"]] == pytest.approx(wanted, rel=1e-6)
    assert len({round(loss, 3) for loss in wanted}) == 3
    assert "is not there" in run(*common, several, "--use=3", code=2)["screen"]
    weighed = ("--use=1", "--adapter_weights=1,1,1")
    assert "sum of all" in run(*common, several, *weighed, code=2)["screen"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "nothing to evaluate on"),
        (["--data=/no/such.jsonl"], "/no/such.jsonl"),
        (["--data=DATA", "--max_length=9999"], "--max_length"),
        (["--data=DATA", "--batch_size=0"], "--batch_size"),
    ],
)
def test_refused(
    flags: list[str], part: str, tiny_llama: Path, tmp_path: Path, run: Any
) -> None:
    data = write(tmp_path / "d.jsonl", [{"text": "the"}])
    named = [flag.replace("DATA", data) for flag in flags]
    assert part in run(f"--model={tiny_llama}", *named, code=2)["screen"]


def test_a_model_that_knows_nothing_needs_log_v_bits_a_token(
    tmp_path: Path, run: Any
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:] = 0  # every token is as likely as any other
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    size = tensors["lm_head.weight"].shape[0]
    text = "the naïve thing in the 日本 end\n" * 9
    data = tmp_path / "d.txt"
    data.write_text(text + "<|endoftext|>\n" + "on\nand on 😀", encoding="utf-8")
    common = (f"--model={folder}", f"--data={data}", "--max_length=32")
    found = run(*common, "--separator=<|endoftext|>", "--overlong=split")
    predicted = text.strip("\n") + "on\nand on 😀"  # BOS is before the first token
    assert (found["rows"], found["truncated"]) == (2, 0)
    bits = found["tokens"] * math.log2(size) / len(predicted.encode())
    assert found["perplexity"] == pytest.approx(size, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["byte_perplexity"] == pytest.approx(2**bits, rel=1e-5)
    # One stream predicts the BOS of the second text too.
    joined = run(*common, "--separator=<|endoftext|>", "--join")
    assert joined["tokens"] == found["tokens"] + 1
