"""Adapters against the real peft, over the real transformers model, both ways.

Run by hand, from the root of the repository; the tests need neither torch nor peft:

    python -m tests.goldens.check_peft golden        # torch: makes peft.json
    python -m tests.goldens.check_peft ours DIR      # jax: exports, and our logits
    python -m tests.goldens.check_peft theirs DIR    # torch: loads them, and compares

`golden` lets peft write adapters (values from `weights.random_tensor`) and keeps their
configuration, shapes and logits: `tests/checkpoints/test_peft.py` loads them again. Of
DoRA it keeps the gradient of the mean loss of the row, and a merged weight, too.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.goldens.commands import run
from tests.goldens.weights import random_tensor, write_random

OUT = Path(__file__).parent / "peft.json"
IDS = [1, 11, 3, 9, 29, 31, 15, 13, 25, 19, 27, 17]
TOLERANCE = 1e-4
PREFIX = "base_model.model."

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}

# What peft writes, for us to read.
THEIRS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "rank_pattern": {"mlp.down_proj": 2, r"layers\.[02]\.self_attn\.k_proj": 3},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 16, "up_proj": 3},
    },
    "rslora": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
        "target_modules": ["o_proj", "gate_proj"],
    },
    "some_layers": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [0, 2],
    },
    "regex": {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.1\..*_proj"},
    "dora": {
        "r": 3,
        "lora_alpha": 5,
        "use_dora": True,
        "rank_pattern": {"v_proj": 2},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": [0, 2],
    },
    "dora_biased": {
        "r": 2,
        "lora_alpha": 4,
        "use_dora": True,
        "target_modules": ["k_proj", "o_proj"],
    },
}

# What ftjax writes, for peft to read: the `method` section of a config.
OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {
        "rank_pattern": r"down_proj=2,layers\.1\.self_attn\.q_proj=5",
        "alpha_pattern": r"v_proj=3,layers\.[01]\.mlp\.up_proj=24",
    },
    "rslora": {"use_rslora": True, "rank_pattern": "k_proj=1"},
    "some_layers": {"targets": r"layers\.[02]\.self_attn\.q_proj,o_proj"},
    "dora": {
        "use_dora": True,
        "targets": r"layers\.[02]\.self_attn\.q_proj,o_proj,down_proj",
        "rank_pattern": "down_proj=2",
    },
}

# Starts that take the update off the base; written as a plain one of the whole base.
TAKEN: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "pissa_patterns": {"init": "pissa", "use_rslora": True, "rank_pattern": "k_proj=1"},
    "olora": {"init": "olora", "alpha_pattern": "v_proj=3"},
}

# Sums of these that ftjax writes; peft makes them with combination_type='cat'.
SUMS: dict[str, dict[str, float]] = {
    "plain_and_some_layers": {"plain": 0.7, "some_layers": 0.3},
    "plain_and_rslora": {"plain": 1.5, "rslora": -0.5},
}


def base_config(case: str) -> dict[str, Any]:
    """The base of a case: `BASE`, or that with biases in the attention."""
    return BASE | {"attention_bias": case.endswith("_biased")}


def base_tensors(*, bias: bool = False) -> dict[str, list[int]]:
    """The published names and shapes of `BASE`."""
    D, F, V, H = 32, 48, 32, 8
    shapes = {"model.embed_tokens.weight": [V, D], "model.norm.weight": [D]}
    for i in range(BASE["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q", 4 * H), ("k", 2 * H), ("v", 2 * H), ("o", D)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = [rows, D]
            if bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = [rows]
        shapes[f"{layer}mlp.gate_proj.weight"] = [F, D]
        shapes[f"{layer}mlp.up_proj.weight"] = [F, D]
        shapes[f"{layer}mlp.down_proj.weight"] = [D, F]
        shapes[f"{layer}input_layernorm.weight"] = [D]
        shapes[f"{layer}post_attention_layernorm.weight"] = [D]
    return shapes


def write_base(folder: Path, case: str = "") -> Path:
    """The checkpoint that an adapter here belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    config = base_config(case)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = base_tensors(bias=config["attention_bias"])
    write_random(folder / "model.safetensors", tensors)
    return folder


