"""Modules that libraries import when they start and most commands never use: imported when they are first used.

diffusers and peft import torch's compiler, bitsandbytes and scipy.stats wherever these are installed, which takes
longer than torch itself. After `postpone` an import of one of them gives a `Postponed`. It turns into the module as
soon as anything is asked of it that is not known without the module. So a program sees no difference, except in time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

COMPILER = "torch._dynamo"
NAMES = (COMPILER, "bitsandbytes", "scipy.stats", "scipy.integrate")
# parts of the compiler that libraries import: transformers one that needs nothing else of it, torchvision one function
ALONE = {f"{COMPILER}._trace_wrapped_higher_order_op"}
UTILS = f"{COMPILER}.utils"
_lock = threading.Lock()


def postpone(names: Sequence[str] = NAMES) -> None:
    """Put off the imports of ``names`` that are not imported yet. A second call does nothing."""
    there = {each.name for each in sys.meta_path if isinstance(each, Finder)}
    for name in names:
        if name not in sys.modules and name not in there:
            sys.meta_path.insert(0, Finder(name))


class Postponed(ModuleType):
    """In the place of a module that was imported, but not used yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__all__", "__version__"):  # looked for in every module
            raise AttributeError(name)
        return getattr(real(self.__name__), name)


class Finder(MetaPathFinder, Loader):
    """Finds the module ``name`` as a `Postponed`, and its parts after the module itself was imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname == self.name or (fullname == UTILS and isinstance(sys.modules.get(COMPILER), Postponed)):
            found = PathFinder.find_spec(fullname, path, target)
            if found is None:
                return None
            places = found.submodule_search_locations
            return importlib.util.spec_from_file_location(
                fullname, found.origin, loader=self, submodule_search_locations=places
            )
        if not fullname.startswith(f"{self.name}.") or fullname in ALONE:
            return None
        real(self.name)
        if (there := sys.modules.get(fullname)) is None:
            return None
        # imported with the module already: not again. Python takes the spec of a module that is there, not what is
        # returned here
        there.__spec__ = ModuleSpec(fullname, _There(there, there.__spec__))
        return there.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = Postponed(spec.name)
        if spec.name == COMPILER:
            vars(module).update(_without_compiler())
        if spec.name == UTILS:
            vars(module)["is_compile_supported"] = lambda device: real(UTILS).is_compile_supported(device)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _There(Loader):
    """Gives a module that was executed before, with its own spec."""

    def __init__(self, module: ModuleType, spec: ModuleSpec | None) -> None:
        self.module, self.spec = module, spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def real(name: str) -> ModuleType:
    """The module, imported now if it was postponed."""
    name_of_all = COMPILER if name == UTILS else name
    with _lock:  # not around the import, which waits for imports of other threads
        stand_ins = {each: sys.modules.get(each) for each in dict.fromkeys((name_of_all, name))}
        if name_of_all == COMPILER:
            stand_ins[UTILS] = sys.modules.get(UTILS)
        stand_ins = {each: module for each, module in stand_ins.items() if isinstance(module, Postponed)}
        sys.meta_path[:] = [each for each in sys.meta_path if not isinstance(each, Finder) or each.name != name_of_all]
        for each in stand_ins:
            del sys.modules[each]
            parent, _, child = each.rpartition(".")
            if parent in sys.modules:
                vars(sys.modules[parent]).pop(child, None)
    for each, stand_in in stand_ins.items():
        found = importlib.import_module(each)
        marked = vars(stand_in).get("_marked", [])
        vars(stand_in).update((key, value) for key, value in vars(found).items() if key != "__spec__")
        for how, function in marked:
            getattr(found, how)(function)
    return importlib.import_module(name)


@contextlib.contextmanager
def absent(name: str) -> Iterator[None]:
    """Libraries that look for ``name`` do not find it, if it was postponed and is not in use."""
    stand_in = sys.modules.get(name)
    if not isinstance(stand_in, Postponed):
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's sign that there is no such module
    try:
        yield
    finally:
        sys.modules[name] = stand_in


# ---- torch._dynamo, while nothing was compiled


def _without_compiler() -> dict[str, Any]:
    """What libraries ask of the compiler when they are imported, and torch's optimisers when they are made."""
    marked: list[tuple[str, Any]] = []  # remembered until there is a compiler

    def mark(how: str, function: Any) -> Any:
        marked.append((how, function))
        return function

    marks = {how: functools.partial(mark, how) for how in ("allow_in_graph", "assume_constant_result")}
    known = {"disable": disable, "graph_break": graph_break, "eval_frame": _EvalFrame()}
    return {"_marked": marked, **marks, **known}


def disable(function: Callable[..., Any] | None = None, recursive: bool = True, **options: Any) -> Any:
    """``function``, which is not compiled, if there is a compiler at the time of its call."""
    if function is None:
        return functools.partial(disable, recursive=recursive, **options)
    kept: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.modules[COMPILER], Postponed):
            return function(*args, **kwargs)
        if not kept:
            kept.append(sys.modules[COMPILER].disable(function, recursive, **options))
        return kept[0](*args, **kwargs)

    return call


def graph_break(*args: Any, **options: Any) -> None:
    """Ends a compiled graph, where there is one."""
    if not isinstance(sys.modules[COMPILER], Postponed):
        sys.modules[COMPILER].graph_break(*args, **options)


class _EvalFrame(SimpleNamespace):
    """torch._dynamo.eval_frame: without a compiler there are no compiled modules."""

    OptimizedModule = type("OptimizedModule", (), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(real(COMPILER).eval_frame, name)
