"""Other adapters than LoRA, and whole weights beside one, against the real peft.

Run by hand, from the root of the repository; the tests need neither torch nor peft:

    python -m tests.goldens.check_peft_others golden     # torch: peft_others.json
    python -m tests.goldens.check_peft_others ours DIR   # jax: exports, our logits
    python -m tests.goldens.check_peft_others theirs DIR # torch: loads and compares

The base, its tokens and the values of the weights are those of `check_peft`. A golden
case keeps what peft writes, its logits, and the gradient of the mean loss of the row.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.goldens import check_peft
from tests.goldens.check_peft import BASE, IDS, TOLERANCE, write_base
from tests.goldens.commands import run
from tests.goldens.weights import random_tensor

OUT = Path(__file__).parent / "peft_others.json"

# What peft writes, for us to read: a configuration's class and its settings.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("IA3Config", {}),
    "ia3_wide": (
        "IA3Config",
        {
            "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"],
            "feedforward_modules": ["o_proj", "down_proj"],
        },
    ),
    "vera": (
        "VeraConfig",
        {"r": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    ),
    "vera_some_layers": (
        "VeraConfig",
        {
            "r": 40,
            "target_modules": ["k_proj", "up_proj"],
            "layers_to_transform": [0, 2],
            "projection_prng_key": 7,
        },
    ),
    "lora_modules": (
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["v_proj"],
            "modules_to_save": ["model.norm", "1.input_layernorm", "2.mlp.down_proj"],
        },
    ),
    "lora_tied": (
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "ia3_norm": ("IA3Config", {"modules_to_save": ["model.norm"]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
}

# Of a pair that VeRA's modules share; and of a tied head, as peft keeps them apart.
PAIR = ("base_model.vera_A.default", "base_model.vera_B.default")
HEAD = "base_model.model.lm_head.weight"
TIED = "base_model.model.model.embed_tokens.weight"

# What ftjax writes, for peft to read: the `method` section of a config.
OURS: dict[str, dict[str, Any]] = {
    "ia3": {"name": "ia3"},
    "ia3_wide": {"name": "ia3", "targets": ".*_proj", "feedforward": "[od].*_proj"},
    "vera": {"name": "vera", "rank": 6, "projection_prng_key": 3},
    "vera_some_layers": {
        "name": "vera",
        "rank": 40,
        "targets": r"layers\.[02]\.self_attn\.q_proj,up_proj",
    },
    "lora_norms": {"name": "lora", "rank": 4, "also_train": ".*norm"},
    "lora_embedding": {
        "name": "lora",
        "rank": 4,
        "targets": "q_proj",
        "also_train": "embed_tokens",
    },
    "vera_embedding": {
        "name": "vera",
        "rank": 6,
        "targets": "q_proj",
        "also_train": "embed_tokens",
    },
    "vera_module": {
        "name": "vera",
        "rank": 6,
        "targets": ".*attn.*",
        "also_train": r"layers\.[12]\.mlp.*",
    },
    "ia3_norm": {"name": "ia3", "also_train": "model.norm"},
    "prompt": {"name": "prompt", "tokens": 4},
    "prefix": {"name": "prefix", "tokens": 4},
}


def golden() -> None:
    import peft
    import torch
    import transformers
    from safetensors import safe_open

    cases = {}
    with tempfile.TemporaryDirectory() as temp:
        base = write_base(Path(temp) / "base")
        for name, (kind, settings) in THEIRS.items():
            config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
            model = peft.get_peft_model(check_peft.transformers_model(base), config)
            trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
            pair = {n: w for n, w in model.state_dict().items() if n in PAIR}
            for key, weight in {**trained, **pair}.items():
                values = random_tensor(_published(key), tuple(weight.shape))
                weight.data.copy_(torch.from_numpy(values))
            folder = Path(temp) / name
            model.save_pretrained(folder)
            with safe_open(folder / "adapter_model.safetensors", "np") as file:
                shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
            written = json.loads((folder / "adapter_config.json").read_text())
            written["base_model_name_or_path"] = "base"
            same = {HEAD: TIED} if name == "lora_tied" else {}
            known = {_published(key) for key in (*trained, *pair)}
            assert shapes.keys() == known | same.keys()
            logits = model(torch.tensor([IDS])).logits[0, -len(IDS) :]
            targets = torch.tensor(IDS[1:])
            torch.nn.functional.cross_entropy(logits[:-1], targets).backward()
            cases[name] = {
                "config": written,
                "tensors": shapes,
                "same": same,
                "logits": logits.detach().double().numpy().round(6).tolist(),
                "gradient": {
                    _published(key): weight.grad.double().numpy().round(8).tolist()
                    for key, weight in trained.items()
                },
            }
    made = f"torch {torch.__version__}, transformers {transformers.__version__}"
    text = {"made_with": f"{made}, peft {peft.__version__}", "cases": cases}
    OUT.write_text(json.dumps(text, separators=(",", ":")) + "\n")
    print(f"wrote {OUT}: {OUT.stat().st_size} bytes, {len(cases)} cases")


def _published(name: str) -> str:
    """The name of a parameter in peft's files."""
    if name.startswith("prompt_encoder."):
        return "prompt_embeddings"
    return name.replace(".modules_to_save", "").replace(".default", "")


