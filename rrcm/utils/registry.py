"""Registries of objects by name. Looking up one entry imports its module and none of the others."""

from collections import UserDict
from functools import partial
from pkgutil import resolve_name


class Registry(UserDict):
    """A dictionary of objects. An entry is an object, or text that says where to import it: "package.module:object".

    The object is imported when the entry is looked up. An entry may also be a pair of such a text and keyword
    arguments, which are then passed in every call.
    """

    def __getitem__(self, name: str) -> object:
        entry = self.data[name]
        where, options = entry if isinstance(entry, tuple) else (entry, {})
        if not isinstance(where, str):
            return entry
        imported = resolve_name(where)
        return partial(imported, **options) if options else imported

    def module(self, name: str) -> str:
        """The name of the module that an entry comes from."""
        entry = self.data[name]
        where = entry[0] if isinstance(entry, tuple) else entry
        return where.partition(":")[0] if isinstance(where, str) else where.__module__
