"""Inputs of the DNA commands to damage, and the whole files that damaged ones are made of."""

import gzip
import shutil
from functools import cache
from pathlib import Path

import torch

from fuzzing import Target
from genomamba.data.targets import TargetDescription
from genomamba.models.sequence_model import save_sequence_model, sequence_model_on
from mambapipelines.cli.genomamba.main import main
from tiny_language_models import language_model, model_folder, random_letters, write_fasta
from tiny_species import bases, fasta, write_tiny_model

LETTERS = random_letters(300, 1)
FASTA = b">one first\nACGTNNACGT\nRYKM\n>two\n" + LETTERS[:90] + b"\n"
FASTQ = b"@one\nACGTNACGT\n+\nIIIIIIIII\n@two first\nACG\n+two\n@@@\n"
VCF = (
    b"##fileformat=VCFv4.2\n##contig=<ID=chr1,length=300>\n"
    b'##INFO=<ID=AC,Number=A,Type=Integer,Description="x">\n'
    b"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    b"chr1\t20\trs1\t" + LETTERS[19:20] + b"\tA,<DEL>,CGG\t9\tPASS\tAC=1,2,3\n"
    b"chr1\t200\t.\t" + LETTERS[199:202] + b"\tT\t.\t.\t.\n"
)
BED = b"track name=x\nchr1\t5\t60\tname\t0\t-\nchr1\t100\t300\n#comment\n"
INTERVALS = b"chr1\t0\t64\ttrain\nchr1\t64\t128\tvalid\nchr1\t128\t192\ttest\n"
READS_WORDS = (b">", b"@", b"+", b"ACGT", b"nnnn", b"*", b";", b".", b"-")
BED_WORDS = (b"chr1", b"chr9", b"-5", b"60", b"1e3", b"browser", b"+", b"train", b"valid")
VCF_WORDS = (b"chr1", b"-1", b"301", b"<DEL>", b"*", b".", b"##contig=<ID=chr1>\n", b"A", b"ACGT")
TABLE_WORDS = (
    b"sequence",
    b"label",
    b"split",
    b"train",
    b"test",
    b"ACGT",
    b",",
    b"\t",
    b'"',
    b"<0.01",
    b"inf",
    b"NA",
    b"1.0",
)
RECIPE = (
    b"minutes: 0.1\nprecision: float32\nmodel:\n  model_width: 16\n  layers: 2\noptimizer:\n  learning_rate: 0.01\n"
)
RECIPE_WORDS = (
    b":",
    b"\n  ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!python/object:os.system",
    b"layers: 1e9",
    b"{",
    b"}",
    b"model:",
)


