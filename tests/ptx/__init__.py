"""PTX, the code that compilers hand to ptxas, run on the CPU: parsed, translated to C++ and compiled.

parser.py        text -> functions of instructions
instructions.py  which instructions there are, and the C++ of each
translator.py    functions -> one C++ file
runtime.h        what each instruction does, on the fibers of csrc/tests/emulation
library.py       C++ file -> shared library, its kernels to be launched from Python
"""
