"""What goes wrong in training: no number, a loss that rises, a look that fails."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sft
from ftjax import job, train
from ftjax.checkpoints.state import Checkpoints
from ftjax.errors import EXIT_DIVERGED, EXIT_USER, UserError
from ftjax.evals.measure import evaluate
from ftjax.loop import compile_step
from ftjax.losses.sums import Sums
from ftjax.metrics import METRICS, read_rows
from ftjax.policy import open_policy
from ftjax.sharding import batch_sharding, make_mesh
from ftjax.step import MANY_SHAPES, compile_lean
from ftjax.watch import Watch, has_risen, is_better
from tests.faults.commands import write_rows
from tests.rl.small import PROMPTS, config_of, letters, write_prompts

HERE = "tests.faults.test_training_faults:"


def config(model: Path, rows: Path, **values: Any) -> Any:
    """A config of a few short steps; `values` have '__' for '.'."""
    c = sft.get_config(f"model={model},method=lora")
    c.data.train, c.data.eval, c.data.max_length = str(rows), str(rows), 64
    c.data.packing = False
    c.optim.lr, c.optim.warmup, c.optim.schedule = 1e-2, 0, "constant"
    c.train.update({"steps": 12, "batch_size": 4, "save_every": 2, "sample_rows": 0})
    c.train.update({"eval_every": 0, "log_every": 1})
    c.log.tensorboard = False
    for name, value in values.items():
        section, _, key = name.partition("__")
        c[section][key] = value
    return c


def saved_in(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir / "checkpoints", keep_last=9, report=print)


def test_r13_one_step_without_a_number_is_left_out(
    tiny: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {4})
    train.run(config(tiny, pairs), str(tmp_path / "run"))
    rows = read_rows(tmp_path / "run" / METRICS)
    skipped = {r["step"]: r["skipped"] for r in rows if r["split"] == "train"}
    assert [step for step, count in skipped.items() if count] == [5]
    assert skipped.keys() == set(range(1, 13))


def test_r13_many_of_them_end_the_run(
    tiny: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(5, 99)))
    with pytest.raises(UserError) as error:
        train.run(config(tiny, pairs, train__max_skipped=3), str(tmp_path / "run"))
    screen = error.value.screen()
    assert error.value.code == EXIT_DIVERGED
    for part in (
        "3 updates in a row",
        "step 8, of ",
        "pairs.jsonl:",
        "checkpoint: step",
    ):
        assert part in screen, screen
    checkpoints = saved_in(tmp_path / "run")
    assert checkpoints.latest() == 6
    kept = open_policy(workdir=str(tmp_path / "run"), dtype=jnp.float32).variables
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(kept))
    # What went on before goes on again, once the cause is gone.
    monkeypatch.undo()
    train.run(config(tiny, pairs, train__max_skipped=3), str(tmp_path / "run"))
    assert checkpoints.latest() == 12


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Of some steps, counted from 0, every frozen weight is no number."""

    def make(*args: Any) -> Any:
        step_fn = compile_step(*args)

        def step(state: Any, frozen: Any, batch: Any) -> Any:
            if int(state.step) in steps:
                frozen = jax.tree.map(lambda x: x * jnp.nan, frozen)
            return step_fn(state, frozen, batch)

        return step

    monkeypatch.setitem(job.STEPS, "jit", make)


