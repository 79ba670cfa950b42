"""The command that continues prompts and talks."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from ftjax import cli, generate
from ftjax.data.tokenizer import load_tokenizer
from ftjax.decoding.generator import Generator
from ftjax.decoding.sampling import Sampling
from ftjax.policy import open_policy
from tests.cli import run_cli
from tests.conftest import ROOT
from tests.runs import make_run
from tests.tiny import make_tiny_checkpoint

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str, code: int = 0) -> dict[str, Any]:
        got = cli.run(generate.main, [*argv, "--json"], generate.define)
        out, err = capsys.readouterr()
        assert got == code, err
        return json.loads(out) if code == 0 else {"screen": err}

    return run


def test_reference_through_the_command(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    result = run_cli(
        "generate",
        f"--model={folder}",
        f"--prompt={reference['prompt']}",
        "--max_new_tokens=40",
        "--temperature=0",
        "--json",
    ).ok()
    assert result.json is not None
    prompt, whole = reference["prompt_ids"], reference["greedy_from_bos_ids"]
    assert whole[: len(prompt)] == prompt
    assert result.json["tokens"] == whole[len(prompt) : len(prompt) + 40]
    text = result.json["prompt"] + result.json["text"]
    assert reference["greedy_from_bos_text"].startswith(text)


def test_several_prompts_are_what_each_is_alone(tiny_llama: Path, run: Run) -> None:
    texts = ["the thing", "on", "in the end, a re"]
    flags = [f"--prompt={text}" for text in texts]
    common = (f"--model={tiny_llama}", "--max_new_tokens=7", "--ignore_eos")
    batch = run(*common, *flags)
    assert [r["prompt"] for r in batch["results"]] == texts
    assert batch["tokens"] == batch["results"][0]["tokens"]
    alone = run(*common, flags[1])
    assert alone == batch["results"][1]
    assert len(alone["tokens"]) == 7
    assert "results" not in alone


def test_prompts_from_standard_input(tiny_llama: Path) -> None:
    flags = (f"--model={tiny_llama}", "--max_new_tokens=3", "--json")
    result = run_cli("generate", *flags, stdin="the\nthing\n").ok()
    assert result.json is not None
    assert [r["prompt"] for r in result.json["results"]] == ["the", "thing"]


def test_a_chat_run_uses_its_template(
    tiny_llama: Path, tmp_path: Path, run: Run
) -> None:
    folder = make_run(tmp_path / "run", tiny_llama, chat=True, rank=2)
    common = (f"--workdir={folder}", "--prompt=the", "--max_new_tokens=4")
    auto = run(*common)
    assert auto == run(*common, "--template=chat")
    raw = run(*common, "--template=raw")
    assert auto["prompt_tokens"] > raw["prompt_tokens"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "say what to use"),
        (["--model=DIR", "--workdir=x"], "say what to use"),
        (["--model=DIR", "--prompt=" + "a " * 600], "longer than the model's context"),
        (["--model=DIR", "--prompt=a", "--temperature=-1"], "--temperature"),
        (["--model=DIR", "--prompt=a", "--top_p=2"], "--top_p"),
        (["--model=DIR", "--prompt=a", "--max_new_tokens=0"], "--max_new_tokens"),
        (["--model=DIR", "--prompt=a", "--adapter=/none"], "folder of an adapter"),
    ],
)
def test_refused(flags: list[str], part: str, tiny_llama: Path, run: Run) -> None:
    named = [flag.replace("DIR", str(tiny_llama)) for flag in flags]
    assert part in run(*named, code=2)["screen"]


def test_chat_on_the_terminal(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = open_policy(model=str(tiny_llama))
    made = Generator(policy.base.spec, policy.variables, dtype=jnp.float32)
    seen: list[int] = []
    tokenizer = policy.base.tokenizer
    encode = tokenizer.encode_chat

    def note(messages: list[dict[str, Any]]) -> list[int]:
        seen.append(len(messages))
        return encode(messages)

    monkeypatch.setattr(tokenizer, "encode_chat", note)
    lines = iter(["the", "", "on", "/reset", "in", "the " * 600, "/quit", "unread"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    generate.talk(made, tokenizer, 5, Sampling(), chat=True)
    assert seen == [1, 3, 1, 3]
    assert "longer than the model's context" in capsys.readouterr().out


def test_pieces_never_cut_a_character(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    text = "the café 🦊 thing"
    ids = tokenizer.encode([text], add_special=False)[0]
    pieces = list(generate.pieces(tokenizer, ids[:3], iter([[i] for i in ids[3:]])))
    assert "".join(pieces) == text[len(tokenizer.decode(ids[:3])) :]
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_model_decides_where_to_stop(tmp_path: Path, run: Run) -> None:
    plain = make_tiny_checkpoint(tmp_path / "plain")
    flags = ("--prompt=the", "--max_new_tokens=8")
    free = run(f"--model={plain}", *flags, "--ignore_eos")["tokens"]
    config = json.loads((plain / "generation_config.json").read_text())
    config["eos_token_id"] = [3, free[4]]
    (plain / "generation_config.json").write_text(json.dumps(config))
    made = run(f"--model={plain}", *flags)
    assert made["tokens"] == free[: free.index(free[4]) + 1]
    assert made["stopped"]


def test_prompts_that_are_no_text(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "ftjax.generate", f"--model={tiny_llama}"]
    done = subprocess.run(
        command, input=b"the\ncaf\xe9\n", capture_output=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert b"a prompt is no text" in done.stderr
