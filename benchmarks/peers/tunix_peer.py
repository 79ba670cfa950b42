"""google-tunix: its Llama, its trainer's jitted step, its sampler; LoRA by qwix.

QLoRA is qwix's nf4: tiles of at most 64 inputs with a scale each; it has no double
quantization.
"""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.turns import Request, Step, note_baseline, serve

PROJECTIONS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build(request: Request) -> tuple[Step, dict[str, str]]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from importlib.metadata import version

    import jax
    import tunix
    from tunix.generate import sampler as _sampler  # noqa: F401
    from tunix.models.llama3 import model, params
    from tunix.sft import peft_trainer as _trainer  # noqa: F401

    names = ("google-tunix", "qwix", "jax", "flax")
    versions = {name: version(name) for name in names}
    assert tunix is not None
    note_baseline()
    c = json.loads((Path(request.checkpoint) / "config.json").read_text())
    config = model.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        weight_tying=c["tie_word_embeddings"],
    )
    mesh = jax.make_mesh(
        (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with mesh:
        llama = params.create_model_from_safe_tensors(
            request.checkpoint, config, mesh, dtype=jax.numpy.float32
        )
    make = _generate if request.task == "generate" else _train
    return make(request, llama, config, mesh), versions


def _train(request: Request, llama: Any, config: Any, mesh: Any) -> Step:
    import jax
    import numpy as np
    import optax
    import qwix
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
    from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

    if request.task in ("lora", "qlora"):
        shape = {"rank": request.rank, "alpha": request.alpha}
        provider = qwix.LoraProvider(module_path=PROJECTIONS, **shape)
        if request.task == "qlora":
            # A tile lies within the last of the inputs' axes: a head, for o_proj.
            sizes = {".*o_proj": min(64, config.head_dim), PROJECTIONS: 64}
            rules = [
                qwix.LoraRule(
                    module_path=path, weight_qtype="nf4", tile_size=size, **shape
                )
                for path, size in sizes.items()
            ]
            provider = qwix.LoraProvider(rules)
        with mesh:
            llama = qwix.apply_lora_to_model(llama, provider, **llama.get_model_input())
    optimizer = optax.adamw(request.learning_rate, weight_decay=0.0)
    trainer = PeftTrainer(llama, optimizer, TrainingConfig(eval_every_n_steps=10**9))

    def inputs(x: Any) -> dict[str, Any]:
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": build_positions_from_mask(x.input_mask),
            "attention_mask": make_causal_attn_mask(x.input_mask),
        }

    trainer = trainer.with_gen_model_input_fn(inputs)
    with mesh:
        train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def step(index: int) -> float:
        tokens = np.asarray(request.tokens(index), np.int32)
        batch = TrainingInput(tokens, np.ones(tokens.shape, bool))
        with mesh:
            loss, *rest = train_step(batch)
        jax.block_until_ready((loss, rest))
        return float(loss)

    return step


class _Ids:
    """A tokenizer of texts that are ids in decimal already."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none is put before a text

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


def _generate(request: Request, llama: Any, config: Any, mesh: Any) -> Step:
    from tunix.generate.sampler import CacheConfig, Sampler

    cache = CacheConfig(
        cache_size=request.length + request.new_tokens,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = Sampler(llama, _Ids(), cache)

    def step(index: int) -> list[int]:
        prompts = [" ".join(map(str, row)) for row in request.tokens(index)]
        with mesh:
            out = sampler(
                prompts,
                max_generation_steps=request.new_tokens,
                max_prompt_length=request.length,
                eos_tokens=[-1],
            )
        tokens = [[int(t) for t in row] for row in out.tokens]
        assert all(len(row) == request.new_tokens for row in tokens)
        return tokens[0]

    return step


if __name__ == "__main__":
    serve(build)
