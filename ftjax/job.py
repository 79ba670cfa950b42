"""A run that may step: its input was found good, and its state is where it stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ftjax.checkpoints.state import Checkpoints
from ftjax.console import say
from ftjax.errors import Stopped
from ftjax.loop import STEPS, Clock, on_mesh
from ftjax.methods.several import Update
from ftjax.optim import make_optimizer
from ftjax.prepare import Prepared, load_variables
from ftjax.reference import add_reference, with_teacher
from ftjax.rl.reward_model import judge_hash
from ftjax.rl.rollouts import Rollouts
from ftjax.rl.setup import open_rollouts
from ftjax.signals import StopRequest
from ftjax.step import TrainState, init_state
from ftjax.streaming import Supply
from ftjax.workdir import Workdir, compare_values

PyTree = Any


@dataclass
class Job:
    """What the loop steps with.

    `first` is the saved step that it continues after, 0 for a new run; `origin` what
    the run took off the published base; `meta` goes into each checkpoint, beside
    `state`.
    """

    config: Any
    ready: Prepared
    checkpoints: Checkpoints
    first: int
    origin: Update | None
    meta: dict[str, Any]
    game: Rollouts | None
    supply: Supply
    frozen: PyTree
    step_fn: Any
    state: TrainState

    def due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps is done after this one."""
        return step == self.supply.last or (every > 0 and step % every == 0)

    def pause(self, step: int) -> bool:
        """Whether the state is needed after a step."""
        c = self.config.train
        often = (c.eval_every, c.sample_every, c.save_every)
        return any(self.due(step, n) for n in often) or self.supply.halts(step)

    def save(self, seconds: float, score: float | None = None) -> None:
        """Saves the state: after so many seconds of the run, with its eval loss."""
        self.meta.update(self.supply.meta(), seconds=seconds)
        self.checkpoints.save(int(self.state.step), self.state, self.meta, score)

    @contextmanager
    def kept(self, clock: Clock) -> Iterator[None]:
        """Saves the state if what is done with it fails, so that only that is lost."""
        try:
            yield
        except Exception:
            step = int(self.state.step)
            if self.supply.whole(step) and step != self.checkpoints.latest():
                self.save(clock.elapsed)
                say(f"step {step} is saved; the same command continues")
            raise

    def end(self, seconds: float) -> None:
        """Raises what ended the run before its last step, if so; the state is saved."""
        step = int(self.state.step)
        if self.supply.halts(step) and step < self.supply.last:
            if step and step != self.checkpoints.latest():
                self.save(seconds)
            raise self.supply.leave(step)


def begin(config: Any, ready: Prepared, folder: Workdir, stop: StopRequest) -> Job:
    """Loads the weights, and the state of the last checkpoint, if there is one.

    Raises:
      UserError: the folder's checkpoints, or the reference, do not fit this run.
      Stopped: it was asked to stop before there was anything to save.
    """
    c = config.train
    checkpoints = Checkpoints(
        folder.path / "checkpoints",
        keep_last=c.keep_last,
        keep_best=c.keep_best,
        report=say,
    )
    identity = identity_of(config, ready)
    first = resume_point(checkpoints, identity)
    trained, frozen, origin = load_variables(
        config, ready.base, ready.shape, ready.mesh
    )
    add_reference(config, ready, trained, frozen, folder.path, lambda: stop.requested)
    game = open_rollouts(config, ready, frozen)
    folder.save_config(config.to_dict())  # no bad input can be found from here on
    if stop.requested and not first:
        raise Stopped("stopped before the first step: there is nothing to save")
    tx = make_optimizer(config.optim, ready.steps, ready.shape.matrices)
    state = on_mesh(init_state(trained, tx, config.seed), ready.mesh)
    meta = identity | new_meta(ready)
    if first:
        meta = checkpoints.meta(first)
        state = checkpoints.restore(first, state)
    supply = Supply(config, ready, folder.path, lambda: stop.requested, meta, game)
    if first:
        done = first >= supply.last
        say(f"{'done already:' if done else 'continuing after'} step {first}")
    frozen = with_teacher(ready, frozen)
    step_fn = STEPS[config.parallel](ready.aim.objective, tx, state)
    return Job(
        config,
        ready,
        checkpoints,
        first,
        origin,
        meta,
        game,
        supply,
        frozen,
        step_fn,
        state,
    )


def new_meta(ready: Prepared) -> dict[str, Any]:
    """What a run keeps beside its state, at its start."""
    tokenizer = ready.base.tokenizer
    return {
        "chat": ready.data.train.report.conversations > 0,
        "tokenizer": tokenizer.fingerprint(),
        "template": tokenizer.template_hash,
        "tokens": 0,
        "seconds": 0.0,
        "best": None,
    }


def identity_of(config: Any, ready: Prepared) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued."""
    settings, aim = config.to_dict(), ready.aim
    found = {
        "method": settings["method"],
        "quant": settings["quant"],
        "data": ready.data.train.fingerprint(),
        "base_hash": ready.base.hash,
    }
    for name, other in (("teacher", aim.teacher), ("reference", aim.reference)):
        found |= {f"{name}_hash": other.hash} if other is not None else {}
    if judge := settings.get("reward", {}).get("model"):
        found["reward_model"] = judge_hash(judge)
    return found


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
