"""Files from strangers: none of them runs code, reads outside, or takes for ever.

Each hostile file would make the canary; that it is not there is the test.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.cli import run_cli
from tests.faults.commands import (
    TALK,
    assert_no_run,
    check,
    copy_model,
    edit_json,
    options,
    write_rows,
)
from tests.tiny import make_tiny_checkpoint

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def payload(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return copy_model(tiny, tmp_path / "model")


def test_the_payload_works(payload: bytes, canary: Path) -> None:
    pickle.loads(payload)
    assert canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_weights_that_are_pickles(
    name: str, model: Path, pairs: Path, payload: bytes, canary: Path, tmp_path: Path
) -> None:
    (model / FILE).unlink()
    with zipfile.ZipFile(model / name, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    workdir = tmp_path / "run"
    run_cli("train", *options(model, pairs, f"--workdir={workdir}")).refused(
        "pickles, which can run code", name, "save_pretrained"
    )
    assert not canary.exists()
    assert_no_run(workdir)


def test_a_pickle_that_is_named_as_weights(
    model: Path, pairs: Path, payload: bytes, canary: Path
) -> None:
    (model / FILE).write_bytes(payload)
    check(model, pairs).refused("not a safetensors file", "pickle")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "part.bin"}}
    (model / FILE).rename(model / "part.bin")
    (model / INDEX).write_text(json.dumps(index))
    check(model, pairs).refused("not a safetensors file", "part.bin")
    assert not canary.exists()


def test_pickles_beside_good_weights_are_not_opened(
    model: Path, pairs: Path, payload: bytes, canary: Path
) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(payload)
    check(model, pairs).ok()
    assert not canary.exists()


@pytest.mark.parametrize("name", ["d.pkl", "d.npy", "d.pt", "d.jsonl"])
def test_data_that_is_a_pickle(
    name: str, tiny: Path, payload: bytes, canary: Path, tmp_path: Path
) -> None:
    data = tmp_path / name
    if name.endswith(".npy"):
        np.save(data, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    else:
        data.write_bytes(payload)
    check(tiny, data).refused("can run code", name)
    assert not canary.exists()


def test_an_adapter_that_is_a_pickle(
    finished: Path, tiny: Path, payload: bytes, canary: Path, tmp_path: Path
) -> None:
    adapter = copy_model(finished / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(payload)
    flags = (f"--model={tiny}", f"--adapter={adapter}", "--prompt=a")
    run_cli("generate", *flags).refused("pickle", "adapter_model.bin")
    assert not canary.exists()


def plant_code(model: Path, canary: Path) -> None:
    for name in ("modeling_x", "tokenization_x", "configuration_x"):
        code = f"open({str(canary)!r}, 'w').close()\nclass X: pass\n"
        (model / f"{name}.py").write_text(code)


def test_code_of_a_model(
    model: Path, pairs: Path, canary: Path, tmp_path: Path
) -> None:
    plant_code(model, canary)
    auto_map = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
    }
    # A known architecture is read by ftjax's own code; the stranger's is named.
    edit_json(model / "config.json", auto_map=auto_map)
    result = check(model, pairs).ok()
    assert "auto_map: the model's own code is never run" in result.err
    edit_json(model / "config.json", model_type="mystery", trust_remote_code=True)
    edit_json(model / "config.json", architectures=["X"])
    workdir = tmp_path / "run"
    run_cli("train", *options(model, pairs, f"--workdir={workdir}")).refused(
        "is not supported", "'mystery'", "auto_map asks for code", "never run"
    )
    assert_no_run(workdir)
    assert not canary.exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_tokenizer(file: str, model: Path, pairs: Path, canary: Path) -> None:
    plant_code(model, canary)
    auto_map = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
    edit_json(model / file, auto_map=auto_map, trust_remote_code=True)
    check(model, pairs).refused(
        "this tokenizer wants to run Python code", file, "tokenization_x.X"
    )
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["up", "absolute", "link"])
def test_weights_outside_the_folder(kind: str, pairs: Path, tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", shards=2)
    outside = make_tiny_checkpoint(tmp_path / "outside", shards=2)
    name = "model-00001-of-00002.safetensors"
    if kind == "link":
        (model / name).unlink()
        (model / name).symlink_to(outside / name)
        named = name
    else:
        named = f"../outside/{name}" if kind == "up" else str(outside / name)
        shards = json.loads((model / INDEX).read_text())["weight_map"]
        moved = {t: named if file == name else file for t, file in shards.items()}
        edit_json(model / INDEX, weight_map=moved)
    check(model, pairs).refused("leads out of the model's folder", named)


def test_a_configuration_outside_the_folder(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    (model / "config.json").rename(tmp_path / "config.json")
    (model / "config.json").symlink_to(tmp_path / "config.json")
    check(model, pairs).refused("leads out of the model's folder", "config.json")


@pytest.mark.parametrize("key", ["tokenizer_file", "chat_template_file"])
def test_a_tokenizer_outside_the_folder(
    key: str, model: Path, pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("{}")
    edit_json(model / "tokenizer_config.json", **{key: "../secret"})
    check(model, pairs).refused(f"`{key}` points outside", "../secret")


LOOPS = "{% for i in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4
HOSTILE = {
    "globals": "{{ messages.__class__.__init__.__globals__ }}",
    "attribute": "{{ ''|attr('__class__') }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "loops": LOOPS,
    "memory": "{{ 'a' * 10**10 }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_chat_templates(
    name: str, model: Path, canary: Path, tmp_path: Path
) -> None:
    source = HOSTILE[name].replace("CANARY", str(canary))
    edit_json(model / "tokenizer_config.json", chat_template=source)
    data = write_rows(tmp_path / "d.jsonl", [{"messages": TALK}] * 4)
    result = check(model, data)
    result.refused("the chat template", str(model))
    assert "root:" not in result.err
    assert result.seconds < 60  # 5 on an idle machine
    assert not canary.exists()
