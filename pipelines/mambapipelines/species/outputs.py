"""Outputs of `genomamba classify` beside the table: groups of records, sequences by call, and the MultiQC summary."""

from __future__ import annotations

import gzip
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final, cast

from genomamba.class_names import UNCLASSIFIED
from genomamba.classification.records import UNKNOWN
from genomamba.io.fastq import read_record_texts
from mambacore.errors import InputError
from mambacore.safe_text import table_line
from mambapipelines.files import check_writable_place, written_whole

CALL_PLACE: Final = "{call}"
GZIP_LEVEL: Final = 6


def group_rule(rule: str) -> Callable[[str], str | None]:
    """Parse `--group-by` into a function from record name to group, `None` for a record of no group.

    Args:
        rule: a file of two tab-separated columns, record and group; or a regular expression with one capturing
            group, searched for in the names; or a separator, before whose first occurrence the group stands.

    Raises:
        InputError: the expression is invalid or does not have one group, or the file has other columns.
    """
    if os.path.isfile(rule):
        mapping = _read_mapping(Path(rule))
        return mapping.get
    if not rule:
        raise InputError("--group-by is empty: give a separator, a regular expression with one group, or a TSV file.")
    if "(" not in rule:
        return lambda name: name.split(rule, 1)[0] if rule in name else None
    try:
        expression = re.compile(rule)
    except re.error as error:
        raise InputError(f"--group-by '{rule}' is not a regular expression ({error}): correct it.") from error
    if expression.groups != 1:
        raise InputError(f"--group-by '{rule}' has {expression.groups} capturing groups: give exactly one.")

    def search(name: str) -> str | None:
        match = expression.search(name)
        return match.group(1) if match else None

    return search


def _read_mapping(path: Path) -> Mapping[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--group-by {path} cannot be read as text ({error}): give a TSV file.") from error
    mapping: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) != 2 or not all(fields):
            raise InputError(f"--group-by {path} has {len(fields)} columns on line {number}: write record, tab, group.")
        if mapping.setdefault(fields[0], fields[1]) != fields[1]:
            raise InputError(f"--group-by {path} puts record '{fields[0]}' into two groups (line {number}).")
    return mapping


class CallSinks:
    """Files for the sequences of records, by call."""

    def __init__(self, classified: str | None, unclassified: Path | None, class_names: Sequence[str]) -> None:
        """Choose the files.

        Args:
            classified: a folder, which receives CLASS.fa for each class, or a file name that contains {call}.
            unclassified: file for unknown and unclassified records.
            class_names: of the model.

        Raises:
            InputError: a file cannot be written.
        """
        self.calls = [*class_names, UNKNOWN, UNCLASSIFIED]
        self._numbers = {name: number for number, name in enumerate(self.calls)}
        self._records = array("H")
        self._paths: list[Path | None] = [*(None for _ in class_names), unclassified, unclassified]
        self._new_folder: str | None = None
        if classified is not None:
            pattern = classified if CALL_PLACE in classified else os.path.join(classified, CALL_PLACE + ".fa")
            if CALL_PLACE not in classified and not os.path.isdir(classified):
                try:
                    os.makedirs(classified)
                    self._new_folder = classified
                except OSError as error:
                    raise InputError(
                        f"--classified-out {classified} cannot be created ({error.strerror}): choose another."
                    ) from error
            for number, name in enumerate(class_names):
                self._paths[number] = Path(pattern.replace(CALL_PLACE, name))
        for path in self.paths:
            check_writable_place(path, "--unclassified-out" if path == unclassified else "--classified-out")
        if len(self.paths) != len(set(self._paths) - {None}):
            raise InputError("--classified-out and --unclassified-out name the same file: choose two names.")

    @property
    def paths(self) -> list[Path]:
        """The files, in the order of the classes."""
        return list(dict.fromkeys(path for path in self._paths if path is not None))

    def add(self, call: str) -> None:
        """Store the call of the next record, in two bytes."""
        self._records.append(self._numbers[call])

    def remove_empty_folder(self) -> None:
        """Remove the new folder if, after a failure, it is empty."""
        if self._new_folder is not None and not os.listdir(self._new_folder):
            os.rmdir(self._new_folder)

    def write(self, sources: Sequence[str], written: ExitStack) -> None:
        """Read the sources again and copy each record to its file.

        Args:
            sources: the classified files.
            written: the files appear under their names when this stack is left without an error.

        Raises:
            InputError: a source has changed, or a file cannot be written.
        """
        files: list[IO[bytes]] = []
        with ExitStack() as packed:
            streams: dict[Path, IO[bytes]] = {}
            for path in self.paths:
                streams[path] = written.enter_context(written_whole(path))
                files.append(streams[path])
                if path.suffix == ".gz":
                    # Without a time stamp the same records give the same bytes.
                    streams[path] = cast(
                        IO[bytes],
                        packed.enter_context(
                            gzip.GzipFile("", "wb", compresslevel=GZIP_LEVEL, fileobj=streams[path], mtime=0)
                        ),
                    )
            self._copy(sources, streams)
        for file in files:
            file.flush()  # a full disk is noticed before any file has got its name

    def _copy(self, sources: Sequence[str], streams: Mapping[Path, IO[bytes]]) -> None:
        first = 0
        for source in sources:
            number = -1
            for number, text in read_record_texts(source):
                if first + number >= len(self._records):
                    raise InputError(f"{source} changed while it was being classified: classify it again.")
                path_of_call = self._paths[self._records[first + number]]
                if path_of_call is not None:
                    streams[path_of_call].write(text)
            first += number + 1
        if first != len(self._records):
            raise InputError("the input changed while it was being classified: classify it again.")


