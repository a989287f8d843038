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
# # Variant scores along a gene
#
# A language model of DNA scores each possible substitution of an open reading frame by its log-likelihood ratio. The
# model is pretrained here, for seconds, so that the notebook needs nothing but the repository. Its scores show how
# the pieces fit together and nothing about yeast: for that, pretrain for hours, or take a published checkpoint.

# %%
import gzip
import os
import re
from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import numpy as np

import genomamba
from mambapipelines.cli.genomamba.main import main

DEMO = Path(os.environ.get("GENOMAMBA_DEMO", "../../demo"))
place = Path(mkdtemp())

# %% [markdown]
# ## A reference
#
# The first 200,000 bases of the long contig of *S. cerevisiae*; the first half is for training.

# %%
with gzip.open(DEMO / "contigs.fa.gz", "rt") as lines:
    next(lines)
    letters = ""
    for line in lines:
        letters += line.strip().upper()
        if len(letters) >= 200_000:
            break
half = 100_000
reference = place / "reference.fa"
with reference.open("w") as stream:
    for name, part in (("train", letters[:half]), ("gene", letters[half : 2 * half])):
        stream.write(f">{name}\n" + "\n".join(part[k : k + 60] for k in range(0, half, 60)) + "\n")

# %% [markdown]
# ## A model

# %%
status = main(
    ["pretrain", "-r", str(reference), "--valid-chromosomes", "gene", "-l", "1024", "--recipe", "tiny", "-n", "30",
     "-o", str(place / "model"), "-q"]
)  # fmt: skip
assert status == 0

# %% [markdown]
# ## A gene
#
# The longest open reading frame of the forward strand, from ATG to a stop codon.

# %%
gene = letters[half : 2 * half]
frames = list(re.finditer(r"(?=(ATG(?:(?!TAA|TAG|TGA)...){50,}?(?:TAA|TAG|TGA)))", gene))
longest = max(frames, key=lambda match: len(match[1]))
begin, length = longest.start(), len(longest[1])
print(f"an open reading frame of {length // 3} codons at {begin + 1}")

# %% [markdown]
# ## Score every transition of its first 60 codons
#
# A transition exchanges A with G, or C with T.

# %%
TRANSITION = {"A": "G", "G": "A", "C": "T", "T": "C"}
positions = range(begin, begin + min(180, length))
rows = [f"gene\t{k + 1}\t.\t{gene[k]}\t{TRANSITION[gene[k]]}\t.\t.\t." for k in positions]
header = ["##fileformat=VCFv4.2", f"##contig=<ID=gene,length={half}>", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
(place / "variants.vcf").write_text("\n".join([*header, *rows]) + "\n")
scores = genomamba.load(place / "model").score_variants(place / "variants.vcf", reference, window=256)
assert set(scores["status"]) == {"scored"}

# %%
ratios = np.array(scores["log_likelihood_ratio"])
figure, axes = plt.subplots(figsize=(9, 3))
axes.bar(np.arange(len(ratios)), ratios, color=[f"C{k % 3}" for k in range(len(ratios))], width=1)
axes.set(xlabel="position in the gene (bp); colours are codon positions", ylabel="log-likelihood ratio (nats)")
figure.tight_layout()

# %%
for codon_position in range(3):
    chosen = ratios[codon_position::3]
    print(f"codon position {codon_position + 1}: mean {chosen.mean():+.3f} nats over {len(chosen)} variants")
