"""Functions of PTX as one C++ file.

A kernel becomes a function of its parameters' addresses, and `ptx_kernels` lists all of them by their PTX names. A
device function takes the addresses of its results and parameters. Shared variables have addresses as in PTX, numbers
that mean nothing to the host: (1 + number of the variable) << 20, and the offset in it.
"""

import re
from collections.abc import Iterable

from .instructions import translate
from .parser import Address, Function, Label, Module, Operand, PtxError, Register, Scope, Variable, parse

SHARED_BITS = 20
SPECIAL_REGISTERS = {
    **{f"%tid.{d}": f"emulation::thread().index.{d}" for d in "xyz"},
    **{f"%ctaid.{d}": f"emulation::thread().block->index.{d}" for d in "xyz"},
    **{f"%ntid.{d}": f"emulation::Machine::get().block().{d}" for d in "xyz"},
    **{f"%nctaid.{d}": f"emulation::Machine::get().grid().{d}" for d in "xyz"},
    "%laneid": "emulation::thread().lane()",
}
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")


def translate_module(text: str, name: str) -> str:
    """The C++ of a PTX file; `name` is for messages.

    Raises:
        PtxError: for what is not understood, with its line.
    """
    module = parse(text)
    variables = _shared_variables(module)
    addresses = {v.name: f"ptx::Bits({(i + 1) << SHARED_BITS})" for i, v in enumerate(variables)}
    names = {f.name for f in module.functions}
    lines = [f"// From {name}.", '#include "runtime.h"', "", "namespace {", ""]
    lines += ["constexpr ptx::SharedVariable kShared[] = {", *(f"    {{{v.size}, {v.align}}}," for v in variables)]
    lines += ["    {0, 0}};", ""]
    lines += [f"void {_identifier(f.name)}({_signature(f)});" for f in module.functions]
    for function in module.functions:
        lines += ["", *_Writer(function, name, addresses, names).lines()]
    lines += ["", "}  // namespace", "", "const ptx::Kernel ptx_kernels[] = {"]
    lines += [f'    {{"{f.name}", {_identifier(f.name)}}},' for f in module.functions if f.is_kernel]
    return "\n".join([*lines, "    {nullptr, nullptr}};", ""])


def _shared_variables(module: Module) -> list[Variable]:
    inside = [s for f in module.functions for s in f.body or () if isinstance(s, Variable) and s.space == "shared"]
    return module.shared + inside


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.lstrip("%"))


def _signature(function: Function) -> str:
    if function.is_kernel:
        return "const void* const* parameters"
    return ", ".join(f"void* {_identifier(v.name)}" for v in function.results + function.parameters)


class _Writer:
    """The C++ of one function; the `Context` of its instructions."""

    def __init__(self, function: Function, file: str, shared: dict[str, str], functions: set[str]):
        self._function = function
        self._file = file
        self._functions = functions
        self._registers: set[str] = set()
        self._addresses = dict(shared)
        for i, variable in enumerate(function.parameters if function.is_kernel else ()):
            self._addresses[variable.name] = f"ptx::address(parameters[{i}])"
        for variable in () if function.is_kernel else function.results + function.parameters:
            self._addresses[variable.name] = f"ptx::address({_identifier(variable.name)})"

    def lines(self) -> list[str]:
        declarations, statements = [], []
        for statement in self._function.body or ():
            if isinstance(statement, Register):
                declarations += self._declare(statement)
            elif isinstance(statement, Variable):
                statements += self._variable(statement)
            elif isinstance(statement, Label):
                statements.append(f"{self.label(statement.name)}:;")
            elif isinstance(statement, Scope):
                statements.append("{" if statement.opens else "}")
            else:
                statements.append(translate(statement, self))
        body = [f"  {line}" for line in [*dict.fromkeys(declarations), *statements]]
        return [f"void {_identifier(self._function.name)}({_signature(self._function)}) {{", *body, "}"]

    def _declare(self, register: Register) -> list[str]:
        names = [register.name] if register.count is None else [f"{register.name}{i}" for i in range(register.count)]
        self._registers.update(names)
        kind = "bool" if register.type == "pred" else f"uint{register.type.lstrip('bfus')}_t"
        return [f"[[maybe_unused]] {kind} {_identifier(name)} = 0;" for name in names]

    def _variable(self, variable: Variable) -> list[str]:
        if variable.space == "shared":
            return []
        name = _identifier(variable.name)
        self._addresses[variable.name] = f"ptx::address({name})"
        return [f"alignas({variable.align}) char {name}[{variable.size}];"]

    def value(self, operand: Operand) -> str:
        if not isinstance(operand, str):
            raise PtxError(f"{self._file}: got {operand}, expected a register or a number")
        if operand[0] == "!":
            return f"!{self.value(operand[1:])}"
        if operand in self._registers:
            return _identifier(operand)
        if operand in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[operand]
        if operand in self._addresses:
            return self._addresses[operand]
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            return f"ptx::Bits(0x{operand[2:]})"
        if _NUMBER.fullmatch(operand):
            return f"ptx::Bits({operand.rstrip('U')}ll)" if operand[0] == "-" else f"ptx::Bits({operand.rstrip('U')}u)"
        raise PtxError(f"{self._file}: unknown name {operand}")

    def target(self, operand: Operand) -> str:
        if operand not in self._registers:
            raise PtxError(f"{self._file}: got {operand}, expected a register")
        return _identifier(str(operand))

    def place(self, operand: Operand, is_shared: bool) -> str:
        if not isinstance(operand, Address):
            raise PtxError(f"{self._file}: got {operand}, expected an address")
        at = f"{self.value(operand.base)} + ptx::Bits({operand.offset}ll)"
        return f"ptx::shared_to_host(kShared, {at})" if is_shared else at

    def shared(self, operand: Operand, to_shared: bool) -> str:
        return f"ptx::{'host_to_shared' if to_shared else 'shared_to_host'}(kShared, {self.value(operand)})"

    def label(self, operand: Operand) -> str:
        return f"label_{_identifier(str(operand))}"

    def call(self, name: Operand, arguments: Iterable[Operand]) -> str:
        if name not in self._functions:
            raise PtxError(f"{self._file}: a call of {name}, which is not defined there")
        return f"{_identifier(str(name))}({', '.join(_identifier(str(a)) for a in arguments)});"

    def site(self, line: int) -> str:
        return f'emulation::Site("{self._file}", {line})'
