"""Run directories without a training: what `ftjax.train` leaves, in a second."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import reward, sft
from ftjax.checkpoints.state import Checkpoints
from ftjax.loading import load_base, open_base
from ftjax.methods.dora import with_magnitudes
from ftjax.methods.lora import init_lora, plan_lora
from ftjax.methods.method import plan_method
from ftjax.models.decoder import Decoder
from ftjax.models.proj import find_sites
from ftjax.sharding import make_mesh


def make_run(
    folder: Path,
    model: Path,
    *,
    method: str = "lora",
    task: str = "sft",
    steps: tuple[tuple[int, float | None], ...] = ((10, None),),
    data: str = "",
    zero: bool = False,
    chat: bool = False,
    **values: Any,
) -> Path:
    """A run of `method` on `model` with random weights at each of `steps`.

    Args:
      task: 'sft', or 'reward', whose head is random too.
      steps: (step, eval loss) of each checkpoint.
      data: what it says it was trained on.
      zero: leaves `b` of LoRA at zero.
      chat: says that its rows were conversations.
      values: of the method, such as `rank`.
    """
    folder.mkdir(parents=True)
    configs = {"sft": sft, "reward": reward}
    config = configs[task].get_config(f"model={model},method={method}")
    config.data.train = data or "rows.jsonl"
    config.method.update(values)
    settings = json.loads(json.dumps(config.to_dict()))
    (folder / "config.json").write_text(json.dumps(settings))
    base = open_base(str(model), logits=task != "reward")
    saved = Checkpoints(folder / "checkpoints", keep_last=9, report=print)
    for step, loss in steps:
        trained = _trained(base, settings["method"], 0 if zero else step)
        if task == "reward":
            w_D = np.random.default_rng(step).normal(size=base.spec.d_model)
            trained["score"] = {"w": jnp.asarray(w_D, jnp.float32)}
        state = {"step": jnp.asarray(step), "trained": trained}
        saved.save(step, state, {"base_hash": base.hash, "chat": chat}, loss)
    return folder


def _trained(base: Any, method: dict[str, Any], seed: int) -> Any:
    rng = np.random.default_rng(seed)

    def moved(leaf: jax.Array) -> jax.Array:
        noise = rng.normal(0, 0.05 if seed else 0, leaf.shape)
        return jnp.asarray(np.asarray(leaf) + noise.astype(np.float32))

    how = plan_method(Decoder(base.spec), SimpleNamespace(**method))
    if method["name"] == "full":
        return jax.tree.map(moved, load_base(base, jnp.float32, make_mesh()))
    if method["name"] != "lora":
        loaded = load_base(base, jnp.float32, make_mesh())
        return jax.tree.map(moved, how.start(loaded, seed)[0])
    plan = plan_lora(find_sites(Decoder(base.spec)), SimpleNamespace(**method))
    lora = init_lora(plan, seed)
    if method.get("use_dora"):
        lora = with_magnitudes(lora, plan, load_base(base, jnp.float32, make_mesh()))
    is_delta = {"is_leaf": lambda leaf: hasattr(leaf, "dense")}
    beside = {}
    if method.get("also_train"):
        loaded = load_base(base, jnp.float32, make_mesh())
        beside = {"params": jax.tree.map(moved, how.start(loaded, seed)[0]["params"])}
    lora = jax.tree.map(lambda d: d.replace(b=moved(d.b)), lora, **is_delta)
    return how.stored({"lora": lora, **beside})
