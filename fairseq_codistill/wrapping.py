"""Wraps methods of one instance, whatever the caller passes by position or by name, and keeps the instance picklable."""

from __future__ import annotations

import inspect
import types
from typing import Any, Callable, Dict, Sequence, Tuple

TRAIN_STEP = ("sample", "model", "criterion", "optimizer", "update_num", "ignore_grad")  # fairseq's order


def wrap(instance: Any, name: str, wrapper: Callable) -> None:
    """From now on `instance.name(…)` calls `wrapper(inner, …)`, where `inner` is the method as it was, or does nothing."""
    setattr(instance, name, _Wrapped(instance, name, wrapper))


class _Wrapped:
    """A wrapped method. Pickled or copied with its instance (data-loading workers, say), it is the class's method again."""

    def __init__(self, instance: Any, name: str, wrapper: Callable) -> None:
        self._instance, self._name, self._wrapper = instance, name, wrapper
        self.__wrapped__ = getattr(instance, name, _nothing)  # where inspect.signature looks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(self.__wrapped__, *args, **kwargs)

    def __reduce__(self) -> Tuple[Callable, Tuple[Any, str]]:
        return _unwrapped, (self._instance, self._name)


def _unwrapped(instance: Any, name: str) -> Any:
    method = getattr(type(instance), name, None)
    return _nothing if method is None else types.MethodType(method, instance)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A method that the class does not have, but that its callers would call."""


class Argument:
    """The argument `name` of calls of `function`, given by position or by name.

    `order`: the names by position, for a function that does not tell its own."""

    def __init__(self, function: Callable, name: str, order: Sequence[str]) -> None:
        names = _positional(function)
        names = names if name in names else list(order)
        self.name, self._place = name, names.index(name) if name in names else None

    def of(self, args: Tuple[Any, ...], kwargs: Dict[str, Any], default: Any = None) -> Any:
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self._place] if self._place is not None and self._place < len(args) else default

    def replaced(self, value: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """(args, kwargs) with `value` for this argument; passed by name where the caller did not pass it."""
        if self.name not in kwargs and self._place is not None and self._place < len(args):
            return (*args[: self._place], value, *args[self._place + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


def _positional(function: Callable) -> list:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
