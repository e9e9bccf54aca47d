"""`python -m pretrain.training CONFIG OUTPUT [key.path=value ...]`: one rank, as a launcher starts it."""

import sys

from data_pipeline.errors import UserError
from pretrain.configuration import load_config
from pretrain.training.distributed import leave
from pretrain.training.rank import run

if __name__ == "__main__":
    try:
        leave(run(load_config(sys.argv[1], sys.argv[3:]), sys.argv[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(error.exit_code)
