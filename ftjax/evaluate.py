"""Evaluates a model, a run or an adapter on a file, by the objective of any task.

    python -m ftjax.evaluate --model=DIR --data=FILE [--json]
    python -m ftjax.evaluate --workdir=RUN --data=FILE
    python -m ftjax.evaluate --config=configs/dpo.py:model=DIR --adapter=DIR --data=FILE
    python -m ftjax.evaluate --workdir=RUN --data=FILE --to=scores --out=FILE
    python -m ftjax.evaluate --model=DIR --adapter=none,A,B --use=0,2 --data=FILE

In float32, over the whole file. Without a task it is the loss per trained token: of
plain text every token after the first, in windows, of prompts and conversations the
answers (--nocompletion_only: everything). A run is measured by its own task, on its own
held-out rows where no data is named, and rows are cut as it cut them (--max_length,
--overlong, --separator, --join); one that learned from rewards answers the prompts, and
is measured by those. `bits_per_byte` counts bytes of the UTF-8 text that is predicted.
--to=scores writes what a reward model thinks of each row. Several adapters are added
up; with --use each is measured alone, over one base.
"""

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from ftjax import cli
from ftjax.adapters import NONE, names_of
from ftjax.asked import Asked, is_text, length_of, load_dataset, load_rows, settle
from ftjax.config import prompt_room
from ftjax.console import say, warn
from ftjax.data.report import DataReport
from ftjax.describe import evaluation
from ftjax.errors import UserError
from ftjax.evals.measure import evaluate, make_sum_batch
from ftjax.evals.scores import score_rows
from ftjax.loading import load_base
from ftjax.methods.heads import SCORE
from ftjax.objectives.distill import TEACHER
from ftjax.objectives.tasks import task_of
from ftjax.policy import Policy, open_policy
from ftjax.prepare import plan_objective
from ftjax.ranges import check_ranges
from ftjax.reference import put_reference, reference_sums
from ftjax.rl.player import Player
from ftjax.rl.setup import open_judge
from ftjax.run_folder import Section, read_run_config
from ftjax.sharding import batch_sharding, make_mesh
from ftjax.switch import chosen_alone, parse_use

CHUNK = 64  # positions per row that the head handles at a time
PLAIN = SimpleNamespace(chunk=CHUNK)  # the settings of a loss that has no others


def define(args: flags.FlagValues) -> None:
    cli.define_source(args)
    integer, text = flags.DEFINE_integer, flags.DEFINE_string
    text(
        "use", "", "which of the adapters are measured, in turn: 0,1", flag_values=args
    )
    text("data", "", "a file, pydoc:..., a name", flag_values=args)
    text("split", "test", "of a `datasets` name", flag_values=args)
    integer(
        "max_length",
        None,
        "tokens per row; 0: 1024, or the model's positions if fewer",
        lower_bound=0,
        flag_values=args,
    )
    integer("batch_size", 8, "rows at a time", lower_bound=1, flag_values=args)
    flags.DEFINE_bool("completion_only", None, "not the prompts", flag_values=args)
    flags.DEFINE_enum(
        "overlong",
        None,
        ["truncate", "drop", "error", "split"],
        "what becomes of rows longer than max_length; split: windows",
        flag_values=args,
    )
    between = "between the texts of a .txt file, as data.separator"
    flags.DEFINE_string("separator", None, between, flag_values=args)
    flags.DEFINE_bool("join", None, "all texts in one stream", flag_values=args)
    what = "the task's metrics, or the reward of each row"
    flags.DEFINE_enum("to", "metrics", ["metrics", "scores"], what, flag_values=args)
    flags.DEFINE_string("out", "", "a new file for the scores", flag_values=args)


def main(args: flags.FlagValues) -> dict[str, Any]:
    asked = settle(args)
    out = Path(args.out)
    folder = out.parent
    new = bool(args.out) and not out.exists() and os.access(folder, os.W_OK)
    if args.to == "scores" and not new:
        raise UserError(
            "scores want a new file",
            where="--out",
            expected="the name of a file that is not there yet, in a folder that is",
            got=args.out or "no name",
        )
    question = task_and_loss(args, asked)
    mesh, names = make_mesh(), names_of(args.adapter)
    summed = bool(args.adapter_weights or args.adapter_rank)
    uses = parse_use(args.use, names, summed=summed) if args.use else []
    policy = open_policy(
        model=_model(args),
        workdir=args.workdir,
        adapter=NONE if uses else args.adapter,
        adapter_weights=args.adapter_weights,
        adapter_rank=args.adapter_rank,
        dtype=jnp.float32,
        mesh=mesh,
        weights=args.weights,
    )
    if args.to == "scores":
        return _write_scores(asked, args.out, policy, mesh)
    if not uses:
        return _told(args, asked, policy, mesh, question)
    results: list[dict[str, Any]] = []
    for i in uses:
        own = chosen_alone(policy, names[i], mesh=mesh)
        told = _told(args, asked, own, mesh, question, tell=not results)
        results.append({**told, "adapter": names[i]})
    return results[0] if len(results) == 1 else {**results[0], "results": results}


def _told(
    args: Any,
    asked: Asked,
    policy: Policy,
    mesh: Mesh,
    question: tuple[str, Any],
    *,
    tell: bool = True,
) -> dict[str, Any]:
    """What was measured of one policy, which is said too."""
    task, loss = question
    if task_of(task).online:
        found, report = _judged(args, asked, policy, mesh)
    else:
        found, report = measure(asked, policy, mesh, task=task, loss=loss, tell=tell)
    say(f"\n{policy.label}\n{evaluation(task, found)}")
    counts = {"rows": report.kept, "truncated": report.truncated}
    about = {"dropped": report.dropped_rows, "model": policy.label, "task": task}
    return {**found, **counts, **about}


