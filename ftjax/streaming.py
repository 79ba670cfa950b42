"""Where a run's batches come from: stored rows, a stream or rollouts; and how far.

A checkpoint of a stream's run says where the rows of its steps end, and the digest of
all before. The same command reads what was kept of the stream from its beginning,
without training on it, and goes on with the batch after the saved step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftjax.data.loader import Batch
from ftjax.data.spool import Place, Spool
from ftjax.data.stream import RowStream
from ftjax.errors import Stopped, UserError
from ftjax.loop import micro_batches, stored_rows
from ftjax.objectives.tasks import task_of
from ftjax.prepare import Prepared
from ftjax.rl.rollouts import Rollouts
from ftjax.step import TrainState

META = "stream"


class Supply:
    """The `Source` of a run's batches.

    Args:
      config: of the run.
      ready: what it prepared.
      folder: of the run, where a stream is kept.
      stopping: whether the run is asked to stop.
      meta: of the checkpoint that it continues, or of a new run.
      game: makes the batches instead, of the policy's own answers.

    Raises:
      UserError: the rows of the saved steps are no longer there.
    """

    def __init__(
        self,
        config: Any,
        ready: Prepared,
        folder: Path,
        stopping: Callable[[], bool],
        meta: dict[str, Any],
        game: Rollouts | None = None,
    ):
        self._steps, self._stopping = ready.steps, stopping
        self._k, rows = config.train.accumulate, config.train.batch_size
        data, saved, self._game = ready.data, meta.get(META), game
        self._loader, self._rows = data.loader, rows
        self._failed: UserError | None = None
        self._end = saved["end"] if saved else None
        self.stream: RowStream | None = None
        if data.loader is not None:
            parts = ready.mesh.size if config.parallel == "pmap" else 0
            stored = stored_rows(data.loader, rows, self._k, parts)
            self._stored = game.batch if game else stored
        elif data.frame is not None and self._end is None:
            known = None
            if saved:
                known = Place(saved["lines"], saved["bytes"]), saved["digest"]
            spool = Spool(
                folder, data.settings.train, data.settings.stream_wait, stopping, known
            )
            self.stream = RowStream(
                spool,
                ready.base.tokenizer,
                data.settings,
                vocab_size=ready.base.spec.vocab_size,
                reads=task_of(config.task).reads,
                frame=data.frame,
                rows=rows,
            )

    def __call__(self, step: int, state: TrainState) -> Batch | None:
        if self.stream is None:
            try:
                return self._stored(step, state)
            except UserError as error:  # of a reward: what was trained is saved first
                self._failed = error
                return None
        batch = self.stream.batch(step)
        return None if batch is None else micro_batches(batch, self._k)

    @property
    def last(self) -> int:
        """The step that is the last one, as far as is known."""
        end = self.stream.end if self.stream is not None else self._end
        return self._steps if end is None else min(self._steps, end)

    @property
    def fault(self) -> UserError | None:
        """What is wrong with the rows that come next."""
        return self.stream.fault if self.stream is not None else self._failed

    def places(self, step: int) -> list[str]:
        """Where the rows of a step are from, of a data set that is stored."""
        if self._loader is None or self._game is not None:
            return []
        rows = self._loader.groups((step - 1) * self._rows, self._rows)
        data = self._loader.dataset
        firsts = [data.groups[group][0] for row in rows for group in row]
        return [data.examples[first].where for first in firsts]

    def whole(self, step: int) -> bool:
        """Whether a run may be continued after a step: not within a rollout."""
        return self._game is None or step % self._game.unit == 0

    def halts(self, step: int) -> bool:
        """Whether to save and leave after a step."""
        return (self._stopping() and self.whole(step)) or self.fault is not None

    def leave(self, step: int) -> Exception:
        """Why a run is left after a step that is saved, if it is not 0."""
        if self.fault is not None:
            return self.fault
        if step == 0:
            return Stopped("stopped before the first step: there is nothing to save")
        return Stopped(
            f"stopped: saved step {step} of {self._steps}; the same command continues"
        )

    def ending(self) -> str | None:
        """What to tell where a stream was over before the last step."""
        end = self.last
        if self._loader is not None or end >= self._steps:
            return None
        return (
            f"the stream ended at step {end} of {self._steps}, over which the learning "
            "rate was laid out; rows that come later are for another --workdir"
        )

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps of a stream; {} for stored rows."""
        stream = self.stream
        if stream is None:
            return {}
        stream.spool.sync()
        place = stream.place
        found = {
            "lines": place.lines,
            "bytes": place.bytes,
            "digest": stream.spool.digest(place),
            "end": stream.end,
        }
        return {META: found, "chat": stream.report.conversations > 0}

    def result(self) -> dict[str, Any]:
        """What `--json` prints of a stream's rows."""
        if self.stream is None:
            return {}
        report = self.stream.report
        return {
            META: {
                "lines": self.stream.place.lines,
                "ended": self.stream.end is not None,
                "read": report.read,
                "kept": report.kept,
                "kinds": report.kinds,
                "joined": report.joined,
                "imitated": report.imitated,
                "dropped": {why: tally.count for why, tally in report.dropped.items()},
                "skipped": report.skipped_rows,
            }
        }
