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
from ftjax.checkpoints.state import Checkpoints
from ftjax.config import validate
from ftjax.console import Progress, say
from ftjax.errors import EXIT_DIVERGED, Stopped, UserError
from ftjax.evals.measure import evaluate, make_sum_batch
from ftjax.evals.samples import answer, pick_prompts
from ftjax.loading import Base, public_name
from ftjax.loop import STEPS, Clock, on_mesh, run_steps
from ftjax.methods.freeze import trained_names
from ftjax.methods.residual import beyond
from ftjax.methods.several import Update
from ftjax.metrics import MetricLog
from ftjax.models.proj import find_sites
from ftjax.objectives.tasks import task_of
from ftjax.optim import make_optimizer, make_schedule
from ftjax.prepare import Prepared, Shape, load_variables, prepare
from ftjax.reference import add_reference, with_teacher
from ftjax.report import write_report
from ftjax.rl.player import shown_table
from ftjax.rl.rollouts import Rollouts
from ftjax.rl.setup import open_rollouts
from ftjax.rollout import Generator
from ftjax.sharding import batch_sharding
from ftjax.signals import StopRequest
from ftjax.step import Objective, TrainState, init_state
from ftjax.streaming import Supply
from ftjax.weights import join
from ftjax.workdir import Workdir, compare_values

PyTree = Any
NEW: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "best": None}  # of a run's meta


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
        settings = config.to_dict()
        for change in folder.compare_config(settings):
            say(f"changed since the run began: {change}")
        c, ready = config.train, prepare(config)
        mesh, base, data, steps = ready.mesh, ready.base, ready.data, ready.steps
        shape = ready.shape
        say(describe.plan(config, ready))

        checkpoints = Checkpoints(
            folder.path / "checkpoints",
            keep_last=c.keep_last,
            keep_best=c.keep_best,
            report=say,
        )
        identity = {
            "method": settings["method"],
            "quant": settings["quant"],
            "data": data.train.fingerprint(),
            "base_hash": base.hash,
        }
        first = resume_point(checkpoints, identity)
        trained, frozen, origin = load_variables(config, base, shape, mesh)
        add_reference(config, ready, trained, frozen, folder.path)
        folder.save_config(settings)  # no bad input can be found from here on
        if stop.requested and not first:
            raise Stopped("stopped before the first step: there is nothing to save")
        tx = make_optimizer(config.optim, steps, shape.matrices)
        state = on_mesh(init_state(trained, tx, config.seed), mesh)
        meta = {**identity, "chat": data.train.report.conversations > 0} | NEW
        if first:
            meta = checkpoints.meta(first)
            state = checkpoints.restore(first, state)
        game = open_rollouts(config, ready, frozen)
        supply = Supply(config, ready, folder.path, lambda: stop.requested, meta, game)
        if first:
            done = first >= supply.last
            say(f"{'done already:' if done else 'continuing after'} step {first}")
        frozen, objective = with_teacher(ready, frozen), ready.aim.objective
        step_fn = STEPS[config.parallel](objective, tx, state)
        rate = make_schedule(config.optim, steps)

        def due(step: int, every: int) -> bool:
            return step == supply.last or (every > 0 and step % every == 0)

        def pause(step: int) -> bool:
            often = (c.eval_every, c.sample_every, c.save_every)
            return any(due(step, every) for every in often) or supply.halts(step)

        def save(score: float | None) -> None:
            meta.update(supply.meta(), seconds=clock.elapsed)
            checkpoints.save(int(state.step), state, meta, score)

        log = MetricLog(
            folder.path,
            resume_step=first or None,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=settings,
        )
        with log, Progress(steps, start=first) as progress:
            look = Look(config, ready, objective, frozen, log, progress, game)
            if not first:
                look.sample(0, state.trained)
                meta["best"] = look.evaluate(0, state.trained)
            clock = Clock(steps - first, meta["seconds"])
            for step, values, now in run_steps(
                step_fn, state, frozen, supply, supply.last, mesh, pause
            ):
                meta["tokens"] += int(values.pop("trained"))
                speed = clock.tick(values.pop("row_tokens"))
                totals = {"tokens": meta["tokens"], "time": clock.elapsed}
                values |= {"lr": rate(step - 1), "tokens_per_s": speed, **totals}
                log.write(step, "train", **values)
                if due(step, c.log_every):
                    reward = values.get("reward")
                    progress.update(step, values["loss"], speed, clock.left, reward)
                if values["skipped"] >= c.max_skipped:
                    raise diverged(step, checkpoints, values)
                if now is None:
                    continue
                state, score, better = now, None, False
                if due(step, c.sample_every):
                    look.sample(step, state.trained)
                if due(step, c.eval_every):
                    score = look.evaluate(step, state.trained)
                    better = score is not None and not score >= meta["best"]
                    meta["best"] = score if better else meta["best"]
                kept, halts = better and c.keep_best > 0, supply.halts(step)
                if due(step, c.save_every) or kept or halts:
                    save(score)
                if halts and step < supply.last:
                    break
                clock.restart()
            step = int(state.step)
            if supply.halts(step) and step < supply.last:
                if step != checkpoints.latest():
                    save(None)
                raise supply.leave(step)
        if supply.stream is not None:
            say(supply.stream.text())
        finish(folder, base, shape, state, frozen, checkpoints, origin)
        found = describe.result(folder.path, config.task, step, meta["chat"])
        return found | supply.result()


