"""What the machine code of a kernel must not do, found by reading it.

ptxas 12.8 compiles some products of tensor cores for compute capability 9.0 such that the address
of an operand in shared memory is used before it is worked out. The register then holds whatever
was left in it: results may be right, wrong, or a memory error, from one launch to the next. No
test of numbers finds that for certain; the code shows it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;")
WRITES_UNIFORM = re.compile(r"U[A-Z]|S2UR|R2UR|REDUX|CS2UR")
WRITES_TWO = re.compile(
    r"(ULDC\.64|UIMAD\.WIDE|UIADD3\.64|S2UR\.64|R2UR\.64|UMOV\.64|USHF\.[LR]\.U64(?!\.HI))"
)


def unwritten_registers(sass: str) -> list[str]:
    """Instructions that read a uniform register which none before them, in the text, writes.

    sass: of one kernel, as nvdisasm and cuobjdump print it. Addresses of descriptors are not
    looked at: they take several registers, of which some may be unused.
    """
    written: set[int] = set()
    found = []
    for line in sass.splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        name, operands = match[1], [part.strip() for part in match[2].split(",")]
        target = None
        if WRITES_UNIFORM.match(name):
            target = re.fullmatch(r"UR(\d+)", operands.pop(0))
        read = re.sub(r"desc\[UR\d+\]", "", " ".join(operands))
        if {int(number) for number in re.findall(r"\bUR(\d+)\b", read)} - written:
            found.append(f"{name} {match[2]}")
        if target is not None:
            first = int(target[1])
            written |= {first, first + 1} if WRITES_TWO.match(name) else {first}
    return found


def disassembled(cubin: Path) -> str:
    """The machine code of a cubin as text, by the disassembler that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [str(tool), "-sass", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