def multiqc_text(counts_by_source: Mapping[str, Mapping[str, int]], class_names: Sequence[str]) -> str:
    """Records of each source by call, as custom content for MultiQC: a bar per source.

    One file with its configuration in leading comments (docs.seqera.io/multiqc/custom_content).
    """
    calls = [*class_names, *(call for call in (UNKNOWN, UNCLASSIFIED) if call not in class_names)]
    lines = [
        "# id: 'genomamba_classify'",
        "# section_name: 'genomamba classify'",
        "# description: 'Records of each input by called class.'",
        "# plot_type: 'bargraph'",
        "# pconfig:",
        "#     id: 'genomamba_classify_calls'",
        "#     title: 'genomamba classify: calls'",
        "#     ylab: 'records'",
        table_line(["Sample", *calls]),
    ]
    names = _sample_names(counts_by_source)
    for name, counts in zip(names, counts_by_source.values(), strict=True):
        lines.append(table_line([name, *(str(counts.get(call, 0)) for call in calls)]))
    return "\n".join(lines) + "\n"


def kraken_report(records: Mapping[str, int], class_names: Sequence[str]) -> str:
    """Records by call in the format of Kraken's report, which Krona, Pavian and Bracken read.

    Columns (github.com/DerrickWood/kraken2, "Sample Report Output Format"): percentage, records of the clade, records
    of the taxon itself, rank code, taxonomy identifier, indented name. Classes are species below the root; they have no
    identifiers of a taxonomy, so those are numbers from 2 in the order of the model. `unknown` and `unclassified`
    records are unclassified.
    """
    total = max(1, sum(records.values()))
    unclassified = records.get(UNKNOWN, 0) + records.get(UNCLASSIFIED, 0)
    if UNKNOWN in class_names:
        unclassified -= records.get(UNKNOWN, 0)
    classified = sum(records.values()) - unclassified

    def line(clade: int, own: int, rank: str, identifier: int, name: str) -> str:
        return table_line([f"{100 * clade / total:6.2f}", str(clade), str(own), rank, str(identifier), name])

    lines = [line(unclassified, unclassified, "U", 0, UNCLASSIFIED)] if unclassified else []
    if classified:
        lines.append(line(classified, 0, "R", 1, "root"))
        found = [(records.get(name, 0), number, name) for number, name in enumerate(class_names, start=2)]
        for count, number, name in sorted(found, key=lambda row: (-row[0], row[1])):
            if count:
                lines.append(line(count, count, "S", number, f"  {name}"))
    return "".join(f"{each}\n" for each in lines)


def biom_text(counts_by_source: Mapping[str, Mapping[str, int]], class_names: Sequence[str]) -> str:
    """Records of each source by call, as a sparse table in BIOM 1.0 (biom-format.org/documentation/format_versions).

    Observations are calls, samples are sources. Calls without any record have a row too, so that tables of several runs
    have the same rows.
    """
    calls = list(dict.fromkeys([*class_names, UNKNOWN, UNCLASSIFIED]))
    samples = _sample_names(counts_by_source)
    data = [
        [row, column, counts[call]]
        for row, call in enumerate(calls)
        for column, counts in enumerate(counts_by_source.values())
        if counts.get(call)
    ]
    document = {
        "id": None,
        "format": "Biological Observation Matrix 1.0.0",
        "format_url": "http://biom-format.org",
        "type": "Taxon table",
        "generated_by": "genomamba classify",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "matrix_type": "sparse",
        "matrix_element_type": "int",
        "shape": [len(calls), len(samples)],
        "rows": [{"id": call, "metadata": None} for call in calls],
        "columns": [{"id": sample, "metadata": None} for sample in samples],
        "data": data,
    }
    return json.dumps(document, indent=1) + "\n"


def _sample_names(sources: Iterable[str]) -> list[str]:
    """File names without folders if they are distinct, else whole paths; standard input is called stdin."""
    paths = ["stdin" if source == "-" else re.sub(r"[\t\r\n]", " ", source) for source in sources]
    short = [os.path.basename(path) for path in paths]
    return short if len(set(short)) == len(short) else paths
