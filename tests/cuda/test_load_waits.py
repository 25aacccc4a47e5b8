"""load_waits.py: loads that a loop waits for soon."""

from __future__ import annotations

import load_waits
from machine_code import Instruction

NONE = 0x7E0  # no counter, no wait


def instruction(n: int, text: str, control: int = NONE, guard: str = "") -> Instruction:
    code, _, operands = text.partition(" ")
    return Instruction(16 * n, code, operands, guard, control)


def load(n: int, text: str, counter: int) -> Instruction:
    return instruction(n, text, 0x700 | counter << 5)


def waiting(n: int, text: str, counter: int) -> Instruction:
    return instruction(n, text, NONE | 1 << 11 + counter)


def test_control_is_read():
    assert load(0, "LDG.E R4, [R2]", 5).counter == 5
    assert instruction(0, "IADD3 R4").counter is None
    assert waiting(0, "FMUL R4, R4", 5).waits_for(5)
    assert not waiting(0, "FMUL R4, R4", 5).waits_for(4)


def test_a_load_is_followed_to_who_waits_for_it():
    loop = [
        load(0, "LDG.E R4, [R2]", 5),
        load(1, "LDL R5, [R1]", 3),
        instruction(2, "IADD3 R6"),
        waiting(3, "FMUL R4, R4", 5),
        instruction(4, "BRA 0x0", guard="P0"),
    ]
    (found,) = load_waits.soon_awaited(loop, 3)
    assert (found[0].code, found[1], found[2].code) == ("LDG.E", 3, "FMUL")
    assert load_waits.soon_awaited(loop, 2) == []


def test_the_way_goes_round_the_loop_and_along_the_shorter_branch():
    loop = [
        waiting(0, "FMUL R4, R4", 5),
        instruction(1, "BRA 0x60", guard="P1"),
        *(instruction(n, "IADD3 R6") for n in (2, 3, 4, 5)),
        load(6, "LDG.E R4, [R2]", 5),
        instruction(7, "BRA.DIV UR4, 0x40"),  # lanes part elsewhere
        instruction(8, "BRA 0x0", guard="P0"),
        instruction(9, "EXIT"),
    ]
    assert load_waits.distance(loop, 6) == (3, loop[0])
    assert load_waits.distance([*loop[:6], loop[6], loop[9]], 6) is None


def test_a_loop_that_nobody_waits_in_has_none():
    assert load_waits.soon_awaited([load(0, "LDG.E R4, [R2]", 5), instruction(1, "BRA 0x0")]) == []
