"""Registers with fairseq as soon as both packages are imported, whichever comes first.

The commands and tools that read logs start at once because this package alone needs neither fairseq nor torch, whose import
takes four seconds. So `plugin`, which registers everything, is imported

* at once where fairseq is there already: `--user-dir`, or `import fairseq, fairseq_codistill`;
* else when fairseq's import ends. A finder in `sys.meta_path`, which sees the end of imports, waits for it and then goes.

It also waits for a module of its package that is being loaded (`from fairseq_codistill import compat` brings fairseq with it):
`plugin` could not use that module while it is half there.
"""

from __future__ import annotations

import importlib
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Dict, Optional, Sequence

_PLUGIN = f"{__package__}.plugin"
# Where a fork of fairseq imports this package while it is itself being imported: what must be whole before it can register.
_NEEDED = ("fairseq.criterions", "fairseq.models", "fairseq.optim", "fairseq.optim.lr_scheduler", "fairseq.tasks")


def register_with_fairseq() -> None:
    """Import `plugin` now, or as soon as fairseq is imported. Raises whatever that import raises."""
    finder = _AfterImport()
    sys.meta_path.insert(0, finder)  # before the look, or an import that ends in another thread would be missed
    finder.register_if_ready()


class _AfterImport(MetaPathFinder):
    """Finds nothing of its own; the modules of fairseq and of this package that others find tell it when they are imported."""

    def __init__(self) -> None:
        self._imported: Dict[str, bool] = {}  # each module whose import was seen to begin: is it whole?
        self._registering = False
        self._lock = threading.Lock()  # guards both; never held during an import, which has locks of its own

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if fullname.split(".")[0] not in ("fairseq", __package__):
            return None
        finders = list(sys.meta_path)
        # Only those behind this one, as Python would: another hook of this sort may be asking this one.
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Telling(spec.loader, self)
                return spec
        return None

    def begin(self, name: str) -> None:
        with self._lock:
            self._imported[name] = False

    def end(self, name: str, whole: bool) -> None:
        """`name` was imported, or failed."""
        with self._lock:
            if whole:
                self._imported[name] = True
            else:
                self._imported.pop(name, None)
        if whole:
            self.register_if_ready()

    def register_if_ready(self) -> None:
        """One thread registers; a second must not wait for it, since the first may need a module that the second imports."""
        with self._lock:
            if self._registering or not (self._fairseq_is_ready() and self._we_are_ready()):
                return
            self._registering = True
        try:
            importlib.import_module(_PLUGIN)
            # A new list: another thread may be walking along the old one, and would miss a finder if it became shorter.
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        finally:
            self._registering = False  # after an error the next import of fairseq shows it again

    def _fairseq_is_ready(self) -> bool:
        if "fairseq" in self._imported:
            return self._imported["fairseq"]
        if self._is_whole("fairseq"):
            return True
        return "fairseq" in sys.modules and all(self._is_whole(name) for name in _NEEDED)

    def _we_are_ready(self) -> bool:
        return all(whole for name, whole in self._imported.items() if name.startswith(f"{__package__}."))

    def _is_whole(self, name: str) -> bool:
        module = sys.modules.get(name)
        begun_before = getattr(getattr(module, "__spec__", None), "_initializing", False)
        return module is not None and self._imported.get(name, not begun_before)


class _Telling(Loader):
    """A module's loader, which tells an _AfterImport of the module's begin and end; in all else it is the loader."""

    def __init__(self, loader: Any, listener: _AfterImport) -> None:
        self._loader, self._listener = loader, listener

    def __getattr__(self, name: str) -> Any:  # get_code, get_data, …: what only some loaders have
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None, "whoever imports a module has given it a spec"
        name = spec.name
        module.__loader__ = spec.loader = self._loader  # for whoever asks the module itself
        self._listener.begin(name)
        whole = False
        try:
            self._loader.exec_module(module)
            whole = True
        finally:
            self._listener.end(name, whole)