def task_and_loss(args: Any, asked: Asked) -> tuple[str, Any]:
    """The task and the settings of its loss: of a config, a run, or by the data."""
    if args.config is not None:
        check_ranges(args.config)
        return args.config.task, args.config.loss
    if args.workdir:
        saved = read_run_config(args.workdir)
        loss = Section(**{"chunk": CHUNK, **saved.get("loss", {})})
        return saved.get("task", "sft"), loss
    return ("generic" if is_text(asked.data) else "sft"), PLAIN


def _model(args: Any) -> str:
    named = args.model or args.workdir or args.config is None
    return args.model if named else args.config.model.path


def measure(
    asked: Asked,
    policy: Policy,
    mesh: Mesh,
    *,
    task: str = "sft",
    loss: Any = PLAIN,
    tell: bool = True,
) -> tuple[dict[str, float], DataReport]:
    """The loss and the metrics of a task, and what the data was.

    Args:
      asked: what is read.
      policy: what is measured.
      mesh: of its weights.
      task: of `objectives.tasks`.
      loss: its settings, `config.loss`.
      tell: prints the report of the data.
    """
    what = task_of(task)
    _check_head(policy, task)
    loader, rows = load_rows(asked, policy.base, mesh, policy.max_positions, task)
    if tell:
        say(loader.dataset.report.text())
    aim = plan_objective(task, loss, policy.model, policy.base)
    frozen: Any = {}
    if aim.teacher is not None:
        frozen = {TEACHER: load_base(aim.teacher, jnp.float32, mesh)}
    elif what.reference is not None and aim.reference is not None:
        say_of = partial(what.reference, policy.model.clone(spec=aim.reference.spec))
        weights = load_base(aim.reference, jnp.float32, mesh)
        put_reference(loader, reference_sums(say_of, weights, loader, loss, mesh, rows))
    elif what.reference is not None:
        frozen = _own_base(policy, mesh)
    found = evaluate(
        make_sum_batch(aim.objective),
        policy.variables,
        frozen,
        loader.epoch(rows),
        batch_sharding(mesh),
        loader.dataset.text_bytes if what.reads == "answers" else None,
    )
    return found, loader.dataset.report


def _own_base(policy: Policy, mesh: Mesh) -> Any:
    """The model that a policy was trained from, as the reference of its loss."""
    if policy.frozen is None:
        return load_base(policy.base, jnp.float32, mesh, formats=policy.formats)
    if policy.step is None and policy.variables.keys() == policy.frozen.keys():
        warn(
            "the model is compared with itself: --config.loss.reference names the one "
            "that it was trained from"
        )
    return policy.frozen


def _judged(
    args: Any, asked: Asked, policy: Policy, mesh: Mesh
) -> tuple[dict[str, float], DataReport]:
    """The rewards of what a policy answers, as its config has them."""
    saved = args.config.to_dict() if args.config else read_run_config(args.workdir)
    rollout, reward = (Section(**saved[key]) for key in ("rollout", "reward"))
    longest = length_of(asked, policy.max_positions)
    room = prompt_room(longest, rollout.max_new_tokens)
    data = load_dataset(asked, policy.base, room, "prompts")
    say(data.report.text())
    place = {"dtype": jnp.float32, "mesh": mesh}
    judge = open_judge(
        reward, policy.base, length=longest, rows=asked.batch_size, **place
    )
    player = Player(policy.base, jnp.float32, saved["seed"], rollout, judge)
    found = player.evaluate(policy.variables, data, asked.batch_size)
    return found, data.report


def _check_head(policy: Policy, task: str) -> None:
    """A task with a head is measured with one, and any other without."""
    head = task_of(task).head
    if head and head not in policy.variables:
        raise _no_head(policy, head)
    if SCORE in policy.variables and not head:
        raise UserError(
            "a reward model is measured by its own task, or gives scores",
            where=policy.label,
            got=f"the task {task}",
            fix="--config=configs/reward.py, or --to=scores --out=FILE",
        )


def _no_head(policy: Policy, head: str) -> UserError:
    return UserError(
        "this model has no head that gives rewards",
        where=policy.label,
        expected=f"a run of configs/reward.py, or its adapter with `{head}`",
        fix="train one: python -m ftjax.train --config=configs/reward.py",
    )


def _write_scores(asked: Asked, out: str, policy: Policy, mesh: Mesh) -> dict[str, Any]:
    """One line of JSON per row: its place, and the reward of each of its answers."""
    head = task_of("reward").head
    if head not in policy.variables:
        raise _no_head(policy, head)
    most = policy.max_positions
    loader, rows = load_rows(asked, policy.base, mesh, most, "reward", "mixed")
    say(loader.dataset.report.text())
    found = score_rows(policy.model, policy.variables, loader, mesh, rows)
    _write_lines(Path(out), found)
    pairs = [row for row in found if "chosen" in row]
    result = {"rows": len(found), "out": out, "model": policy.label}
    if pairs:
        right = sum(row["chosen"] > row["rejected"] for row in pairs)
        result["accuracy"] = right / len(pairs)
        say(f"\n{right:,} of {len(pairs):,} pairs are ranked as they were")
    say(f"{len(found):,} rows -> {out}")
    return result


def _write_lines(out: Path, rows: list[dict[str, Any]]) -> None:
    """A new file of JSON lines, whole or not at all."""
    try:
        file = out.open("x", encoding="utf-8")
    except OSError as error:
        raise UserError(
            "the scores cannot be written", where=out, got=error.strerror
        ) from error
    try:
        with file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    cli.entry(main, define, config=True)
