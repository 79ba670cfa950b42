"""The folder of a run: refused at once where it cannot serve, held by one process."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ftjax.errors import EXIT_BUSY, EXIT_RESOURCES, EXIT_USER, UserError
from ftjax.lock import Holder
from ftjax.signals import StopRequest
from ftjax.workdir import (
    Workdir,
    compare_values,
    read_json,
    require_space,
    storage_error,
    write_json_atomic,
)
from tests.conftest import ROOT

CONFIG: dict[str, Any] = {
    "task": "sft",
    "optim": {"lr": 1e-4, "warmup": 10},
    "method": {"rank": 8, "targets": ["q", "k"], "patterns": {}},
    "train": {"steps": 100, "keep_last": 2, "save_every": None},
    "mesh": {"data": -1, "fsdp": 1},
}


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v | sections.get(k, {}) if k in sections else v for k, v in CONFIG.items()
    }


def start(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


HOLD = """
    import sys
    from ftjax.errors import UserError
    from ftjax.workdir import Workdir
    sys.stdin.readline()
    try:
        workdir = Workdir.open(sys.argv[1])
    except UserError as error:
        print(error.screen().replace(chr(10), " "), flush=True)
        sys.exit(error.code)
    print("held", flush=True)
    sys.stdin.readline()
    workdir.close()
