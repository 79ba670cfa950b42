"""What a run shows of its model along the way: answers, and the held-out loss."""

import math
from typing import Any

from ftjax import describe
from ftjax.console import Progress, warn
from ftjax.decoding.generator import Generator
from ftjax.evals.measure import evaluate, make_sum_batch
from ftjax.evals.samples import answer, pick_prompts
from ftjax.job import Job
from ftjax.metrics import MetricLog
from ftjax.objectives.tasks import task_of
from ftjax.rl.player import shown_table
from ftjax.sharding import batch_sharding
from ftjax.weights import join

PyTree = Any


class Look:
    """Samples and evaluates along the way, and writes down what it finds."""

    def __init__(self, job: Job, log: MetricLog, progress: Progress):
        c, ready = job.config.train, job.ready
        self.task, self.game, self.frozen = job.config.task, job.game, job.frozen
        self.ready, self.log, self.progress = ready, log, progress
        self.rows, self.sample_tokens = c.batch_size // c.accumulate, c.sample_tokens
        self.sharding = batch_sharding(ready.mesh)
        self.sum_batch = make_sum_batch(ready.aim.objective)
        self.prompts = pick_prompts(
            ready.data.eval or ready.data.train, ready.base.tokenizer, c.sample_rows
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
        if not math.isfinite(found["loss"]):
            warn(f"the evaluation of step {step} is no number, and never the best one")
        self.log.write(step, "eval", **found)
        said = describe.evaluation(self.task, found)
        self.progress.note(f"eval at step {step}: {said}")
        return found["loss"]
