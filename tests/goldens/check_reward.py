"""Reward models against the real transformers and PEFT, both ways.

Run by hand, from the root of the repository; the tests need none of them:

    python -m tests.goldens.check_reward ours DIR      # jax: exports runs; our scores
    python -m tests.goldens.check_reward theirs DIR    # torch: loads them, compares,
                                                       # and writes some of its own
    python -m tests.goldens.check_reward back DIR      # jax: reads those, and compares

Rows of two lengths are padded on the right, so that the pad token counts. The body of
the QLoRA run's base is read by bitsandbytes from ftjax's nf4 file, and made dense as in
`check_quant`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.goldens.check_quant import dense
from tests.goldens.check_quant import load as load_plain
from tests.goldens.commands import run

TOLERANCE = 1e-4
ROWS = [
    {"prompt": "the thing", "completion": " in the end"},
    {"prompt": "on", "completion": " a re er on the the in the thing"},
]
# Rows of 128 numbers, for bitsandbytes: see `check_quant`.
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
# Model -> its config.json; a tied one has no head of its own.
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "tied": SIZES | {"tie_word_embeddings": True},
}
# Run -> (model, method, its settings).
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "lora", {"rank": 4}),
    "lora-tied": ("tied", "lora", {"rank": 4, "use_rslora": True}),
    "also": ("llama", "lora", {"targets": "v_proj", "also_train": "embed_tokens"}),
    "also-tied": ("tied", "lora", {"targets": "v_proj", "also_train": "embed_tokens"}),
    "pissa": ("llama", "lora", {"rank": 4, "init": "pissa"}),
    "dora": ("llama", "lora", {"rank": 4, "use_dora": True}),
    "ia3": ("llama", "ia3", {}),
    "vera": ("llama", "vera", {"rank": 8}),
    "qlora": ("llama", "qlora", {"rank": 4}),
    "full": ("llama", "full", {}),
    "full-tied": ("tied", "full", {}),
}
PEFT: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "embedding": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["embed_tokens"],
    },
}


def ours(folder: Path) -> None:
    from ftjax import cli, export, quantize
    from tests.runs import make_run
    from tests.tiny import make_tiny_checkpoint

    bases: dict[str, Any] = {}
    for name, how in MODELS.items():
        bases[name] = make_tiny_checkpoint(folder / name, **how)
    argv = [f"--model={bases['llama']}", f"--out={folder / 'llama-nf4'}"]
    argv += ["--format=nf4", "--double_quant", "--data=none"]
    assert cli.run(quantize.main, argv, quantize.define) == 0
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    for name, (model, method, values) in RUNS.items():
        made = make_run(
            folder / f"run-{name}", bases[model], method=method, task="reward", **values
        )
        found, ids = our_scores(folder, workdir=str(made))
        np.save(folder / f"{name}.npy", found)
        (folder / f"{model}.ids.json").write_text(json.dumps(ids))
        kinds = ["merged"] if method == "full" else ["merged", "peft"]
        for kind in kinds:
            argv = [f"--workdir={made}", f"--to={kind}"]
            argv += [f"--out={folder / f'{name}-{kind}'}"]
            argv += ["--dtype=float32"] if kind == "merged" else []
            assert cli.run(export.main, argv, export.define) == 0


def our_scores(folder: Path, **source: str) -> tuple[np.ndarray, list[list[int]]]:
    """What `ftjax.evaluate --to=scores` writes, and the tokens of its rows."""
    from types import SimpleNamespace

    from ftjax import cli, evaluate
    from ftjax.data.dataset import build_dataset
    from ftjax.loading import open_base

    out = folder / "scores.jsonl"
    out.unlink(missing_ok=True)
    argv = [f"--{name}={value}" for name, value in source.items()]
    argv += [f"--data={folder / 'rows.jsonl'}", "--to=scores", f"--out={out}"]
    assert cli.run(evaluate.main, argv, evaluate.define, config=True) == 0
    found = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    rules = SimpleNamespace(
        max_length=512,
        overlong="error",
        completion_only=True,
        empty_completion="error",
        on_bad_row="error",
        split="test",
        eval_rows=0,
    )
    base = open_base(str(folder / "llama"))
    data = build_dataset(
        str(folder / "rows.jsonl"),
        base.tokenizer,
        rules,
        vocab_size=base.spec.vocab_size,
        split="eval",
        reads="mixed",
    )
    ids = [example.ids.tolist() for example in data.examples]
    assert all(row[-1] in base.eos_ids for row in ids)
    return np.asarray(found), ids


def theirs(folder: Path) -> None:
    import peft
    import torch
    import transformers

    worst = 0.0
    for name, (model, method, _) in RUNS.items():
        wanted = np.load(folder / f"{name}.npy")
        ids = json.loads((folder / f"{model}.ids.json").read_text())
        merged = load(folder / f"{name}-merged")
        assert type(merged).__name__.endswith("ForSequenceClassification")
        apart = {"merged": scores(merged, ids) - wanted}
        if method != "full":
            base = load(folder / model, num_labels=1, pad_token_id=0)
            if method == "qlora":
                base.model = dense(load_plain(folder / f"{model}-nf4")).model
            adapter = folder / f"{name}-peft"
            tuned = peft.PeftModel.from_pretrained(base, adapter).eval()
            apart["peft"] = scores(tuned, ids) - wanted
            assert tuned.peft_config["default"].task_type == "SEQ_CLS"
        shown = {kind: f"{np.abs(x).max():.1e}" for kind, x in apart.items()}
        print(f"{name}: scores {wanted.round(3).tolist()}, apart {shown}")
        worst = max(worst, *(float(np.abs(x).max()) for x in apart.values()))
        assert np.abs(wanted).min() > 1e-2
    for name, settings in PEFT.items():
        for model in MODELS:
            torch.manual_seed(0)
            base = load(folder / model, num_labels=1, pad_token_id=0)
            config = peft.LoraConfig(task_type="SEQ_CLS", **settings)
            tuned = peft.get_peft_model(base, config)
            with torch.no_grad():
                for weight in tuned.parameters():
                    if weight.requires_grad:
                        weight += 0.1 * torch.randn_like(weight)
            ids = json.loads((folder / f"{model}.ids.json").read_text())
            out = folder / f"theirs-{model}-{name}"
            tuned.eval().save_pretrained(out)
            np.save(out / "scores.npy", scores(tuned, ids))
            whole = tuned.merge_and_unload()
            whole.save_pretrained(out / "merged")
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / model)
            tokenizer.save_pretrained(out / "merged")
    print(f"worst {worst:.1e}; {peft.__version__}, {transformers.__version__}")
    assert worst < TOLERANCE


def back(folder: Path) -> None:
    worst = 0.0
    for name in PEFT:
        for model in MODELS:
            made = folder / f"theirs-{model}-{name}"
            wanted = np.load(made / "scores.npy")
            adapter = {"model": str(folder / model), "adapter": str(made)}
            for source in (adapter, {"model": str(made / "merged")}):
                found, _ = our_scores(folder, **source)
                apart = float(np.abs(found - wanted).max())
                print(f"{source}: scores {found.round(3).tolist()}, apart {apart:.1e}")
                worst = max(worst, apart)
    assert worst < TOLERANCE, worst
    print(f"worst {worst:.1e}")


def load(folder: Path, **settings: Any) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **settings
    ).eval()


def scores(model: Any, rows: list[list[int]]) -> np.ndarray:
    """Of rows in one batch, padded by 0 on the right."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[int(i < len(row)) for i in range(longest)] for row in rows])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    assert found.shape == (len(rows), 1)
    return found[:, 0].numpy()


if __name__ == "__main__":
    run(ours, theirs, back)
