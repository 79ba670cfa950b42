"""The documentation of the running interpreter, entry by entry.

Read from `pydoc_data.topics`, from the sources of the standard library (parsed, never
imported) and from the docstrings of the C modules that ship with it.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftjax.data.prose import paragraphs

_SKIPPED_FOLDERS = frozenset(
    ("idle_test", "test", "tests", "site-packages", "dist-packages", "turtledemo")
)
# Not safe to import, not for users, or gone from newer Pythons.
_SKIPPED_MODULES = frozenset(
    {"antigravity", "this", "_tkinter", "readline", "_curses", "_curses_panel", "nis"}
    | {"ossaudiodev", "spwd", "__phello__", "__hello__", "xxlimited", "xxsubtype"}
    | {"xxlimited_35", "lib2to3"}
)
# Modules that document the same things belong to one family, so one side of the split.
_FAMILIES = {
    "posix": "os", "nt": "os", "posixpath": "os", "ntpath": "os", "genericpath": "os",
    "_pyio": "io", "_pydecimal": "decimal", "_pydatetime": "datetime",
    "_py_abc": "abc", "_collections_abc": "collections", "_thread": "threading",
    "_pylong": "builtins", "_sitebuiltins": "site", "_weakrefset": "weakref",
    "_interpreters": "concurrent", "_interpqueues": "concurrent",
    "_md5": "hashlib", "_sha1": "hashlib", "_sha2": "hashlib", "_sha3": "hashlib",
    "_sha256": "hashlib", "_sha512": "hashlib", "_blake2": "hashlib",
    "_strptime": "time", "sre_compile": "re", "sre_parse": "re",
    "sre_constants": "re", "_sre": "re", "_posixsubprocess": "subprocess",
    "_opcode_metadata": "opcode", "_elementtree": "xml", "pyexpat": "xml",
    "_osx_support": "sysconfig", "_aix_support": "sysconfig",
    "_imp": "importlib", "imp": "importlib",
    "_frozen_importlib": "importlib", "_frozen_importlib_external": "importlib",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One documented thing.

    Attributes:
      name: its dotted public name, or the title of a topic.
      kind: 'module', 'class', 'exception', 'function', 'method', 'attribute', 'topic'.
      owner: the title it is documented under: a module, a class or a topic.
      family: the top-level module it belongs to; the unit of the split.
      opens: whether `text[0]` is the first paragraph of the docstring.
      text: its paragraphs of prose, each on one line.
    """

    name: str
    kind: str
    owner: str
    family: str
    opens: bool
    text: tuple[str, ...]


def family_of(module: str) -> str:
    """The top-level module under which `module` is counted in the split."""
    top = module.partition(".")[0]
    return _FAMILIES.get(top, top.lstrip("_") or top)


