"""Tokenizers from directories, the harmful and the broken ones included."""

import json
import sys

import pytest

from ftjax.data.tokenizer import load_tokenizer
from ftjax.errors import UserError
from tests.data.conftest import CHATML, chat_row, write_tokenizer


def fault(path, **options):
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, **options)
    assert caught.value.code == 2
    return caught.value


def test_encode_and_decode(plain):
    texts = ["the answer", "emoji \U0001f469\u200d\U0001f4bb and \u05d0 e\u0301 \u00e9"]
    for text, ids in zip(texts, plain.encode(texts, add_special=True), strict=True):
        assert plain.decode(ids) == text
        assert all(0 <= i < plain.vocab_size for i in ids)


def test_special_ids(make_tokenizer):
    tokenizer = make_tokenizer(add_bos=True, pad="</s>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad) == (0, 1, 1)
    assert tokenizer.added == ([0], [])
    assert tokenizer.decode([0, 1]) == ""
    assert tokenizer.decode([0, 1], skip_special=False) == "<s></s>"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    folder = write_tokenizer(tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {
        "max_length": 2,
        "stride": 0,
        "strategy": "LongestFirst",
        "direction": "Right",
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert len(load_tokenizer(folder).encode(["zzz zzz"], False)[0]) > 2


def test_the_template_may_come_from_three_places(tmp_path):
    folder = write_tokenizer(tmp_path / "t", template="config")
    talk = chat_row("a", "b")["messages"]
    assert load_tokenizer(folder).render(talk) == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(folder).render(talk) == "file"
    (tmp_path / "own.jinja").write_text("own")
    own = load_tokenizer(folder, chat_template=str(tmp_path / "own.jinja"))
    assert own.render(talk) == "own"
    assert "cannot be read" in fault(folder, chat_template="nowhere.jinja").what


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool", "template": "t"}]
    folder = write_tokenizer(tmp_path, template=named)
    assert load_tokenizer(folder).render(chat_row("a", "b")["messages"]) == "d"
    folder = write_tokenizer(tmp_path, template=named[1:])
    assert "none is the default" in fault(folder).what


def test_every_end_of_the_model_and_the_template_ends_an_answer(tmp_path):
    folder = write_tokenizer(tmp_path, template=CHATML)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (1, 5, 3)  # 3 is <|im_end|>


def test_code_is_refused_and_never_runs(tmp_path):
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\nclass T: pass\n"
    auto_map = {"AutoTokenizer": ["tok.T", "tok.T"]}
    folder = write_tokenizer(tmp_path / "a", auto_map=auto_map)
    (folder / "tok.py").write_text(code)
    error = fault(folder)
    assert "auto_map" in error.what and "tok.T" in error.got
    folder = write_tokenizer(tmp_path / "b")
    (folder / "tok.py").write_text(code)
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert "auto_map" in fault(folder).what
    assert not canary.exists() and "tok" not in sys.modules


@pytest.mark.parametrize("value", ["../secret.json", "/etc/passwd"])
def test_paths_out_of_the_directory_are_refused(tmp_path, value):
    folder = write_tokenizer(tmp_path, tokenizer_file=value)
    error = fault(folder)
    assert "`tokenizer_file`" in error.what and error.got == value


def test_nothing_there(tmp_path):
    assert "no tokenizer" in fault(tmp_path).what
    assert fault(tmp_path / "nowhere").got == "no such directory"


def test_damaged_files(tmp_path):
    folder = write_tokenizer(tmp_path)
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[:1000])
    assert "cannot be read" in fault(folder).what
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").write_text("{")
    assert "not valid JSON" in fault(folder).what


def test_a_refusal_of_the_template_in_a_prompt(make_tokenizer):
    tokenizer = make_tokenizer(template="{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="refuses"):
        tokenizer.render(chat_row("a", "b")["messages"])
