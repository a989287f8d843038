"""Compressed files that are cut or damaged anywhere are refused, with what is wrong and where; never read in part."""

import re

import numpy as np
import pytest
import soundfile

from audiomamba.data.ogg import ogg_starts
from audiomamba.data.waveforms import read_waveform
from mambacore.errors import InputError

RATE, FRAMES = 16_000, 24_000
FORMATS = {
    "flac": {"format": "FLAC"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
    "w64": {"format": "W64"},
}


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder, sound = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0).normal(0, 0.1, FRAMES)
    for name, options in FORMATS.items():
        soundfile.write(folder / name, sound.astype("f4"), RATE, **options)
    return {name: (folder / name).read_bytes() for name in FORMATS}


def noise_at(content, place, count=600):
    return content[:place] + np.random.default_rng(1).bytes(count) + content[place + count :]


DAMAGES = {
    "20 bytes": lambda content: content[:20],
    "a tenth": lambda content: content[: len(content) // 10],
    "half": lambda content: content[: len(content) // 2],
    "all but 200 bytes": lambda content: content[:-200],
    "zeros within": lambda content: content[: len(content) // 2] + bytes(600) + content[len(content) // 2 + 600 :],
    "noise within": lambda content: noise_at(content, len(content) // 2),
    "a part missing": lambda content: content[: len(content) // 2] + content[len(content) // 2 + 3000 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_refused_with_what_and_where(name, damage, contents, tmp_path, capfd):
    if name == "w64" and damage.endswith("within"):
        pytest.skip("raw samples have no checksum")
    path = tmp_path / f"sound.{name}"
    path.write_bytes(DAMAGES[damage](contents[name]))
    with pytest.raises(InputError) as caught:
        read_waveform(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "does not exist" not in message
    assert damage == "20 bytes" or re.search(r"is (cut off|damaged)\b", message), message
    # The MP3 decoder would speak for itself, without a name.
    assert all(line.startswith(str(path)) for line in capfd.readouterr().err.splitlines())


@pytest.mark.parametrize("name", FORMATS)
def test_whole_files_are_read_whole(name, contents, tmp_path):
    path = tmp_path / f"sound.{name}"
    path.write_bytes(contents[name])
    assert abs(read_waveform(path).samples.shape[0] - FRAMES) < 8


@pytest.mark.parametrize("name", ["vorbis", "opus"])
def test_every_byte_of_an_ogg_file_is_checked(name, contents):
    content = contents[name]
    assert ogg_starts(content) == [0]
    for place in range(0, len(content), 61):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        with pytest.raises(ValueError, match=r"^is (cut off|damaged)"):
            ogg_starts(bytes(damaged))


def test_joined_ogg_files_begin_at_their_first_pages(contents):
    first, second = contents["vorbis"], contents["opus"]
    assert ogg_starts(first + second + b"other bytes") == [0, len(first)]
    pages = [match.start() for match in re.finditer(b"OggS", second)]
    with pytest.raises(ValueError, match=f"pages are missing before byte {len(first) + pages[2]:,}"):
        ogg_starts(first + second[: pages[2]] + second[pages[3] :])
