"""Public data sets of recordings: the spoken digits of Speech Commands."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Final

from audiomamba.data.clips import DIGITS, SC09_CLIPS
from mambacore.errors import InputError
from mambapipelines.console import note
from mambapipelines.datasets.downloads import RemoteFile
from mambapipelines.datasets.fetch import DataSet, SetFile

SPEECH_COMMANDS: Final = "speech_commands_v0.02.tar.gz"
# Members of the archive beside the folders of the digits.
SPEECH_COMMANDS_TEXTS: Final = ("validation_list.txt", "testing_list.txt", "LICENSE", "README.md")


def extract_digits(archive: Path, ready: Path) -> None:
    """Extract the ten digits and the lists of the split from the archive of Speech Commands.

    Raises:
        InputError: the archive is damaged or lacks something, or the disk is full.
    """
    temporary = ready.with_name(f".{ready.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parts = Path(member.name).parts
                wanted = parts[:1] and (parts[0] in DIGITS or (len(parts) == 1 and parts[0] in SPEECH_COMMANDS_TEXTS))
                if wanted and (member.isfile() or member.isdir()):
                    tar.extract(member, temporary, filter="data")
        missing = [name for name in (*DIGITS, *SPEECH_COMMANDS_TEXTS[:2]) if not (temporary / name).exists()]
        if missing:
            raise InputError(f"{archive} does not hold {', '.join(missing)}: remove it and run the same command again.")
        temporary.replace(ready)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{archive} is damaged ({error}): remove it and run the same command again.") from None
    except OSError as error:
        raise InputError(
            f"{ready} cannot be written ({error.strerror or error}): free some disk space and rerun."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    clips, published = sum(1 for _ in ready.glob("*/*.wav")), sum(SC09_CLIPS.values())
    if clips != published:
        note(f"{ready} has {clips:,} clips of digits; the published task has {published:,}")


SC09: Final = DataSet(
    "sc09",
    "the spoken digits of Speech Commands v0.02 (Warden, arXiv 1804.03209), 16 kHz",
    {
        "digits": (
            SetFile(
                # Checksum from torchaudio's source.
                RemoteFile(
                    SPEECH_COMMANDS,
                    (
                        f"http://download.tensorflow.org/data/{SPEECH_COMMANDS}",
                        f"https://storage.googleapis.com/download.tensorflow.org/data/{SPEECH_COMMANDS}",
                    ),
                    checksum="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
                ),
                ready="sc09",
                prepare=extract_digits,
            ),
        )
    },
)

AUDIO_SETS: Final = {SC09.name: SC09}
