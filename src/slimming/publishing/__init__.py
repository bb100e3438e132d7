"""Share a slim model: the hub, its model card, timm and transformers."""
