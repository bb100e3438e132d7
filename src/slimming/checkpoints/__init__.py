"""Models on disk and on the Hugging Face hub, without pickle."""
