"""A pickle read as data: dicts, lists, texts, numbers, and descriptions of tensors. Nothing in it is ever called.

A pickle is a program for a small stack machine (`pickletools` describes every instruction). Where it names a class
or a function, an `Opaque` stands for what that would make, so that weights come out of a trainer's checkpoint
whatever lies beside them. What a name outside of HARMLESS stands for is for the caller to refuse.
"""

import pickletools
import re
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import torch

MOST_INSTRUCTIONS = 2_000_000  # a state_dict has some 40 for a tensor; 2,000,000 take seconds and 300 MB

# Instructions that push the value beside them.
VALUES = re.compile(
    r"(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT|(SHORT_)?(BIN)?(STRING|BYTES8?|UNICODE8?)|BYTEARRAY8"
)

# What trainers put beside weights: plain values, whose names may stand in a file without being suspicious.
HARMLESS = re.compile(
    r"(builtins|__builtin__)\.(set|frozenset|bytearray|bytes|complex|slice|range|int|long|float|bool|str|list|tuple|dict|object)"
    r"|collections\.(OrderedDict|defaultdict|Counter|deque)"
    r"|_codecs\.encode|copy_?reg\._reconstructor|typing\.Any"
    r"|numpy\.(ndarray|dtype|(bool|float|int|uint|complex|str|bytes|datetime)\w*|dtypes\.\w+DType)"
    r"|numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    r"|numpy\.random\.(_pickle\.__\w+_ctor|_\w+\.(MT19937|PCG64|PCG64DXSM|Philox|SFC64)"
    r"|mtrand\.RandomState|_generator\.Generator|bit_generator\.(__pyx_unpickle_)?SeedSequence)"
    r"|argparse\.Namespace|types\.SimpleNamespace|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|datetime\.(datetime|date|time|timedelta|timezone)"
    r"|omegaconf\.(dictconfig\.DictConfig|listconfig\.ListConfig|base\.(Container)?Metadata|nodes\.\w+Node)"
    r"|(pytorch_lightning|lightning(\.pytorch)?)\.utilities\.parsing\.AttributeDict"
    r"|(lightning_fabric|lightning\.fabric)\.utilities\.data\.AttributeDict"
    r"|easydict\.EasyDict|addict\.addict\.Dict|ml_collections\.config_dict\.config_dict\.ConfigDict"
    r"|mmengine\.(config\.config\.ConfigDict|logging\.history_buffer\.HistoryBuffer)|yacs\.config\.CfgNode"
    r"|diffusers\.configuration_utils\.FrozenDict|decimal\.Decimal|uuid\.UUID|torch\.torch_version\.TorchVersion"
    r"|torch\.(Size|device|Tensor|layout|Generator|nn\.parameter\.(Parameter|Buffer)|(serialization|_C)\._get_layout)"
    r"|torch\.(cuda\.)?\w+Storage|torch\.storage\.(Un)?[tT]ypedStorage|torch\.storage\._LegacyStorage"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.(q?u?int\d+(x\d+)?|b?float\d\w*|complex\d+|bool|half|double|long|bits\w+)"
)
DICTS = re.compile(r"collections\.(OrderedDict|defaultdict)|(builtins|__builtin__)\.dict")
STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
}


class Broken(Exception):
    """Not a pickle, or one that no torch.save writes."""


class Opaque(NamedTuple):
    """What the class or function `name` would make."""

    name: str


class Name(NamedTuple):
    """A class or function that is named and not called yet."""

    text: str


class Storage(NamedTuple):
    """Numbers that lie elsewhere in the file, under `key`."""

    key: str
    dtype: torch.dtype | None  # None: a kind that no weights are of
    numel: int
    location: str
    start: int = 0  # its first element in the storage `key`, of which it is a part


class Described(NamedTuple):
    """A tensor: where its elements lie in a storage; `odd` says why it is not a plain one."""

    storage: Storage | None
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements
    odd: str = ""


