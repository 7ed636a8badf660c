"""Randomly initialised models of the real architectures, a few kilobytes each, saved as the Hub has them."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf

CLASSES = {0: "person", 1: "ball", 2: "goal"}
DECODER = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER |= {"iou_head_hidden_dim": 16, "iou_head_depth": 2}
PROMPT_ENCODER = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
DETR = {"encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "d_model": 16, "num_queries": 9}
DETR |= {"decoder_in_channels": [16] * 3, "decoder_ffn_dim": 16, "decoder_layers": 2, "decoder_attention_heads": 2}
DETR |= {"num_denoising": 0, "id2label": CLASSES}


def sam(folder: Path) -> None:
    vision = tf.SamVisionConfig(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        global_attn_indexes=[0],
        num_pos_feats=8,
        mlp_dim=32,
        window_size=4,
    )
    prompt, decoder = tf.SamPromptEncoderConfig(**PROMPT_ENCODER), tf.SamMaskDecoderConfig(**DECODER)
    config = tf.SamConfig(
        vision_config=vision.to_dict(), prompt_encoder_config=prompt.to_dict(), mask_decoder_config=decoder.to_dict()
    )
    tf.SamModel(config).save_pretrained(folder)
    images = tf.SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    tf.SamProcessor(images).save_pretrained(folder)


def sam2(folder: Path) -> None:
    backbone = tf.Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = tf.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )
    prompt, decoder = tf.Sam2PromptEncoderConfig(**PROMPT_ENCODER), tf.Sam2MaskDecoderConfig(**DECODER)
    config = tf.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    tf.Sam2Model(config).save_pretrained(folder)
    images = tf.Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})
    tf.Sam2Processor(images).save_pretrained(folder)


def yolos(folder: Path) -> None:
    config = tf.YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 64],
        num_detection_tokens=7,
        id2label=CLASSES,
    )
    tf.YolosForObjectDetection(config).save_pretrained(folder)
    tf.YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)


def rt_detr(folder: Path) -> None:
    backbone = tf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = tf.RTDetrConfig(backbone_config=backbone, encoder_in_channels=[8, 16, 16], decoder_n_points=2, **DETR)
    tf.RTDetrForObjectDetection(config).save_pretrained(folder)
    tf.RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def d_fine(folder: Path) -> None:
    backbone = tf.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 32, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[1, 1, 1, 1],
        embedding_size=8,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = tf.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 32, 32],
        decoder_n_points=[2, 2, 2],
        lqe_hidden_dim=8,
        max_num_bins=8,
        **DETR,
    )
    tf.DFineForObjectDetection(config).save_pretrained(folder)
    tf.RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def grounding_dino(folder: Path) -> None:
    backbone = tf.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    text = tf.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=16,
        max_position_embeddings=32,
    )
    config = tf.GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        num_queries=9,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        d_model=32,
        encoder_n_points=2,
        decoder_n_points=2,
        max_text_len=24,
        disable_custom_kernels=True,
    )
    tf.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "a", "red", "car", "dog", "##gie"]
    tokenizer = tf.BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=24)
    images = tf.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    tf.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)


def owlv2(folder: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 64, "max_position_embeddings": 16}
    text |= {"pad_token_id": 0, "bos_token_id": 61, "eos_token_id": 62}
    config = tf.Owlv2Config(
        text_config=text, vision_config={**size, "image_size": 64, "patch_size": 16}, projection_dim=16
    )
    tf.Owlv2ForObjectDetection(config).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {"!": 0} | {f"{letter}</w>": 1 + i for i, letter in enumerate(letters)}
    vocabulary |= {letter: 27 + i for i, letter in enumerate(letters)} | {"<|startoftext|>": 61, "<|endoftext|>": 62}
    tokenizer = tf.CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!", model_max_length=16)
    images = tf.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    tf.Owlv2Processor(images, tokenizer).save_pretrained(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    build.__name__: build for build in (sam, sam2, yolos, rt_detr, d_fine, grounding_dino, owlv2)
}


def build(name: str, folder: Path) -> Path:
    """Save one tiny model and its processor in a folder."""
    torch.manual_seed(0)
    BUILDERS[name](folder)
    return folder
