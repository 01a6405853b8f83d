"""Describe everything that decides how an object behaves, as JSON: its class, its code, its attributes and its tensors.

A run that was stopped is resumed only if the descriptions of its networks are the same. No list says which attributes
count: all of them are described, and an object that cannot be described is refused. Descriptions are the same in
processes that were started in the same way, because they contain no addresses, no order of sets and no device numbers.
They do not see what a program changes at run time in torch's modules or in the global variables of a module.
"""

import copyreg
import hashlib
import io
import sys
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property, singledispatchmethod
from itertools import groupby
from types import CodeType, FunctionType, ModuleType

import torch
from torch import nn

from rrcm.utils.errors import RRCMError, one_line

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.layout, torch.memory_format)
CONTAINERS = (list, tuple, dict, OrderedDict, set, frozenset)
BY_VERSION = {"torch", "builtins", *sys.stdlib_module_names}  # packages whose version stands for their code
# Attributes of graphs: the code stands for the first, and torch.export adds the others, which change no output
OF_EXPORT = ("_graph", "eval", "train", "range_constraints")


class Description:
    """Describes objects one after another. `modules` collects the names of the modules that define their code."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._seen: dict[int, tuple[int, object]] = {}  # by id: a number, and the object, so that its id is not reused
        self._path: list[str] = []  # the attributes that lead to the current value, for the error message

    def of(self, value: object) -> list:
        """The JSON-able description of a value. Raises `RRCMError` for a value that cannot be described."""
        kind = type(value)
        if kind in PLAIN:
            return [kind.__name__, repr(value)]
        if kind not in (tuple, frozenset, CodeType):  # Python may or may not share equal objects of these types
            if id(value) in self._seen:
                return ["seen", self._seen[id(value)][0]]
            self._seen[id(value)] = len(self._seen), value
        if isinstance(value, CONTAINERS) and kind not in CONTAINERS:  # a subclass may have further attributes
            return self._reduced(value)
        return self._described(value)

    def _reduced(self, value: object) -> list:
        """Describe the parts from which `copy` and `pickle` would rebuild the value."""
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            parts = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:  # each type raises its own
            raise RRCMError(
                f"{'.'.join(self._path)}: a {type(value).__qualname__}, which cannot be described ({one_line(error)}), "
                "so a stopped run could not be distinguished from another one; keep it out of the model's attributes"
            ) from None
        if isinstance(parts, str):  # the name of a global
            return [str(getattr(value, "__module__", None)), parts]
        return [self.of(list(part) if isinstance(part, Iterator) else part) for part in parts]

    @singledispatchmethod
    def _described(self, value: object) -> list:
        return self._reduced(value)

    @_described.register
    def _sequence(self, values: list | tuple) -> list:
        return [type(values).__name__, *(self.of(value) for value in values)]

    @_described.register
    def _set(self, values: set | frozenset) -> list:
        in_order = sorted(values, key=lambda value: str(Description().of(value)))  # before they get numbers
        return [type(values).__name__, *(self.of(value) for value in in_order)]

    @_described.register
    def _mapping(self, entries: dict) -> list:
        described = []
        for name, value in entries.items():
            self._path.append(str(name))
            described.append([self.of(name), self.of(value)])
            self._path.pop()
        return [type(entries).__name__, *described]

    @_described.register
    def _tensor(self, tensor: torch.Tensor) -> list:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            return self._reduced(tensor)
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        return [str(tensor.dtype), tensor.shape, tensor.stride(), hashlib.sha256(content.numpy()).hexdigest()]

    @_described.register
    def _storage(self, storage: torch.UntypedStorage | torch.TypedStorage) -> list:
        return self._tensor(torch.empty(0, dtype=torch.uint8).set_(storage.untyped().cpu()))

    @_described.register
    def _program(self, program: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> list:
        saved = io.BytesIO()
        torch.jit.save(program, saved)
        with zipfile.ZipFile(saved) as parts:  # one is a random number, and others serve messages only
            names = [name for name in parts.namelist() if not name.endswith(("serialization_id", ".debug_pkl"))]
            return ["program", *([name, _code_of_program(parts.read(name))] for name in names)]

    @_described.register
    def _network(self, network: nn.Module) -> list:
        if type(network).__name__ == "GuardsFn":  # of torch.export: it checks the input, and has no description
            return ["guards"]
        return [self.of(type(network)), self._mapping(vars(network))]  # not __getstate__, which may leave something out

    @_described.register
    def _graph(self, network: torch.fx.GraphModule) -> list:
        """As a network, but its graph by the code that it was compiled to. Keys of hooks count up within a process."""
        own = {key: value for key, value in vars(network).items() if key not in OF_EXPORT}
        hooks = {key: list(own[key].values()) for key in own if "hooks" in key and isinstance(own[key], dict)}
        return [network.code, self._mapping(own | hooks)]

    @_described.register
    def _class(self, cls: type) -> list:
        name, members = self._named(cls), []
        if cls.__module__.split(".")[0] not in BY_VERSION:
            members = [(key, each) for key, member in vars(cls).items() for each in _code_and_data(key, member)]
        return [name, *map(self.of, cls.__bases__), *([key, self.of(each)] for key, each in members)]

    @_described.register
    def _function(self, function: FunctionType) -> list:
        name = self._named(function)
        if name[0].split(".")[0] in BY_VERSION and "<" not in function.__qualname__:
            return name
        holds = function.__code__, function.__defaults__, function.__kwdefaults__
        return [name, *map(self.of, holds), *(self.of(list(_content(cell))) for cell in function.__closure__ or ())]

    @_described.register
    def _code(self, code: CodeType) -> list:
        return [code.co_code.hex(), *code.co_names, *map(self.of, code.co_consts)]

    @_described.register
    def _module(self, module: ModuleType) -> list:
        self.modules.add(module.__name__)
        return [module.__name__]

    @_described.register
    def _device(self, device: torch.device) -> list:
        return [device.type]

    @_described.register
    def _reference(self, reference: weakref.ref) -> list:
        return ["weakref", self.of(reference())]

    def _named(self, value: type | Callable) -> list:
        module = value.__module__ or ""  # torch.export makes functions of no module
        self.modules |= {module} - {""}
        return [module, value.__qualname__]


def _code_of_program(content: bytes) -> str:
    """A hash of one part of a program. The order in which its code lists the constants of a class is random."""
    groups = groupby(content.split(b"\n"), key=lambda line: b": Final[" in line)
    lines = [line for constants, group in groups for line in (sorted(group) if constants else group)]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def _code_and_data(key: str, member: object) -> Iterator[object]:
    """What a class defines as `key`: the functions of a method or property, or a value."""
    if isinstance(member, FunctionType):
        yield member
    elif isinstance(member, staticmethod | classmethod):
        yield member.__func__
    elif isinstance(member, property):
        yield from (member.fget, member.fset, member.fdel)
    elif isinstance(member, cached_property):
        yield member.func
    elif not (key.startswith("__") and key.endswith("__")) and isinstance(member, (*PLAIN, *CONTAINERS, type)):
        yield member


def _content(cell: object) -> Iterator[object]:
    """The value of a variable in a closure, if it has been assigned."""
    try:
        yield cell.cell_contents
    except ValueError:
        return