def test_r14_a_rate_that_grows_too_far(
    tiny: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate of the last step is a hundred times a good one, and too much by then."""
    made = config(tiny, pairs, optim__lr=30.0, optim__warmup=59, train__steps=60)
    made.train.update({"eval_every": 5, "save_every": 5, "keep_best": 1})
    train.run(made, str(tmp_path / "run"))
    assert "warning: the loss has risen" in capsys.readouterr().err
    evals = {
        row["step"]: row["loss"]
        for row in read_rows(tmp_path / "run" / METRICS)
        if row["split"] == "eval" and row["step"]
    }
    best = saved_in(tmp_path / "run").best()
    assert best == min(evals, key=lambda step: evals[step])
    assert evals[best] < 0.7 * evals[60]


def test_r14_what_a_rise_is() -> None:
    rng = np.random.default_rng(0)
    noise = 2 + 0.3 * rng.standard_normal(400)
    falling = 4 * np.exp(-np.arange(400) / 80) + noise
    windows = [falling[max(0, i - 55) : i].tolist() for i in range(1, 400)]
    assert not any(map(has_risen, windows))
    assert has_risen([*noise[:20], *noise[20:25] + 3])
    assert not has_risen([*noise[:20], 9.0, *noise[20:24]])  # one batch is no rise
    assert not has_risen([*noise[:9], *noise[20:25] + 3])  # too little to compare with
    assert has_risen([0.0] * 20 + [0.1] * 5)


def test_r14_r28_what_is_no_number_is_never_the_best() -> None:
    assert is_better(2.0, None) and is_better(2.0, math.nan) and is_better(1.0, 2.0)
    assert not is_better(math.nan, 2.0) and not is_better(None, 2.0)
    assert not is_better(math.nan, None) and not is_better(2.0, 2.0)


def test_r26_one_length_of_rows_is_one_program(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of odd lengths, evaluations and samples: nothing is compiled twice."""
    rows = write_rows(
        tmp_path / "odd.jsonl",
        [{"prompt": "a " * i, "completion": " re" * (17 - i)} for i in range(1, 17)],
    )
    made = config(tiny, rows, train__sample_rows=2, train__sample_tokens=4)
    made.train.update({"eval_every": 2, "sample_every": 2, "steps": 8})
    compiled: list[int] = []
    steps = {"now": 0}

    def note(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(steps["now"])

    class Counting(Watch):
        def see(self, step: int, values: dict[str, Any]) -> None:
            steps["now"] = step
            super().see(step, values)

    jax.monitoring.register_event_duration_secs_listener(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Watch", Counting)
        train.run(made, str(tmp_path / "run"))
    steps["now"] = -1
    assert 0 in compiled and max(compiled) <= 2
    assert "shapes" not in capsys.readouterr().err


def test_r26_many_lengths_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    step = compile_lean(jax.jit(lambda state, frozen, batch: state + jnp.sum(batch)))
    for length in range(1, MANY_SHAPES + 1):
        assert "shapes" not in capsys.readouterr().err
        step(jnp.float32(0), jnp.float32(0), jnp.ones((2, length)))
    told = capsys.readouterr().err
    assert f"compiled for {MANY_SHAPES} shapes" in told
    assert f"(2, {MANY_SHAPES})" in told


def only_at_first(completions: Any, **columns: Any) -> list[float]:
    """Fails at the second evaluation of three prompts."""
    global looks
    if len(completions) == len(PROMPTS):
        looks += 1
        if looks > 1:
            raise OSError("the grader is away")
    return letters(completions=completions, **columns)


looks = 0


def test_r28_an_evaluation_that_fails_costs_no_step(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the run, which is saved; when the cause is gone it goes on from there."""
    global looks
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    made = config_of("grpo", tiny, prompts, train__sample_rows=0)
    made.train.update({"eval_every": 3, "save_every": 4})
    made.reward.function = HERE + "only_at_first"
    looks = 0
    with pytest.raises(UserError, match="the reward function failed") as error:
        train.run(made, str(tmp_path / "run"))
    assert (
        error.value.code == EXIT_USER and "the grader is away" in error.value.screen()
    )
    assert "step 3 is saved; the same command continues" in capsys.readouterr().out
    assert saved_in(tmp_path / "run").latest() == 3
    looks = -99
    train.run(made, str(tmp_path / "run"))
    steps = [
        row["step"]
        for row in read_rows(tmp_path / "run" / METRICS)
        if row["split"] == "train"
    ]
    assert steps == [1, 2, 3, 4]


def test_r28_a_row_without_a_number_shows_in_the_loss() -> None:
    """A term that is no number is not one that nothing says anything about."""

    def sums(policy: Any, frozen: Any, batch: Any) -> Any:
        del policy, frozen
        terms = {"a": batch["x"][0], "b": batch["x"][1]}
        return Sums(terms, {}, {}), {"a": 1.0, "b": batch["n"][0]}, {"trained": 1}

    def loss(a: float, b: float, n: float) -> float:
        place = batch_sharding(make_mesh())
        row = {"x": np.array([a, b, 0, 0], np.float32), "n": np.full(4, n, np.float32)}
        return evaluate(sums, {}, {}, [row], place)["loss"]

    assert loss(1.0, 2.0, 1.0) == 3.0
    assert loss(1.0, 0.0, 0.0) == 1.0
    assert math.isnan(loss(1.0, math.nan, 1.0))
