"""What kernel_faults.py says of kernels whose code is wrong, and reads in the compilers' words."""

from __future__ import annotations

import kernel_faults
import pytest
from machine_code import Instruction, Kernel


def kernel(name: str, *code: str, stack: int = 0) -> Kernel:
    instructions = [Instruction(16 * i, *line.partition(" ")[::2]) for i, line in enumerate(code)]
    return Kernel(name, registers=64, stack=stack, code=instructions)


ROWS = ("HMMA.16816.F32 R0", "LDGSTS.E.BYPASS.128 [R1]")


@pytest.mark.parametrize(
    ("code", "stack"),
    [(ROWS, 8), ((*ROWS, "STL [R1], R2"), 0), ((*ROWS, "LDL.LU.64 R2, [R1]"), 0)],
)
@pytest.mark.parametrize("name", ["linear_rows_kernel<ChunkFragments<10>>", "linear_tile_kernel<19>"])
def test_a_fast_kernel_that_spills_is_a_fault(name, code, stack):
    rows = kernel("linear_rows_kernel<ChunkFragments<11>>", *ROWS)
    assert kernel_faults.faults([rows, kernel(name, *ROWS)]) == []
    (fault,) = kernel_faults.faults([rows, kernel(name, *code, stack=stack)])
    assert fault == f"{name}: it has a stack: registers are spilled"


@pytest.mark.parametrize("name", kernel_faults.FAST)
def test_every_fast_kernel_is_asked(name):
    faults = kernel_faults.faults([kernel(f"{name}_kernel<1>", stack=16)])
    assert f"{name}_kernel<1>: it has a stack: registers are spilled" in faults


def test_a_kernel_that_begins_early_waits_before_it_touches_memory():
    rows = kernel("linear_rows_kernel<ChunkFragments<11>>", "MOV R1, R2", "ACQBULK", "PREEXIT", *ROWS)
    assert kernel_faults.faults([rows]) == []
    arrange = kernel("arrange_kernel", "LDG.E.128.STRONG.GPU R4, [R2]", "STG.E [R2], R4")
    assert kernel_faults.faults([rows, arrange]) == ["arrange_kernel: it doesn't wait for the kernel ahead"]
    arrange.code.insert(1, Instruction(8, "ACQBULK", ""))
    assert kernel_faults.faults([rows, arrange]) == [
        "arrange_kernel: it touches global memory before it waits for the kernel ahead"
    ]
    constant = kernel("rows_sums_kernel", "ACQBULK", "LDG.E.128.CONSTANT R4, [R2]")
    assert kernel_faults.faults([rows, constant]) == [
        "rows_sums_kernel: it reads what an earlier kernel writes as what nobody does"
    ]


def test_the_stack_that_is_known_is_of_one_body_of_a_kernel():
    body = kernel("linear_tile_kernel<5>", *ROWS, stack=64)
    assert kernel_faults.spills(body)
    body.code += kernel("", "USETMAXREG 112").code
    assert not kernel_faults.spills(body)


def test_loops_that_load_from_a_stack_are_counted():
    code = ("USETMAXREG 112", "HMMA.16816.F32 R0", "LDL R2, [R1]", "BRA 0x10", "UBLKCP R4")
    may = kernel("linear_tile_kernel<6>", *code, stack=8)
    assert not kernel_faults.waits_for_stack(may)
    may_not = kernel("linear_tile_kernel<13>", *code, stack=8)
    assert kernel_faults.waits_for_stack(may_not)
    assert f"{may_not.name}: more of its loops load from a stack" in kernel_faults.faults([may_not])


def test_a_search_that_encodes_may_have_a_stack():
    faults = kernel_faults.faults([kernel("encode_each_block<16, Q3K>", stack=1232)])
    assert faults == ["there is no kernel for few rows"]


def test_bytes_of_the_stack():
    code = kernel(
        "k", "STL [R1], R2", "STL.64 [R1], R2", "LDL.LU.128 R4, [R1]", "LDL.U8 R4, [R1]", "LDS.128 R4"
    )
    assert code.bytes_of("STL") == 12
    assert code.bytes_of("LDL") == 17


def test_complaints_about_wgmma_are_found():
    said = """[1/2] Building CUDA object linear.o
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : Used 232 registers, used 1 barriers
ptxas info    : (C7517) warpgroup.wait is injected in around line 116 by compiler in function 'bad'
[2/2] Linking"""
    assert [line[:7] for line in kernel_faults.complaints(said)] == ["(C7508)", "(C7517)"]
    assert kernel_faults.complaints("ptxas info    : Used 90 registers, used 0 barriers") == []
