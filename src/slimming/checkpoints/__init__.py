"""Save and load models on disk and on the Hugging Face hub, without pickle."""
