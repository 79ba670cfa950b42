"""What the demo adds to a run: a fresh folder, and answers side by side."""

from pathlib import Path
from typing import Any

from configs import sft
from ftjax.demo import COLUMN, VALUES, fresh_folder, side_by_side


def test_every_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert fresh_folder(tmp_path) == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert fresh_folder(tmp_path) == tmp_path / "demo-3"


def test_the_values_are_keys_of_the_config() -> None:
    config = sft.get_config()
    config.update_from_flattened_dict(VALUES)  # raises for a key that is not there
    assert {k: config[k.split(".")[0]][k.split(".")[1]] for k in VALUES} == VALUES


def test_first_and_last_answers_stand_in_two_columns() -> None:
    prompt = "user\nWhat does `len` do?\nassistant"
    rows: list[dict[str, Any]] = [
        {"step": 0, "prompt": prompt, "text": "the\n\nthe of a file " * 6},
        {"step": 5, "prompt": prompt, "text": "in between"},
        {"step": 9, "prompt": prompt, "text": "Return the number of items."},
        {"step": 0, "prompt": "user\nAnd `id`?\nassistant", "text": ""},
        {"step": 9, "prompt": "user\nAnd `id`?\nassistant", "text": "An integer."},
    ]
    for row in rows:
        row["reference"] = "Return the size of a container, " + "and so on, " * 9
    text = side_by_side(rows)
    lines = text.splitlines()
    assert lines[0] == "What does `len` do?"
    assert lines[2].split() == ["before", "after"]
    assert max(map(len, lines)) <= 2 * COLUMN + 2 <= 80
    assert "Return the number of items." in text
    assert "in between" not in text
    assert "(nothing)" in text
    assert text.count("before") == text.count("docstring: Return the size") == 2
