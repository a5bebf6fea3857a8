"""Checkpoints read without running anything that they name: tensors, containers, numbers and text, and stand-ins for the rest.

A pickle is a program that calls what it names. Here it may call what builds a tensor, and nothing else: whatever else it names, a
`Namespace` of arguments, a config, NumPy's scalars, a log history, an unknown class, becomes an `Ignored`, whatever it would have
been given is dropped, and nothing is imported.
"""
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch._utils
from torch import Tensor

from zoo.errors import InputError

# A file that names one of these was made to run something. It would not run here; it is refused because nobody wants its weights.
HOSTILE_MODULES = frozenset((
    "asyncio", "code", "commands", "ctypes", "http", "importlib", "marshal", "multiprocessing", "nt", "os", "pickle", "pip", "posix",
    "posixpath", "pty", "pydoc", "runpy", "shutil", "socket", "subprocess", "sys", "timeit", "urllib", "webbrowser", "_pickle",
    "_posixsubprocess",
))
HOSTILE_BUILTINS = frozenset(("__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "input", "open", "setattr"))
SCALARS = (str, int, float, bool, bytes, type(None))  # keys of dicts: what takes no long time to hash


class Ignored:
    """An inert stand-in for something a checkpoint names and its reader does not need: keeps and calls nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def read_inert(path: str | Path, map_location: str | torch.device = "cpu") -> object:
    """What the file at `path`, written by torch.save in either of its formats, holds, with `Ignored` for all but plain values.

    Raises pickle.UnpicklingError for what was made to run something or to fill the memory, InputError for formats that cannot be
    read so, and whatever damaged bytes lead to.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # how torch.load tells its two formats apart
    if is_archive:
        _check_archive(path, size)
    elif tarfile.is_tarfile(path):
        raise InputError(f"{path} is in the format of PyTorch before 0.1.10, which is not read; load and save it again with a newer one")

    class Module:
        """What torch.load takes for the module pickle; bound to the size of the file, beyond which no tensor can reach."""

        class Unpickler(_Unpickler):
            limit = size

        @staticmethod
        def load(file: Any, **options: Any) -> object:
            return Module.Unpickler(file, **options).load()

    return torch.load(path, map_location=map_location, pickle_module=Module, weights_only=False)


def _check_archive(path: Path, size: int) -> None:
    """torch.save compresses nothing: an archive that grows on reading, or is a program, is none of its files."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(Path(entry.filename).name == "constants.pkl" for entry in entries):
        raise InputError(f"{path} is a TorchScript program, not a checkpoint; save the model's state_dict instead")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > size:
        raise InputError(f"{path} is refused: it would grow on reading, which files of torch.save do not")


def _rebuild_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    """The arguments of torch._utils._rebuild_tensor and, with more, of _rebuild_tensor_v2."""
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _rebuild_tensor_of_dtype(storage: Any, offset: int, size: tuple, stride: tuple, grad: object, hooks: object, dtype: torch.dtype,
                             *_: object) -> Tensor:
    """The arguments of torch._utils._rebuild_tensor_v3."""
    tensor = torch.empty((0,), dtype=dtype, device=storage._untyped_storage.device)
    return tensor.set_(storage._untyped_storage, offset, size, stride)


def _first(data: object, *_: object) -> object:
    """A parameter's tensor."""
    return data


def _rebuild_subclass(build: Callable, kind: object, arguments: tuple, state: object) -> object:
    """A subclass's tensor, as a plain one."""
    return _call(build, arguments)


def _set(items: Any = (), *_: object) -> set:
    """Of what takes no long time to hash."""
    return {item for item in items if type(item) in SCALARS} if type(items) in (list, tuple) else set()


BUILDERS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("collections", "OrderedDict"): dict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): _set,
}
STORAGES = {("torch.storage", "UntypedStorage"): torch.UntypedStorage, ("torch", "UntypedStorage"): torch.UntypedStorage}


