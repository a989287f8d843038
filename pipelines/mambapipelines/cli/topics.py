"""`genomamba help TOPIC`: short pages on topics common to several commands."""

TOPICS = {
    "models": (
        "forms of a MODEL argument",
        """
        A model is a folder with config.json, model.safetensors and README.md (its card); every training command
        writes one. A MODEL argument may be

          yeasts                      a folder, or a model that comes with the package (`genomamba models`)
          hf://owner/name@revision    a model on the Hugging Face Hub, downloaded once

        Language models may also be checkpoints of transformers (Mamba), mamba_ssm or Caduceus. Pickles are loaded in
        the mode that accepts only tensors. `genomamba share` checks a folder and uploads it.
        """,
    ),
    "formats": (
        "file formats that are read and written",
        """
        Sequences   FASTA and FASTQ, recognised by content; gzip, bgzip, bzip2, xz and Zstandard; - is standard input
        References  FASTA, plain or compressed with bgzip, indexed on first use
        Variants    VCF and BCF, plain or compressed                         (extra `variants`)
        Tables      TSV, CSV; a name ending in .gz compresses
        Vectors     .npz, .parquet, .h5ad (AnnData)                          (extra `tables`)
        Tracks      bedGraph, bigWig                                         (extra `tables`)
        Calls       TSV, HTML, MultiQC, Kraken's report, BIOM
        Sound       WAV, FLAC, OGG, MP3                                      (extra `audio`)

        Files are written to a temporary name and renamed when complete.
        """,
    ),
    "resuming": (
        "interrupting and resuming a run",
        """
        A training run saves its state about every 30 seconds, and after the current step on Ctrl-C, SIGTERM and
        SIGHUP. The same command with --resume continues it, with identical results; if there is nothing to resume, it
        starts a new run, so a job script can always use --resume. A finished run can be extended with a larger
        --steps. Only one process at a time can use a run folder.
        """,
    ),
    "recipes": (
        "recipes and settings",
        """
        All settings of a training run other than its data are in a recipe. --recipe NAME|FILE.yaml chooses one,
        --print-recipe prints it completely, --set section.key=value overrides a value:

          genomamba train --print-recipe --genome a=a.fa --length 8192 --output model
          genomamba train ... --set model.layers=8 --set optimizer.learning_rate=0.001

        The finished model and its report record the recipe.
        """,
    ),
    "devices": (
        "CPUs, GPUs and several processes",
        """
        --device auto|cpu|cuda|cuda:N   device; auto is a CUDA GPU of capability 8.0 or above, else the CPU
        --precision float32|bfloat16    precision of the linear layers; states stay in float32
        --threads N                     CPU threads of this process
        --processes N                   (classify) processes that share the input
        --strategy ddp|fsdp             with torchrun or srun: how processes share a training run
        --context-ranks N               (pretrain) processes that share each sequence

        Up to rounding, results do not depend on the number of threads or processes.
        `genomamba doctor` reports the available devices and backends.
        """,
    ),
    "environment": (
        "environment variables",
        """
        MAMBACORE_BACKEND=torch            use the plain PyTorch implementation
        MAMBACORE_INSTRUCTION_SET=NAME     avx512, avx2 or baseline, instead of the best that the processor has
        MAMBA_VERBOSITY=quiet|verbose      as --quiet and --verbose
        OMP_WAIT_POLICY=active             let idle threads spin: faster on a machine without other load
        GLIBC_TUNABLES=                    give freed memory back to the system at once, as programs usually do
        """,
    ),
    "exit-codes": (
        "exit codes",
        """
        0     success
        2     invalid input or options, disk full, missing data: explained in one line on standard error
        129   SIGHUP; training was saved
        130   interrupted with Ctrl-C; training was saved
        143   terminated by SIGTERM; training was saved
        """,
    ),
}
