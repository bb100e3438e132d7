"""Small detectors, segmenters and pairs of encoders of transformers, with what their forward takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Tensor]]
"""A model, and the keyword arguments of one call."""

CNN = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "bottleneck"}
VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LABELS = {"num_labels": 3}


def _hf() -> Any:
    import transformers

    return transformers


def images(size: int, batch: int = 1) -> Tensor:
    """Random images."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _with_images(model: nn.Module, size: int) -> Made:
    return model.eval(), {"pixel_values": images(size)}


def rt_detr_v2(**arguments: Any) -> Made:
    """RT-DETR v2."""
    hf = _hf()
    backbone = hf.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [16, 24, 32],
        "feat_strides": [8, 16, 32],
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "d_model": 32,
        "num_queries": 10,
        "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 48,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_n_points": 2,
        "num_denoising": 4,
        "anchor_image_size": None,
    }
    config = hf.RTDetrV2Config(backbone_config=backbone, **{**sizes, **LABELS, **arguments})
    return _with_images(hf.RTDetrV2ForObjectDetection(config), 64)


def d_fine(**arguments: Any) -> Made:
    """D-FINE with its HGNet."""
    hf = _hf()
    backbone = hf.HGNetV2Config(
        embedding_size=16,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 32, 40],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [24, 32, 40],
        "feat_strides": [8, 16, 32],
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "d_model": 32,
        "num_queries": 10,
        "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 48,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_n_points": [2, 2, 2],
        "num_denoising": 4,
        "anchor_image_size": None,
        "max_num_bins": 8,
    }
    config = hf.DFineConfig(backbone_config=backbone, **{**sizes, **LABELS, **arguments})
    return _with_images(hf.DFineForObjectDetection(config), 64)


DETR_SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_queries": 6,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


def detr(**arguments: Any) -> Made:
    """DETR."""
    hf = _hf()
    backbone = hf.ResNetConfig(**CNN, out_features=["stage4"])
    config = hf.DetrConfig(backbone_config=backbone, **{**DETR_SIZES, **LABELS, **arguments})
    model, call = _with_images(hf.DetrForObjectDetection(config), 64)
    return model, {**call, "pixel_mask": torch.ones(1, 64, 64, dtype=torch.int64)}


def deformable_detr(**arguments: Any) -> Made:
    """Deformable DETR in two stages."""
    hf = _hf()
    backbone = hf.ResNetConfig(**CNN, out_features=["stage2", "stage3", "stage4"])
    sizes = {
        **DETR_SIZES,
        "num_feature_levels": 3,
        "two_stage": True,
        "with_box_refine": True,
        "two_stage_num_proposals": 6,
    }
    config = hf.DeformableDetrConfig(backbone_config=backbone, **{**sizes, **LABELS, **arguments})
    return _with_images(hf.DeformableDetrForObjectDetection(config), 64)


def yolos(**arguments: Any) -> Made:
    """YOLOS."""
    hf = _hf()
    config = hf.YolosConfig(
        **{**VIT, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 6, **LABELS, **arguments}
    )
    return _with_images(hf.YolosForObjectDetection(config), 32)


def segformer(**arguments: Any) -> Made:
    """SegFormer."""
    hf = _hf()
    sizes = {
        "num_encoder_blocks": 3,
        "depths": [1, 1, 1],
        "sr_ratios": [4, 2, 1],
        "hidden_sizes": [16, 32, 40],
        "num_attention_heads": [2, 4, 4],
        "patch_sizes": [7, 3, 3],
        "strides": [4, 2, 2],
        "mlp_ratios": [2, 2, 2],
        "decoder_hidden_size": 32,
    }
    config = hf.SegformerConfig(**{**sizes, **LABELS, **arguments})
    return _with_images(hf.SegformerForSemanticSegmentation(config), 64)


def mask2former(**arguments: Any) -> Made:
    """Mask2Former with a Swin."""
    hf = _hf()
    backbone = hf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 4, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 48,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "num_attention_heads": 4,
        "dim_feedforward": 48,
        "num_queries": 6,
    }
    config = hf.Mask2FormerConfig(backbone_config=backbone, **{**sizes, **LABELS, **arguments})
    return _with_images(hf.Mask2FormerForUniversalSegmentation(config), 64)


