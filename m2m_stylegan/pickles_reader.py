"""A small pickle machine: it knows the instructions that network pickles consist of, and nothing else exists in it.

Python's own unpickler is not used. It allocates what a file merely claims (a memo index of 2^31 costs it 32 GiB), sets
attributes on whatever stands on its stack, and would need a second parser in front of it that might disagree with it.
Every name in a pickle is looked up in a table of our own functions (pickles_globals.py). Format: Lib/pickletools.py.
"""

import io
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from m2m_stylegan.errors import UserError
from m2m_stylegan.pickles_tree import MAPPINGS, MAX_INT_BYTES, is_key

MAX_NAME_BYTES = 200            # of one line of a GLOBAL instruction
MAX_WIDE_TEXT_BYTES = 2**24     # Python stores text beyond Latin-1 in up to 4 bytes per character; sources are under 1 MB.
_BEYOND_LATIN1 = re.compile(rb'[\xc4-\xff]')


@dataclass
class Budget:
    """What one file may still cost, whichever way it is nested: instructions executed, and bytes made by copying."""

    steps: int
    copied_bytes: int

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise UserError('it consists of too many objects (see max_objects)')

    def copy(self, count: int) -> None:
        self.copied_bytes -= count
        if self.copied_bytes < 0:
            raise UserError('its contents would take much more memory than the file has bytes; no official file does that')


@dataclass
class Global:
    """A name that pickles may use: `reduce(args, budget)` replaces calling it, `new()` making an instance of it."""

    name: str
    reduce: Callable[[tuple, Budget], object] | None = None
    new: Callable[[], object] | None = None


class Buildable:
    """Base of stand-ins that get their contents afterwards, by a BUILD instruction."""

    built: object = None        # what later instructions see in place of the stand-in

    def build(self, state: object, budget: Budget) -> object:
        raise NotImplementedError


class Stream:
    """`size` bytes of an open file; a length found in the file is compared with what is left before anything is allocated."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.left = file, size, size

    def peek(self, count: int) -> bytes:
        data = self.file.read(count)
        self.file.seek(-len(data), io.SEEK_CUR)
        return data

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.left else b''
        if len(data) != count:
            raise UserError(f'it is truncated or damaged: {count} more bytes are expected, there are {self.left}')
        self.left -= count
        return data

    def number(self, code: str) -> int | float:
        """The next number, by its `struct` code."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def line(self) -> bytes:
        line = self.file.readline(min(MAX_NAME_BYTES, self.left))
        if not line.endswith(b'\n'):
            raise UserError('it is truncated or damaged: a name is not terminated')
        self.left -= len(line)
        return line[:-1]


