"""`genomamba help TOPIC`: short pages on what several commands share."""

TOPICS = {
    "models": (
        "what MODEL may be",
        """
        A model is a folder with config.json, model.safetensors and README.md (its card); every training command
        writes one. Wherever a command takes MODEL it takes

          yeasts                      a folder
          hf://owner/name@revision    a model on the Hugging Face Hub, downloaded once

        Language models may also be checkpoints of transformers (Mamba), mamba_ssm or Caduceus. Nothing is ever
        unpickled but tensors. `genomamba share` checks a folder and uploads it.
        """,
    ),
    "formats": (
        "which files are read and written",
        """
        Sequences   FASTA and FASTQ, recognised by content; gzip, bgzip, bzip2, xz and Zstandard; - is standard input
        References  FASTA, plain or compressed with bgzip, indexed on first use
        Variants    VCF and BCF, plain or compressed                         (extra `variants`)
        Tables      TSV, CSV; a name ending in .gz compresses
        Vectors     .npz, .parquet, .h5ad (AnnData)                          (extra `tables`)
        Tracks      bedGraph, bigWig                                         (extra `tables`)
        Calls       TSV, HTML, MultiQC, Kraken's report, BIOM
        Sound       WAV, FLAC, OGG, MP3                                      (extra `audio`)

        Files appear under their name only when they are complete.
        """,
    ),
    "resuming": (
        "what happens when a run is stopped",
        """
        A training run saves its state about every 30 seconds, and after the current step on Ctrl-C, SIGTERM and
        SIGHUP. The same command with --resume goes on, to the same numbers; where there is nothing to resume, it
        starts. So put --resume into a job script from the beginning. A finished run is extended with a larger
        --steps. A run folder belongs to one process at a time.
        """,
    ),
    "recipes": (
        "where settings come from",
        """
        All settings of a training run other than its data stand in a recipe. --recipe NAME|FILE.yaml chooses one,
        --print-recipe prints it complete, --set section.key=value overrides a value:

          genomamba train --print-recipe --genome a=a.fa --length 8192 --output model
          genomamba train ... --set model.layers=8 --set optimizer.learning_rate=0.001

        The finished model and its report record the recipe.
        """,
    ),
    "devices": (
        "CPUs, GPUs and several processes",
        """
        --device auto|cpu|cuda|cuda:N   where to compute; auto takes a CUDA GPU of capability 8.0 or above
        --precision float32|bfloat16    of the linear layers; states stay in float32
        --threads N                     CPU threads of this process
        --processes N                   (classify) processes that share the input
        --strategy ddp|fsdp             with torchrun or srun: how processes share a training run
        --context-ranks N               (pretrain) processes that share each sequence

        Results do not depend on the number of threads or processes, to rounding.
        `genomamba doctor` says what is there.
        """,
    ),
    "environment": (
        "variables of the environment",
        """
        MAMBACORE_BACKEND=torch            use the plain PyTorch implementation
        MAMBACORE_INSTRUCTION_SET=NAME     avx512, avx2 or baseline, instead of the best that the processor has
        MAMBA_VERBOSITY=quiet|verbose      as --quiet and --verbose
        OMP_WAIT_POLICY=active             let waiting threads spin: faster on a machine of your own
        """,
    ),
    "exit-codes": (
        "what a status means",
        """
        0     done
        2     wrong input or options, a full disk, data that vanished: one line on standard error says which
        129   SIGHUP; training was saved
        130   interrupted with Ctrl-C; training was saved
        143   ended by SIGTERM; training was saved
        """,
    ),
}
