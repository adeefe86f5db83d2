"""Says on which machine and day something is measured: `python bench/machine.py`."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
"""Those that matter to matrix products, as Linux calls them."""


def machine() -> str:
    """Returns the day, the processor, its cores and its instruction sets."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    known = re.search(r"(?:flags|Features)\s*: (.*)", text)
    found = [one for one in INSTRUCTIONS if known and one in known[1].split()]
    return ", ".join(
        [
            datetime.date.today().isoformat(),
            f"{os.cpu_count()} cores of {name[1] if name else platform.processor()}",
            " ".join(found) or platform.machine(),
        ]
    )


if __name__ == "__main__":
    print(machine())
