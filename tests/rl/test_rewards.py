"""Rewards: the built-in ones, the user's own, and how they are added up."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs import grpo
from ftjax.errors import UserError
from ftjax.rl.functions import find_reward, last_number
from ftjax.rl.rewards import Judge, Judged

CHAT = [{"role": "user", "content": "Two and two?"}]


def settings(**values: Any) -> Any:
    return SimpleNamespace(**{**grpo.get_config().reward.to_dict(), **values})


def judge(texts: list[str], columns: dict[str, Any], **values: Any) -> Judged:
    rows = [{name: x[i] for name, x in columns.items()} for i in range(len(texts))]
    ids = [[1]] * len(texts)
    stopped = [bool(text) for text in texts]
    return Judge(settings(**values))(rows, texts, ids, ids, stopped)


def test_numbers() -> None:
    for text, number in (
        ("it is 1,234.50 then", "1234.50"),
        ("first 7, then -3", "-3"),
        ("<<1+2=3>>3\n#### 42\n", "42"),
        ("A: 5", "5"),
    ):
        assert str(last_number(text)) == number
    assert last_number("none") is None


def test_the_built_in_rewards() -> None:
    def of(name: str, texts: list[Any], columns: Any = None, **values: Any) -> Any:
        function = find_reward(name, settings(**values))
        return function(prompts=["p"] * len(texts), completions=texts, **columns or {})

    texts = ["so 4", "4.0", "no", "####  4 or 5"]
    answers = {"answer": ["2+2 #### 4", "4", "4", None]}
    assert of("exact_match", texts, answers) == [1, 1, 0, None]
    assert of("exact_match", ["4"], {"completion": ["A: 4"]}) == [1]
    assert of("length", ["a b", "", "a b c d e"], words_wanted=2) == [1, 0, 0.4]
    said = [{"role": "assistant", "content": "It's one."}]
    assert of("length", [said, "a b c"], words_wanted=4) == [0.5, 0.75]
    assert of("format", [" A\nb. ", "b. c"], pattern=r"[A-Z].*\.") == [1, 0]
    assert of("words", ["Happy!", "a friend", "unhappy"], words="happy,big") == [
        0.5,
        0,
        0,
    ]


def nan_of_three(prompts: Any, completions: Any, mark: Any, **_: Any) -> Any:
    assert prompts == ["p", "p", CHAT] and mark == [None, 1, 2]
    assert completions[:2] == ["x", ""] and completions[2][0]["content"] == "z"
    return [1, None, math.nan]


def test_rewards_are_weighted_and_added() -> None:
    columns = {"prompt": ["p", "p", CHAT], "mark": [None, 1, 2]}
    own = "tests.rl.test_rewards:nan_of_three"
    found = judge(
        ["x", "", "z"],
        columns,
        function=f"length,{own}",
        weights="2,0.5",
        words_wanted=1,
        unfinished=-0.25,
        max_nan=0.5,
    )
    assert found.bad.tolist() == [False, False, True]
    np.testing.assert_array_equal(found.total, [2.5, -0.25, math.nan])
    np.testing.assert_array_equal(found.each[own], [1, math.nan, math.nan])
    alone = judge(["x", "", "z"], columns, function=own, max_nan=0.5, unfinished=-1.0)
    np.testing.assert_array_equal(alone.total, [1, math.nan, math.nan])


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"function": "lenght"}, "exact_match, length"),
        ({"function": ""}, "needs a reward"),
        ({"function": "length", "weights": "1,2"}, "weights=1,2"),
        ({"function": "length,length"}, "its own weight"),
        ({"function": "no_such:f"}, "No module named 'no_such'"),
        ({"function": "math:no_such"}, "no_such"),
        ({"function": "math:pi"}, "no function"),
        ({"function": "format"}, "config.reward.pattern"),
        ({"function": "format", "pattern": "("}, "no regular expression"),
        ({"function": "words"}, "config.reward.words"),
    ],
)
def test_rewards_that_are_not_there(values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        Judge(settings(**values))
    assert part in error.value.screen()


def test_nothing_to_compare_with() -> None:
    with pytest.raises(UserError, match="nothing to compare"):
        judge(["4"], {"prompt": ["p"], "result": ["4"]}, function="exact_match")
