"""GGUF files, read back by the `gguf` package, and run by the real llama.cpp.

Run by hand, from the root of the repository, where `gguf` or `xllamacpp` is installed:

    python -m tests.goldens.check_gguf ours DIR      # jax, gguf: writes and reads back
    python -m tests.goldens.check_gguf theirs DIR    # xllamacpp: runs them

Compared are the log-probabilities of the greedy continuation of a text: of the model
that ships, tokenizer and all, and of tiny ones of each family, by token ids.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.goldens.commands import run

IDS = [[11, 29, 31, 15, 13, 25, 19, 27, 17], [40, 5, 270, 90, 33]]
TEXTS = ["The function returns a list of", "Return the number of items in the"]
NEXT = 6
TOLERANCE = 5e-3  # of float16, over log-probabilities
# Of the largest number in a block of 32: half a step, and the scale is a float16.
STEPS = {
    "F32": 0.0,
    "F16": 2.0**-11,
    "Q8_0": 0.51 / 127 + 2**-11,
    "Q4_0": 1 / 8 + 2**-9,
}


def ours(folder: Path) -> None:
    import gguf

    from ftjax.loading import open_base
    from tests.tiny import FAMILIES, make_tiny_checkpoint

    wanted = {"base-f16": continued("base", [*TEXTS])}
    export("base", "f16", folder / "base-f16")
    for family in FAMILIES:
        model = make_tiny_checkpoint(folder / family, family, vocab_size=288)
        base = open_base(str(model), note=lambda _: None)
        for kind in ("f16", "q8_0", "q4_0"):
            out = folder / f"{family}-{kind}"
            export(str(model), kind, out)
            found = gguf.GGUFReader(out / "model.gguf")
            worst = compare(gguf, found, base)
            words = found.fields["tokenizer.ggml.tokens"].contents()
            assert len(words) == base.spec.vocab_size
            ids = base.tokenizer.encode(["the thing"], add_special=False)[0]
            assert "".join(words[i] for i in ids) == "theĠthing"
            print(f"{family} {kind}: {len(found.tensors)} tensors, worst {worst}")
        wanted[f"{family}-f16"] = continued(str(model), IDS)
    (folder / "wanted.json").write_text(json.dumps(wanted))
    print(f"gguf {version('gguf')}: all as written")


def export(model: str, kind: str, out: Path) -> None:
    flags = [f"--model={model}", "--to=gguf", f"--dtype={kind}", f"--out={out}"]
    subprocess.run([sys.executable, "-m", "ftjax.export", *flags], check=True)


def continued(model: str, prompts: list[Any]) -> list[dict[str, Any]]:
    """The greedy continuation of each prompt, with its log-probabilities."""
    import jax
    import jax.numpy as jnp

    from ftjax.policy import open_policy

    policy = open_policy(model=model, note=lambda _: None)
    found = []
    for prompt in prompts:
        ids = prompt
        if isinstance(prompt, str):
            ids = policy.base.tokenizer.encode([prompt], add_special=True)[0]
        ids, values = list(ids), []
        for _ in range(NEXT):
            tokens = jnp.asarray([ids], jnp.int32)
            rows = (tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
            logits = policy.model.apply(policy.variables, *rows, method="logits")
            logp = jax.nn.log_softmax(logits[0, -1])
            ids.append(int(jnp.argmax(logp)))
            values.append(float(logp[ids[-1]]))
        found.append({"prompt": prompt, "ids": ids[-NEXT:], "logp": values})
    return found


def theirs(folder: Path) -> None:
    import xllamacpp

    worst = 0.0
    for name, cases in json.loads((folder / "wanted.json").read_text()).items():
        settings = xllamacpp.CommonParams()
        settings.model.path = str(folder / name / "model.gguf")
        settings.n_ctx, settings.n_parallel, settings.warmup = 128, 1, False
        server = xllamacpp.Server(settings)
        for case in cases:
            asked = {"prompt": case["prompt"], "max_tokens": NEXT, "temperature": 0}
            answer = server.handle_completions({**asked, "logprobs": 1})
            rows = answer["choices"][0]["logprobs"]["content"]
            apart, at = [], 0
            for row in rows:
                # Tokens whose bytes make one character only together share a row,
                # which is that of the last.
                if row["id"] in case["ids"][at:]:
                    at = case["ids"].index(row["id"], at) + 1
                    apart.append(abs(row["logprob"] - case["logp"][at - 1]))
            assert len(apart) > NEXT / 2, (name, rows, case)
            print(f"{name}: {len(apart)} tokens, |logp| apart {max(apart):.1e}")
            worst = max(worst, *apart)
    print(f"worst {worst:.1e}; xllamacpp {version('xllamacpp')}")
    assert worst < TOLERANCE


def compare(gguf: Any, found: Any, base: Any) -> dict[str, float]:
    """The largest error of each type, after checking what the type allows."""
    import numpy as np

    from ftjax.checkpoints.gguf import gguf_name, reordered
    from ftjax.models.names import model_weights

    stored = {tensor.name: tensor for tensor in found.tensors}
    worst: dict[str, float] = {}
    names = [n for weight in model_weights(base.spec).values() for n in weight.names]
    assert stored.keys() == {gguf_name(name) for name in names}
    for name in names:
        tensor = stored[gguf_name(name)]
        values = base.weights.tensors[name].read()
        wanted = reordered(values, name, base.spec)
        kind = tensor.tensor_type.name
        got = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert got.shape == wanted.shape, (name, got.shape)
        error = np.abs(got.astype(np.float32) - wanted)
        width = 32 if error.shape[-1] % 32 == 0 else 1
        largest = np.abs(wanted).reshape(-1, width).max(1, keepdims=True)
        allowed = STEPS[kind] * largest + (0 if kind == "F32" else 1e-7)
        assert (error.reshape(-1, width) <= allowed).all(), (name, kind)
        worst[kind] = max(worst.get(kind, 0.0), float(error.max()))
    return worst


if __name__ == "__main__":
    run(ours, theirs)
