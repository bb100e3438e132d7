"""Slim models in transformers: a configuration with the structure, and an image classification model.

Importing this module registers both with the Auto classes of transformers, see `slimming.register_with_transformers`.
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
    """The configuration of a slim model: the names of the classes, and the structure in ``model_args`` as in timm."""

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(self, model_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs.pop("num_classes", None)
        super().__init__(**kwargs)
        self.model_args = model_args or {}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, with the fields that timm reads."""
        config = super().to_dict()
        if "architecture" in config:
            config["num_classes"] = self.num_labels
            config["label_names"] = [(self.id2label or {})[label] for label in range(self.num_labels)]
        return config


class SlimmingForImageClassification(transformers.PreTrainedModel):
    """A slim model with the interface of transformers; its attribute ``model`` is what `slimming.load` returns.

    Args:
        config: the configuration with the structure.
        model: the slim model; None builds one with random weights.
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
                raise CheckpointError("This configuration has no structure, so it does not describe a slim model.")
            # from_pretrained builds on the meta device, but buffers outside the state dict need their values.
            loading = torch.get_default_device().type == "meta"
            with torch.device("cpu"):
                model = build(structure) if loading else build_filled(structure)
            if classes_of(model) != config.num_labels:
                reset_classes_(model, config.num_labels)
        self.model = model
        self._unsaved_buffers = {
            id(module): {
                name: module._buffers[name].clone()  # pyright: ignore[reportOptionalMemberAccess]
                for name in module._non_persistent_buffers_set
                if module._buffers.get(name) is not None
            }
            for module in model.modules()
        }
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Restore the buffers outside the state dict, and initialise weights that no file contained."""
        for name, saved in self._unsaved_buffers.get(id(module), {}).items():
            current = module._buffers[name]
            module._buffers[name] = saved if current is None else saved.to(current.device, current.dtype)
        reset: Any = getattr(module, "reset_parameters", None)
        missing = [p for p in module.parameters(recurse=False) if not getattr(p, "_is_hf_initialized", False)]
        if missing and reset is not None:
            reset()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, but never with the older tensor names that it has for some models."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as torch does, also with the names that `slimming.save` writes."""
        state = unprefixed(state_dict, self.model)
        renamed = {f"{self.base_model_prefix}.{name}": tensor for name, tensor in state.items()}
        return super().load_state_dict(renamed, *args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Logits (B, classes) of images (B, C, H, W), and the cross-entropy if labels (B,) are given."""
        output = self.model(pixel_values)
        logits = getattr(output, "logits", output)
        if isinstance(logits, (tuple, list)):  # in training, distilled models return the outputs of two classifiers
            logits = torch.stack(list(logits)).mean(0)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)


transformers.AutoConfig.register(MODEL_TYPE, SlimmingConfig)
transformers.AutoModelForImageClassification.register(SlimmingConfig, SlimmingForImageClassification)
