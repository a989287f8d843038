"""The local page of `audiomamba app` draws the clips of `generate`, goes on with uploads, and tells mistakes."""

from pathlib import Path

import pytest
import soundfile
import torch

import audiomamba
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.writing import encoded
from audiomamba.models import StageConfig, WaveformModel, WaveformModelConfig
from audiomamba.models.waveform_model import save_waveform_model
from browser import (
    NARROW_PX,
    WIDE_PX,
    assert_page_does_not_scroll_sideways,
    assert_pictures_are_seen,
    assert_players_play,
    browser,
    watched_page,
)
from mambacore.errors import InputError
from mambapipelines.apps.clip_stream import stream_address, stream_route
from mambapipelines.apps.clips import ClipPage, players
from mambapipelines.cli.audiomamba.main import main

RATE = 8000


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    stage = StageConfig(1, {"name": "selective", "state_size": 2})
    model = WaveformModel(WaveformModelConfig((stage, stage), 8, (4,), quantiser=Quantiser(sample_rate_hz=RATE)))
    folder = tmp_path_factory.mktemp("model") / "model"
    save_waveform_model(folder, model, details={})
    return folder


@pytest.fixture
def page(model_folder) -> ClipPage:
    return ClipPage(audiomamba.load(model_folder), longest_seconds=0.5)


@pytest.fixture
def upload(tmp_path) -> Path:
    path = tmp_path / "clip.wav"
    soundfile.write(path, 0.3 * torch.sin(torch.arange(4410) * 0.1).numpy(), 22050)
    return path


def test_the_clips_are_those_of_generate(page):
    found = page.generate(2, 0.05, 7, 0.9, 0.95, None)
    expected = page.generator.generate(2, 0.05, 7, 0.9, 0.95)
    assert torch.equal(found.classes, expected.classes)
    assert players(found, 7).count("<audio controls") == 2


def test_an_upload_of_another_rate_is_continued(page, upload):
    found = page.generate(1, 0.05, 0, 1.0, 1.0, str(upload))
    assert found.classes.shape[1] == round(0.2 * RATE) + round(0.05 * RATE)
    prompt = page.generator.prompt(audiomamba.read_waveform(upload))
    assert torch.equal(found.classes[0, : round(0.2 * RATE)], prompt.classes)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((0, 0.1, 0, 1.0, 1.0), "1 to 16"),
        ((17, 0.1, 0, 1.0, 1.0), "1 to 16"),
        ((1, 9.0, 0, 1.0, 1.0), "at most 0.5"),
        ((1, 0.0, 0, 1.0, 1.0), "at most 0.5"),
        ((1, 0.1, -1, 1.0, 1.0), "seed"),
        ((1, 0.1, 0, -1.0, 1.0), "temperature"),
        ((1, 0.1, 0, 1.0, 2.0), "top_p"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(page, asked, words):
    with pytest.raises(InputError, match=words):
        page.generate(*asked, None)


def test_an_upload_that_is_no_sound_or_too_long_is_refused(page, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(InputError, match=r"text\.wav"):
        page.generate(1, 0.1, 0, 1.0, 1.0, str(tmp_path / "text.wav"))
    soundfile.write(tmp_path / "long.wav", torch.rand(RATE).numpy(), RATE)
    with pytest.raises(InputError, match="lasts"):
        page.generate(1, 0.1, 0, 1.0, 1.0, str(tmp_path / "long.wav"))


def test_the_command_tells_mistakes_in_one_line(model_folder, tmp_path, capsys):
    assert main(["app", str(tmp_path / "nothing")]) == 2
    assert main(["app", str(model_folder), "--longest-seconds", "0"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 2
    assert "--longest-seconds" in complaint


def test_a_stream_is_the_wav_file_of_the_first_clip(page):
    starlette = pytest.importorskip("starlette.applications", reason="the extra app is not installed")
    client_of = pytest.importorskip("starlette.testclient", reason="the client for tests needs httpx").TestClient
    client = client_of(starlette.Starlette(routes=[stream_route(page.stream, RATE)]))
    settings = {"seconds": 0.05, "seed": 7, "temperature": 0.9, "top_p": 0.95, "guidance": 1.0}
    answer = client.get(stream_address(settings, {}))
    assert answer.status_code == 200 and answer.headers["content-type"] == "audio/wav"
    assert answer.content == encoded(page.generate(3, 0.05, 7, 0.9, 0.95, None).samples[0], RATE)
    assert len(answer.content) == int(answer.headers["content-length"])
    for changed, words in (({"seconds": 9}, "at most 0.5"), ({"top_p": 2}, "top_p"), ({"seed": "x"}, "give a number")):
        refused = client.get(stream_address({**settings, **changed}, {}))
        assert refused.status_code == 400 and words in refused.text
    assert client.get(stream_address(settings, {"digit": "7"})).status_code == 400  # a model without labels
    elsewhere = client.get(stream_address(settings, {}), headers={"sec-fetch-site": "cross-site"})
    assert elsewhere.status_code == 403


@pytest.mark.slow
@pytest.mark.parametrize("width_px", [NARROW_PX, WIDE_PX])
def test_a_reader_draws_clips_goes_on_with_one_and_hears_them(model_folder, upload, width_px):
    from mambapipelines.apps.clips import clip_app  # noqa: PLC0415
    from mambapipelines.apps.server import serve  # noqa: PLC0415

    pytest.importorskip("gradio", reason="the test extra is not installed")
    blocks, routes = clip_app(model_folder, longest_seconds=1.0, threads=1)
    address = serve(blocks, "127.0.0.1", 0, largest_upload_megabytes=1, wait=False, routes=routes)
    with browser() as chromium, watched_page(chromium, width_px, offline=False) as (page, wrong):
        elsewhere: list[str] = []
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(address)
        page.fill("#clips input", "2")
        page.fill("#seconds input", "0.5")
        page.click("#generate")
        page.wait_for_selector("#sounds audio")
        assert page.locator("#sounds audio").count() == 2
        assert "times real time" in page.inner_text("#summary")
        assert_pictures_are_seen(page, width_px)
        assert_players_play(page)
        assert_page_does_not_scroll_sideways(page, width_px)

        page.click("#listen")
        page.wait_for_selector("#sounds audio[autoplay]")
        page.wait_for_function("document.querySelector('#sounds audio').duration > 0")
        assert page.evaluate("document.querySelector('#sounds audio').duration") == pytest.approx(0.5, abs=0.01)

        page.set_input_files("#upload input[type=file]", upload)
        page.wait_for_selector("#upload >> text=clip")
        page.fill("#clips input", "1")
        page.click("#generate")
        page.wait_for_function(
            "document.querySelectorAll('#sounds audio:not([autoplay])').length === 1"
            " && document.querySelector('#sounds audio').duration > 0"
        )
        duration = page.evaluate("document.querySelector('#sounds audio').duration")
        assert duration == pytest.approx(0.7, abs=0.01)

        page.fill("#seconds input", "99")
        page.click("#generate")
        page.wait_for_selector("#summary p[role=alert]")
        assert "at most 1" in page.inner_text("#summary")
        assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
        # The stream of answers of a finished run is ended by the page itself.
        assert [line for line in wrong if "ERR_ABORTED" not in line] == []
    blocks.close(verbose=False)