class Unpickled(NamedTuple):
    """What a pickle holds, names in it that are not harmless, and the storages that it refers to, by their keys."""

    content: Any
    foreign: tuple[str, ...]
    storages: dict[str, Storage]


def unpickle(stream: BinaryIO) -> Unpickled:
    """Read one pickle from where the stream stands. Raises Broken."""
    machine = _Machine()
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MOST_INSTRUCTIONS:
                raise Broken(f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions")
            if instruction.name == "STOP":
                return Unpickled(machine.stack.pop(), tuple(machine.foreign), machine.storages)
            if instruction.name not in INSTRUCTIONS:
                raise Broken(
                    f"its pickle has the instruction {instruction.name}, which torch.save does not write"
                )
            INSTRUCTIONS[instruction.name](machine, argument)
    except Broken as error:
        raise Broken(*error.args, *list(machine.foreign)[:1]) from error
    except Exception as error:  # nothing but the file's own bytes is at work here
        raise Broken("its pickle is damaged", *list(machine.foreign)[:1]) from error
    raise Broken("its pickle has no end", *list(machine.foreign)[:1])


class _Machine:
    """The stack machine; one method for every kind of instruction, which takes what stands beside it in the file."""

    def __init__(self):
        self.stack: list = []
        self.below: list[list] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        self.foreign: dict[str, None] = {}  # in their order
        self.storages: dict[str, Storage] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, count: int) -> list:
        if len(self.stack) < count:
            raise Broken("its pickle is damaged")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop(self, _) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def put(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def fill(self, items: list) -> None:
        """Append to the list, or set in the dict, that is now on top."""
        target = self.stack[-1]
        if isinstance(target, list):
            target += items
        elif isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key if type(key) in (str, int) else Opaque("a key that is no text")] = value

    def refer(self, pid: tuple) -> None:
        storage = _stored(pid)
        self.storages[storage.key] = storage
        self.push(storage)

    def dict_of(self, items: list) -> None:
        self.push({})
        self.fill(items)

    def name(self, module: str, name: str) -> None:
        text = f"{module}.{name}"
        if not HARMLESS.fullmatch(text):
            self.foreign[text] = None
        self.push(Name(text))

    def make(self, arguments: Sequence) -> None:
        """In place of the class or function that is on top: what it would make of these."""
        made = _made(self.stack.pop(), arguments)
        self.push(made)
        if (
            isinstance(made, dict) and arguments and isinstance(arguments[-1], list)
        ):  # OrderedDict([(key, value), …])
            self.fill([part for pair in arguments[-1] for part in pair])


def _made(maker: Any, arguments: Sequence) -> Any:
    text = maker.text if isinstance(maker, Name) else type(maker).__name__
    if text in MAKERS:
        return MAKERS[text](*arguments)
    if DICTS.fullmatch(text):
        return {}
    if text.endswith("._reconstructor") and isinstance(arguments[0], Name):
        return Opaque(arguments[0].text)
    if text.startswith("torch._utils._rebuild_"):
        kind = text.removeprefix("torch._utils._rebuild_").removesuffix("_tensor").replace("_", " ")
        return Described(
            None, None, (), (), 0, ODD.get(text.rpartition("._rebuild_")[2], f"a tensor of kind {kind}")
        )
    return Opaque(text)


def _stored(pid: tuple) -> Storage:
    """pid   ("storage", class, key, location, number of elements), and in old files (key, start, length) of a part"""
    if pid[0] != "storage":
        raise Broken(f"its pickle refers to a {type(pid[0]).__name__} that is no storage")
    kind = pid[1].text.rpartition(".")[2].removesuffix("Storage") if isinstance(pid[1], Name) else ""
    part = pid[5] if len(pid) > 5 else None
    start, numel = part[1:3] if part else (0, pid[4])
    return Storage(str(pid[2]), STORAGES.get(kind), numel, str(pid[3]), start)


