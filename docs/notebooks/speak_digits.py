# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Generate spoken digits and score them
#
# The shipped model `digits` generates sound sample by sample, 8,000 samples a second, in one of five voices.

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Audio, display

import audiomamba
from audiomamba.metrics.speech import speech_figures

# %%
voice = audiomamba.load("digits")
rate = voice.quantiser.sample_rate_hz
for labels in voice.label_sets:
    print(labels)

# %% [markdown]
# ## Generate
#
# A clip is a function of the model, the labels, the seed and its number. `guidance` exaggerates what the labels ask
# for.

# %%
clips = voice.generate(clips=2, seconds=0.6, seed=0, labels={"digit": "7"}, guidance=2.0)
print(f"{clips.real_time_factor:.2f} seconds of sound per second")
for samples in clips.samples:
    display(Audio(samples.numpy(), rate=rate))

# %%
figure, rows = plt.subplots(len(clips.samples), 2, figsize=(9, 4))
for (wave, spectrum), samples in zip(rows, clips.samples, strict=True):
    wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.5)
    spectrum.specgram(samples.numpy(), NFFT=256, noverlap=192, Fs=rate)
figure.tight_layout()

# %% [markdown]
# ## Score
#
# `bits_per_sample` says how surprising a clip is to the model itself, lower is likelier. The figures of speech need
# no model: the share of audible frames that are voiced, the flatness of the spectrum (1 is white noise), and the
# pitch.

# %%
print("bits per sample:", clips.bits_per_sample.numpy().round(2))
made = speech_figures(clips.samples, rate)
noise = speech_figures([clips.samples[0].new_tensor(np.random.default_rng(0).normal(size=rate) * 0.1)], rate)
print(
    f"generated: {made.voiced_share:.0%} voiced, flatness {made.flatness:.2f}, median pitch {made.pitch_hz[1]:.0f} Hz"
)
print(f"white noise: {noise.voiced_share:.0%} voiced, flatness {noise.flatness:.2f}")
assert made.flatness < noise.flatness

# %% [markdown]
# `audiomamba evaluate` scores many clips with an independent classifier, beside real clips of the test set.
