"""Rollouts: the batches of a run that learns from its own answers.

A rollout is a function of its number and of the policy: which prompts it draws, and
with which random numbers, follows from the seed. Some optimizer steps train on its
answers; then comes the next one, of the policy as it is by then.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import rollout_steps
from ftjax.console import warn
from ftjax.data.loader import Batch
from ftjax.data.order import permutation
from ftjax.errors import EXIT_DIVERGED, UserError
from ftjax.loop import micro_batches
from ftjax.losses.policy import k3
from ftjax.methods.heads import read_head
from ftjax.models.decoder import Decoder
from ftjax.objectives.online import METRIC, read
from ftjax.objectives.ppo import VALUE
from ftjax.objectives.tasks import task_of
from ftjax.prepare import Prepared
from ftjax.rl.advantages import of_groups, of_values, shares
from ftjax.rl.answers import lay_out
from ftjax.rl.player import TRAIN_SEED, Player, Shown, answer_metrics, seed_of
from ftjax.sharding import batch_sharding, put_batch
from ftjax.step import TrainState
from ftjax.weights import join

PyTree = Any


class Rollouts:
    """Answers of the policy as batches, and as a measure of it.

    Args:
      config: of the run.
      ready: what it prepared.
      frozen: what is not trained.
      reference: variables of the reference, or None where there is none.
      player: lets the policy answer.
    """

    def __init__(
        self,
        config: Any,
        ready: Prepared,
        frozen: PyTree,
        reference: PyTree | None,
        player: Player,
    ):
        self.config, self.ready, self.player = config, ready, player
        self.frozen, self.reference = frozen, reference
        self.unit = rollout_steps(config)
        self.size = config.train.batch_size * config.rollout.batches  # completions
        self._rows: Batch = {}
        self._number, self._warned = -1, False
        self.critic = task_of(config.task).head == VALUE
        self._score = jax.jit(make_score(ready.shape.model, config.loss))

    def batch(self, step: int, state: TrainState) -> Batch:
        """The batch of a step, leaves [k, rows, ...]; a `loop.Source`."""
        number, part = divmod(step, self.unit)
        if part == 0:
            self._rows, self._number = self.rollout(number, state.trained), number
        if number != self._number:
            raise UserError(
                "the run was saved within a rollout, as they are cut now",
                where="config.rollout.batches, config.rollout.passes",
                expected=f"a last step that is a multiple of {self.unit}",
                got=str(step),
                fix="continue with the batches and passes that the run began with",
            )
        c = self.config
        turn, place = divmod(part, c.rollout.batches)
        order = np.arange(self.size)
        if self.unit > 1:
            order = permutation(self.size, c.seed, number * c.rollout.passes + turn)
        count, k = c.train.batch_size, c.train.accumulate
        chosen = order[place * count : (place + 1) * count]
        rows = {name: x[chosen] for name, x in self._rows.items()}
        if not self.critic:
            rows |= shares(rows["weights"], c.loss, k, c.rollout.max_new_tokens)
        return micro_batches(rows, k)

    def rollout(self, number: int, trained: PyTree) -> Batch:
        """The rows of a whole rollout, leaves [n, ...].

        Raises:
          UserError: of the rewards, or the policy is further from its reference than
            `config.loss.max_kl`.
        """
        c, data = self.config, self.ready.data
        policy = join(self.frozen, trained)
        prompts = self.size // c.rollout.group
        if data.loader is None:
            raise ValueError("prompts are not read from a stream")
        drawn = data.loader.groups(number * prompts, prompts)
        rows = [i for (i,) in drawn for _ in range(c.rollout.group)]
        seed = seed_of(c.seed, TRAIN_SEED, number)
        answers = self.player.answer(policy, data.train, rows, c.loss.temperature, seed)
        batch = lay_out(
            answers.prompts, [a.tokens for a in answers.completions], data.length
        )
        counts = ~np.isnan(answers.judged.total)
        if c.loss.mask_truncated:
            counts &= answers.stopped
        batch["weights"] *= counts[:, None]
        batch |= self.scores(policy, batch)
        self._check_kl(batch)
        made = of_values if self.critic else of_groups
        leaves, values = made(answers, batch, c)
        told = {**answer_metrics(answers), **values}
        self._warn_once(told["frac_reward_zero_std"], counts.any(), answers.stopped)
        more = {METRIC + name: x.astype(np.float32) for name, x in told.items()}
        return batch | leaves | more

    def scores(self, policy: PyTree, batch: Batch) -> Batch:
        """What the policy and the reference say of the rows, where it is needed."""
        own = self.unit > 1 or self._limits_kl or self.critic
        wanted = {"old_": policy} if own else {}
        if self.reference is not None:
            wanted["ref_"] = self.reference
        size = self.config.train.batch_size // self.config.train.accumulate
        sharding = batch_sharding(self.ready.mesh)
        found = {}
        for prefix, variables in wanted.items():
            parts = []
            for start in range(0, self.size, size):
                part = {n: x[start : start + size] for n, x in batch.items()}
                parts.append(self._score(variables, put_batch(part, sharding)))
            for name in parts[0]:
                whole = np.concatenate([np.asarray(part[name]) for part in parts])
                found[prefix + name] = whole
        return found

    @property
    def _limits_kl(self) -> bool:
        return self.config.loss.max_kl > 0

    def _check_kl(self, batch: Batch) -> None:
        if not self._limits_kl:
            return
        weights = batch["weights"]
        policy, reference = (jnp.asarray(batch[n]) for n in ("old_logp", "ref_logp"))
        each = np.asarray(k3(policy, reference))
        kl = float((each * weights).sum() / max(weights.sum(), 1))
        if not kl <= self.config.loss.max_kl:
            raise UserError(
                "the policy has gone too far from its reference",
                where="config.loss.max_kl",
                expected=f"a KL per token of at most {self.config.loss.max_kl:g}",
                got=f"{kl:.4g}",
                fix="lower config.optim.lr or raise config.loss.beta",
                code=EXIT_DIVERGED,
            )

    def _warn_once(
        self, equal: np.ndarray, judged: np.bool_, stopped: np.ndarray
    ) -> None:
        """Of the first rollout that nothing, or little, can be learned from."""
        said = []
        if not judged:
            said.append(
                "no completion of this rollout counts: none has a reward, or all were "
                "cut and loss.mask_truncated leaves them out"
            )
        elif equal.all():
            said.append(
                "all completions of each prompt earn the same, so that there is no "
                "signal in this rollout; frac_reward_zero_std counts such prompts"
            )
        if not stopped.any():
            said.append(
                "every completion of this rollout was cut at rollout.max_new_tokens: "
                "none ended by itself"
            )
        if said and not self._warned:
            self._warned = True
            warn("; and ".join(said))

    def evaluate(self, trained: PyTree) -> dict[str, float] | None:
        """The rewards of the held-out prompts, or None; see `Player.evaluate`."""
        data = self.ready.data.eval
        if data is None:
            return None
        policy = join(self.frozen, trained)
        return self.player.evaluate(policy, data, self.config.train.batch_size)

    def show(self, trained: PyTree) -> list[Shown]:
        """The likeliest answers to a few held-out prompts."""
        data, count = self.ready.data, self.config.train.sample_rows
        policy = join(self.frozen, trained)
        return self.player.show(policy, data.eval or data.train, count)


def make_score(model: Decoder, config: Any) -> Any:
    """`f(variables, batch)`: `logp` of every trained token, [B, T], as in the loss.

    And the `value` of the state in which it is chosen, where there is such a head.
    """

    def score(variables: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        hidden, tokens = read(model, variables, batch, config)
        found = {"logp": tokens.logp_BT}
        if VALUE in variables:
            found["value"] = read_head(hidden, variables[VALUE]) * batch["weights"]
        return found

    return score
