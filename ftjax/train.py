"""Fine-tunes a model: from a config to a run directory, a checkpoint and an adapter.

    python -m ftjax.train --config=configs/sft.py:model=PATH,method=lora \\
        --config.data.train=FILE --workdir=DIR

The same command in the same directory continues where it stopped.
"""

from ftjax import runtime

if __name__ == "__main__":
    runtime.prepare()  # before the imports that take time: it may start over

from functools import partial
from typing import Any

from absl import flags

from ftjax import cli, describe
from ftjax.checkpoints.folder import replace_folder
from ftjax.checkpoints.peft_others import adapter_kind, save_any, why_unsaved
from ftjax.config import validate
from ftjax.console import Progress, say
from ftjax.errors import UserError
from ftjax.job import Job, begin
from ftjax.loading import public_name
from ftjax.look import Look
from ftjax.loop import Clock, run_steps
from ftjax.methods.freeze import trained_names
from ftjax.methods.residual import beyond
from ftjax.metrics import MetricLog
from ftjax.models.proj import find_sites
from ftjax.optim import make_schedule
from ftjax.prepare import prepare
from ftjax.report import PLAN, write_report
from ftjax.signals import StopRequest
from ftjax.watch import Watch, is_better
from ftjax.weights import join
from ftjax.workdir import Workdir


def main(args: flags.FlagValues) -> dict[str, Any]:
    if args.config is None:
        raise UserError(
            "no configuration is named", fix="--config=configs/sft.py --workdir=DIR"
        )
    found = run(args.config, args.workdir)
    say(describe.ending(found))
    return found


def run(config: Any, workdir: str) -> dict[str, Any]:
    """The whole run: check, load, train, evaluate, save, report.

    Returns:
      what `--json` prints; see `describe.result`.

    Raises:
      UserError: before anything expensive, for whatever the user can mend.
      Stopped: it was asked to stop, and has saved its last step.
    """
    validate(config)
    with StopRequest() as stop, Workdir.open(workdir, report=say) as folder:
        for change in folder.compare_config(config.to_dict()):
            say(f"changed since the run began: {change}")
        ready = prepare(config)
        plan = describe.plan(config, ready)
        say(plan)
        job = begin(config, ready, folder, stop)
        (folder.path / PLAN).write_text(plan + "\n", encoding="utf-8")
        log = MetricLog(
            folder.path,
            resume_step=job.first or None,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=config.to_dict(),
        )
        with log, Progress(ready.steps, start=job.first) as progress:
            train(job, log, progress)
        if job.supply.stream is not None:
            account = job.supply.stream.text()
            say(account)
            with (folder.path / PLAN).open("a", encoding="utf-8") as file:
                file.write(f"\n{account}\n")
        if over := job.supply.ending():
            say(over)
        finish(job, folder)
        step, chat = int(job.state.step), job.meta["chat"]
        found = describe.result(folder.path, config.task, step, chat)
        return found | job.supply.result()


def train(job: Job, log: MetricLog, progress: Progress) -> None:
    """The loop of every task: the steps that are left, and what is done between them.

    Raises:
      UserError: of updates, rows, rewards or an evaluation; what was trained is saved.
      Stopped: it was asked to stop, and has saved its last step.
    """
    c, supply, meta = job.config.train, job.supply, job.meta
    rate = make_schedule(job.config.optim, job.ready.steps)
    look, watch = Look(job, log, progress), Watch(job)
    if not job.first:
        look.sample(0, job.state.trained)
        meta["best"] = look.evaluate(0, job.state.trained)
    clock = Clock(job.ready.steps - job.first, meta["seconds"])
    for step, values, now in run_steps(
        job.step_fn,
        job.state,
        job.frozen,
        supply,
        supply.last,
        job.ready.mesh,
        job.pause,
    ):
        meta["tokens"] += int(values.pop("trained"))
        speed = clock.tick(values.pop("row_tokens"))
        totals = {"tokens": meta["tokens"], "time": clock.elapsed}
        values |= {"lr": rate(step - 1), "tokens_per_s": speed, **totals}
        log.write(step, "train", **values)
        watch.see(step, values)
        if job.due(step, c.log_every):
            progress.update(step, watch.recent.take(), speed, clock.left)
        if now is None:
            continue
        job.state, score = now, None
        with job.kept(clock):
            if job.due(step, c.sample_every):
                look.sample(step, now.trained)
            if job.due(step, c.eval_every):
                score = look.evaluate(step, now.trained)
        better = is_better(score, meta["best"])
        meta["best"] = score if better else meta["best"]
        kept, halts = better and c.keep_best > 0, supply.halts(step)
        if job.due(step, c.save_every) or kept or halts:
            job.save(clock.elapsed, score)
        if halts:
            break
        clock.restart()
    watch.end()
    job.end(clock.elapsed)


def finish(job: Job, folder: Workdir) -> None:
    """Leaves the report, and the adapter of the best step, or of the last.

    The adapter is one of the base as it is published, whatever the run took off it.
    """
    base, shape, trained = job.ready.base, job.ready.shape, job.state.trained
    step = job.checkpoints.best() or job.checkpoints.latest()
    saved, sites = trained_names(shape.method, base.spec), find_sites(shape.model)
    reason = why_unsaved(trained, saved, sites)
    if reason:
        say(f"there is no adapter for others to load: {reason}")
    elif adapter_kind(trained) and step is not None:
        if step != int(job.state.step):
            like = {"trained": trained}
            trained = job.checkpoints.restore(step, like, partial=True)["trained"]
        plan = shape.method.lora
        if job.origin is not None and plan is not None:
            learned = beyond(trained["lora"], plan, job.origin)
            trained, plan = {**trained, "lora": learned.lora}, learned.plan
            say(f"adapter/ is one of {base.name} as it is published")
            if shape.formats:
                say("without what rounding took of it: export --to=pair keeps all")
        save = partial(
            save_any,
            variables=join(job.frozen, trained),
            plan=plan,
            sites=sites,
            base_name=public_name(base),
            base_hash=job.checkpoints.meta(step)["base_hash"],
            saved=saved,
            spec=base.spec,
        )
        replace_folder(folder.path / "adapter", save)
    write_report(folder.path)


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "the folder of the run", flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define, config=True)
