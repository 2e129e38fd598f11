"""The text of PTX as functions of instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# lines that end where the line ends, and what follows the code: places in source files
_DEBUG_LINE = re.compile(r"(?m)^\s*\.(?:loc|file)\b[^\n]*$")
_DEBUG_SECTIONS = re.compile(r"(?m)^\s*\.section\b(?:.|\n)*\Z")
_TOKEN = re.compile(
    r"""
    (?P<string>"[^"]*")
  | (?P<number>0[fF][0-9a-fA-F]{8}\b | 0[dD][0-9a-fA-F]{16}\b | 0[xX][0-9a-fA-F]+U? | \d+(?:\.\d+)?U?)
  | (?P<word>[%$._A-Za-z][\w$.]*(?:::[\w$.]+)*)
  | (?P<mark>[{}()\[\],;:@!|+\-<>=])
    """,
    re.VERBOSE,
)

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


class PtxError(ValueError):
    """PTX that the parser or the translator does not know."""


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: str
    offset: int


@dataclass(frozen=True)
class Pair:
    """`first|second`: two results."""

    first: str
    second: str


# a name, a number as it stands, `!predicate`, an address, a vector or argument list, two results
Operand = str | Address | tuple | Pair


@dataclass(frozen=True)
class Variable:
    """A variable, or a parameter, in one of the memory spaces; `size` in bytes, 0 if the launch gives it."""

    space: str
    name: str
    size: int
    align: int


@dataclass(frozen=True)
class Register:
    type: str
    name: str
    count: int | None  # of name0, name1, ...; None: just name


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Scope:
    """The begin or the end of a block of statements with names of its own."""

    opens: bool


@dataclass(frozen=True)
class Instruction:
    line: int
    predicate: str | None  # name, or !name
    opcode: str
    operands: tuple[Operand, ...]

    def __str__(self) -> str:
        return f"line {self.line}: {self.opcode} {', '.join(map(str, self.operands))}"


Statement = Variable | Register | Label | Scope | Instruction


@dataclass
class Function:
    name: str
    is_kernel: bool
    results: list[Variable]
    parameters: list[Variable]
    body: list[Statement] | None = None  # None: declared only


@dataclass
class Module:
    functions: list[Function] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)


class _Tokens:
    def __init__(self, text: str):
        text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
        text = _DEBUG_SECTIONS.sub("", _DEBUG_LINE.sub("", text))
        self._tokens = list(self._split(text))
        self._next = 0

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, int]]:
        at, line = 0, 1
        while at < len(text):
            if text[at].isspace():
                line += text[at] == "\n"
                at += 1
                continue
            match = _TOKEN.match(text, at)
            if match is None:
                raise PtxError(f"line {line}: unknown character {text[at]!r}")
            yield match[0], line
            at = match.end()

    def __bool__(self) -> bool:
        return self._next < len(self._tokens)

    @property
    def line(self) -> int:
        return self._tokens[min(self._next, len(self._tokens) - 1)][1]

    def peek(self) -> str:
        return self._tokens[self._next][0] if self else ""

    def take(self) -> str:
        token = self.peek()
        self._next += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self._next += 1
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise PtxError(f"line {self.line}: got {self.peek()!r}, expected {token!r}")


def type_size(name: str) -> int:
    """Bytes of a type such as `u32`."""
    digits = re.fullmatch(r"(?:bf|[busf])(8|16|32|64)", name)
    if digits is None:
        raise PtxError(f"unknown type .{name}")
    return SIZES[digits[1]]


def integer(token: str) -> int:
    return int(token.rstrip("U"), 0)


def parse(text: str) -> Module:
    """Parses PTX.

    Raises:
        PtxError: with the line, for what is not known.
    """
    tokens = _Tokens(text)
    module = Module()
    while tokens:
        word = tokens.take()
        if word in (".version", ".address_size"):
            tokens.take()
        elif word == ".target":
            tokens.take()
            while tokens.accept(","):
                tokens.take()
        elif word in (".visible", ".extern", ".weak", ".common"):
            continue
        elif word in (".shared", ".global", ".const"):
            variable = _variable(word, tokens)
            while not tokens.accept(";"):  # its value
                tokens.take()
            if word == ".shared":
                module.shared.append(variable)
        elif word in (".entry", ".func"):
            function = _function(word == ".entry", tokens)
            if function.body is not None:
                module.functions.append(function)
        else:
            raise PtxError(f"line {tokens.line}: unknown directive {word!r}")
    return module


def _variable(space: str, tokens: _Tokens) -> Variable:
    """After the space: `.align 8 .b8 name[24]`; also `.param .u64 .ptr .global .align 1 name`."""
    align, size = None, None
    while tokens.peek().startswith("."):
        word = tokens.take()
        if word == ".align":
            align = integer(tokens.take())
        elif word not in (".ptr", ".global", ".shared"):
            size = type_size(word[1:])
    name = tokens.take()
    if size is None:
        raise PtxError(f"line {tokens.line}: variable {name} has no type")
    align = align or size
    if tokens.accept("["):
        size = 0 if tokens.peek() == "]" else size * integer(tokens.take())
        tokens.expect("]")
    return Variable(space[1:], name, size, align)


def _parameters(tokens: _Tokens) -> list[Variable]:
    result = []
    if tokens.accept("("):
        while not tokens.accept(")"):
            tokens.expect(".param")
            result.append(_variable(".param", tokens))
            tokens.accept(",")
    return result


def _function(is_kernel: bool, tokens: _Tokens) -> Function:
    results = [] if is_kernel else _parameters(tokens)
    function = Function(tokens.take(), is_kernel, results, _parameters(tokens))
    while not tokens.accept("{"):
        if tokens.accept(";"):
            return function
        tokens.take()  # .maxntid and the like: for ptxas
    function.body = list(_statements(tokens))
    return function


def _statements(tokens: _Tokens) -> Iterator[Statement]:
    depth = 0
    while True:
        line, word = tokens.line, tokens.take()
        if word == "{":
            depth += 1
            yield Scope(True)
        elif word == "}":
            if depth == 0:
                return
            depth -= 1
            yield Scope(False)
        elif word == ".pragma":
            tokens.take()
            tokens.expect(";")
        elif word == ".reg":
            yield from _registers(tokens)
        elif word in (".local", ".shared", ".param"):
            yield _variable(word, tokens)
            tokens.expect(";")
        elif word == ";":
            continue
        elif tokens.accept(":"):
            yield Label(word)
        else:
            yield _instruction(line, word, tokens)


def _registers(tokens: _Tokens) -> Iterator[Register]:
    kind = tokens.take()[1:]
    while True:
        name, count = tokens.take(), None
        if tokens.accept("<"):
            count = integer(tokens.take())
            tokens.expect(">")
        yield Register(kind, name, count)
        if tokens.accept(";"):
            return
        tokens.expect(",")


def _instruction(line: int, word: str, tokens: _Tokens) -> Instruction:
    predicate = None
    if word == "@":
        negated = tokens.accept("!")
        predicate = ("!" if negated else "") + tokens.take()
        word = tokens.take()
    operands = []
    while not tokens.accept(";"):
        operands.append(_operand(tokens))
        tokens.accept(",")
    return Instruction(line, predicate, word, tuple(operands))


def _operand(tokens: _Tokens) -> Operand:
    token = tokens.take()
    if token in ("{", "("):
        end = {"{": "}", "(": ")"}[token]
        items = []
        while not tokens.accept(end):
            items.append(_operand(tokens))
            tokens.accept(",")
        return tuple(items)
    if token == "[":
        base, offset = tokens.take(), 0
        if tokens.accept("+"):
            sign = -1 if tokens.accept("-") else 1
            offset = sign * integer(tokens.take())
        tokens.expect("]")
        return Address(base, offset)
    if token in ("!", "-"):
        return token + tokens.take()
    if tokens.accept("|"):
        return Pair(token, tokens.take())
    return token
