"""Data loading: tar shards, sample order, decoding, tokenizers and batches."""