def golden() -> None:
    import peft
    import torch
    import transformers
    from safetensors import safe_open

    cases = {}
    with tempfile.TemporaryDirectory() as temp:
        for name, settings in THEIRS.items():
            base = write_base(Path(temp) / f"base_{name}", name)
            config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
            model = peft.get_peft_model(transformers_model(base), config)
            fill_in_place(model)
            folder = Path(temp) / name
            model.save_pretrained(folder)
            with safe_open(folder / "adapter_model.safetensors", "np") as file:
                shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
            written = json.loads((folder / "adapter_config.json").read_text())
            written["base_model_name_or_path"] = "base"
            logits = torch_logits(model).round(6).tolist()
            cases[name] = {"config": written, "tensors": shapes, "logits": logits}
            if config.use_dora:
                cases[name] |= {"gradient": gradient(model), "merged": merged(model)}
    made = f"torch {torch.__version__}, transformers {transformers.__version__}"
    text = {"made_with": f"{made}, peft {peft.__version__}", "cases": cases}
    OUT.write_text(json.dumps(text, separators=(",", ":")) + "\n")
    print(f"wrote {OUT}: {OUT.stat().st_size} bytes, {len(cases)} cases")


def gradient(model: Any) -> dict[str, Any]:
    """Of the mean loss of the row, by published names."""
    import torch

    logits = model(torch.tensor([IDS])).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(IDS[1:])).backward()
    return {
        published(name): weight.grad.numpy().round(8).tolist()
        for name, weight in model.named_parameters()
        if "lora_" in name
    }


def merged(model: Any) -> dict[str, Any]:
    """The first weight that an adapter has changed, after peft has merged it."""
    name = next(n for n, _ in model.named_modules() if n.endswith("lora_A"))
    name = name.removeprefix(PREFIX).removesuffix(".lora_A")
    whole = model.merge_and_unload().get_submodule(name)
    return {f"{name}.weight": whole.weight.detach().numpy().round(7).tolist()}


def published(name: str) -> str:
    """The name of a parameter in peft's files."""
    if "magnitude" in name:
        return name.removesuffix(".default.weight")
    return name.replace(".default", "")


