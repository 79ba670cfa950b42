"""ftjax's rows: the same functions that `ftjax.train` and `ftjax.generate` call."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.turns import Request, Step, note_baseline, serve
from ftjax import runtime


def build(request: Request) -> tuple[Step, dict[str, str]]:
    import flax
    import jax

    import ftjax.decoding.generator
    import ftjax.train  # noqa: F401

    versions = {"jax": jax.__version__, "flax": flax.__version__}
    note_baseline()
    make = _generate if request.task == "generate" else _train
    return make(request), versions


def _load(request: Request, mesh: Any, quant: Any = None) -> tuple[Any, Any]:
    from ftjax.checkpoints.hf import open_weights, read_config
    from ftjax.loading import Base, load_base
    from ftjax.methods.quant import plan_quant
    from ftjax.models.decoder import Decoder
    from ftjax.models.proj import find_sites
    from ftjax.models.registry import spec_from_config

    folder = Path(request.checkpoint)
    config = read_config(folder)
    spec = spec_from_config(config, str(folder))
    weights = open_weights(folder, spec)
    tokenizer: Any = None  # the rows are token ids already
    base = Base(folder, folder.name, config, spec, tokenizer, (), weights)
    formats = plan_quant(find_sites(Decoder(spec)), quant) if quant else {}
    return spec, load_base(base, np.float32, mesh, formats=formats)


def _train(request: Request) -> Step:
    import jax

    from configs import dpo as pairs
    from configs import sft
    from ftjax.loop import compile_step, on_mesh
    from ftjax.methods.method import plan_method
    from ftjax.models.decoder import Decoder
    from ftjax.objectives.causal import causal
    from ftjax.objectives.dpo import dpo
    from ftjax.optim import make_optimizer
    from ftjax.sharding import batch_sharding, make_mesh, put_batch
    from ftjax.step import init_state

    kind, _, method = request.task.rpartition(" ")
    config = sft.get_config(f"method={method}")
    config.optim.lr = request.learning_rate
    config.optim.schedule, config.optim.warmup = "constant", 0
    config.optim.clip_norm = 0.0  # nobody clips here
    mesh = make_mesh()
    spec, base = _load(request, mesh, config.quant)
    model = Decoder(spec, dtype=np.float32, remat=config.model.remat, mesh=mesh)
    if config.method.name == "lora":
        config.method.rank, config.method.alpha = request.rank, request.alpha
    trained, frozen = plan_method(model, config.method).start(base, config.seed)
    del base
    tx = make_optimizer(config.optim, steps=1000)
    state = on_mesh(init_state(trained, tx, config.seed), mesh)
    del trained
    objective = causal(model, config.loss.chunk)
    if kind == "dpo":
        objective = dpo(model, pairs.get_config().loss)
    step_fn = compile_step(objective, tx, state)
    sharding = batch_sharding(mesh, leading=1)

    def step(index: int) -> float:
        nonlocal state
        rows = _batch(request.tokens(index))
        if kind == "dpo":
            rows = _pairs(rows, reference=not frozen)
        batch = put_batch(rows, sharding)
        state, metrics = step_fn(state, frozen, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def _batch(rows: list[list[int]]) -> dict[str, np.ndarray]:
    """A batch as the loader makes it: one document per row, every token trained on."""
    tokens = np.asarray([rows], np.int32)
    targets, weights = np.zeros_like(tokens), np.ones(tokens.shape, np.float32)
    targets[..., :-1], weights[..., -1] = tokens[..., 1:], 0
    positions = np.broadcast_to(
        np.arange(tokens.shape[2], dtype=np.int32), tokens.shape
    )
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "segments": np.ones_like(tokens),
        "positions": np.ascontiguousarray(positions),
    }


def _pairs(batch: dict[str, np.ndarray], reference: bool) -> dict[str, np.ndarray]:
    """Each row as a pair: its halves, all of them answers but the first tokens.

    `reference`: with numbers of a reference, as where no base is left in memory.
    """
    from ftjax.objectives.dpo import REFERENCE

    half = batch["tokens"].shape[-1] // 2
    second = np.arange(batch["tokens"].shape[-1]) >= half
    one = np.ones((*batch["tokens"].shape[:2], 1), np.float32)
    ends = batch["weights"].copy()
    ends[..., half - 1] = 0
    made = {
        **batch,
        "weights": ends,
        "segments": (1 + second + np.zeros_like(batch["tokens"])).astype(np.int32),
        "positions": (batch["positions"] - half * second).astype(np.int32),
        "pair": one,
    }
    return made | {name: -100 * one for name in REFERENCE if reference}


def _generate(request: Request) -> Step:
    from ftjax.decoding.generator import Generator
    from ftjax.sharding import make_mesh

    spec, base = _load(request, make_mesh())
    generator = Generator(spec, base, release=True)

    def step(index: int) -> list[int]:
        prompts = request.tokens(index)
        done = generator.generate(prompts, request.new_tokens, ignore_eos=True)
        assert all(len(one.tokens) == request.new_tokens for one in done)
        return done[0].tokens

    return step


if __name__ == "__main__":
    runtime.prepare()
    serve(build)
