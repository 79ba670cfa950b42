"""The golden model and what is trained of it, and steps that must equal torch's."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.checkpoints.hf import load_params, open_weights
from ftjax.methods.heads import SCORE
from ftjax.methods.lora import LoraPlan, init_lora, plan_lora
from ftjax.models.decoder import Decoder
from ftjax.models.names import model_weights
from ftjax.models.proj import find_sites, put, site_names
from ftjax.models.registry import spec_from_config
from ftjax.optim import make_optimizer
from ftjax.step import Objective, init_state, make_train_step
from ftjax.weights import join
from tests.goldens import make_steps
from tests.goldens.weights import random_tensor, write_random
from tests.models_small import split

PyTree = Any
Tensors = dict[str, tuple[np.ndarray, float]]
FOLDER = Path(__file__).parent / "goldens"


def golden(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


@dataclass(frozen=True)
class Start:
    """The golden model before its first step.

    Attributes:
      model: its shape.
      plan: of LoRA.
      head: the collection of a scalar head that is trained too, if there is one.
      trained: at the start.
      frozen: the rest.
    """

    model: Decoder
    plan: LoraPlan
    head: str
    trained: PyTree
    frozen: PyTree

    @property
    def policy(self) -> PyTree:
        return join(self.frozen, self.trained)


def start(folder: Path, method: str, head: str = "") -> Start:
    model, params = load(folder)
    plan, lora = known_lora(model)
    trained, frozen = split(method, {"params": params}, lora)
    if head:
        w_D = random_tensor(f"{head}.weight", (1, model.spec.d_model))[0]
        trained = {**trained, head: {"w": jnp.asarray(w_D)}}
    return Start(model, plan, head, trained, frozen)


def load(folder: Path, of: str = "") -> tuple[Decoder, PyTree]:
    """The golden model, by way of a checkpoint; `of` is that of `write_random`."""
    spec = spec_from_config(make_steps.CONFIG, "config.json")
    names = model_weights(spec)
    shapes = {n: list(w.stored_shape) for w in names.values() for n in w.names}
    write_random(folder / "model.safetensors", shapes, of)
    return Decoder(spec), load_params(open_weights(folder, spec), dtype="float32")


def known_lora(model: Decoder) -> tuple[LoraPlan, PyTree]:
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


def get(tree: PyTree, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def stored(begun: Start, trained: PyTree) -> Tensors:
    """(tensor, its first number) of what is trained, under the names of torch."""
    found: Tensors = {}
    if begun.head:
        w_D = np.asarray(trained[begun.head]["w"], np.float64)
        found[f"{begun.head}.weight"] = (w_D, w_D[0])
    if "lora" in trained:
        return found | stored_lora(begun.plan, trained["lora"])
    for path, weight in model_weights(begun.model.spec).items():
        leaf = np.asarray(get(trained["params"], path), np.float64)
        rows = leaf if weight.layers else leaf[None]
        for row, name in zip(rows, weight.names, strict=True):
            first = row if "scale" in path else row.reshape(row.shape[0], -1)
            found[name] = (row, first.flat[0])
    if begun.head == SCORE:  # torch has no head of logits then; ours stands idle
        del found["lm_head.weight"]
    return found


def stored_lora(plan: LoraPlan, tree: PyTree) -> Tensors:
    found: Tensors = {}
    for path, at in plan.sites.items():
        delta = get(tree, path)["w"]
        for layer, name in enumerate(site_names(at.site)):
            for part in "ab":
                x = np.asarray(getattr(delta, part)[layer], np.float64)
                key = f"base_model.model.{name}.lora_{part.upper()}.default.weight"
                found[key] = (x, x.flat[0])
    return found


def check_steps(
    begun: Start, frozen: PyTree, objective: Objective, batch: Any, golden: Any
) -> None:
    """Some steps on one batch give the losses, norms and weights of torch.

    `frozen` is that of the start, and what an objective has beside it.
    """
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
    state = init_state(begun.trained, tx, seed=0)
    step = jax.jit(make_train_step(objective, tx))
    losses, norms = [], []
    for _ in range(make_steps.STEPS):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(losses, golden["loss"], rtol=2e-5)
    np.testing.assert_allclose(norms, golden["grad_norm"], rtol=2e-5)
    ours = stored(begun, state.trained)
    assert ours.keys() == golden["trained"].keys()
    for name, (total, squares, first) in golden["trained"].items():
        x, ours_first = ours[name]
        np.testing.assert_allclose((x * x).sum(), squares, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(x.sum(), total, atol=2e-2, err_msg=name)
        np.testing.assert_allclose(ours_first, first, atol=1e-4, err_msg=name)
