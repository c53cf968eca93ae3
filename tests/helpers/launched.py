"""Say how many processes train together, or why that is refused: `accelerator_for` alone.

python -m tests.helpers.launched [PROCESSES]
"""

import sys

from sparse.training.config import TrainConfig
from sparse.training.processes import accelerator_for

if __name__ == "__main__":
    asked = int(sys.argv[1]) if sys.argv[1:] else None
    try:
        accelerator = accelerator_for(TrainConfig(steps=1, folder="", processes=asked), None)
        sys.stdout.write(f"{accelerator.num_processes} together\n")
    except ValueError as error:
        sys.stdout.write(f"refused: {error}\n")
