"""`deepspeed train/main.py [--config FILE] [key=value ...]`: parse, join, train, leave."""

from __future__ import annotations

import os
import sys
import time

from pipeline.settings import ConfigError
from train.config import parse
from train.ranks import USER_ERRORS, AgreedError

# The launcher ends all ranks of a node as soon as one has failed: this long, those that would say
# the same leave it to the one that speaks for them, which may have been started later.
SPEAKER_S = 10.0


def main(arguments: list[str]) -> int:
    """Run this rank of a training run; return the exit status."""
    try:
        config = parse(arguments)
    except ConfigError as error:
        # All ranks of a node have read the same files: one speaks.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(SPEAKER_S)
        return fail(str(error))
    # DeepSpeed takes seconds to import: not before the settings are known to be right.
    from train.engine import join_ranks, leave_ranks
    from train.trainer import Trainer

    try:
        ranks = join_ranks()
        Trainer(config, ranks).run()
    except AgreedError as error:
        if os.environ["RANK"] == "0":
            fail(str(error))
        leave_ranks()
        return 1
    except USER_ERRORS as error:
        status = fail(f"rank {os.environ.get('RANK', '0')}: {error}")
        os._exit(status)  # without the others, which may wait for this rank: leaving could hang
    leave_ranks()
    return 0


def fail(message: str) -> int:
    """Report what the user can mend, on one line, and return the exit status."""
    sys.stderr.write(f"train: {message}\n")
    sys.stderr.flush()
    return 1


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed. Native threads of gloo may still run, and the interpreter's
    # teardown under them now and then aborts a finished run ("terminate called without …").
    os._exit(exit_status)
