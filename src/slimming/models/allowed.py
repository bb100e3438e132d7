"""Lists of what a checkpoint or a config.json may pass to the constructors of timm, transformers and torchvision.

Files are read from strangers. They may give a constructor numbers, flags, and words such as the name of an activation;
never a path, an address, a repository, a file of weights or a flag that asks for pretrained weights. Arguments that a
user gives in Python or on the command line are not restricted.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import nn

from slimming.errors import CheckpointError

WORD = re.compile(r"[\w+ -]{0,64}")
"""Strings that may be arguments: without a slash, a colon or a dot they are no path, address, repository or file."""
NAME = re.compile(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_]{1,100})?")
"""Names of timm's registry, with or without a tag."""
MODULES = re.compile(r"[\w.]{0,200}")
"""Names of modules, by which backbones name the features that they return."""
LARGEST, LONGEST, DEEPEST, MOST_CLASSES = 10**7, 10_000, 6, 10**6
"""Bounds of an integer, of the length of a list and of the nesting of lists."""

TIMM_EXTRA = frozenset({"bn_eps", "bn_momentum", "drop_connect_rate", "features_only", "out_indices"})
"""Arguments of timm's builders that are not those of a model class."""
TIMM_EXCLUDED = frozenset({"self", "kwargs", "args", "cfg", "device", "dtype", "model_cfg"})

TORCHVISION: Mapping[str, tuple[type, float, float]] = {
    "num_classes": (int, 1, MOST_CLASSES),
    "image_size": (int, 1, 100_000),
    "dropout": (float, 0, 1),
    "attention_dropout": (float, 0, 1),
    "stochastic_depth_prob": (float, 0, 1),
    "width_mult": (float, 0, 100),
    "groups": (int, 1, 10_000),
    "width_per_group": (int, 1, 10_000),
    "min_size": (int, 1, 100_000),
    "max_size": (int, 1, 100_000),
    "num_keypoints": (int, 1, 10_000),
    "trainable_backbone_layers": (int, 0, 100),
    "aux_logits": (bool, 0, 1),
    "aux_loss": (bool, 0, 1),
    "transform_input": (bool, 0, 1),
    "init_weights": (bool, 0, 1),
    "zero_init_residual": (bool, 0, 1),
    "memory_efficient": (bool, 0, 1),
}
"""Arguments of torchvision's builders: type, least and largest value."""

REFUSED = frozenset({
    *("auto_map", "trust_remote_code", "custom_pipelines", "quantization_config", "fusion_config", "kernel_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
    *("use_pretrained_backbone", "pretrained", "pretrained_backbone", "weights", "weights_backbone", "backbone"),
    *("checkpoint", "checkpoint_path", "cache_dir", "url", "file", "hf_hub_id", "hf_hub_filename", "custom_load"),
    *("state_dict", "backbone_kwargs", "adapter_kwargs", "gguf_file", "subfolder"),
})  # fmt: skip
"""Fields that a configuration of transformers may not set, at any depth."""
OWN_WORDS: Mapping[str, frozenset[str]] = {
    name: frozenset({"eager", "sdpa"})
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
}
"""Values of `REFUSED` fields that are harmless: implementations that transformers contains."""
DROPPED = frozenset({
    *("_name_or_path", "transformers_version", "tokenizer_class", "torchscript", "_commit_hash"),
    *("finetuning_task", "task_specific_params", "prefix", "feature_extractor_type", "image_processor_type"),
})  # fmt: skip
"""Fields that describe where a configuration comes from, and are not passed on."""
LABELS = ("id2label", "label2id")
BACKBONE_FIELDS = frozenset({"out_features", "out_indices", "_out_features", "_out_indices", "stage_names"})
IMAGE_SETTINGS: Mapping[str, type | tuple[type, ...]] = {
    "input_size": (list, tuple),
    "mean": (list, tuple),
    "std": (list, tuple),
    "interpolation": str,
    "crop_pct": (int, float),
    "crop_mode": str,
    "label_names": (list, tuple),
}


def check_timm(name: Any, arguments: Any) -> None:
    """Check the name and the arguments of a model of timm that a file gives.

    Raises:
        CheckpointError: timm's registry does not have the name, or an argument is not allowed.
    """
    import timm

    if not timm_has(name):
        # timm would look for an unknown name on the Hugging Face hub.
        raise CheckpointError(
            f"timm {timm.__version__} has no architecture {name!r}. Install the timm version named in provenance.json."
        )
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"The arguments of {name} are no mapping; the file is damaged. Take an intact copy.")
    allowed = timm_arguments()
    for key, value in arguments.items():
        if key not in allowed:
            raise _refusal(name, key)
        check_value(name, key, value)
        rate = isinstance(key, str) and key.endswith("_rate") and value is not None
        if rate and not all(0 <= part <= 1 for part in _numbers(value)):
            raise CheckpointError(f"{name}: {key} is {value!r}, and must be between 0 and 1. Take an intact copy.")


