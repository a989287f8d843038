"""Quantisers: every class survives the way out and back, at every depth, and the scale never moves."""

import json

import pytest
import torch
from torchaudio import functional

from audiomamba.data.quantisers import SCHEMES, Quantiser
from mambacore.errors import InputError

DEPTHS = range(8, 17)


@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_class_survives_decoding_and_encoding(scheme, bits):
    for full_scale in (1.0, 0.3, 7.0):
        quantiser = Quantiser(scheme, bits, full_scale=full_scale)
        classes = torch.arange(quantiser.classes)
        samples = quantiser.decode(classes)
        assert samples.dtype == torch.float32 and (samples.diff() > 0).all()
        assert samples.abs().max() <= full_scale * (1 + 1e-6)
        assert torch.equal(quantiser.encode(samples).long(), classes)


@pytest.mark.parametrize("bits", DEPTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sample_goes_to_the_nearest_class_of_its_scale(scheme, bits):
    quantiser = Quantiser(scheme, bits)
    samples = torch.linspace(-1, 1 - 2 / quantiser.classes, 5001, dtype=torch.float64)  # linear classes end there
    classes = quantiser.encode(samples).long()
    found = quantiser.decode(classes).double()
    below = quantiser.decode((classes - 1).clamp(min=0)).double()
    above = quantiser.decode((classes + 1).clamp(max=quantiser.classes - 1)).double()
    # Between its neighbours; nearest in the compressed scale of mu-law, nearest of all for linear ones.
    assert ((samples >= below) & (samples <= above)).all()
    if scheme == "linear":
        assert (samples - found).abs().max() <= 1 / quantiser.classes + 1e-12


def test_mu_law_is_the_published_curve():
    """torchaudio's, at every tenth of a thousandth but where float32 cannot tell the classes apart."""
    samples = torch.linspace(-1, 1, 20001)
    for bits in (8, 10):
        found = Quantiser("mu-law", bits).encode(samples).long()
        expected = functional.mu_law_encoding(samples, 1 << bits)
        assert (found != expected).float().mean() < 1e-3 and (found - expected).abs().max() <= 1
        decoded = functional.mu_law_decoding(torch.arange(1 << bits), 1 << bits)
        assert (Quantiser("mu-law", bits).decode(torch.arange(1 << bits)) - decoded).abs().max() < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_silence_is_the_middle_class_and_stays_silent(scheme):
    for bits in DEPTHS:
        quantiser = Quantiser(scheme, bits)
        silence = quantiser.encode(torch.zeros(100))
        assert (silence == quantiser.middle_class).all() and quantiser.middle_class == 2 ** (bits - 1)
        # -81 dB of full scale with 8 bits of mu-law, and less for all others.
        assert quantiser.decode(silence).abs().max() < 10 ** (-81 / 20)
    assert Quantiser("linear").decode(torch.tensor([128])).item() == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scale_does_not_depend_on_the_clip(scheme):
    quantiser = Quantiser(scheme)
    quiet = torch.tensor([-0.01, 0.0, 0.02])
    loud = torch.tensor([-0.01, 0.0, 0.02, 0.9, -1.0])
    assert torch.equal(quantiser.encode(loud)[:3], quantiser.encode(quiet))


def test_what_is_louder_than_full_scale_is_clipped():
    for scheme in SCHEMES:
        quantiser = Quantiser(scheme, full_scale=0.5)
        assert quantiser.encode(torch.tensor([-3.0, -0.5, 0.5, 3.0])).tolist() == [0, 0, 255, 255]


def test_shapes_and_dtypes():
    assert Quantiser(bits=8).encode(torch.zeros(2, 3)).dtype == torch.uint8
    assert Quantiser(bits=16).encode(torch.ones(2, 3, dtype=torch.float64)).tolist() == [[65535] * 3] * 2
    assert Quantiser().encode(torch.zeros(0)).shape == (0,)
    assert Quantiser().decode(torch.zeros(0, dtype=torch.uint8)).shape == (0,)


def test_configurations_survive_json():
    for scheme in SCHEMES:
        for bits in DEPTHS:
            quantiser = Quantiser(scheme, bits, 8000, 0.25)
            assert Quantiser.from_config(json.loads(json.dumps(quantiser.to_config()))) == quantiser


MISTAKES = {
    "scheme": ({"scheme": "a-law"}, "no quantiser 'a-law'"),
    "few bits": ({"bits": 7}, "8 to 16 bits but 7"),
    "many bits": ({"bits": 17}, "8 to 16 bits but 17"),
    "half a bit": ({"bits": 8.5}, "8 to 16 bits but 8.5"),
    "rate": ({"sample_rate_hz": 0}, "sample_rate_hz is 0"),
    "rate beyond any": ({"sample_rate_hz": 10**9}, "at most 768000"),
    "rate in words": ({"sample_rate_hz": "16k"}, "sample_rate_hz is '16k'"),
    "no scale": ({"full_scale": 0.0}, "positive amplitude"),
    "endless scale": ({"full_scale": float("inf")}, "positive amplitude"),
    "scale in words": ({"full_scale": "loud"}, "as a number"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Quantiser(**options)
    with pytest.raises(InputError, match=message):
        Quantiser.from_config(Quantiser().to_config() | options)


def test_damaged_configurations_are_refused():
    config = Quantiser().to_config()
    for name in config:
        with pytest.raises(InputError, match=f"lacks {name}"):
            Quantiser.from_config({key: value for key, value in config.items() if key != name})
    with pytest.raises(InputError, match="unknown key 'gain'"):
        Quantiser.from_config(config | {"gain": 1})
    with pytest.raises(InputError, match="has version 2"):
        Quantiser.from_config(config | {"version": 2})
    with pytest.raises(InputError, match="not a table"):
        Quantiser.from_config(8)


def test_samples_and_classes_that_mean_nothing_are_refused():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="non-finite"):
            Quantiser().encode(torch.tensor([0.0, bad]))
    with pytest.raises(InputError, match=r"samples must be floating-point numbers from -1 to 1 but are torch.int16"):
        Quantiser().encode(torch.zeros(3, dtype=torch.int16))
    with pytest.raises(InputError, match="between 0 and 255 but range from -100 to 3"):
        Quantiser().decode(torch.tensor([-100, 3]))
    with pytest.raises(InputError, match="classes must be integers"):
        Quantiser().decode(torch.zeros(3))