class Machine:
    """Reads one pickle from `stream`: `run()` returns the object that it describes, not yet checked as a whole.

    `names` maps (module, name) to what it stands for; `persistent` turns a persistent id into an object, None refuses them.
    Raises UserError for anything unexpected.
    """

    def __init__(self, stream: Stream, budget: Budget, names: Mapping[tuple[str, str], Global],
                 persistent: Callable[[object], object] | None = None):
        self.stream, self.budget, self.names, self.persistent = stream, budget, names, persistent
        self.stack: list = []
        self.outer_stacks: list[list] = []      # those below each MARK
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        marker, protocol = self.stream.take(2)
        if marker != pickle.PROTO[0] or not 2 <= protocol <= 5:
            raise UserError('it is not a pickle of protocol 2 to 5')
        while (code := self.stream.take(1)) != pickle.STOP:
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise UserError(f'instruction {_opcode_name(code)} is not used by network pickles; nothing was executed')
            self.budget.step()
            instruction(self)
        if len(self.stack) != 1 or self.outer_stacks:
            raise UserError('it is damaged: it ends with more or less than one object')
        return self.pop()

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        return self.pop_many(1)[0]

    def top(self) -> object:
        if not self.stack:
            raise UserError('it is damaged: an instruction finds no object to work on')
        return self.stack[-1]

    def pop_many(self, count: int) -> list:
        if len(self.stack) < count:
            raise UserError('it is damaged: an instruction finds too few objects to work on')
        values = self.stack[len(self.stack) - count:]
        del self.stack[len(self.stack) - count:]
        return values

    def mark(self) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list:
        if not self.outer_stacks:
            raise UserError('it is damaged: a group of objects has no beginning')
        values, self.stack = self.stack, self.outer_stacks.pop()
        return values

    def long(self) -> None:
        count = self.stream.number('<B')
        if count > MAX_INT_BYTES:
            raise UserError(f'it contains an integer of {count} bytes, expected at most {MAX_INT_BYTES}')
        self.push(int.from_bytes(self.stream.take(count), 'little', signed=True))

    def text(self, length_code: str) -> None:
        raw = self.stream.take(self.stream.number(length_code))
        if len(raw) > MAX_WIDE_TEXT_BYTES and _BEYOND_LATIN1.search(raw):
            raise UserError(f'it contains a text of {len(raw)} bytes')
        try:
            text = raw.decode('utf-8', 'surrogatepass')
        except UnicodeDecodeError as err:
            raise UserError('it is damaged: a text is not UTF-8') from err
        self.budget.copy(text.__sizeof__())
        self.push(text)

    def frame(self) -> None:
        # Frames only group bytes for faster reading. Their length is not needed, but a wrong one is a sign of damage.
        if (count := self.stream.number('<Q')) > self.stream.left:
            raise UserError(f'it is truncated or damaged: a frame of {count} bytes is announced, there are {self.stream.left}')

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise UserError('it is damaged: it refers to an object that was not stored')
        value = self.memo[index]
        self.push(value if not isinstance(value, Buildable) or value.built is None else value.built)

    def append_items(self, values: list) -> None:
        if type(self.top()) is not list:
            raise UserError(f'it appends items to a {type(self.top()).__name__}')
        self.top().extend(values)

    def set_items(self, values: list) -> None:
        target = self.top()
        if type(target) not in MAPPINGS or len(values) % 2:
            raise UserError(f'it sets {len(values)} keys and values on a {type(target).__name__}')
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def add_items(self, values: list) -> None:
        if type(self.top()) is not set:
            raise UserError(f'it adds elements to a {type(self.top()).__name__}')
        self.top().update(map(_key, values))

    def find(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise UserError('it is damaged: a name is not a text')
        if (module, name) not in self.names:
            raise UserError(f'it uses {f"{module}.{name}"[:2 * MAX_NAME_BYTES]!a}, which is not on the list of names that '
                            'network pickles may use; nothing was executed')
        self.push(self.names[module, name])

    def find_line(self) -> None:
        module, name = self.stream.line(), self.stream.line()
        self.find(module.decode('utf-8', 'replace'), name.decode('utf-8', 'replace'))

    def reduce(self) -> None:
        function, args = self.pop_many(2)
        if type(function) is not Global or function.reduce is None or type(args) is not tuple:
            raise UserError(f'it calls {_describe(function)} with a {type(args).__name__}')
        self.push(function.reduce(args, self.budget))

    def new(self) -> None:
        cls, args = self.pop_many(2)
        if type(cls) is not Global or cls.new is None or type(args) is not tuple or args:
            raise UserError(f'it makes an instance of {_describe(cls)} in a way that network pickles do not')
        self.push(cls.new())

    def build(self) -> None:
        target, state = self.pop_many(2)
        if not isinstance(target, Buildable):
            raise UserError(f'it sets the inner state of a {type(target).__name__}')
        target.built = target.build(state, self.budget)
        self.push(target.built)

    def load_persistent(self) -> None:
        if self.persistent is None:
            raise UserError('it refers to objects outside itself (a persistent id), as a torch.save checkpoint does')
        self.push(self.persistent(self.pop()))


def _key(key: object) -> object:
    if not is_key(key):
        raise UserError(f'a dict key or set element is a {type(key).__name__}, expected a str or an int of 64 bits')
    return key


def _describe(value: object) -> str:
    return value.name if type(value) is Global else f'a {type(value).__name__}'


def _opcode_name(code: bytes) -> str:
    known = pickletools.code2op.get(code.decode('latin1'))
    return known.name if known else f'0x{code.hex()}'


_INSTRUCTIONS: dict[bytes, Callable[[Machine], object]] = {
    pickle.FRAME: Machine.frame,
    pickle.MARK: Machine.mark,
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.stream.number('<i')),
    pickle.BININT1: lambda m: m.push(m.stream.number('<B')),
    pickle.BININT2: lambda m: m.push(m.stream.number('<H')),
    pickle.LONG1: Machine.long,
    pickle.BINFLOAT: lambda m: m.push(m.stream.number('>d')),
    pickle.SHORT_BINUNICODE: lambda m: m.text('<B'),
    pickle.BINUNICODE: lambda m: m.text('<I'),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.stream.take(m.stream.number('<B'))),
    pickle.BINBYTES: lambda m: m.push(m.stream.take(m.stream.number('<I'))),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: lambda m: m.push(tuple(m.pop_many(1))),
    pickle.TUPLE2: lambda m: m.push(tuple(m.pop_many(2))),
    pickle.TUPLE3: lambda m: m.push(tuple(m.pop_many(3))),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_to_mark())),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.APPEND: lambda m: m.append_items(m.pop_many(1)),
    pickle.APPENDS: lambda m: m.append_items(m.pop_to_mark()),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.SETITEM: lambda m: m.set_items(m.pop_many(2)),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_to_mark()),
    pickle.EMPTY_SET: lambda m: m.push(set()),
    pickle.ADDITEMS: lambda m: m.add_items(m.pop_to_mark()),
    pickle.BINPUT: lambda m: m.memo.__setitem__(m.stream.number('<B'), m.top()),
    pickle.LONG_BINPUT: lambda m: m.memo.__setitem__(m.stream.number('<I'), m.top()),
    pickle.MEMOIZE: lambda m: m.memo.__setitem__(len(m.memo), m.top()),
    pickle.BINGET: lambda m: m.get(m.stream.number('<B')),
    pickle.LONG_BINGET: lambda m: m.get(m.stream.number('<I')),
    pickle.GLOBAL: Machine.find_line,
    pickle.STACK_GLOBAL: lambda m: m.find(*m.pop_many(2)),
    pickle.REDUCE: Machine.reduce,
    pickle.NEWOBJ: Machine.new,
    pickle.BUILD: Machine.build,
    pickle.BINPERSID: Machine.load_persistent,
}