def fill_in_place(model: Any) -> None:
    """Gives every LoRA weight the values of its published name."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                values = random_tensor(published(name), tuple(weight.shape))
                weight.copy_(torch.from_numpy(values))


def ours(folder: Path) -> None:
    import jax
    import jax.numpy as jnp

    from ftjax.checkpoints.hf import load_params, open_weights, save_params
    from ftjax.checkpoints.peft import save_adapter
    from ftjax.methods.lora import merge
    from ftjax.methods.several import Update, combine
    from ftjax.models.registry import spec_from_config

    base = write_base(folder / "base")
    spec = spec_from_config(BASE, "config.json")
    params = load_params(open_weights(base, spec), dtype="float32")
    tokens = jnp.asarray([IDS], jnp.int32)
    rows = (tokens, jnp.arange(len(IDS))[None], jnp.ones_like(tokens))
    made = {
        name: (*random_adapter(spec, OURS[name], params), params, None) for name in OURS
    }
    made |= {name: taken(base, spec, name) for name in TAKEN}
    for name, mix in SUMS.items():
        parts = [Update(made[part][2], made[part][1]) for part in mix]
        summed = combine(parts, list(mix.values()))
        assert summed is not None
        made[name] = (made["plain"][0], summed.plan, summed.lora, params, None)
    for name, (model, plan, lora, under, plain) in made.items():
        logits = model.apply({"params": under, "lora": lora}, *rows, method="logits")
        target = folder / name
        written = (lora, plan) if plain is None else plain
        save_adapter(target / "peft", *written, str(base), "0" * 64)
        (target / "merged").mkdir()
        merged = merge(under, lora)
        save_params(target / "merged", merged, spec, config=BASE, dtype="float32")
        np.save(target / "logits.npy", np.asarray(logits[0]))
        size = sum(leaf.size for leaf in jax.tree.leaves(lora))
        print(f"{name}: {len(plan.sites)} sites, {size} numbers")


def taken(base: Path, spec: Any, name: str) -> tuple[Any, ...]:
    """(model, plan, collection, rest of the base, plain update), after noise."""
    import jax
    import jax.numpy as jnp

    from ftjax.checkpoints.hf import load_params, open_weights
    from ftjax.methods.method import plan_method
    from ftjax.methods.residual import beyond
    from ftjax.models.decoder import Decoder
    from tests.models_small import lora_config

    model = Decoder(spec)
    method = plan_method(model, lora_config(name="lora", **TAKEN[name]))
    assert method.begin is not None and method.lora is not None
    begun = method.begin({}, {})
    weights = open_weights(base, spec)
    left = load_params(weights, dtype="float32", changes=begun.changes)
    rng = np.random.default_rng(0)

    def learn(delta: Any) -> Any:
        """Both factors moved by a tenth of what they are."""
        a, b = (
            jnp.asarray(x * (1 + 0.1 * rng.normal(size=x.shape)), jnp.float32)
            for x in (delta.a, delta.b)
        )
        return replace(delta, a=a, b=b)

    start = begun.update
    is_delta = {"is_leaf": lambda leaf: hasattr(leaf, "dense")}
    lora = jax.tree.map(learn, start.lora, **is_delta)
    return model, method.lora, lora, left, beyond(lora, method.lora, start)


def random_adapter(
    spec: Any, settings: dict[str, Any], params: Any = None
) -> tuple[Any, Any, Any]:
    """(model, plan, collection): of a `method` section, b random instead of zero.

    So are the magnitudes of DoRA, which needs the base's weights.
    """
    import jax
    import jax.numpy as jnp

    from ftjax.methods.dora import with_magnitudes
    from ftjax.methods.lora import init_lora, plan_lora
    from ftjax.models.decoder import Decoder
    from ftjax.models.proj import find_sites
    from ftjax.weights import Delta
    from tests.models_small import lora_config

    model = Decoder(spec)
    plan = plan_lora(find_sites(model), lora_config(**settings))
    rng = np.random.default_rng(0)

    def fill(delta: Delta) -> Delta:
        noise = rng.normal(0, 0.3, delta.b.shape).astype(np.float32)
        used = jnp.any(delta.a != 0, axis=tuple(range(1, delta.a.ndim - 1)))  # [L, r]
        used = used.reshape(*used.shape, *[1] * (delta.b.ndim - 2))
        m = delta.m
        if m is not None:
            m = m * jnp.asarray(rng.uniform(0.5, 1.5, m.shape), jnp.float32)
        return replace(delta, b=jnp.where(used, jnp.asarray(noise), 0), m=m)

    start = with_magnitudes(init_lora(plan, 0), plan, {"params": params})
    lora = jax.tree.map(fill, start, is_leaf=lambda leaf: isinstance(leaf, Delta))
    return model, plan, lora


def theirs(folder: Path) -> None:
    import peft
    import transformers

    worst = 0.0
    for name in (*OURS, *SUMS, *TAKEN):
        wanted = np.load(folder / name / "logits.npy")
        plain = torch_logits(transformers_model(folder / "base"))
        model = peft.PeftModel.from_pretrained(
            transformers_model(folder / "base"), folder / name / "peft"
        )
        b = [w.abs().max().item() for n, w in model.named_parameters() if "lora_B" in n]
        assert b and min(b) > 0, f"{name}: a lora_B is zero"
        adapter = np.abs(torch_logits(model) - wanted).max()
        merged = np.abs(
            torch_logits(transformers_model(folder / name / "merged")) - wanted
        ).max()
        moved = np.abs(plain - wanted).max()
        print(
            f"{name}: {len(b)} modules, least max |B| {min(b):.3f}; max |logit "
            f"difference| adapter {adapter:.1e}, merged {merged:.1e}; "
            f"the adapter moves them by {moved:.2f}"
        )
        worst = max(worst, adapter, merged)
        assert moved > 0.1
        if name in SUMS:
            summed = np.abs(
                torch_logits(_concatenated(folder, SUMS[name])) - wanted
            ).max()
            print(f"{name}: max |logit difference| from peft's own sum {summed:.1e}")
            worst = max(worst, summed)
    assert worst < TOLERANCE, worst
    print(f"worst {worst:.1e}; peft {peft.__version__}, {transformers.__version__}")


def _concatenated(folder: Path, mix: dict[str, float]) -> Any:
    """The base with peft's own sum of adapters that ftjax wrote."""
    import peft

    names = list(mix)
    model = peft.PeftModel.from_pretrained(
        transformers_model(folder / "base"), folder / names[0] / "peft", names[0]
    )
    for name in names[1:]:
        model.load_adapter(folder / name / "peft", name)
    model.add_weighted_adapter(names, list(mix.values()), "sum", "cat")
    model.set_adapter("sum")
    return model


def transformers_model(folder: Path) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


if __name__ == "__main__":
    run(golden, ours, theirs)