def _tensor(storage: Any, offset: int, shape: tuple, stride: tuple, *_) -> Described:
    if not isinstance(storage, Storage):
        return Described(None, None, (), (), 0, "a tensor without a storage")
    return Described(storage, storage.dtype, tuple(shape), tuple(stride), offset)


def _tensor_of_dtype(
    storage: Any, offset: int, shape: tuple, stride: tuple, _, hooks, dtype: Name, *more
) -> Described:
    """Of dtypes that came after 2022 the storage is untyped."""
    found = getattr(torch, dtype.text.removeprefix("torch."), None)
    return _tensor(storage, offset, shape, stride)._replace(
        dtype=found if isinstance(found, torch.dtype) else None
    )


def _first(value: Any, *_) -> Any:
    return value


MAKERS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda maker, kind, arguments, *_: _made(maker, arguments),
    "torch.Size": _first,
}
ODD = {
    "meta_tensor_no_storage": "a meta tensor, which has no values",
    "sparse_tensor": "a sparse tensor",
    "nested_tensor": "a nested tensor",
    "qtensor": "a quantised tensor",
    "wrapper_subclass": "a tensor that another package packs",
}


def _instructions() -> dict[str, Callable[[_Machine, Any], None]]:
    table: dict[str, Callable[[_Machine, Any], None]] = {
        "PROTO": lambda m, _: None,
        "FRAME": lambda m, _: None,
        "MARK": _Machine.mark,
        "DUP": lambda m, _: m.push(m.stack[-1]),
        "POP": _Machine.pop,
        "POP_MARK": lambda m, _: m.since_mark(),
        "NONE": lambda m, _: m.push(None),
        "NEWTRUE": lambda m, _: m.push(True),
        "NEWFALSE": lambda m, _: m.push(False),
        "EMPTY_TUPLE": lambda m, _: m.push(()),
        "EMPTY_LIST": lambda m, _: m.push([]),
        "EMPTY_SET": lambda m, _: m.push([]),
        "EMPTY_DICT": lambda m, _: m.push({}),
        "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
        "FROZENSET": lambda m, _: m.push(tuple(m.since_mark())),
        "LIST": lambda m, _: m.push(m.since_mark()),
        "DICT": lambda m, _: m.dict_of(m.since_mark()),
        "TUPLE1": lambda m, _: m.push(tuple(m.last(1))),
        "TUPLE2": lambda m, _: m.push(tuple(m.last(2))),
        "TUPLE3": lambda m, _: m.push(tuple(m.last(3))),
        "APPEND": lambda m, _: m.fill(m.last(1)),
        "APPENDS": lambda m, _: m.fill(m.since_mark()),
        "ADDITEMS": lambda m, _: m.fill(m.since_mark()),
        "SETITEM": lambda m, _: m.fill(m.last(2)),
        "SETITEMS": lambda m, _: m.fill(m.since_mark()),
        "GLOBAL": lambda m, argument: m.name(*argument.split(" ", 1)),
        "STACK_GLOBAL": lambda m, _: m.name(*map(str, m.last(2))),
        "REDUCE": lambda m, _: m.make(m.stack.pop()),
        "NEWOBJ": lambda m, _: m.make(m.stack.pop()),
        "NEWOBJ_EX": lambda m, _: m.make(m.last(2)[0]),
        "BUILD": lambda m, _: m.last(1),  # attributes of something that is not made
        "BINPERSID": lambda m, _: m.refer(m.stack.pop()),
    }
    for one in pickletools.opcodes:
        if one.name == "MEMOIZE" or one.name.endswith("PUT"):
            table[one.name] = _Machine.put
        elif one.name.endswith("GET"):
            table[one.name] = lambda m, place: m.push(m.memo[place])
        elif VALUES.fullmatch(one.name):
            table[one.name] = _Machine.push
    return table


INSTRUCTIONS = _instructions()