def split_of(family: str) -> str:
    """'eval' for about 8 % of the families, by a stable hash of the name."""
    digest = hashlib.sha256(family.encode()).hexdigest()
    return "eval" if int(digest[:8], 16) % 100 < 8 else "train"


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every documented thing of this interpreter once, in a fixed order."""
    found: dict[str, Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old sources and modules, not of ours
        for source in (_topics(), _sources(), _compiled()):
            for entry in source:
                if entry.text:
                    found.setdefault(entry.name, entry)
    return tuple(found.values())


def _entry(name: str, kind: str, owner: str, module: str, doc: str) -> Entry:
    opens, text = paragraphs(doc, name.rpartition(".")[2])
    return Entry(name, kind, owner, family_of(module), opens, tuple(text))


def _topics() -> Iterator[Entry]:
    from pydoc_data.topics import topics

    heading = re.compile(r"^(?=\S.*\n([*=\-^~])\1{3,}\n)", re.M)
    for key in sorted(topics):
        sections = [part for part in heading.split(topics[key]) if len(part) > 1]
        for section in sections:
            title, _, body = section.partition("\n")
            body = body.partition("\n")[2]
            yield _entry(title.strip(), "topic", title.strip(), "pydoc_data", body)


def _sources() -> Iterator[Entry]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in root.rglob("*.py") if not _skipped(p.relative_to(root))]
    for path in sorted(paths, key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            continue
        with contextlib.suppress(SyntaxError, ValueError):
            tree = ast.parse(source)
            yield _entry(public(module), "module", public(module), module, _doc(tree))
            yield from _members(tree.body, public(module), module, "")


def _skipped(path: Path) -> bool:
    top = path.parts[0].removesuffix(".py")
    folders = _SKIPPED_FOLDERS.intersection(path.parts[:-1])
    return bool(folders) or top in _SKIPPED_MODULES or top.startswith("config-")


def public(module: str) -> str:
    """The name under which users import what a private module defines."""
    top, dot, rest = module.partition(".")
    family = "collections.abc" if top == "_collections_abc" else family_of(top)
    if top.startswith("_py") or top in ("posix", "nt", "_collections_abc", "_io"):
        return family + dot + rest
    bare = top.lstrip("_")
    return bare + dot + rest if bare in sys.stdlib_module_names else module


def _doc(node: ast.AST) -> str:
    allowed = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (ast.get_docstring(node) or "") if isinstance(node, allowed) else ""


def _members(
    body: list[ast.stmt], owner: str, module: str, cls: str
) -> Iterator[Entry]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            inner = [*node.body, *getattr(node, "orelse", [])]
            for handler in getattr(node, "handlers", []):
                inner += handler.body
            yield from _members(inner, owner, module, cls)
        elif isinstance(node, ast.ClassDef):
            name = f"{owner}.{node.name}"
            yield _entry(name, _class_kind(node.name), name, module, _doc(node))
            yield from _members(node.body, name, module, name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = [ast.unparse(d) for d in node.decorator_list]
            member = any(d.endswith("property") for d in decorators)
            kind = "attribute" if member else "method" if cls else "function"
            yield _entry(f"{owner}.{node.name}", kind, owner, module, _doc(node))


def _class_kind(name: str) -> str:
    exception = name.endswith(("Error", "Exception", "Warning"))
    return "exception" if exception else "class"


def _compiled() -> Iterator[Entry]:
    """The docstrings of the modules written in C that are safe to import."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    for name in sorted(sys.stdlib_module_names - _SKIPPED_MODULES):
        if name.startswith(("_test", "_xx", "_ctypes_test")) or name == "__main__":
            continue
        with contextlib.suppress(ImportError, ValueError, AttributeError):
            spec = importlib.util.find_spec(name)
            origin = (spec and spec.origin) or ""
            if origin != "built-in" and not origin.endswith(suffixes):
                continue
            module = importlib.import_module(name)
            title = public(name)
            yield _entry(title, "module", title, name, module.__doc__ or "")
            for key, value in sorted(vars(module).items()):
                yield from _object(key, value, title, name)


def _object(key: str, value: object, owner: str, module: str) -> Iterator[Entry]:
    home = getattr(value, "__module__", None) or module
    if key.startswith("_") or family_of(home) != family_of(module):
        return
    if isinstance(value, type):
        if value.__name__ != key:
            return  # an alias, as `os.error` is of `OSError`
        name = f"{owner}.{key}" if owner != "builtins" else key
        yield _entry(name, _class_kind(key), name, module, _own_doc(value))
        for attribute, member in sorted(vars(value).items()):
            kind = "method" if callable(member) else "attribute"
            known = callable(member) or isinstance(member, types.GetSetDescriptorType)
            if known and not attribute.startswith("_"):
                doc = _own_doc(member)
                yield _entry(f"{name}.{attribute}", kind, name, module, doc)
    elif isinstance(value, types.BuiltinFunctionType | types.FunctionType):
        name = f"{owner}.{key}" if owner != "builtins" else key
        yield _entry(name, "function", owner, module, _own_doc(value))


def _own_doc(value: object) -> str:
    doc = getattr(value, "__doc__", None)
    return doc if isinstance(doc, str) else ""
