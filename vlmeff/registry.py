"""A named collection that classes join by decorator. A leaf module: it imports only ``vlmeff.errors``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from vlmeff.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps the names users type to classes; an unknown name lists the nearest ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that adds the class under ``name``; a name that is taken raises."""

        def add(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already, by {self._entries[name].__qualname__}")
            self._entries[name] = cls
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """The class registered under ``name``; raises ``UnknownNameError``."""
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name]

    def name_of(self, entry: T) -> str:
        """The name under which the class of ``entry`` is registered, else the name of its class."""
        return next((name for name, cls in self._entries.items() if cls is type(entry)), type(entry).__name__)

    def names(self) -> list[str]:
        return sorted(self._entries)
