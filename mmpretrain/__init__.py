"""mmpretrain: multimodal pre-training, exact over ranks, workers and micro-batches."""

__version__ = "0.1.0"