def timm_has(name: Any) -> bool:
    """Whether ``name`` is in timm's registry, apart from ``slimming``, which takes the path of a checkpoint."""
    import timm

    if not isinstance(name, str) or not NAME.fullmatch(name):
        return False
    bare = name.partition(".")[0]
    return bare != "slimming" and timm.is_model(bare)


@cache
def timm_arguments() -> frozenset[str]:
    """Names of the arguments of timm's model classes (sizes, rates, layers), without those of `create_model` itself."""
    import timm  # noqa: F401 (imports the modules below)

    names: set[str] = set()
    for module, content in list(sys.modules.items()):
        if not module.startswith("timm.models."):
            continue
        for cls in list(vars(content).values()):
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module:
                parameters = inspect.signature(cls.__init__).parameters
                names.update(parameters if "num_classes" in parameters else ())
    return frozenset((names | TIMM_EXTRA) - TIMM_EXCLUDED)


def check_torchvision(name: Any, arguments: Any) -> None:
    """Check the name and the arguments of a model of torchvision that a file gives.

    Raises:
        CheckpointError: torchvision has no such model, or an argument is not allowed.
    """
    import torchvision

    if name not in torchvision.models.list_models():
        raise CheckpointError(
            f"torchvision {torchvision.__version__} has no model {name!r}. Install the version named in "
            "provenance.json."
        )
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"The arguments of {name} are no mapping; the file is damaged. Take an intact copy.")
    for key, value in arguments.items():
        if key == "weights_backbone" and value is None:
            continue
        if key not in TORCHVISION:
            raise _refusal(name, key)
        kind, least, largest = TORCHVISION[key]
        types = (int, float) if kind is float else (kind,)
        if value is not None and (type(value) not in types or not least <= value <= largest):
            raise CheckpointError(
                f"{name}: {key} is {value!r}, and must be {kind.__name__} from {least} to {largest}. Take an intact "
                "copy."
            )


