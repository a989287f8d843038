"""Generation equals the model, a clip depends on its seed and number alone, and what is wrong with clips is said."""

import copy
import math
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import audiomamba
from audiomamba import generation
from audiomamba.data.clock import Clock
from audiomamba.data.labels import LabelSet
from audiomamba.data.quantisers import Quantiser
from audiomamba.data.waveforms import Waveform
from audiomamba.generation import WaveformGenerator
from audiomamba.metrics.selection import flags_of, likelihoods_of_real_clips
from audiomamba.models import ARCHITECTURES, StageConfig, WaveformModel, WaveformModelConfig, architecture
from audiomamba.models.step_program import WaveformSteps, steps_library
from audiomamba.sampling import sample_classes
from mambacore import use_backend
from mambacore.errors import InputError
from mambacore.layers import step_program
from mambacore.layers.step_weights import WEIGHT_FORMATS, rounded_weight, weight_dtype
from mambacore.native_library import native_library
from tolerances import PIECES_FLOAT32, PIECES_FLOAT64, ROUNDED_INPUTS, relative_error

native = pytest.mark.skipif(native_library() is None, reason="installed without the native library")

SELECTIVE = StageConfig(2, {"name": "selective", "state_size": 3})
COMPLEX = StageConfig(1, {"name": "selective", "state_size": 2, "complex_state": True}, 1)
S4D = StageConfig(1, {"name": "s4d", "state_size": 3}, 2)
RATE = 1000
CONFIGURATIONS = {
    "no pooling": ((SELECTIVE,), (), True),
    "two unlike poolings": ((COMPLEX, S4D, SELECTIVE), (2, 5), True),
    "three poolings": ((SELECTIVE, S4D, COMPLEX, S4D), (2, 3, 2), True),
    "not a unet": ((S4D, SELECTIVE, COMPLEX), (3, 2), False),
}


def model_of(name, dtype=torch.float32):
    stages, pooling, unet = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = WaveformModel(
        WaveformModelConfig(stages, 8, pooling, blocks_on_the_way_down=unet, quantiser=Quantiser(sample_rate_hz=RATE))
    )
    with torch.no_grad():
        model.head.weight.mul_(8)  # far from uniform
    return model.to(dtype).eval()


def classes(length, seed=1):
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(seed))


@native
@pytest.mark.parametrize("before", [0, 23], ids=["from the start", "going on"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, PIECES_FLOAT64), (torch.float32, PIECES_FLOAT32)], ids=["64", "32"]
)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_native_steps_equal_the_whole_at_every_depth(name, dtype, tolerance, before):
    model, tokens = model_of(name, dtype), classes(97)
    with torch.no_grad():
        logits, _ = model(tokens)
        state = model(tokens[:, :before])[1] if before else None
    expected = torch.log_softmax(logits.double(), -1)[:, before:-1].gather(2, tokens[:, before + 1 :].unsqueeze(2))
    steps = WaveformSteps(model, steps_library(model))
    memory, first = steps.memory(2, state), tokens[:, before].clone()
    found = []
    for given in tokens[:, before + 1 :].split([40, 97 - before - 41], dim=1):  # calls go on where the last one ended
        found.append(steps.run(memory, first, before + sum(part.shape[1] for part in found), given=given)[1])
    assert relative_error(torch.cat(found, dim=1), expected.squeeze(2)) < tolerance


@native
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}])
def test_native_and_composed_generation_draw_the_same(options):
    model = model_of("two unlike poolings", torch.float64)
    found = WaveformGenerator(model).generate(3, 0.1, seed=4, prompt=classes(17)[0], **options)
    with use_backend("torch"):
        composed = WaveformGenerator(model)
        assert not composed.is_native
        expected = composed.generate(3, 0.1, seed=4, prompt=classes(17)[0], **options)
    assert torch.equal(found.classes, expected.classes)
    assert relative_error(found.log_likelihoods, expected.log_likelihoods) < PIECES_FLOAT64
    assert (found.classes[0] == found.classes[1]).all() == (options.get("temperature") == 0.0)


