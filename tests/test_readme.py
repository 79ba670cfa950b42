"""Every command of the README runs, in order, as it stands there.

Runs go to a temporary folder and take two steps; `make setup` and `make test` are what
runs this; the demo has a test of its own.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BY_HAND = ("make setup", "make test", "make demo")
# That they run is what is looked at: programs are used for two steps each.
COMPILE_LESS = {"XLA_FLAGS": "--xla_backend_optimization_level=1"}
FAST = (
    "--config.train.steps=2",
    "--config.optim.warmup=1",
    "--config.data.eval_rows=16",
    "--config.train.sample_tokens=4",
)


def commands() -> list[str]:
    """The lines of the bash blocks, continued lines joined, comments cut."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+#.*", "", " ".join(line.split()))
            if command:
                found.append(command)
    return found


def arguments(command: str, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments of a command, its runs under `folder`."""
    own = folder / "rows.jsonl"
    own.write_text('{"prompt": "Two and two?", "completion": "Four."}\n' * 8)
    text = command.replace("runs/", f"{folder}/runs/")
    text = text.replace("model=PATH", "model=base").replace("eval=FILE", f"eval={own}")
    text = text.replace("train=FILE", f"train={own}")
    words = shlex.split(text)
    env = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    assert words[:2] == ["python", "-m"], command
    if words[2] == "ftjax.train":
        words += FAST
    if words[2] == "ftjax.evaluate":
        words += ["--max_length=64"]
    return env, [sys.executable, *words[1:]]


def test_the_readme_has_commands_of_every_entry() -> None:
    entries = {c.split("ftjax.")[1].split()[0] for c in commands() if "ftjax." in c}
    assert entries >= {"train", "check", "generate", "evaluate", "export"}
    others = [c for c in commands() if " -m " not in c]
    assert sorted(others) == sorted({*BY_HAND}), others


def test_every_command_runs(tmp_path: Path) -> None:
    for command in commands():
        if command in BY_HAND:
            continue
        env, words = arguments(command, tmp_path)
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=os.environ | COMPILE_LESS | env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )
        shown = f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, shown


@pytest.mark.long
def test_the_demo_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ftjax.demo", f"--runs={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("q_proj", "before", "after", "eval loss", "adapter", "ftjax.generate"):
        assert word in done.stdout