def transformers_config(cls: Any, content: Any, *, where: str = "config") -> dict[str, Any]:
    """The fields of a configuration of transformers that a file may set; other fields are dropped.

    Args:
        cls: class of the configuration.
        content: its fields, as JSON values.
        where: name of the configuration in messages.

    Raises:
        CheckpointError: a field names a file, an address, code or pretrained weights, or its value is not plain.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where} is no mapping; the file is damaged. Take an intact copy.")
    fields, safe = config_fields(cls), {}
    of_timm = getattr(cls, "model_type", "") in ("timm_backbone", "timm_wrapper")
    for key, value in content.items():
        if key in DROPPED:
            continue
        if of_timm and key in ("backbone", "architecture", "model_args", "pretrained_cfg"):
            safe[key] = _of_timm(cls, key, value, content)
        elif key in REFUSED:
            if value and value not in OWN_WORDS.get(key, ()):
                raise _refusal(where, key)
        elif key in LABELS:
            safe[key] = _labels(where, key, value)
        elif key in fields:
            safe[key] = _field(cls, value, where=f"{where}.{key}", key=key)
    return safe


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of transformers to be written: without its origin, and without flags of pretrained weights."""
    left = {
        key: without_origin(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in (DROPPED | {"use_pretrained_backbone", "auto_map"})
    }
    if left.get("backbone_config") is not None:
        left.pop("backbone", None)  # an earlier way to give the same
    return left


def _of_timm(cls: Any, key: str, value: Any, content: Mapping[str, Any]) -> Any:
    if key in ("backbone", "architecture"):
        check_timm(value, {})
    elif key == "model_args":
        check_timm(content.get("architecture"), value or {})
    else:
        return image_settings_of(value or {})
    return value


def _field(cls: Any, value: Any, *, where: str, key: str) -> Any:
    if not isinstance(value, Mapping):
        check_value(where.rpartition(".")[0], key, value)
        return value
    part = (getattr(cls, "sub_configs", None) or {}).get(key)
    if isinstance(value.get("model_type"), str):
        from transformers import CONFIG_MAPPING

        if value["model_type"] in CONFIG_MAPPING:
            part = CONFIG_MAPPING[value["model_type"]]
    if isinstance(part, type) and part.__name__ != "AutoConfig":
        return {"model_type": value.get("model_type"), **transformers_config(part, value, where=where)}
    for name, entry in value.items():
        if name in REFUSED and entry:
            raise _refusal(where, name)
        if isinstance(entry, Mapping):
            _field(cls, entry, where=f"{where}.{name}", key=name)
        else:
            check_value(where, name, entry)
    return dict(value)


def _labels(where: str, key: str, value: Any) -> Any:
    if value is not None and not (
        isinstance(value, Mapping) and all(isinstance(entry, (str, int)) for pair in value.items() for entry in pair)
    ):
        raise CheckpointError(f"{where}.{key} does not map classes to names; the file is damaged. Take an intact copy.")
    return value


@cache
def config_fields(cls: Any) -> frozenset[str]:
    """Names of the fields of a configuration class, without making one."""
    names: set[str] = set(BACKBONE_FIELDS)
    for base in cls.__mro__:
        names.update(vars(base).get("__annotations__", {}))
        if "__init__" in vars(base):
            names.update(inspect.signature(base.__init__).parameters)
        names.update(vars(base).get("attribute_map", {}) or {})
    return frozenset(names - {"self", "args", "kwargs"})


def image_settings_of(content: Any) -> dict[str, Any]:
    """The settings for images and classes that a file may set, see `hosts.SETTINGS`; other entries are dropped.

    Raises:
        CheckpointError: a setting is of another type.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError("The image settings are no mapping; the file is damaged. Take an intact copy.")
    safe: dict[str, Any] = {}
    for key, types in IMAGE_SETTINGS.items():
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            raise _damaged_setting(key, value)
        if key == "label_names":
            fits = all(isinstance(name, str) for name in value)
        elif isinstance(value, (list, tuple)):
            fits = 0 < len(value) <= LONGEST and all(_is_number(part) for part in value)
            fits = fits and (key != "input_size" or _is_shape(value))
        else:
            fits = _is_number(value) if key == "crop_pct" else bool(WORD.fullmatch(value))
        if not fits:
            raise _damaged_setting(key, value)
        safe[key] = value
    return safe


def timm_settings(content: Any) -> dict[str, Any]:
    """The settings in timm's ``pretrained_cfg`` that a file may set; the places of weights are dropped.

    Raises:
        CheckpointError: a setting is of another type.
    """
    if isinstance(content, Mapping) and "labels" in content:  # the name in earlier versions
        content = {"label_names": content["labels"], **content}
    safe = image_settings_of(content)
    for key, fits in _TIMM_SETTINGS.items():
        value = content.get(key)
        if value is not None:
            if not fits(value):
                raise _damaged_setting(key, value)
            safe[key] = value
    return safe


def _are_modules(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [None]
    return all(isinstance(name, str) and MODULES.fullmatch(name) for name in names)


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


_TIMM_SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("test_input_size", "min_input_size"), lambda value: _is_shape(value)),
    **dict.fromkeys(("pool_size", "test_pool_size"), lambda value: _is_shape(value)),
    **dict.fromkeys(("num_classes", "label_offset"), lambda value: type(value) is int and 0 <= value <= MOST_CLASSES),
    **dict.fromkeys(("first_conv", "classifier"), _are_modules),
    "fixed_input_size": lambda value: isinstance(value, bool),
    "test_crop_pct": lambda value: _is_number(value),
    "label_descriptions": _are_texts,
    "license": lambda value: isinstance(value, str),
    "tag": lambda value: isinstance(value, str) and bool(MODULES.fullmatch(value)),
}
"""Entries of timm's ``pretrained_cfg`` beside those of `IMAGE_SETTINGS`, and whether a value is of their type."""


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (2, 3)
        and all(type(size) is int and 1 <= size <= LARGEST for size in value)
    )


def _damaged_setting(key: str, value: Any) -> CheckpointError:
    return CheckpointError(f"The image setting {key} is {value!r}; the file is damaged. Take an intact copy.")


def _refusal(owner: str, key: Any) -> CheckpointError:
    return CheckpointError(
        f"The file passes {key!r} to {owner}, which a checkpoint may not: it could name a file, an address or code. "
        "Do not use this file; if you trust it, make the model in Python and give slimming the module."
    )


def check_value(owner: str, key: Any, value: Any, depth: int = 0) -> None:
    """Check that an argument is a number in range, a flag, a word, None, or a list of such.

    Args:
        owner: what takes the argument, for messages.
        key: its name.
        value: its value.
        depth: levels of lists around it.

    Raises:
        CheckpointError: it is not.
    """
    if value is None or isinstance(value, bool) or _is_number(value):
        return
    if isinstance(value, str) and (MODULES if key in BACKBONE_FIELDS else WORD).fullmatch(value):
        return
    if isinstance(value, (list, tuple)) and len(value) <= LONGEST and depth < DEEPEST:
        for entry in value:
            check_value(owner, key, entry, depth + 1)
        return
    shown = repr(value)[:80]
    raise CheckpointError(
        f"The file passes {key}={shown} to {owner}; only integers up to {LARGEST:.0e}, finite numbers, flags and plain "
        "words are taken from a file. Take an intact copy, or make the model in Python and give slimming the module."
    )


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) <= LARGEST) or (type(value) is float and math.isfinite(value))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in _numbers(part)]
    return [value] if type(value) in (int, float) else []
