"""Slim models as transformers knows them: a configuration that carries the structure, and an image classifier.

Registered with transformers' Auto classes when this module is imported, see `slimming.register_with_transformers`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from slimming.errors import CheckpointError
from slimming.models.directories import MODEL_TYPE, structure_in, unprefixed
from slimming.models.families import build, build_filled
from slimming.models.hosts import classes_of, reset_classes_


class SlimmingConfig(transformers.PreTrainedConfig):
    """The configuration of a slim model: names of classes and the structure, in ``model_args`` as timm has it."""

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(self, model_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs.pop("num_classes", None)
        super().__init__(**kwargs)
        self.model_args = model_args or {}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it, with what timm reads of it."""
        found = super().to_dict()
        if "architecture" in found:
            found["num_classes"] = self.num_labels
            found["label_names"] = [(self.id2label or {})[label] for label in range(self.num_labels)]
        return found


class SlimmingForImageClassification(transformers.PreTrainedModel):
    """A slim model with the face of transformers: ``model`` is what `slimming.load` gives.

    Args:
        config: with the structure.
        model: the slim model, if it is there already; otherwise it is made with random weights.
    """

    config_class: ClassVar[Any] = SlimmingConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules: ClassVar[Any] = []

    def __init__(self, config: SlimmingConfig, model: nn.Module | None = None) -> None:
        super().__init__(config)
        if model is None:
            structure = structure_in(config.to_dict())
            if structure is None:
                raise CheckpointError("This configuration has no structure; it is not of a slim model.")
            # from_pretrained makes models without values; tables that no file holds must have theirs all the same.
            loading = torch.get_default_device().type == "meta"
            with torch.device("cpu"):
                model = build(structure) if loading else build_filled(structure)
            if classes_of(model) != config.num_labels:
                reset_classes_(model, config.num_labels)
        self.model = model
        self._tables = {
            id(module): {
                name: module._buffers[name].clone()  # pyright: ignore[reportOptionalMemberAccess]
                for name in module._non_persistent_buffers_set
                if module._buffers.get(name) is not None
            }
            for module in model.modules()
        }
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Give a module that no file filled its random weights, and the tables that no file holds."""
        for name, table in self._tables.get(id(module), {}).items():
            now = module._buffers[name]
            module._buffers[name] = table if now is None else table.to(now.device, now.dtype)
        reset: Any = getattr(module, "reset_parameters", None)
        missing = [p for p in module.parameters(recurse=False) if not getattr(p, "_is_hf_initialized", False)]
        if missing and reset is not None:
            reset()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers does, with the names that the tensors have, also where it knows older ones."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As torch does, also for the names that `slimming.save` writes."""
        own = unprefixed(state_dict, self.model)
        renamed = {f"{self.base_model_prefix}.{name}": tensor for name, tensor in own.items()}
        return super().load_state_dict(renamed, *args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits (B, classes) of images (B, C, H, W), and with labels (B,) the cross-entropy."""
        found = self.model(pixel_values)
        logits = getattr(found, "logits", found)
        if isinstance(logits, (tuple, list)):  # distilled models train with two classifiers
            logits = torch.stack(list(logits)).mean(0)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)


transformers.AutoConfig.register(MODEL_TYPE, SlimmingConfig)
transformers.AutoModelForImageClassification.register(SlimmingConfig, SlimmingForImageClassification)