FORMATS = pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)


def rounded(model, weight_format):
    """A copy of the model with the weights of its linear layers rounded as a program rounds them."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in other.named_modules():
            if isinstance(module, torch.nn.Linear) and "step_projection" not in name:
                dtype = weight_dtype(weight_format, in_group="deeper" in name or "pooling" in name)
                module.weight.copy_(rounded_weight(module.weight, dtype))
    return other


@native
@FORMATS
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_rounded_weights_are_those_of_a_model_that_has_them(name, weight_format):
    """But for the inputs of layers, which are rounded as well: `test_step_weights.py` checks these layer by layer."""
    model, tokens = model_of(name), classes(97)
    other = rounded(model, weight_format)
    with torch.no_grad():
        logits, _ = other(tokens)
        whole, _ = model(tokens)
    expected = torch.log_softmax(logits.double(), -1)[:, :-1].gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
    steps = WaveformSteps(model, steps_library(model), weight_format)
    _, found = steps.run(steps.memory(2), tokens[:, 0].clone(), 0, given=tokens[:, 1:])
    assert relative_error(found, expected) < (PIECES_FLOAT32 if weight_format == "float32" else ROUNDED_INPUTS)
    assert (weight_format == "float32") == torch.equal(logits, whole)


@native
@FORMATS
def test_rounded_clips_depend_on_seed_and_number_alone(weight_format):
    generator = WaveformGenerator(model_of("two unlike poolings"), weight_format)
    many = generator.generate(5, 0.05, seed=9)
    for number in (0, 4):
        alone = generator.generate(1, 0.05, seed=9, first_clip=number)
        assert torch.equal(alone.classes[0], many.classes[number])
        assert torch.equal(alone.log_likelihoods[0], many.log_likelihoods[number])


@contextmanager
def threads(count, monkeypatch):
    """So many threads, on a machine that has them or not."""
    before = torch.get_num_threads()
    monkeypatch.setattr(step_program, "processors", lambda: count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LABELS = (LabelSet("digit", ("0", "1", "2")),)


def conditional(name):
    stages, pooling, unet = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = WaveformModel(
        WaveformModelConfig(
            stages, 8, pooling, blocks_on_the_way_down=unet, quantiser=Quantiser(sample_rate_hz=RATE),
            label_sets=LABELS, clock=Clock(8),
        )
    )  # fmt: skip
    with torch.no_grad():
        model.head.weight.mul_(8)
        for embedding in (model.label_embedding, model.clock_embedding):
            for parameter in embedding.parameters():
                parameter.normal_()
    return model.eval()


SHARED = {
    "plain": (model_of, {}),
    "likeliest": (model_of, {"temperature": 0.8, "top_p": 0.9}),
    "labels, clock and guidance": (
        conditional,
        {"labels": {"digit": "each"}, "guidance": 1.7, "clock": 0.11},
    ),
}


@native
@pytest.mark.parametrize("weight_format", [None, "mixed"])
@pytest.mark.parametrize(("make", "options"), SHARED.values(), ids=SHARED.keys())
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_clip_is_the_same_by_one_thread_by_two_and_in_a_batch(name, make, options, weight_format, monkeypatch):
    """Two threads share the steps of one clip where it has poolings; four share two clips."""
    generator = WaveformGenerator(make(name), weight_format)
    with threads(1, monkeypatch):
        expected = generator.generate(3, 0.3, seed=5, **options)
    assert expected.classes.unique().numel() > 20
    for count, first, clips in ((2, 0, 1), (2, 2, 1), (3, 0, 3), (4, 1, 2), (1, 1, 1)):
        with threads(count, monkeypatch):
            found = generator.generate(clips, 0.3, seed=5, first_clip=first, **options)
        assert torch.equal(found.classes, expected.classes[first : first + clips])
        assert torch.equal(found.log_likelihoods, expected.log_likelihoods[first : first + clips])


@native
def test_a_stream_is_the_same_by_one_thread_and_by_two(monkeypatch):
    """Each piece is a call of its own, which leaves no group to the next one."""
    generator = WaveformGenerator(model_of("two unlike poolings"))
    with threads(1, monkeypatch):
        expected = torch.cat(list(generator.stream(0.3, seed=5)))
    with threads(2, monkeypatch):
        found = torch.cat(list(generator.stream(0.3, seed=5)))
    assert torch.equal(found, expected)


@native
def test_a_single_processor_is_not_shared_by_two_threads(monkeypatch):
    helped = []
    run = step_program.Library.generate
    monkeypatch.setattr(
        step_program.Library, "generate", lambda self, work: (helped.append(work.helped), run(self, work))[1]
    )
    for count in (1, 2):
        with threads(count, monkeypatch):
            WaveformGenerator(model_of("two unlike poolings")).generate(1, 0.01)
    assert helped == [0, 1]


def test_formats_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="the weights 'int4' are unknown; use float32, bfloat16, int8, mixed"):
        WaveformGenerator(model_of("no pooling"), "int4")
    with use_backend("torch"), pytest.raises(InputError, match="for native steps, which this model has not"):
        WaveformGenerator(model_of("no pooling"), "int8")
    if native_library() is not None:
        with pytest.raises(InputError, match="this one is in float64"):
            WaveformGenerator(model_of("no pooling", torch.float64), "int8")


def test_likelihoods_are_those_of_the_model():
    model = model_of("three poolings", torch.float64)
    clips = WaveformGenerator(model).generate(2, 0.15, seed=1)
    inputs = torch.cat([torch.full((2, 1), 128), clips.classes[:, :-1]], dim=1)
    with torch.no_grad():
        nats, count, _ = model.loss(inputs, clips.classes)
    assert float(clips.bits_per_sample.mean()) == pytest.approx(float(nats) / int(count) / math.log(2), rel=1e-9)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_clip_depends_on_seed_and_number_alone(backend, monkeypatch):
    if backend == "native" and native_library() is None:
        pytest.skip("installed without the native library")
    monkeypatch.setattr(generation, "SAMPLES_AT_ONCE", 7)
    with use_backend(backend):
        generator = WaveformGenerator(model_of("two unlike poolings", torch.float64))
        many = generator.generate(4, 0.05, seed=9)
        alone = generator.generate(1, 0.05, seed=9, first_clip=2)
        assert torch.equal(alone.classes[0], many.classes[2])
        assert torch.equal(generator.generate(4, 0.05, seed=9).classes, many.classes)
        assert not torch.equal(generator.generate(4, 0.05, seed=10).classes, many.classes)
    assert len({tuple(clip.tolist()) for clip in many.classes}) == 4


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("samples_at_once", [None, 1, 7, 1000])
def test_a_stream_is_the_clip_piece_by_piece(backend, samples_at_once):
    if backend == "native" and native_library() is None:
        pytest.skip("installed without the native library")
    options = {"seed": 9, "temperature": 0.9, "prompt": classes(11)[0]}
    with use_backend(backend):
        generator = WaveformGenerator(model_of("two unlike poolings", torch.float64))
        whole = generator.generate(3, 0.05, **options)
        pieces = []
        for piece in generator.stream(0.05, **options, number=2, samples_at_once=samples_at_once):
            assert not torch.is_inference_mode_enabled()  # what the reader does between pieces is the reader's
            pieces.append(piece)
    assert torch.equal(torch.cat(pieces), whole.samples[2])
    at_once = RATE // 100 if samples_at_once is None else samples_at_once
    assert [len(piece) for piece in pieces[:2]] == [11, min(at_once, 50)]


def test_a_stream_is_refused_before_its_first_piece():
    generator = WaveformGenerator(model_of("no pooling"))
    for options in ({"seconds": 0.0}, {"temperature": -1.0}, {"samples_at_once": 0}, {"guidance": 2.0}):
        with pytest.raises(InputError):
            generator.stream(**options)


def test_attention_generates_through_pytorch():
    torch.manual_seed(0)
    model = WaveformModel(
        WaveformModelConfig(
            (SELECTIVE, StageConfig(1, "attention")), 16, (3,), quantiser=Quantiser(sample_rate_hz=RATE)
        )
    )
    generator = WaveformGenerator(model)
    assert not generator.is_native
    clips = generator.generate(2, 0.02, prompt=classes(11)[0])
    assert clips.classes.shape == (2, 31) and torch.equal(clips.classes[1, :11], classes(11)[0])


def test_load_generate_and_continue(tmp_path):
    model_of("no pooling").save_pretrained(tmp_path / "model")
    voice = audiomamba.load(tmp_path / "model")
    clips = voice.generate(clips=2, seconds=0.1, seed=3)
    audiomamba.write_waveform(tmp_path / "clip.wav", clips.samples[0], RATE)
    longer = voice.continue_clip(tmp_path / "clip.wav", seconds=0.05, seed=4)
    assert clips.samples.shape == (2, 100) and longer.samples.shape == (1, 150)
    assert relative_error(longer.samples[0, :100], clips.samples[0]) < 2e-4  # 16 bits in the file
    assert clips.real_time_factor == pytest.approx(clips.samples_per_second / RATE)
    resampled = voice.continue_clip(Waveform(torch.zeros(200), 2 * RATE), seconds=0.05)
    assert resampled.classes.shape == (1, 150)


def test_a_prompt_of_another_rate_is_refused(tmp_path):
    audiomamba.write_waveform(tmp_path / "clip.wav", torch.zeros(50), 2 * RATE)
    generator = WaveformGenerator(model_of("no pooling"))
    with pytest.raises(InputError, match=r"clip\.wav has 2000 Hz but the model 1000 Hz; resample"):
        generator.continue_clip(tmp_path / "clip.wav")


@pytest.mark.parametrize(
    "options", [{"clips": 0}, {"seconds": 0.0}, {"seconds": math.nan}, {"seed": -1}, {"temperature": -1}, {"top_p": 0}]
)
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(InputError):
        WaveformGenerator(model_of("no pooling")).generate(**options)


def test_the_drawn_class_follows_the_cumulative_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3]])).expand(5, 3)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.69, 0.999999])
    assert sample_classes(logits, uniforms)[0].tolist() == [0, 0, 1, 1, 2]
    assert sample_classes(logits, uniforms, top_p=0.7)[0].tolist() == [0, 0, 0, 2, 2]
    assert sample_classes(logits, uniforms, temperature=0)[0].tolist() == [0] * 5
    assert torch.allclose(sample_classes(logits, uniforms)[1].exp(), torch.tensor([0.5, 0.5, 0.2, 0.2, 0.3]).double())


FLAWS = {
    "silent": lambda time: torch.zeros(8000),
    "clipped": lambda time: (3 * torch.sin(440 * time)).clamp(-1, 1),
    "shifted": lambda time: 0.2 * torch.sin(440 * time) + 0.3,
    "runaway": lambda time: torch.rand(8000, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95,
}


@pytest.mark.parametrize(("flaw", "make"), FLAWS.items(), ids=FLAWS.keys())
def test_flaws_of_a_clip_are_named(flaw, make):
    time = torch.arange(8000) / 8000 * 2 * math.pi
    assert flags_of(make(time)) == (flaw,)
    assert flags_of(0.5 * torch.sin(440 * time)) == ()


def test_real_clips_bound_the_likelihood():
    assert likelihoods_of_real_clips(torch.linspace(0, 1, 101)) == pytest.approx((0.05, 0.95))
    with pytest.raises(InputError, match="20 real clips"):
        likelihoods_of_real_clips(torch.zeros(5))


@native
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_models_without_attention_have_native_steps(name):
    config = architecture(name)
    uses_attention = any(mixer["name"] == "attention" for stage in config.stages for mixer in stage.mixers())
    model = WaveformModel(WaveformModelConfig(config.stages, 8, config.pooling))
    assert (steps_library(model) is None) == uses_attention


def test_importing_the_package_does_not_import_torch():
    code = "import sys, audiomamba; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
