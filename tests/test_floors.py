"""The shape of the tree: imports go down only, files stay short, nothing is local."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A module may import its own floor and those below; a longer name wins.
FLOORS = {
    "ftjax": 0,
    "ftjax.errors": 0,
    "ftjax.weights": 0,
    "ftjax.sharding": 0,
    "ftjax.gradients": 0,
    "ftjax.quant": 0,
    "ftjax.ranges": 0,
    "ftjax.runtime": 0,
    "ftjax.step": 0,
    "ftjax.optim": 0,
    "ftjax.optimizers": 0,
    "ftjax.meanings": 0,
    "ftjax.names": 0,
    "ftjax.metrics": 0,
    "ftjax.config": 0,
    "ftjax.console": 0,
    "ftjax.curves": 0,
    "ftjax.workdir": 0,
    "ftjax.lock": 0,
    "ftjax.scrub": 0,
    "ftjax.signals": 0,
    "ftjax.losses": 0,
    "ftjax.data": 0,
    "ftjax.models": 1,
    "ftjax.methods": 2,
    "ftjax.checkpoints": 3,
    "ftjax.decoding": 3,
    "ftjax.evals": 3,
    "ftjax.objectives": 3,
    "ftjax.adapters": 4,
    "ftjax.asked": 4,
    "ftjax.cli": 4,
    "ftjax.describe": 4,
    "ftjax.job": 4,
    "ftjax.loading": 4,
    "ftjax.look": 4,
    "ftjax.loop": 4,
    "ftjax.memory": 4,
    "ftjax.policy": 4,
    "ftjax.prepare": 4,
    "ftjax.reference": 4,
    "ftjax.report": 4,
    "ftjax.rl": 4,
    "ftjax.run_folder": 4,
    "ftjax.streaming": 4,
    "ftjax.switch": 4,
    "ftjax.watch": 4,
    "ftjax.train": 5,
    "ftjax.check": 5,
    "ftjax.generate": 5,
    "ftjax.evaluate": 5,
    "ftjax.card": 5,
    "ftjax.export": 5,
    "ftjax.quantize": 5,
    "ftjax.merged": 5,
    "ftjax.pair": 5,
    "ftjax.demo": 5,
    "benchmarks": 5,
    "experiments": 5,
}

# Folders of the ground floor that know nothing of one another.
APART = ("ftjax.losses", "ftjax.data")
# What must start fast and run where there is no accelerator stack.
WITHOUT_JAX = ("ftjax.data", "ftjax.console", "ftjax.errors", "ftjax.metrics")
HEAVY = ("transformers", "datasets", "matplotlib", "orbax", "wandb", "tensorboardX")
NEVER = ("torch", "tensorflow")
LINEN_ONLY_IN = "ftjax.models"

LONGEST_FILE = 400
LONGEST_FUNCTION = 50


def name_of(path: Path) -> str:
    """The dotted name of a module of the tree."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


