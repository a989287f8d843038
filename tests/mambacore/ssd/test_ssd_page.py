"""Every block of kernels/SSD.md runs, in order, and its assertions hold."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "kernels" / "SSD.md"


def test_the_derivations_hold():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7 and sum(block.count("assert ") for block in blocks) == 6
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"SSD.md, block {number}", "exec"), names)
