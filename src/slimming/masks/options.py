"""Names of the ways in which token masks act. Imports no PyTorch, so that ``--help`` is fast."""

BIAS, MULTIPLY = TOKEN_MASKS = ("bias", "multiply")
"""``"bias"`` adds log(mask) to the attention logits of a key, so that a mask of 0 equals removal; ``"multiply"``
multiplies the outputs of norms, as in the ViT-Slim paper."""
