"""What is read in the compilers' words."""

from __future__ import annotations

import machine_code


def test_complaints_about_wgmma_are_found():
    said = """[1/2] Building CUDA object linear.o
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry.
ptxas info    : Used 232 registers, used 1 barriers
ptxas info    : (C7517) warpgroup.wait is injected in around line 116 by compiler in function 'bad'
[2/2] Linking"""
    assert [line[:7] for line in machine_code.complaints(said)] == ["(C7508)", "(C7517)"]
    assert machine_code.complaints("ptxas info    : Used 90 registers, used 0 barriers") == []
