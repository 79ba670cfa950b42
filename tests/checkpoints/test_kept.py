"""Which steps stay: the newest, the best, and nothing that was left over."""

import shutil
from pathlib import Path

import pytest

from ftjax.checkpoints.state import Checkpoints
from ftjax.errors import UserError
from tests.checkpoints.states import Run, abstract, assert_same, flip, make_state


def test_saving_a_step_again_replaces_it(run: Run) -> None:
    run.save(5)
    run.checkpoints.save(5, make_state(6), {"second": True}, 0.5)
    assert run.checkpoints.best() == 5
    assert run.checkpoints.meta(5)["second"] is True
    assert_same(run.checkpoints.restore(5, abstract(make_state())), make_state(6))
    assert [p.name for p in run.checkpoints.dir.iterdir()] == ["5"]


def test_leftovers_are_cleaned_by_the_writer_only(run: Run) -> None:
    run.save(30, 40)
    folder = run.checkpoints.dir
    shutil.copytree(folder / "40", folder / ".tmp-50-ab")
    shutil.copytree(folder / "30", folder / ".trash-20-cd")
    (folder / "40").rename(folder / "40.replaced")
    shutil.copytree(folder / "30", folder / "30.replaced")
    reader = Run(folder)
    assert reader.checkpoints.latest() == 30
    assert len(list(folder.iterdir())) == 5
    writer = Run(folder)
    writer.checkpoints.clean()
    assert sorted(p.name for p in folder.iterdir()) == ["30", "40"]
    assert writer.said == ["removed an unfinished save of step 50"]
    assert writer.checkpoints.latest() == 40


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path / "c", keep_last=2, keep_best=2)
    metrics = [3.0, 1.0, float("nan"), 2.0, 1.5, None, float("-inf"), 9.0]
    for step, metric in enumerate(metrics):
        run.save(step, metric=metric)
    assert run.checkpoints.steps() == [1, 4, 6, 7]
    assert run.checkpoints.best() == 1
    # A fresh process goes on from what is written down.
    again = Run(tmp_path / "c", keep_last=1, keep_best=1)
    again.save(8, metric=1.0)
    assert again.checkpoints.steps() == [8], "of equals the newest"
    assert not list((tmp_path / "c").glob(".*"))


def test_never_best_without_a_number(run: Run) -> None:
    run.save(1, metric=float("nan"))
    run.save(2)
    assert run.checkpoints.best() is None
    run.save(3, metric=1e9)
    assert run.checkpoints.best() == 3


def test_a_damaged_best_step_is_passed_over(run: Run) -> None:
    run.save(1, metric=2.0)
    run.save(2, metric=1.0)
    run.save(3)
    flip(run.checkpoints.dir / "2" / "meta.json", 3)
    assert run.checkpoints.best() == 1
    flip(run.checkpoints.dir / "1" / "meta.json", 3)
    other = Run(run.checkpoints.dir)
    assert other.checkpoints.best() is None
    assert "no best step is left" in other.said[0]
    assert other.checkpoints.latest() == 3


def test_the_step_just_saved_stays(tmp_path: Path) -> None:
    run = Run(tmp_path / "c", keep_last=1)
    run.save(40)
    run.save(35)
    assert run.checkpoints.steps() == [35, 40]


@pytest.mark.parametrize(("last", "best"), [(0, 1), (1, -1)])
def test_keeping_nothing_is_refused(tmp_path: Path, last: int, best: int) -> None:
    with pytest.raises(UserError, match="keep no checkpoint"):
        Checkpoints(tmp_path, keep_last=last, keep_best=best)
