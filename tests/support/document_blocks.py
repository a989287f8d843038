"""The code blocks of the documents: which there are, what is to be run, and the command lines in them.

A block is run by `tests/test_documents.py` unless an HTML comment before it says otherwise:

    <!-- needs data: WHY -->       not run, because of what it would need
    <!-- test adds: OPTIONS -->    run with these options at the end of each command
    <!-- output -->                what the block before prints on standard output
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("genomamba", "audiomamba")
SHELL_WORDS = {
    *PROGRAMS,
    "make",
    "pip",
    "python",
    "torchrun",
    "source",
    "tensorboard",
    "zcat",
    "snakemake",
    "srun",
    "bcftools",
}
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```(\w*)")
_COMMENT = re.compile(r"^<!-- (needs data|test adds|output)(?:: (.*?))? -->$")


@dataclass(frozen=True)
class Block:
    """A block of a page: where it begins, its language (`shell`, `python`, `text`), and what the comment says."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    remark: str

    @property
    def name(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The command lines of a shell block, continuation lines joined."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = [line.strip() for line in joined.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number, before = 0, ""
    while number < len(lines):
        line = lines[number]
        begin = number
        language, content = None, []
        if fence := _FENCE.match(line):
            language = {"bash": "shell", "sh": "shell"}.get(fence[1], fence[1] or "text")
            number += 1
            while number < len(lines) and not lines[number].startswith("```"):
                content.append(lines[number])
                number += 1
        elif line.startswith("    ") and (begin == 0 or not lines[begin - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                content.append(lines[number][4:])
                number += 1
            number -= 1
            words = content[0].split()
            language = "shell" if words[0] in SHELL_WORDS else "other"
        if language is not None:
            mark = _COMMENT.match(before)
            kind, remark = (mark[1], mark[2] or "") if mark else ("", "")
            yield Block(page, begin + 1, language, "\n".join(content).rstrip() + "\n", kind, remark)
        if line.strip():
            before = line.strip()
        number += 1


def program_words(command: str) -> Iterator[list[str]]:
    """The words of each call of a program within a command line, the program first."""
    words = shlex.split(command, comments=True)
    for position, word in enumerate(words):
        if word in PROGRAMS and (position == 0 or words[position - 1] in {"|", "--no-python", "--kill-on-bad-exit"}):
            end = next((k for k in range(position, len(words)) if words[k] in {"|", ">", "&&", "<"}), len(words))
            yield words[position:end]