def ours(folder: Path) -> None:
    import jax.numpy as jnp

    from configs.common import method_config
    from ftjax.checkpoints.hf import load_params, open_weights
    from ftjax.checkpoints.peft_others import save_any
    from ftjax.methods.freeze import trained_names
    from ftjax.methods.method import plan_method
    from ftjax.models.decoder import Decoder
    from ftjax.models.proj import find_sites
    from ftjax.models.registry import spec_from_config
    from ftjax.weights import join

    base = write_base(folder / "base")
    spec = spec_from_config(BASE, "config.json")
    params = load_params(open_weights(base, spec), dtype="float32")
    model = Decoder(spec)
    tokens = jnp.asarray([IDS], jnp.int32)
    rows = (tokens, jnp.arange(len(IDS))[None], jnp.ones_like(tokens))
    for name, settings in OURS.items():
        config = method_config(settings["name"])
        config.update(settings)
        method = plan_method(model, config)
        trained, frozen = method.start({"params": params}, 0)
        both = join(frozen, moved(trained))
        logits = model.apply(both, *rows, method="logits")
        target, plan, sites = folder / name, method.lora, find_sites(model)
        named = trained_names(method, spec)
        save_any(target, both, plan, sites, str(base), "0" * 64, saved=named, spec=spec)
        np.save(target / "logits.npy", np.asarray(logits[0]))


def moved(trained: Any) -> Any:
    """Trained arrays, away from where they start; LoRA's scale is none."""
    import jax

    rng = np.random.default_rng(0)

    def move(path: Any, x: Any) -> Any:
        scale = getattr(path[-1], "name", "") == "scale"
        return x if scale else x + rng.normal(0, 0.3, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(move, trained)


def theirs(folder: Path) -> None:
    import peft
    import transformers

    worst = 0.0
    for name in OURS:
        wanted = np.load(folder / name / "logits.npy")
        plain = check_peft.torch_logits(check_peft.transformers_model(folder / "base"))
        model = peft.PeftModel.from_pretrained(
            check_peft.transformers_model(folder / "base"), folder / name
        )
        found = check_peft.torch_logits(model)[-len(IDS) :]
        apart, far = np.abs(found - wanted).max(), np.abs(plain - wanted).max()
        print(f"{name}: max |logit difference| {apart:.1e}; moved by {far:.2f}")
        worst = max(worst, apart)
        if name not in ("prompt", "prefix"):
            merged = check_peft.torch_logits(model.merge_and_unload())
            apart = np.abs(merged - wanted).max()
            print(f"{name}, merged by peft: max |logit difference| {apart:.1e}")
            worst = max(worst, apart)
        assert far > 0.1
    assert worst < TOLERANCE, worst
    print(f"worst {worst:.1e}; peft {peft.__version__}, {transformers.__version__}")


if __name__ == "__main__":
    run(golden, ours, theirs)