class Look:
    """Samples and evaluates along the way, and writes down what it finds."""

    def __init__(
        self,
        config: Any,
        ready: Prepared,
        objective: Objective,
        frozen: PyTree,
        log: MetricLog,
        progress: Progress,
        game: Rollouts | None,
    ):
        c, data, self.task = config.train, ready.data, config.task
        self.ready, self.frozen, self.log, self.progress = ready, frozen, log, progress
        self.rows, self.sample_tokens = c.batch_size // c.accumulate, c.sample_tokens
        self.sharding, self.game = batch_sharding(ready.mesh), game
        self.sum_batch = make_sum_batch(objective)
        self.prompts = pick_prompts(
            data.eval or data.train, ready.base.tokenizer, c.sample_rows
        )

    def sample(self, step: int, trained: PyTree) -> None:
        """Answers the held-out prompts."""
        if not self.prompts:
            return
        if self.game:
            shown = self.game.show(trained)
            for row in shown:
                self.log.write_sample(step, row.prompt, row.answer, reward=row.reward)
            self.progress.note(shown_table(shown))
            return
        base, dtype = self.ready.base, self.ready.shape.dtype
        policy = join(self.frozen, trained)
        generator = Generator(base.spec, policy, dtype=dtype, eos_ids=base.eos_ids)
        texts = answer(generator, base.tokenizer, self.prompts, self.sample_tokens)
        for prompt, text in zip(self.prompts, texts, strict=True):
            self.log.write_sample(step, prompt.text, text, prompt.reference)

    def evaluate(self, step: int, trained: PyTree) -> float | None:
        """The eval loss, or None where there is no eval data."""
        found, loader = None, self.ready.data.eval_loader
        if self.game:
            found = self.game.evaluate(trained)
        elif loader:
            policy, rows = join(self.frozen, trained), loader.epoch(self.rows)
            answers = task_of(self.task).reads == "answers"
            text_bytes = loader.dataset.text_bytes if answers else None
            place = self.sharding, text_bytes
            found = evaluate(self.sum_batch, policy, self.frozen, rows, *place)
        if found is None:
            return None
        self.log.write(step, "eval", **found)
        shown = task_of(self.task).shown
        self.progress.note(describe.evaluation(step, found, shown))
        return found["loss"]


def resume_point(checkpoints: Checkpoints, identity: dict[str, Any]) -> int:
    """The step to continue after, 0 for a new run; refuses another run's state."""
    checkpoints.clean()
    done = checkpoints.latest()
    if done is None:
        return 0
    saved = checkpoints.meta(done)
    compare_values(
        {key: saved.get(key) for key in identity},
        identity,
        what="the checkpoints here belong to another run",
        where=checkpoints.dir,
        fix="use another --workdir, or restore the data and the model of this run",
    )
    return done


def diverged(step: int, checkpoints: Checkpoints, values: dict[str, Any]) -> UserError:
    saved = checkpoints.steps()
    return UserError(
        f"{values['skipped']} updates in a row had to be left out",
        where=f"step {step}",
        expected="a finite loss and gradient, and tokens to train on",
        got=f"loss {values['loss']}, gradient norm {values['grad_norm']}",
        fix="lower config.optim.lr; "
        + (f"the last good checkpoint is step {saved[-1]}" if saved else "start anew"),
        code=EXIT_DIVERGED,
    )


def finish(
    folder: Workdir,
    base: Base,
    shape: Shape,
    state: TrainState,
    frozen: PyTree,
    checkpoints: Checkpoints,
    origin: Update | None,
) -> None:
    """Leaves the report, and the adapter of the best step, or of the last.

    The adapter is one of the base as it is published, whatever the run took off it.
    """
    step = checkpoints.best() or checkpoints.latest()
    saved, sites = trained_names(shape.method, base.spec), find_sites(shape.model)
    reason = why_unsaved(state.trained, saved, sites)
    if reason:
        say(f"there is no adapter for others to load: {reason}")
    elif adapter_kind(state.trained) and step is not None:
        trained = state.trained
        if step != int(state.step):
            like = {"trained": trained}
            trained = checkpoints.restore(step, like, partial=True)["trained"]
        plan = shape.method.lora
        if origin is not None and plan is not None:
            learned = beyond(trained["lora"], plan, origin)
            trained, plan = {**trained, "lora": learned.lora}, learned.plan
            say(f"adapter/ is one of {base.name} as it is published")
            if shape.formats:
                say("without what rounding took of it: export --to=pair keeps all")
        save = partial(
            save_any,
            variables=join(frozen, trained),
            plan=plan,
            sites=sites,
            base_name=public_name(base),
            base_hash=checkpoints.meta(step)["base_hash"],
            saved=saved,
            spec=base.spec,
        )
        replace_folder(folder.path / "adapter", save)
    write_report(folder.path)


def define(args: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "the folder of the run", flag_values=args)


if __name__ == "__main__":
    cli.entry(main, define, config=True)