def dpt(**arguments: Any) -> Made:
    """DPT for depth."""
    hf = _hf()
    sizes = {
        **VIT,
        "num_hidden_layers": 4,
        "image_size": 32,
        "patch_size": 8,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 16, 24, 32],
        "fusion_hidden_size": 16,
        "is_hybrid": False,
    }
    return _with_images(hf.DPTForDepthEstimation(hf.DPTConfig(**{**sizes, **arguments})), 32)


def depth_anything(**arguments: Any) -> Made:
    """Depth Anything with a DINOv2."""
    hf = _hf()
    backbone = hf.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    sizes = {
        "reassemble_hidden_size": 32,
        "neck_hidden_sizes": [8, 16, 24, 32],
        "fusion_hidden_size": 16,
        "patch_size": 14,
        "head_hidden_size": 16,
    }
    config = hf.DepthAnythingConfig(backbone_config=backbone, **{**sizes, **arguments})
    return _with_images(hf.DepthAnythingForDepthEstimation(config), 56)


def sam2_encoder(**arguments: Any) -> Made:
    """The image encoder of SAM 2."""
    hf = _hf()
    backbone = hf.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 2, 4, 2],
        window_positional_embedding_background_size=[4, 4],
        global_attention_blocks=[3],
    )
    config = hf.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=32,
        **arguments,
    )
    return _with_images(hf.Sam2VisionModel(config), 64)


def sam2(**arguments: Any) -> Made:
    """SAM 2 for images."""
    hf = _hf()
    vision = sam2_encoder()[0].config
    prompt = hf.Sam2PromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16)
    mask = hf.Sam2MaskDecoderConfig(
        hidden_size=32, mlp_dim=48, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=32
    )
    config = hf.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask, **arguments)
    model, call = _with_images(hf.Sam2Model(config), 64)
    return model, {
        **call,
        "input_points": torch.tensor([[[[20.0, 30.0]]]]),
        "input_labels": torch.ones(1, 1, 1, dtype=torch.int64),
    }


TEXT = {**VIT, "vocab_size": 99, "max_position_embeddings": 12}


def clip(**arguments: Any) -> Made:
    """CLIP, both towers."""
    hf = _hf()
    text = {**TEXT, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1}
    config = hf.CLIPConfig(
        text_config=text, vision_config={**VIT, "image_size": 32, "patch_size": 8}, projection_dim=24, **arguments
    )
    return _two_towers(hf.CLIPModel(config))


def siglip(**arguments: Any) -> Made:
    """SigLIP, both towers."""
    hf = _hf()
    config = hf.SiglipConfig(
        text_config={**TEXT, "projection_size": 32},
        vision_config={**VIT, "image_size": 32, "patch_size": 8},
        **arguments,
    )
    return _two_towers(hf.SiglipModel(config))


def siglip2(**arguments: Any) -> Made:
    """SigLIP 2, both towers."""
    hf = _hf()
    config = hf.Siglip2Config(
        text_config={**TEXT, "projection_size": 32},
        vision_config={**VIT, "num_patches": 16, "patch_size": 8},
        **arguments,
    )
    model, call = _two_towers(hf.Siglip2Model(config))
    patches = torch.nn.functional.unfold(call.pop("pixel_values"), 8, stride=8).transpose(1, 2)
    return model, {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 4]]),
        **call,
    }


def _two_towers(model: nn.Module) -> Made:
    model, call = _with_images(model, 32)
    words = torch.tensor([[5, 9, 17, 23, 4, 40, 98]])
    return model, {**call, "input_ids": words, "attention_mask": torch.ones_like(words)}


def vitpose(**arguments: Any) -> Made:
    """ViTPose."""
    hf = _hf()
    backbone = hf.VitPoseBackboneConfig(
        image_size=[32, 32],
        patch_size=[8, 8],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        out_indices=[2],
    )
    config = hf.VitPoseConfig(backbone_config=backbone, **{**{"num_labels": 5}, **arguments})
    return _with_images(hf.VitPoseForPoseEstimation(config), 32)


MODELS: dict[str, Callable[..., Made]] = {
    "RT-DETR v2": rt_detr_v2,
    "D-FINE": d_fine,
    "DETR": detr,
    "Deformable DETR": deformable_detr,
    "YOLOS": yolos,
    "SegFormer": segformer,
    "Mask2Former": mask2former,
    "DPT": dpt,
    "Depth Anything": depth_anything,
    "SAM 2 encoder": sam2_encoder,
    "SAM 2": sam2,
    "CLIP": clip,
    "SigLIP": siglip,
    "SigLIP 2": siglip2,
    "ViTPose": vitpose,
}
