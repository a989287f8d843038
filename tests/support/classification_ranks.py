"""One of the processes that `torchrun` would start for `genomamba classify`, for tests."""

import os
import sys

from mambacore.errors import InputError
from mambapipelines.species.classify import ClassificationOptions, classify_files


def run_rank(rank: int, count: int, port: int, options: ClassificationOptions) -> None:
    """Classify as rank `rank` of `count` under the environment of `torchrun`; exit status 2 for bad input."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        classify_files(options)
    except InputError:
        sys.exit(2)
