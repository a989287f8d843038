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
# # Classify a contig and explain the call
#
# The shipped model `yeasts` tells three species of *Saccharomyces* apart. Here it classifies contigs of a chromosome
# that it was not trained on, and one of *Escherichia coli*, and we look at where along a contig the evidence comes
# from.

# %%
import gzip
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import genomamba
from genomamba.classification.class_track import class_track
from genomamba.tokenizer import CharacterTokenizer

# The folder of the repository that has the contigs.
DEMO = Path(os.environ.get("GENOMAMBA_DEMO", "../../demo"))
WANTED = ("cerevisiae_4096_1", "cerevisiae_16384_1", "paradoxus_16384_1", "arboricola_16384_1", "escherichia_coli")

# %%
contigs, name = {}, None
with gzip.open(DEMO / "contigs.fa.gz", "rt") as lines:
    for line in lines:
        if line.startswith(">"):
            name = line[1:].split()[0]
        elif name in WANTED:
            contigs[name] = contigs.get(name, "") + line.strip()
{name: len(letters) for name, letters in contigs.items()}

# %% [markdown]
# ## The calls
#
# Every contig gets one of the three classes, *E. coli* too: the model has to choose. `unknown_rate` adds the question
# whether a contig is as likely as sequences that were held out of training.

# %%
model = genomamba.load("yeasts")
table = model.classify(contigs, unknown_rate=0.01)
table.to_pandas()

# %% [markdown]
# ## Where the evidence comes from
#
# Each window of the contig by itself, given what precedes it. Single windows are hardly ever certain; their log-
# likelihood ratios add up, which is why a long contig is.

# %%
letters = contigs["cerevisiae_16384_1"]
track = class_track(model.model, CharacterTokenizer().encode(letters), most_windows=64)
figure, axes = plt.subplots(figsize=(9, 3))
centres = (track.boundaries[1:] + track.boundaries[:-1]) / 2
for label, probabilities in zip(model.class_names, track.probabilities.T, strict=True):
    axes.plot(centres, probabilities, label=label)
axes.set(xlabel="position (bp)", ylabel="probability of the window", ylim=(0, 1))
axes.legend()
figure.tight_layout()

# %%
shares = track.probabilities.argmax(axis=1)
for number, label in enumerate(model.class_names):
    print(f"{label}: most probable in {np.mean(shares == number):.0%} of the windows")
assert np.allclose(track.probabilities.sum(axis=1), 1)

# %% [markdown]
# ## The other strand
#
# A contig and its reverse complement get the same call.

# %%
forward = {"forward": letters}
complement = str.maketrans("ACGTacgt", "TGCAtgca")
both = model.classify(forward | {"reverse": letters.translate(complement)[::-1]})
print(both)
assert len(set(both["call"])) == 1
