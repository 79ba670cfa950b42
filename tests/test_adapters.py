"""Several adapters through the commands: added up, one for each prompt, switched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax import cli, evaluate, export, generate
from ftjax.checkpoints.peft import save_adapter
from ftjax.console import printable
from ftjax.decoding.generator import Generator
from ftjax.decoding.sampling import Sampling
from ftjax.errors import UserError
from ftjax.loading import open_base
from ftjax.policy import open_policy
from ftjax.switch import Switch, with_adapter
from tests.goldens import check_peft
from tests.runs import make_run
from tests.tiny import make_tiny_checkpoint

IDS = [1, 70, 80, 90, 100, 110]
Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def two(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters of one base, of different ranks and targets."""
    base, folder = open_base(str(tiny_llama)), tmp_path_factory.mktemp("adapters")
    for name, settings in (
        ("first", {"rank": 2, "targets": "q_proj,down_proj"}),
        ("second", {"rank": 3, "alpha": 5.0}),
    ):
        _, plan, lora = check_peft.random_adapter(base.spec, settings)
        save_adapter(folder / name, lora, plan, "base", base.hash)
    return [str(folder / "first"), str(folder / "second")]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(command: Any, *argv: str, code: int = 0) -> dict[str, Any]:
        config = command is evaluate
        got = cli.run(command.main, [*argv, "--json"], command.define, config=config)
        out, err = capsys.readouterr()
        assert got == code, err
        return json.loads(out) if code == 0 else {"screen": err}

    return call


def logits(policy: Any) -> np.ndarray:
    tokens = jnp.asarray([IDS], jnp.int32)
    rows = (tokens, jnp.arange(len(IDS))[None], jnp.ones_like(tokens))
    return np.asarray(policy.model.apply(policy.variables, *rows, method="logits")[0])


def test_each_prompt_uses_its_adapter(
    tiny_llama: Path, two: list[str], call: Call
) -> None:
    names = ["none", *two]
    common = (f"--model={tiny_llama}", "--max_new_tokens=6", "--ignore_eos")
    prompts = ["--prompt=the", "--prompt=the", "--prompt=on a", "--prompt=the"]
    adapters = f"--adapter={','.join(names)}"
    found = call(generate, *common, adapters, *prompts, "--use=2,0,1,1")["results"]
    assert [row.pop("adapter") for row in found] == [names[k] for k in (2, 0, 1, 1)]
    for row, prompt, k in zip(found, prompts, (2, 0, 1, 1), strict=True):
        assert row == call(generate, *common, f"--adapter={names[k]}", prompt)
    assert len({tuple(found[i]["tokens"]) for i in (0, 1, 3)}) == 3


@pytest.mark.parametrize("rank", [0, 2])
def test_a_sum_is_exported_as_one_adapter(
    rank: int, tiny_llama: Path, two: list[str], tmp_path: Path, call: Call
) -> None:
    flags = [f"--adapter={','.join(two)}", "--adapter_weights=0.7,-0.4"]
    flags += [f"--adapter_rank={rank}", f"--model={tiny_llama}"]
    made = call(export, *flags, "--to=peft", f"--out={tmp_path / 'sum'}")
    assert "0.7 * " in made["from"]
    summed = open_policy(
        model=str(tiny_llama),
        adapter=",".join(two),
        adapter_weights="0.7,-0.4",
        adapter_rank=rank,
    )
    again = open_policy(model=str(tiny_llama), adapter=str(tmp_path / "sum"))
    np.testing.assert_allclose(logits(again), logits(summed), atol=1e-5)
    assert again.plan is not None
    ranks = {r for at in again.plan.sites.values() for r in at.ranks}
    assert ranks == ({2} if rank else {3, 5})
    call(export, *flags, "--to=merged", f"--out={tmp_path / 'whole'}")
    whole = open_policy(model=str(tmp_path / "whole"))
    np.testing.assert_allclose(logits(whole), logits(summed), atol=1e-4)


def test_an_open_policy_takes_another(tiny_llama: Path, two: list[str]) -> None:
    policy = open_policy(model=str(tiny_llama), adapter=two[0])
    other = with_adapter(policy, two[1])
    wanted = open_policy(model=str(tiny_llama), adapter=two[1])
    np.testing.assert_array_equal(logits(other), logits(wanted))
    both = (jax.tree.leaves(p.variables["params"]) for p in (policy, other))
    assert all(before is after for before, after in zip(*both, strict=True))
    plain = with_adapter(other, "none")
    assert "lora" not in plain.variables
    assert list(plain.adapters) == [*two, "none"]
    np.testing.assert_array_equal(logits(with_adapter(plain, two[0])), logits(policy))


