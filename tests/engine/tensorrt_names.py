"""Which names of TensorRT our source uses, and which its versions and type stubs have."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from jmp_deploy.core.paths import PACKAGE
from jmp_deploy.engine import api
from tests.engine.trt_differences import lacks

SEAM = Path(api.__file__)
"""Modules that hold a module or an object of TensorRT."""
TABLE = Path(__file__).with_suffix(".json")
"""{"versions": [...], "names": {name: versions that have it}}, by scripts/bindings_check.py."""
MODULE_DUNDERS = {"__name__", "__version__"}


def our_names() -> set[str]:
    """All names of TensorRT that we use, in any of its flavours."""
    names = set()
    for user in PACKAGE.rglob("*.py"):
        names |= used_names(user.read_text("utf-8"), api.OBJECT_NAMES)
    return names


def wrong(
    names: Iterable[str], has: Callable[[str], bool], flavour: str, version: str
) -> list[str]:
    """What is missing without being listed, or listed although it is there."""
    found = []
    for name in sorted(names):
        if has(name) == lacks(name, flavour, version):
            found.append(f"{name}: {'listed but there' if has(name) else 'not there'}")
    return sorted(found)


def used_names(source: str, objects: dict[str, str]) -> set[str]:
    """ "Class.attribute" of objects and "name" or "name.member" of modules that a source uses.

    A module is a variable called `trt`; an object is a variable whose annotation is
    `tensorrt.Class`, or one whose name `objects` maps to a class. A variable that is assigned
    from `trt.Name` stands for that name.
    """
    tree = ast.parse(source)
    found: set[str] = set()
    for scope in _scopes(tree):
        known = {**objects, **dict(_annotated(scope))}
        aliases = dict(_aliases(scope))
        for node in _own_nodes(scope):
            if isinstance(node, ast.Attribute):
                path = _dotted(node)
                if path and path[0] in aliases:
                    path = ["trt", *aliases[path[0]], *path[1:]]
                if path and path[0] == "trt" and len(path) > 1:
                    found.add(".".join(path[1:]))
                elif path and path[0] in known:
                    found.add(f"{known[path[0]]}.{path[1]}")
    return {name for name in found if name.split(".")[0] not in MODULE_DUNDERS}


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """A scope's nodes without those of functions within: these have scopes of their own."""
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting.extend(ast.iter_child_nodes(node))
        else:
            waiting.extend(node.decorator_list)


def _annotated(scope: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
        for argument in (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs):
            if argument.annotation is not None and (name := _tensorrt_class(argument.annotation)):
                yield argument.arg, name
    for node in _own_nodes(scope):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and (name := _tensorrt_class(node.annotation))
        ):
            yield node.target.id, name


def _tensorrt_class(annotation: ast.expr) -> str | None:
    path = _dotted(annotation)
    return path[1] if path and path[0] == "tensorrt" else None


def _aliases(scope: ast.AST) -> Iterator[tuple[str, list[str]]]:
    for node in _own_nodes(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            path = _dotted(node.value)
            if path and path[0] == "trt" and len(path) > 1:
                yield node.targets[0].id, path[1:]


def _dotted(node: ast.AST) -> list[str] | None:
    """["a", "b"] of `a.b`; what comes after a call is not known and ends it."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return [*before, node.attr] if before else None
    return None


class Stubs:
    """Names in the type stubs of TensorRT; None of them where the package is missing.

    Attributes:
        classes: class -> its own attributes and those of its bases.
        names: of the module.
        folder: a copy that Python's grammar accepts, for mypy.
    """

    def __init__(self, source: str) -> None:
        tree = ast.parse(source)
        self.names = {name for node in tree.body for name in _declared(node)}
        own: dict[str, set[str]] = {}
        bases: dict[str, list[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                own.setdefault(node.name, set()).update(_members(node))
                bases[node.name] = [ast.unparse(base) for base in node.bases]
        self.classes = {name: self._with_bases(name, own, bases) for name in own}

    def _with_bases(
        self, name: str, own: dict[str, set[str]], bases: dict[str, list[str]]
    ) -> set[str]:
        found = set(own.get(name, ()))
        for base in bases.get(name, ()):
            found |= self._with_bases(base, own, bases)
        return found

    def has(self, name: str) -> bool:
        """Whether "Class.attribute" or a name of the module is there."""
        first, _, rest = name.partition(".")
        if not rest:
            return first in self.names
        attribute, _, member = rest.partition(".")
        if first not in self.classes or attribute not in self.classes[first]:
            return False
        # ILogger.Severity.ERROR: a class in a class
        return not member or (attribute in self.classes and member in self.classes[attribute])


def _declared(node: ast.stmt) -> Iterable[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    return []


def _members(node: ast.ClassDef) -> set[str]:
    members = {name for child in node.body for name in _declared(child)}
    # stubgen finds no properties that can only be set, and no enum values with odd names:
    # they stand in the docstring
    return members | set(re.findall(r":ivar (\w+):", ast.get_docstring(node) or ""))


def repaired(text: str) -> str:
    """The stubs as Python: generated from docstrings, they hold what its grammar does not allow."""
    for wrong, right in (
        ("(self, in: ", "(self, in_: "),
        ("(self: IPluginV3, in: ", "(self: IPluginV3, in_: "),
        ("channel_axis: int) -> IScaleLayer", "channel_axis: int = ...) -> IScaleLayer"),
    ):
        text = text.replace(wrong, right)
    return text


def stub_files() -> dict[str, Path] | None:
    """{"tensorrt/__init__.pyi": path, ...} of the installed stubs, or None."""
    try:
        listed = files("tensorrt-stubs") or []
    except PackageNotFoundError:
        return None
    found = {str(entry): Path(str(entry.locate())) for entry in listed if entry.suffix == ".pyi"}
    return found or None