"""


def say(process: subprocess.Popen[str], line: str = "go") -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_makes_parents_and_leaves_only_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "a" / "ünï code" / "run"
    with Workdir.open(path) as workdir:
        assert workdir.path == path
        assert os.listdir(path) == ["lock"]
        assert json.loads((path / "lock").read_text())["pid"] == os.getpid()
    assert os.listdir(path) == []
    workdir.close()


@pytest.mark.parametrize(
    "name", ["file", "file/below", "link", "/proc/ftjax", "\0", ""]
)
def test_unusable_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError) as caught:
        Workdir.open(tmp_path / name if name else "")
    assert caught.value.code == EXIT_USER
    assert "--workdir" in str(caught.value.fix)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_read_only_mount(tmp_path: Path) -> None:
    """Permission bits say nothing to root, so the disk itself is made read-only."""
    try:
        mounts = [
            ["mount", "--bind", str(tmp_path), str(tmp_path)],
            ["mount", "-o", "remount,ro,bind", str(tmp_path)],
        ]
        done = [subprocess.run(m, capture_output=True, check=False) for m in mounts]
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done[0].returncode:
        pytest.skip("may not mount here")
    try:
        if done[1].returncode:
            pytest.skip("may not mount read-only here")
        for path in (tmp_path, tmp_path / "run"):
            with pytest.raises(UserError, match="cannot be used") as caught:
                Workdir.open(path)
            assert caught.value.code == EXIT_USER
            assert "Read-only" in str(caught.value.got)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_live_holder_is_named(tmp_path: Path) -> None:
    with start(HOLD, tmp_path) as process:
        say(process)
        assert heard(process) == "held"
        before = (tmp_path / "lock").read_text()
        with pytest.raises(UserError, match="another run") as caught:
            Workdir.open(tmp_path)
        error = caught.value
        assert error.code == EXIT_BUSY
        started = json.loads(before)["started"]
        assert error.got == (
            f"process {process.pid} on host {socket.gethostname()}, started {started}"
        )
        assert (tmp_path / "lock").read_text() == before
        say(process)
        assert process.wait() == 0
    Workdir.open(tmp_path).close()


def test_twice_in_one_process(tmp_path: Path) -> None:
    with Workdir.open(tmp_path), pytest.raises(UserError) as caught:
        Workdir.open(tmp_path)
    assert caught.value.code == EXIT_BUSY


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    said: list[str] = []
    with start(HOLD, tmp_path) as process:
        say(process)
        assert heard(process) == "held"
        process.kill()
        # Not waited for yet: a zombie still has its pid, but it holds nothing.
        while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        with Workdir.open(tmp_path, report=said.append):
            assert len(said) == 1 and f"process {process.pid}" in said[0]


@pytest.mark.parametrize(
    "stale",
    [
        replace(Holder.me(), ticks="1"),
        replace(Holder.me(), boot="another"),
        None,
    ],
    ids=["pid used again", "host started again", "cut short"],
)
def test_stale_locks(tmp_path: Path, stale: Holder | None) -> None:
    text = json.dumps(asdict(stale)) if stale else '{"pid": 1'
    (tmp_path / "lock").write_text(text)
    said: list[str] = []
    with Workdir.open(tmp_path, report=said.append):
        assert len(said) == 1
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_another_host_is_left_alone(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    text = json.dumps(asdict(replace(Holder.me(), host="elsewhere", pid=4)))
    lock.write_text(text)
    with pytest.raises(UserError) as caught:
        Workdir.open(tmp_path)
    assert caught.value.code == EXIT_BUSY
    assert "process 4 on host elsewhere" in str(caught.value.got)
    assert f"delete {lock}" in str(caught.value.fix)
    assert lock.read_text() == text


def test_only_our_own_lock_is_given_back(tmp_path: Path) -> None:
    workdir = Workdir.open(tmp_path)
    text = json.dumps(asdict(replace(Holder.me(), pid=4)))
    (tmp_path / "lock").write_text(text)
    workdir.close()
    assert (tmp_path / "lock").read_text() == text


def test_a_race_for_a_stale_lock_has_one_winner(tmp_path: Path) -> None:
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        stale = replace(Holder.me(), ticks="1")
        (folder / "lock").write_text(json.dumps(asdict(stale)))
        racers = [start(HOLD, folder) for _ in range(3)]
        time.sleep(0.2)
        for racer in racers:
            say(racer)
        lines = []
        for racer in racers:
            line = heard(racer)
            lines.append(heard(racer) if line.startswith("taking over") else line)
        for racer in racers:
            racer.communicate("end\n")
        assert lines.count("held") == 1, lines
        assert sorted(racer.returncode for racer in racers) == [0, EXIT_BUSY, EXIT_BUSY]


def test_same_config_again(tmp_path: Path) -> None:
    with Workdir.open(tmp_path) as workdir:
        assert workdir.saved_config() is None
        assert workdir.compare_config(CONFIG) == []
        workdir.save_config(CONFIG)
        assert workdir.saved_config() == CONFIG
        tuples = changed(method={"targets": ("q", "k")})
        assert workdir.compare_config(tuples) == []


def test_allowed_changes_are_told(tmp_path: Path) -> None:
    with Workdir.open(tmp_path) as workdir:
        workdir.save_config(CONFIG)
        new = changed(train={"steps": 200, "keep_best": 1}, mesh={"fsdp": 4})
        changes = workdir.compare_config(new)
    assert list(map(str, changes)) == [
        "mesh.fsdp: 1 -> 4",
        "train.keep_best: (not set) -> 1",
        "train.steps: 100 -> 200",
    ]


def test_another_config_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with Workdir.open(tmp_path) as workdir:
        workdir.save_config(CONFIG)
        before = (tmp_path / "config.json").read_bytes()
        new = changed(
            optim={"lr": 2e-4},
            train={"steps": 5},
            method={"rank": 4, "patterns": {"x": 2}},
        )
        with pytest.raises(UserError, match="another configuration") as caught:
            workdir.compare_config(new)
        assert (tmp_path / "config.json").read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["config.json", "lock"]
    assert caught.value.code == EXIT_USER
    assert str(caught.value.got).split("\n") == [
        "method.patterns: {} -> (not set)",
        "method.patterns.x: (not set) -> 2",
        "method.rank: 8 -> 4",
        "optim.lr: 0.0001 -> 0.0002",
    ]
    assert "train.steps" in str(caught.value.expected)


def test_fingerprints_are_compared_the_same_way() -> None:
    old, new = {"base": "ab", "data": {"train": "12"}}, {"data": {"train": "34"}}
    new["base"] = "ab"  # type: ignore[assignment]
    with pytest.raises(UserError, match="data has changed") as caught:
        compare_values(old, new, what="the data has changed", fix="--allow")
    assert caught.value.got == 'data.train: "12" -> "34"'
    assert caught.value.expected is None
    assert len(compare_values(old, new, what="", allowed=("data.*",))) == 1


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"task": ')
    damaged = pytest.raises(UserError, match="damaged")
    with Workdir.open(tmp_path) as workdir, damaged as caught:
        workdir.compare_config(CONFIG)
    assert caught.value.where == tmp_path / "config.json"


def test_json_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"a": [1, None]})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="full") as caught:
        write_json_atomic(path, {"a": 2})
    assert caught.value.code == EXIT_RESOURCES
    assert read_json(path) == {"a": [1, None]}
    assert os.listdir(tmp_path) == ["x.json"]


def test_space_and_storage_errors(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(UserError) as caught:
        require_space(tmp_path, 1 << 60, "the checkpoints")
    assert caught.value.code == EXIT_RESOURCES
    wrapped = storage_error(ValueError("x: No space left on device"), tmp_path)
    assert wrapped is not None and wrapped.code == EXIT_RESOURCES
    gone = storage_error(OSError(errno.EROFS, "x"), tmp_path)
    assert gone is not None and gone.code == EXIT_USER
    assert storage_error(ValueError("shape"), tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal == number
    assert {n: signal.getsignal(n) for n in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_after_it_insists(number: signal.Signals) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_no_handlers_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend([stop.requested, signal.getsignal(signal.SIGTERM) == before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]