def test_a_run_is_left_and_found_again(tiny_llama: Path, tmp_path: Path) -> None:
    policy = open_policy(workdir=str(make_run(tmp_path / "lora", tiny_llama, rank=2)))
    generator = Generator(policy.base.spec, policy.variables, apart=True)
    before = generator.generate([IDS], 5)
    switch = Switch(policy, generator)
    assert switch("/adapter none")
    plain = Generator(policy.base.spec, {"params": policy.variables["params"]})
    assert generator.generate([IDS], 5) == plain.generate([IDS], 5) != before
    assert switch("/adapter run")
    assert generator.generate([IDS], 5) == before
    assert not switch("/adapt") and not switch("what is an /adapter?")


def test_weights_of_their_own_take_no_adapter(
    tiny_llama: Path, two: list[str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "full", tiny_llama, method="full")
    with pytest.raises(UserError, match="belongs to the model"):
        with_adapter(open_policy(workdir=str(run)), two[0])


def test_a_chat_switches(
    tiny_llama: Path,
    two: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = open_policy(model=str(tiny_llama), adapter=",".join(two))
    spec = policy.base.spec
    generator = Generator(spec, policy.variables, release=True, apart=True)
    script = ["the", "/adapter first", "the", "/adapter second", "the", "/adapters"]
    script += ["/adapter gone", "/adapter", "/adapter none", "the", "/quit"]
    lines = iter(script)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    tokenizer = policy.base.tokenizer
    command = Switch(policy, generator, ",".join(two))
    capsys.readouterr()
    generate.talk(generator, tokenizer, 5, Sampling(), chat=False, command=command)
    shown = capsys.readouterr().out
    ids = generate.encode_prompt(tokenizer, "the", chat=False)
    texts = set()
    for name in (",".join(two), *two, "none"):
        alone = open_policy(model=str(tiny_llama), adapter=name)
        made = Generator(spec, alone.variables, apart=True).generate([ids], 5)[0]
        text = tokenizer.decode(ids + made.tokens)[len(tokenizer.decode(ids)) :]
        assert f"{printable(text)}\n" in shown
        texts.add(text)
    assert len(texts) == 4
    listing = f"  none\n  {two[0]}\n* {two[1]}\n"
    assert shown.count(listing) == 2
    assert "not the folder of an adapter" in shown


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--adapter=A,/gone"], ["not the folder of an adapter", "/gone"]),
        (["--adapter=A,"], ["no name"]),
        (["--adapter=A,B", "--adapter_weights=1"], ["as many weights as", "1: 1"]),
        (["--adapter_weights=1"], ["as many weights as", "none given"]),
        (["--adapter=A", "--adapter_weights=x"], ["no number", "'x'"]),
        (["--adapter=A", "--adapter_weights=nan"], ["no number", "'nan'"]),
        (["--adapter_rank=3"], ["a rank without adapters"]),
        (["--adapter=A,B", "--use=0,2"], ["not there", "1 (B)", "got:      2"]),
        (["--adapter=A,B", "--use=-1,0"], ["not there", "-1"]),
        (["--adapter=A,B", "--use=0"], ["as many uses as prompts", "expected: 2"]),
        (["--use=0,0"], ["not there", "--adapter=DIR,DIR"]),
        (["--adapter=A,B", "--use=0,1", "--adapter_weights=1,2"], ["--use", "sum"]),
    ],
)
def test_refused(
    flags: list[str], parts: list[str], tiny_llama: Path, two: list[str], call: Call
) -> None:
    def named(text: str) -> str:
        for letter, folder in zip("AB", two, strict=True):
            text = text.replace(letter, folder)
        return text

    argv = [f"--model={tiny_llama}", *map(named, flags)]
    screen = call(generate, *argv, "--prompt=a", "--prompt=b", code=2)["screen"]
    for part in parts:
        assert named(part) in screen


def test_an_adapter_of_another_base_is_refused(
    two: list[str], tmp_path: Path, call: Call
) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the thing"}\n')
    flags = (f"--model={other}", f"--adapter=none,{two[0]}", f"--data={data}")
    screen = call(evaluate, *flags, code=2)["screen"]
    assert "another base: same shapes, other weights" in screen
    assert two[0] in screen


def test_nothing_to_export(tiny_llama: Path, tmp_path: Path, call: Call) -> None:
    flags = (f"--model={tiny_llama}", "--adapter=none", f"--out={tmp_path / 'x'}")
    screen = call(export, *flags, "--to=peft", code=2)["screen"]
    assert "there is no adapter to export" in screen
