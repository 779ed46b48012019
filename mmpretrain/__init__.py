"""mmpretrain: multimodal pre-training, exact over ranks, workers and micro-batches."""

import os

__version__ = "0.1.0"

# Before torch loads OpenMP. Its threads wait for each other by spinning; with decoding workers or another program on
# the same cores that costs training a factor of ten, and sleeping instead costs an idle machine nothing measurable.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
