"""Whether a run still learns: what ends it, and what its user is told."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from ftjax.console import warn
from ftjax.errors import EXIT_DIVERGED, UserError
from ftjax.job import Job
from ftjax.objectives.tasks import task_of

RECENT, BEFORE, LEAST = 5, 50, 10  # steps
SPREADS = 6.0  # a rise is so many times what losses usually differ by
SHARE = 0.5  # and this share of the loss
SHOWN = 5  # rows that are named


class Watch:
    """Sees what every step gives.

    The loss of a policy on its own answers says nothing, and is not watched.

    Attributes:
      recent: what to show of the steps since the last line.
    """

    def __init__(self, job: Job):
        self.job, self._limit = job, job.config.train.max_skipped
        self._means_something = not task_of(job.config.task).online
        self._losses: deque[float] = deque(maxlen=BEFORE + RECENT)
        self._seen = self._left_out = 0
        self.recent = Recent(job.config.task)

    def see(self, step: int, values: dict[str, Any]) -> None:
        """Warns where the loss has risen.

        Raises:
          UserError: too many updates in a row had to be left out.
        """
        self._seen += 1
        self.recent.add(values)
        self._left_out += values["skipped"] > 0
        if values["skipped"] >= self._limit:
            raise self._diverged(step, values)
        if values["skipped"] or not self._means_something:
            return
        self._losses.append(values["loss"])
        losses = list(self._losses)
        if has_risen(losses):
            now, before = median(losses[-RECENT:]), median(losses[:-RECENT])
            warn(
                f"the loss has risen: {now:.4g} in steps {step - RECENT + 1} to "
                f"{step}, {before:.4g} in the {len(losses) - RECENT} before; "
                "lower config.optim.lr if it stays there"
            )
            self._losses.clear()

    def end(self) -> None:
        """Tells how many updates were left out, if any were."""
        if self._left_out:
            warn(
                f"{self._left_out} of {self._seen} updates were left out, for want of "
                "a finite loss and gradient, or of tokens to train on"
            )

    def _diverged(self, step: int, values: dict[str, Any]) -> UserError:
        saved, rows = self.job.checkpoints.steps(), self.job.supply.places(step)
        named = ", ".join(rows[:SHOWN]) + (", ..." if len(rows) > SHOWN else "")
        last = f"step {saved[-1]}" if saved else "none"
        return UserError(
            f"{values['skipped']} updates in a row had to be left out",
            where=f"step {step}" + (f", of {named}" if named else ""),
            expected="a finite loss and gradient, and tokens to train on, or rewards",
            got=f"loss {values['loss']}, gradient norm {values['grad_norm']}",
            fix=f"lower config.optim.lr; the last good update is of step "
            f"{step - values['skipped']}, the last good checkpoint: {last}",
            code=EXIT_DIVERGED,
        )


class Recent:
    """What the steps since the last line gave: the means of what a task shows."""

    def __init__(self, task: str):
        what = task_of(task)
        self._names = what.shown if what.online else ("loss", *what.shown)
        self._given: list[dict[str, float]] = []

    def add(self, values: dict[str, float]) -> None:
        self._given.append(values)

    def take(self) -> dict[str, float]:
        """By name, without what none of the steps gave; and starts anew."""
        given = {n: [v[n] for v in self._given if n in v] for n in self._names}
        self._given.clear()
        return {name: fmean(numbers) for name, numbers in given.items() if numbers}


def has_risen(losses: Sequence[float]) -> bool:
    """Whether the last few losses are far above those before.

    By medians, so that one batch is no rise: of the last `RECENT`, more than `SPREADS`
    median deviations and `SHARE` of the median above the others.
    """
    before, recent = losses[:-RECENT], losses[-RECENT:]
    if len(before) < LEAST:
        return False
    middle = median(before)
    spread = median(abs(loss - middle) for loss in before)
    return median(recent) - middle > max(SPREADS * spread, SHARE * abs(middle))


def is_better(score: float | None, best: float | None) -> bool:
    """Whether an eval loss is the lowest so far; one that is NaN never is."""
    if score is None or math.isnan(score):
        return False
    return best is None or math.isnan(best) or score < best
