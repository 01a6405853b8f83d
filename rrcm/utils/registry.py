"""Registries name modules, so that importing one entry imports none of the others."""

from collections import UserDict
from functools import partial
from pkgutil import resolve_name


class Registry(UserDict):
    """Objects by name. An entry is the object, or text that says where it is: "package.module:object".

    Such an object is imported when it is asked for. An entry may also be a pair of that text and the keyword arguments
    that the object is always called with. An entry that is added later may be any object, as in other dictionaries.
    """

    def __getitem__(self, name: str) -> object:
        entry = self.data[name]
        where, options = entry if isinstance(entry, tuple) else (entry, {})
        if not isinstance(where, str):
            return entry
        found = resolve_name(where)
        return partial(found, **options) if options else found

    def module(self, name: str) -> str:
        """The name of the module that an entry comes from."""
        entry = self.data[name]
        where = entry[0] if isinstance(entry, tuple) else entry
        return where.partition(":")[0] if isinstance(where, str) else where.__module__
