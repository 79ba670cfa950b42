"""Three optimizer steps equal those of torch, transformers and PEFT, per method."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dpo as dpo_config
from configs import orpo as orpo_config
from ftjax.checkpoints.hf import load_params, open_weights
from ftjax.data.dataset import Dataset
from ftjax.data.encode import Example
from ftjax.data.loader import Loader
from ftjax.data.report import DataReport
from ftjax.methods.lora import init_lora, plan_lora
from ftjax.models.decoder import Decoder
from ftjax.models.names import model_weights
from ftjax.models.proj import find_sites, put, site_names
from ftjax.models.registry import spec_from_config
from ftjax.objectives.causal import causal
from ftjax.objectives.dpo import dpo, pair_logps
from ftjax.objectives.orpo import KINDS, orpo
from ftjax.optim import make_optimizer
from ftjax.reference import put_reference, reference_sums
from ftjax.sharding import make_mesh, replicated
from ftjax.step import Objective, init_state, make_train_step
from tests.goldens import make_preference_steps, make_steps
from tests.goldens.weights import random_tensor, write_random
from tests.models_small import split

GOLDEN = json.loads((Path(__file__).parent / "goldens/steps.json").read_text())
FILE = Path(__file__).parent / "goldens/preference_steps.json"
PREFERENCES = json.loads(FILE.read_text())
LENGTH = 20


def base(folder: Path) -> tuple[Decoder, Any]:
    spec = spec_from_config(GOLDEN["config"], "config.json")
    names = model_weights(spec)
    shapes = {n: list(w.stored_shape) for w in names.values() for n in w.names}
    write_random(folder / "model.safetensors", shapes)
    return Decoder(spec), load_params(open_weights(folder, spec), dtype="float32")


def known_lora(model: Decoder) -> Any:
    config = SimpleNamespace(
        **make_steps.LORA,
        targets="all-linear",
        rank_pattern="",
        alpha_pattern="",
        use_rslora=False,
        dropout=0.0,
    )
    plan = plan_lora(find_sites(model), config)
    tree = init_lora(plan, 0)
    for path, at in plan.sites.items():
        delta = get(tree, path)["w"]
        layers = [
            random_tensor(
                f"base_model.model.{name}.lora_A.default.weight",
                (at.rank, int(np.prod(at.site.inputs))),
            ).T.reshape(*at.site.inputs, at.rank)
            for name in site_names(at.site)
        ]
        put(tree, path, {"w": delta.replace(a=jnp.asarray(np.stack(layers)))})
    return plan, tree


def get(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def batch(micro: int) -> dict[str, np.ndarray]:
    """The golden rows, padded, as `micro` micro-batches."""
    names = ("tokens", "targets", "positions", "segments")
    made = make_steps.rows()
    out = {name: np.zeros((len(made), LENGTH), np.int32) for name in names}
    out["weights"] = np.zeros((len(made), LENGTH), np.float32)
    for row, (ids, prompt) in enumerate(made):
        n = len(ids) - 1
        out["tokens"][row, :n], out["targets"][row, :n] = ids[:-1], ids[1:]
        out["positions"][row, :n], out["segments"][row, :n] = np.arange(n), 1
        out["weights"][row, prompt - 1 : n] = 1
    return {k: v.reshape(micro, -1, LENGTH) for k, v in out.items()}


def stored(method: str, trained: Any, model: Decoder, plan: Any) -> dict[str, Any]:
    """The trained tensors under the names that torch has for them."""
    found = {}
    if method == "full":
        for path, weight in model_weights(model.spec).items():
            leaf = np.asarray(get(trained["params"], path), np.float64)
            for row, name in zip(
                leaf if weight.layers else leaf[None], weight.names, strict=True
            ):
                first = row if "scale" in path else row.reshape(row.shape[0], -1)
                found[name] = (row, first.flat[0])
        return found
    for path, at in plan.sites.items():
        delta = get(trained["lora"], path)["w"]
        for layer, name in enumerate(site_names(at.site)):
            for part in "ab":
                x = np.asarray(getattr(delta, part)[layer], np.float64)
                key = f"base_model.model.{name}.lora_{part.upper()}.default.weight"
                found[key] = (x, x.flat[0])
    return found


def pairs() -> Dataset:
    """The golden pairs; both sides begin with the prompt."""
    examples = []
    for prompt, *answers in make_preference_steps.pairs():
        for answer in answers:
            ids = np.array([*prompt, *answer], np.int32)
            trained = np.arange(len(ids)) >= len(prompt)
            examples.append(Example(ids, trained, "golden"))
    count = len(examples) // 2
    return Dataset(
        examples,
        DataReport("golden", "train", 64),
        groups=[(2 * i, 2 * i + 1) for i in range(count)],
        values={name: np.full(count, name == "pair", np.float32) for name in KINDS},
        members=2,
    )


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("task", ["dpo", "orpo"])
def test_preference_steps_equal_torch(task: str, method: str, tmp_path: Path) -> None:
    """In packed rows, in two micro-batches; full DPO with numbers known before."""
    model, params = base(tmp_path)
    config = {"dpo": dpo_config, "orpo": orpo_config}[task].get_config().loss
    config.update(chunk=8, beta=make_preference_steps.BETA)
    made = {"dpo": dpo, "orpo": orpo}[task](model, config)
    loader = Loader(pairs(), length=64, packing=True, seed=0, shuffle=False)
    if task == "dpo" and method == "full":
        mesh, say = make_mesh(), partial(pair_logps, model)
        whole = jax.device_put({"params": params}, replicated(mesh))
        put_reference(loader, reference_sums(say, whole, loader, config, mesh, 4))
    rows = next(loader.epoch(4))
    halves = {k: x.reshape(2, 2, *x.shape[1:]) for k, x in rows.items()}
    golden = PREFERENCES["tasks"][task][method]
    check_steps(model, params, method, made, halves, golden)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_steps_equal_torch(method: str, micro: int, tmp_path: Path) -> None:
    model, params = base(tmp_path)
    made, golden = causal(model, chunk=8), GOLDEN["methods"][method]
    check_steps(model, params, method, made, batch(micro), golden)


def check_steps(
    model: Decoder,
    params: Any,
    method: str,
    objective: Objective,
    batch: Any,
    golden: Any,
) -> None:
    """Some steps on one batch give the losses, norms and weights of torch."""
    plan, lora = known_lora(model)
    trained, frozen = split(method, {"params": params}, lora)
    optim = SimpleNamespace(
        **make_steps.OPTIM,
        name="adamw",
        b_lr_ratio=1.0,
        schedule="constant",
        warmup=0,
        final=1.0,
        clip_norm=make_steps.CLIP,
    )
    tx = make_optimizer(optim, make_steps.STEPS)
    state = init_state(trained, tx, seed=0)
    step = jax.jit(make_train_step(objective, tx))
    losses, norms = [], []
    for _ in range(make_steps.STEPS):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(losses, golden["loss"], rtol=2e-5)
    np.testing.assert_allclose(norms, golden["grad_norm"], rtol=2e-5)
    ours = stored(method, state.trained, model, plan)
    assert ours.keys() == golden["trained"].keys()
    for name, (total, squares, first) in golden["trained"].items():
        x, ours_first = ours[name]
        np.testing.assert_allclose((x * x).sum(), squares, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(x.sum(), total, atol=2e-2, err_msg=name)
        np.testing.assert_allclose(ours_first, first, atol=1e-4, err_msg=name)