CODE = {
    name_of(path): path
    for folder in ("ftjax", "configs", "benchmarks", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PACKAGE = {name: path for name, path in CODE.items() if name.startswith("ftjax")}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def floor_of(name: str) -> int | None:
    homes = [home for home in FLOORS if home != "ftjax" and within(name, home)]
    if name == "ftjax":
        return FLOORS[name]
    return FLOORS[max(homes, key=len)] if homes else None


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[str, int]]:
    """(imported module, line) of each import; those under TYPE_CHECKING too."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    package = name_of(path) if path.stem == "__init__" else name_of(path.parent)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in CODE else base), node.lineno


def test_every_module_has_a_floor() -> None:
    homeless = [name for name in PACKAGE if floor_of(name) is None]
    assert not homeless, f"give these a floor in FLOORS: {homeless}"


def test_imports_go_down_only() -> None:
    wrong = []
    for name, path in CODE.items():
        floor = floor_of(name)
        for target, line in imports(path):
            below = floor_of(target)
            if below is not None and floor is not None and below > floor:
                wrong.append(f"{name}:{line} (floor {floor}) -> {target} ({below})")
    assert not wrong, "\n".join(wrong)


def test_losses_and_data_stand_apart() -> None:
    wrong = [
        f"{name}:{line} -> {target}"
        for home in APART
        for name, path in PACKAGE.items()
        if within(name, home)
        for target, line in imports(path)
        if any(within(target, other) for other in APART if other != home)
    ]
    assert not wrong, "\n".join(wrong)


def test_configs_import_only_ml_collections_and_each_other() -> None:
    wrong = [
        f"{name}:{line} -> {target}"
        for name, path in CODE.items()
        if within(name, "configs")
        for target, line in imports(path)
        if target.split(".")[0] not in {"ml_collections", "configs"}
        and target.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_never_names_another_framework() -> None:
    wrong = [
        f"{name}:{line} -> {target}"
        for name, path in PACKAGE.items()
        for target, line in imports(path)
        if target.split(".")[0] in NEVER
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{name}:{line} -> {target}"
        for name, path in PACKAGE.items()
        for target, line in imports(path, top_level_only=True)
        if target.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_linen_lives_in_one_folder() -> None:
    wrong = [
        f"{name}:{line} -> {target}"
        for name, path in PACKAGE.items()
        if not within(name, LINEN_ONLY_IN)
        for target, line in imports(path)
        if within(target, "flax.linen") or within(target, "flax.nnx")
    ]
    assert not wrong, "\n".join(wrong)


def test_configs_and_data_load_without_jax() -> None:
    names = [name for name in CODE if within(name, "configs")]
    names += [name for name in PACKAGE if any(within(name, w) for w in WITHOUT_JAX)]
    script = (
        f"import importlib, sys\nfor name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'jax' in sys.modules: raise SystemExit(f'{name} starts jax')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    paths = CODE | {name_of(path): path for path in (ROOT / "tests").rglob("*.py")}
    lengths = {n: len(p.read_text().splitlines()) for n, p in paths.items()}
    long = {n: size for n, size in lengths.items() if size >= LONGEST_FILE}
    assert not long, f"{LONGEST_FILE} lines or more: {long}"


def test_functions_are_short() -> None:
    long = []
    for name, path in CODE.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > LONGEST_FUNCTION:
                    long.append(f"{name}:{node.lineno} {node.name}: {size} lines")
    assert not long, "\n".join(long)


def test_nothing_is_left_open() -> None:
    marks = [r"TO" r"DO\b", r"FIX" r"ME\b", r"X" r"XX\b", r"NotImplemented" r"Error"]
    needle = re.compile("|".join([*marks, r"except[^:\n]*:\s*pa" r"ss\b"]))
    wrong = [
        f"{name}: {found.group()!r}"
        for name, path in CODE.items()
        for found in needle.finditer(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def repository_files() -> list[Path]:
    """What git holds or would hold; without git, every file but hidden folders."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        found: list[Path] = []
        for folder, folders, files in os.walk(ROOT):
            folders[:] = [f for f in folders if not f.startswith(".")]
            found += [Path(folder) / file for file in files]
        return found
    paths = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


# In two pieces each, so that this file does not name them.
LOCAL = [
    "/" + "work/",
    "/" + "root/",
    "/" + "farm/",
    "/" + "tmp/" + "w/",
    "/ho" + "me/",
]


@pytest.mark.parametrize("needle", LOCAL)
def test_no_file_names_a_place_on_one_machine(needle: str) -> None:
    pattern = re.compile(rb"(?<![A-Za-z0-9_.~])" + re.escape(needle.encode()))
    wrong = [
        str(path.relative_to(ROOT))
        for path in repository_files()
        if pattern.search(path.read_bytes())
    ]
    assert not wrong, f"{needle} in {wrong}"
