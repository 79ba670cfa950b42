"""Every objective once more: in float64, over sequences one by one, from its formula.

Nothing of ours is used but the model's hidden states.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.data.dataset import Dataset
from ftjax.models.decoder import Decoder, hidden_and_head
from tests.models_small import SPEC

LENGTH = 24
ROWS = 16  # at least; those that no sequence fills are empty


class Alone:
    """The sequences of a data set, each in a row of its own, and what a model says."""

    def __init__(self, data: Dataset, variables: Any, head_w: Any = None):
        """`variables` of the model, float64; `head_w` of a reward head."""
        self.data, count = data, max(ROWS, len(data.examples))
        self.batch = {
            name: np.zeros((count, LENGTH), np.int32)
            for name in ("tokens", "segments", "positions")
        }
        self.trained = np.zeros((count, LENGTH))
        self.last = np.zeros(count, int)
        for i, example in enumerate(data.examples):
            n = len(example.ids)
            self.batch["tokens"][i, :n], self.batch["segments"][i, :n] = example.ids, 1
            self.batch["positions"][i, :n] = np.arange(n)
            self.trained[i, :n], self.last[i] = example.trained, n - 1
        self.there = self.batch["segments"].astype(float)
        self.hidden, self.matrix = forward()(variables, self.batch)
        self.head_w = head_w

    def log_probs(self, hidden: Any) -> Any:
        """Of every token of the vocabulary, at the place that it is predicted."""
        logp = jax.nn.log_softmax(hidden @ self.matrix)
        return jnp.pad(logp, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    def logp(self, hidden: Any) -> Any:
        """log p of every token given those before it: [sequences, T]."""
        picked = self.batch["tokens"][..., None]
        return jnp.take_along_axis(self.log_probs(hidden), picked, axis=-1)[..., 0]

    def answers(self, hidden: Any) -> Any:
        """log p of each answer: [sequences]."""
        return jnp.sum(self.logp(hidden) * self.trained, axis=1)

    @property
    def sizes(self) -> Any:
        """Tokens of each answer."""
        return self.trained.sum(1)

    def sides(self, values: Any) -> tuple[Any, Any]:
        """Of the chosen and of the rejected of each pair."""
        pairs = np.array([g for g in self.data.groups if len(g) == 2])
        return values[pairs[:, 0]], values[pairs[:, 1]]

    def rewards(self, hidden: Any, w: Any) -> Any:
        return hidden[np.arange(len(self.last)), self.last] @ w


@cache
def forward() -> Any:
    model = Decoder(SPEC, dtype=jnp.float64)

    @jax.jit
    def run(variables: Any, batch: Any) -> Any:
        return hidden_and_head(model, variables, batch)

    return run


@cache
def backward() -> Any:
    """The gradient of the trained part, of a cotangent of the hidden states."""
    model = Decoder(SPEC, dtype=jnp.float64)

    @jax.jit
    def run(trained: Any, frozen: Any, batch: Any, cotangent: Any) -> Any:
        def hidden(trained: Any) -> Any:
            return hidden_and_head(model, {**frozen, **trained}, batch)[0]

        return jax.vjp(hidden, trained)[1](cotangent)[0]

    return run


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)


def true_loss(
    formula: Any, data: Dataset, trained: Any, frozen: Any, other: Any = None
) -> tuple[float, Any]:
    """(loss, gradient of what is trained) of a formula.

    Args:
      formula: (policy, reference, hidden states of the policy, its reward head) -> [].
      data: the sequences and their groups.
      trained: with `lora`, and perhaps `score`.
      frozen: of the base.
      other: the reference's or teacher's variables; the base's by default.
    """
    with jax.enable_x64(True):
        trained, frozen = wide(trained), wide(frozen)
        lora = {"lora": trained["lora"]}
        own = Alone(data, {**frozen, **lora})
        base = Alone(data, frozen if other is None else wide(other))
        w = trained.get("score", {"w": jnp.zeros(())})["w"]
        slopes = jax.value_and_grad(partial(formula, own, base), argnums=(0, 1))
        value, (slope, head) = jax.jit(slopes)(own.hidden, w)
        grads = backward()(lora, frozen, own.batch, slope)
        if "score" in trained:
            grads = {**grads, "score": {"w": head}}
        return float(value), jax.tree.map(np.asarray, grads)


def log_sigmoid(x: Any) -> Any:
    return -jnp.log1p(jnp.exp(-x))


def dpo(beta: float) -> Any:
    """arXiv 2305.18290, eq. 7."""

    def formula(own: Alone, base: Alone, hidden: Any, w: Any) -> Any:
        chosen, rejected = own.sides(own.answers(hidden) - base.answers(base.hidden))
        return jnp.mean(-log_sigmoid(beta * (chosen - rejected)))

    return formula


def ipo_sft_short(beta: float, sft: float, alpha: float) -> Any:
    """IPO as TRL has it, of answers whose tokens beyond the shorter one count `alpha`
    (LD-DPO, arXiv 2409.06411), and the likelihood of the chosen."""

    def formula(own: Alone, base: Alone, hidden: Any, w: Any) -> Any:
        place = np.cumsum(own.trained, axis=1) * own.trained
        shared = np.zeros(len(own.sizes))
        for pair in own.data.groups:
            shared[list(pair)] = own.sizes[list(pair)].min()
        count = own.trained * np.where(place > shared[:, None], alpha, 1.0)
        ratio = jnp.sum((own.logp(hidden) - base.logp(base.hidden)) * count, axis=1)
        chosen, rejected = own.sides(ratio / np.maximum(own.sizes, 1))
        nll = -own.sides(own.answers(hidden))[0].sum() / own.sides(own.sizes)[0].sum()
        ipo = jnp.mean(jnp.square(chosen - rejected - 1 / (2 * beta)))
        return ipo + sft * nll

    return formula


def orpo(beta: float, answer: float, text: float, whole: bool = True) -> Any:
    """arXiv 2403.07691, eq. 6, as TRL counts tokens; and answers and texts beside."""

    def formula(own: Alone, base: Alone, hidden: Any, w: Any) -> Any:
        chosen, rejected = own.sides(own.answers(hidden) / np.maximum(own.sizes, 1))

        def odds(p: Any) -> Any:
            return p - jnp.log1p(-jnp.exp(p))

        logp = own.logp(hidden)
        predicted = own.there.copy()
        predicted[:, 0] = 0  # the first token of a sequence never is
        count = np.zeros_like(predicted)
        for i, group in enumerate(own.data.groups):
            first, kinds = group[0], {k: v[i] for k, v in own.data.values.items()}
            tokens = predicted if kinds["pair"] and whole else own.trained
            weight = kinds["pair"] + answer * kinds["answer"] + text * kinds["text"]
            count[first] = weight * tokens[first]
        nll = -jnp.sum(logp * count) / count.sum()
        return nll - beta * jnp.mean(log_sigmoid(odds(chosen) - odds(rejected)))

    return formula


def reward(margins: Any, center: float) -> Any:
    """arXiv 2203.02155, eq. 1, with margins and centering."""

    def formula(own: Alone, base: Alone, hidden: Any, w: Any) -> Any:
        chosen, rejected = own.sides(own.rewards(hidden, w))
        apart = -log_sigmoid(chosen - rejected - margins)
        return jnp.mean(apart + center * jnp.square(chosen + rejected))

    return formula


def kto(beta: float, labels: Any, up: float, down: float) -> Any:
    """arXiv 2402.01306, eq. 8; a group is an answer, and another to the same prompt."""

    def formula(own: Alone, base: Alone, hidden: Any, w: Any) -> Any:
        ratio, other = own.sides(own.answers(hidden) - base.answers(base.hidden))
        z0 = jnp.maximum(0, jnp.mean(jax.lax.stop_gradient(other)))
        value = jnp.where(labels > 0, ratio - z0, z0 - ratio)
        weight = np.where(labels > 0, up, down)
        return jnp.mean(weight * (1 - 1 / (1 + jnp.exp(-beta * value))))

    return formula


def cpo(beta: float, nll_weight: float) -> Any:
    """arXiv 2401.08417, eq. 6; the likelihood per token, as TRL has it."""

    def formula(own: Alone, base: Alone, hidden: Any, w: Any) -> Any:
        chosen, rejected = own.sides(own.answers(hidden))
        nll = -chosen.sum() / own.sides(own.sizes)[0].sum()
        prefer = jnp.mean(-log_sigmoid(beta * (chosen - rejected)))
        return prefer + nll_weight * nll

    return formula


def simpo(beta: float, gamma: float) -> Any:
    """arXiv 2405.14734, eq. 6."""

    def formula(own: Alone, base: Alone, hidden: Any, w: Any) -> Any:
        chosen, rejected = own.sides(own.answers(hidden) / np.maximum(own.sizes, 1))
        return jnp.mean(-log_sigmoid(beta * (chosen - rejected) - gamma))

    return formula


def distill(share: float, temperature: float) -> Any:
    """Forward KL from the teacher, per trained token, and a share of the likelihood."""

    def formula(own: Alone, base: Alone, hidden: Any, w: Any) -> Any:
        t = jax.nn.log_softmax(base.hidden @ base.matrix / temperature)
        s = jax.nn.log_softmax(hidden @ own.matrix / temperature)
        apart = jnp.sum(jnp.exp(t) * (t - s), axis=-1)
        apart = jnp.pad(apart, ((0, 0), (1, 0)))[:, :-1]
        each = (1 - share) * apart - share * own.logp(hidden)
        return jnp.sum(each * own.trained) / own.sizes.sum()

    return formula
