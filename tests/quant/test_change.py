"""How far predictions move: nothing for the same weights, else what numpy finds."""

import jax
import numpy as np

from ftjax.evals.change import change
from ftjax.evals.measure import evaluate, make_sum_batch
from ftjax.objectives.causal import causal
from ftjax.sharding import batch_sharding, make_mesh
from tests.models_small import small_batch, small_model
from tests.quant.test_model import KINDS, quantized


def test_the_change_of_predictions() -> None:
    model, params = small_model()
    before, after = {"params": params}, quantized(model, params, **KINDS["int4"])
    batches = [small_batch(rows=4, seed=seed) for seed in (0, 1)]
    sharding = batch_sharding(make_mesh())
    same = change(model, before, before, batches, sharding)
    assert same["kl"] == 0 and same["logits_max"] == 0 and same["agree"] == 1
    found = change(model, before, after, batches, sharding)
    usual = evaluate(make_sum_batch(causal(model, 8)), after, {}, batches, sharding)
    assert (
        found["tokens"] == usual["tokens"] == sum(b["weights"].sum() for b in batches)
    )
    np.testing.assert_allclose(found["loss_after"], usual["loss"], rtol=1e-5)
    assert found["loss_before"] == same["loss_before"] == same["loss_after"]
    logits = [
        np.concatenate(
            [
                np.asarray(model.apply(v, *inputs(b), method="logits"), np.float64)[
                    b["weights"] > 0
                ]
                for b in batches
            ]
        )
        for v in (before, after)
    ]
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in logits)
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    np.testing.assert_allclose(found["kl"], kl, rtol=1e-3)
    apart = np.abs(logits[0] - logits[1])
    np.testing.assert_allclose(found["logits_mean"], apart.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["logits_max"], apart.max(), rtol=1e-4)
    agree = (p.argmax(-1) == q.argmax(-1)).mean()
    np.testing.assert_allclose(found["agree"], agree, rtol=1e-6)


def inputs(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return batch["tokens"], batch["positions"], batch["segments"]