def _call(function: Any, arguments: object) -> object:
    """A call in the file: carried out if it builds a tensor or a container, an `Ignored` otherwise."""
    if not any(function is builder for builder in BUILDERS.values()) or type(arguments) is not tuple:
        return Ignored()
    if function in (dict, tuple) and not (arguments == () or (len(arguments) == 1 and type(arguments[0]) in (list, tuple))):
        return Ignored()
    if function is dict:  # Python 2's OrderedDict comes with its pairs
        pairs = [pair for pair in arguments[0] if type(pair) in (list, tuple) and len(pair) == 2] if arguments else []
        return {key: value for key, value in pairs if type(key) in SCALARS}
    return function(*arguments)


class _Unpickler(pickle._Unpickler):
    """Python's own, in which nothing is called, imported or set but by the rules of this module.

    It is the one in Python, because the one in C can be told what names stand for, and not what may be done to them.
    """

    limit: int
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    # What Python's has and its stub leaves out.
    stack: list[Any]
    append: Callable[[Any], None]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any, **options: Any):
        super().__init__(file, **options)
        self.storages: dict[object, int] = {}

    def find_class(self, module: str, name: str) -> object:
        module = "builtins" if module == "__builtin__" else module  # as Python 2 calls it
        if (module, name) in BUILDERS:
            return BUILDERS[module, name]
        if (module, name) in STORAGES:
            return STORAGES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        hostile = not HOSTILE_BUILTINS.isdisjoint(name.split(".")) if module == "builtins" else module.split(".")[0] in HOSTILE_MODULES
        if hostile:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} would run code")
        return Ignored

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        result = _call(function, arguments)
        if isinstance(result, Tensor) and result.numel() * result.element_size() > self.limit:
            raise pickle.UnpicklingError("a tensor is larger than the file")
        self.stack[-1] = result

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        del self.stack[-2:]
        self.stack[-1] = Ignored()

    def load_obj(self) -> None:
        self.pop_mark()
        self.append(Ignored())

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.find_class(module, name)  # may refuse it
        self.pop_mark()
        self.append(Ignored())

    def load_build(self) -> None:
        self.stack.pop()  # the state of an object, also the versions of modules that a state dict carries

    def load_ext(self) -> None:
        raise pickle.UnpicklingError("GLOBAL copyreg extensions are not read")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _update(self, items: list) -> None:
        if type(self.stack[-1]) is dict:
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update({key: value for key, value in pairs if type(key) in SCALARS})

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is set:
            self.stack[-1].update(item for item in items if type(item) in SCALARS)

    def load_frozenset(self) -> None:
        self.append(frozenset(item for item in self.pop_mark() if type(item) in SCALARS))

    def load_persid(self) -> None:
        raise pickle.UnpicklingError("names in text stand for no storage")

    def load_binpersid(self) -> None:
        """A storage; in files before zip archives also a module's class with its source, which torch would look up and compare."""
        name = self.stack.pop()
        if type(name) is tuple and name and name[0] == "module":
            self.append(Ignored)
            return
        if type(name) is not tuple or len(name) not in (5, 6) or name[0] != "storage" or type(name[4]) is not int:
            raise pickle.UnpicklingError("a storage has no sound name")
        dtype = getattr(name[1], "dtype", None) if name[1] is not torch.UntypedStorage else torch.uint8
        if not isinstance(dtype, torch.dtype) or type(name[2]) not in SCALARS or name[4] < 0:
            raise pickle.UnpicklingError("a storage is of an unknown kind")
        self.storages[name[2]] = max(self.storages.get(name[2], 0), name[4] * dtype.itemsize)
        if sum(self.storages.values()) > self.limit:
            raise pickle.UnpicklingError("tensors are larger than the file")
        self.append(self.persistent_load(name))

    for _key, _load in (
        (pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_newobj), (pickle.NEWOBJ_EX, load_newobj_ex), (pickle.OBJ, load_obj),
        (pickle.INST, load_inst), (pickle.BUILD, load_build), (pickle.EXT1, load_ext), (pickle.EXT2, load_ext), (pickle.EXT4, load_ext),
        (pickle.APPEND, load_append), (pickle.APPENDS, load_appends), (pickle.SETITEM, load_setitem), (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict), (pickle.ADDITEMS, load_additems), (pickle.FROZENSET, load_frozenset), (pickle.PERSID, load_persid),
        (pickle.BINPERSID, load_binpersid),
    ):
        dispatch[_key[0]] = _load


def forced_strict() -> bool:
    """Whether the environment tells torch to use none but its own safe unpickler."""
    return os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true")