def prepare(material: Path) -> Path:
    """Write the models and files that the commands use."""
    write_tiny_model(material / "species")
    model_folder(material / "language", "causal")
    targets = TargetDescription("classes", ("kind",), ("a", "b"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fine_tuned = sequence_model_on(language_model("causal"), targets, "mean", True).float()
    save_sequence_model(material / "fine-tuned", fine_tuned, {})
    write_fasta(material / "genome.fa", {"chr1": LETTERS})
    for number, name in enumerate("ab"):
        (material / f"{name}.fa").write_bytes(fasta({"c1": bases(3000, number), "c2": bases(2000, number + 2)}))
    (material / "reads.fa").write_bytes(FASTA)
    (material / "x.vcf").write_bytes(VCF.replace(b"chr1", b"1"))
    (material / "indexed").mkdir()
    shutil.copy(material / "genome.fa", material / "indexed")
    run = ["train", *_genomes(material), "--holdout", "c2", "--length", "128", "--recipe", "tiny", "--steps", "2"]
    assert main([*run, "--threads", "1", "--output", str(material / "run")]) == 0
    return material


def _genomes(material: Path) -> list[str]:
    return [part for name in "ab" for part in ("--genome", f"{name}={material / name}.fa")]


@cache
def targets(material: Path) -> dict[str, Target]:
    """Name -> target."""
    species, language, fine_tuned = (str(material / name) for name in ("species", "language", "fine-tuned"))
    genome, reads = str(material / "genome.fa"), str(material / "reads.fa")
    table = b"sequence\tlabel\tsplit\n" + b"".join(
        b"%s\t%s\t%s\n" % (bases(24, number), (b"a", b"b")[number % 2], (b"train", b"valid", b"test")[number % 3])
        for number in range(12)
    )
    run_state = sorted((material / "run" / "training").rglob("state.json"))

    def output(place: Path) -> list[str]:
        return ["--output", str(place / "out"), "--threads", "1"]

    def into(folder: Path, name: str, then: list[str]):  # type: ignore[no-untyped-def]
        """A command on a copy of a folder in which one file is the damaged one."""

        def command(path: Path, place: Path) -> list[str]:
            copy = place / "copy"
            shutil.copytree(folder, copy)
            shutil.move(path, copy / name)
            return [part.replace("COPY", str(copy)).replace("PLACE", str(place)) for part in then]

        return command

    scoring = ("score-variants", language, "--reference", genome, "--window", "32")

    def regions(command: str, ending: str):  # type: ignore[no-untyped-def]
        return lambda path, place: [
            command, language, "--bed", str(path), "--reference", genome, "--output", str(place / f"out.{ending}"),
        ]  # fmt: skip

    def simple(*command: str):  # type: ignore[no-untyped-def]
        """A command in which PATH is the damaged input and PLACE the folder of the case."""
        return lambda path, place: [
            part.replace("PATH", str(path)).replace("PLACE", str(place)) for part in (*command, *output(place))
        ]

    found = [
        Target("reads", (FASTA, FASTQ), simple("classify", species, "PATH"), words=READS_WORDS),
        Target(
            "compressed reads",
            (gzip.compress(FASTA, mtime=0), gzip.compress(FASTQ * 50, mtime=0)),
            simple("classify", species, "PATH"),
            words=(b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"),
        ),
        Target(
            "paired reads",
            (FASTQ, b"@r/1\nACG\n+\nIII\n@r/2\nACGT\n+\nIIII\n"),
            simple("classify", species, "PATH", "--paired"),
            words=READS_WORDS,
        ),
        Target(
            "groups",
            (b"one\tg1\ntwo\tg2\n",),
            simple("classify", species, reads, "--group-by", "PATH", "--groups-output", "PLACE/g"),
            outputs=("out", "g"),
        ),
        Target(
            "genome list",
            (f"name\tpath\na\t{material}/a.fa\nb\t{material}/b.fa\n".encode(),),
            simple("evaluate", species, "--genomes", "PATH", "--baseline", "none", "--lengths", "64"),
            words=(b"a", b"b", str(material / "a.fa").encode(), b"*", b"?", b"["),
        ),
        Target(
            "genome to train on",
            (fasta({"c1": bases(600), "c2": bases(300, 2)}),),
            lambda p, d: [
                *["train", "--genome", f"a={p}", "--genome", f"b={material}/b.fa", "--length", "64"],
                *["--recipe", "tiny", "--steps", "1", *output(d)],
            ],
            words=READS_WORDS,
            outputs=(),
        ),
        Target("regions to embed", (BED,), regions("embed", "npz"), words=BED_WORDS, outputs=("out.npz",)),
        Target("regions to track", (BED,), regions("track", "bedgraph"), words=BED_WORDS, outputs=("out.bedgraph",)),
        Target(
            "region option",
            (b"chr1:5-60", b"chr1", b"chr1:1,0-"),
            lambda p, d: [
                *["track", language, "--reference", genome, "--region", p.read_bytes().decode("utf-8", "replace")],
                *["--output", str(d / "out")],
            ],
            words=BED_WORDS,
        ),
        Target(
            "variants",
            (VCF,),
            simple(*scoring, "PATH"),
            words=VCF_WORDS,
            file_name="x.vcf",
            found=(VCF.replace(b"VCFv4.2", b"VCF\x80v4.2"),),
        ),
        Target(
            "chromosome map",
            (b"1\tchr1\nX\tchrX\n",),
            simple(*scoring, str(material / "x.vcf"), "--chromosome-map", "PATH"),
        ),
        Target(
            "intervals",
            (INTERVALS,),
            lambda p, d: [
                *["intervals", "audit", "--intervals", str(p), "--reference", genome, "--length", "64"],
                *["--rule", "hyenadna", "--fix", "trim", "--output", str(d / "out")],
            ],
            words=BED_WORDS,
        ),
        Target(
            "fine-tuning table",
            (table, table.replace(b"\t", b","), table.replace(b"\ta\t", b"\t1.5\t").replace(b"\tb\t", b"\t-2\t")),
            simple("finetune", "--table", "PATH", "--recipe", "tiny", "--steps", "1"),
            words=TABLE_WORDS,
            outputs=(),
        ),
        Target(
            "table to predict",
            (table, table.replace(b"\t", b","), b"name,sequence\nx,ACGT\n"),
            simple("predict", fine_tuned, "PATH"),
            words=TABLE_WORDS,
        ),
        Target("prompt", (FASTA,), simple("generate", language, "--length", "8", "--prompt", "PATH")),
        Target(
            "recipe",
            (RECIPE,),
            simple("train", *_genomes(material), "--length", "64", "--recipe", "PATH", "--print-recipe"),
            words=RECIPE_WORDS,
            file_name="recipe.yaml",
        ),
        Target(
            "index of a genome",
            (b"chr1\t300\t6\t60\t61\n",),
            into(
                material / "indexed",
                "genome.fa.fai",
                ["track", language, "--reference", "COPY/genome.fa", "--output", "PLACE/out"],
            ),
            words=(b"chr1", b"300", b"60", b"61", b"-1"),
        ),
        *(
            Target(
                f"configuration of a {kind} model",
                ((folder / "config.json").read_bytes(),),
                into(folder, "config.json", [*command, "--output", "PLACE/out"]),
                words=(b"[" * 5000, b"{", b'"layers": 1000000000', b'"model_width": 1000000', b"NaN", b"Infinity"),
                structured=True,
            )
            for kind, folder, command in (
                ("species", material / "species", ["classify", "COPY", reads]),
                ("language", material / "language", ["embed", "COPY", reads]),
                ("fine-tuned", material / "fine-tuned", ["predict", "COPY", reads]),
            )
        ),
        Target(
            "weights",
            ((material / "species" / "model.safetensors").read_bytes(),),
            into(material / "species", "model.safetensors", ["classify", "COPY", reads, "--output", "PLACE/out"]),
        ),
        Target(
            "metrics of a run",
            ((material / "run" / "training" / "metrics.csv").read_bytes(),),
            into(material / "run", "training/metrics.csv", ["report", "COPY", "--output", "PLACE/out"]),
            words=(b",", b"loss", b"step", b"nan", b"inf", b"1e400"),
        ),
        Target(
            "state of a run",
            (run_state[-1].read_bytes(),),
            into(
                material / "run",
                str(run_state[-1].relative_to(material / "run")),
                [
                    *["train", *_genomes(material), "--holdout", "c2", "--length", "128", "--recipe", "tiny"],
                    *["--steps", "3", "--threads", "1", "--output", "COPY", "--resume"],
                ],
            ),
            structured=True,
            outputs=(),
        ),
    ]
    return {target.name: target for target in found}
