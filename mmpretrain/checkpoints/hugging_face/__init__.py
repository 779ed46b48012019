"""Export to folders that Hugging Face's `transformers` loads with `from_pretrained`."""
