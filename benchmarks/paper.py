"""The numbers of the paper's tables (Liu et al., 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted
Windows"), for `benchmarks.tables`. Parameters in M, multiply-adds in G, images/s of a V100, top-1 in %.
"""

from typing import NamedTuple


class Peer(NamedTuple):
    """A row of Table 1. `model` is a recipe in configs/, or the name that timm has for it."""

    name: str
    pretrained: str  # "", or the pre-training data set
    model: str
    pixels: int
    parameters: float
    macs: float
    rate: float | None
    top1: float
    weights: str = ""  # for Swin: the release with this accuracy


TABLE1 = (
    Peer("RegNetY-4G", "", "regnety_040", 224, 21, 4.0, 1156.7, 80.0),
    Peer("RegNetY-8G", "", "regnety_080", 224, 39, 8.0, 591.6, 81.7),
    Peer("RegNetY-16G", "", "regnety_160", 224, 84, 16.0, 334.7, 82.9),
    Peer("EffNet-B3", "", "tf_efficientnet_b3", 300, 12, 1.8, 732.1, 81.6),
    Peer("EffNet-B4", "", "tf_efficientnet_b4", 380, 19, 4.2, 349.4, 82.9),
    Peer("EffNet-B5", "", "tf_efficientnet_b5", 456, 30, 9.9, 169.1, 83.6),
    Peer("EffNet-B6", "", "tf_efficientnet_b6", 528, 43, 19.0, 96.9, 84.0),
    Peer("EffNet-B7", "", "tf_efficientnet_b7", 600, 66, 37.0, 55.1, 84.3),
    Peer("ViT-B/16", "", "vit_base_patch16_384", 384, 86, 55.4, 85.9, 77.9),
    Peer("ViT-L/16", "", "vit_large_patch16_384", 384, 307, 190.7, 27.3, 76.5),
    Peer("DeiT-S", "", "deit_small_patch16_224", 224, 22, 4.6, 940.4, 79.8),
    Peer("DeiT-B", "", "deit_base_patch16_224", 224, 86, 17.5, 292.3, 81.8),
    Peer("DeiT-B", "", "deit_base_patch16_384", 384, 86, 55.4, 85.9, 83.1),
    Peer("Swin-T", "", "swin_tiny", 224, 29, 4.5, 755.2, 81.3, "swin_tiny_patch4_window7_224"),
    Peer("Swin-S", "", "swin_small", 224, 50, 8.7, 436.9, 83.0, "swin_small_patch4_window7_224"),
    Peer("Swin-B", "", "swin_base", 224, 88, 15.4, 278.1, 83.5, "swin_base_patch4_window7_224"),
    Peer("Swin-B", "", "swin_base_384", 384, 88, 47.0, 84.7, 84.5, "swin_base_patch4_window12_384"),
    Peer("R-101x3", "22K", "resnetv2_101x3_bit", 384, 388, 204.6, None, 84.4),
    Peer("R-152x4", "22K", "resnetv2_152x4_bit", 480, 937, 840.5, None, 85.4),
    Peer("ViT-B/16", "22K", "vit_base_patch16_384", 384, 86, 55.4, 85.9, 84.0),
    Peer("ViT-L/16", "22K", "vit_large_patch16_384", 384, 307, 190.7, 27.3, 85.2),
    Peer("Swin-B", "22K", "swin_base_22kto1k", 224, 88, 15.4, 278.1, 85.2, "swin_base_patch4_window7_224_22kto1k"),
    Peer("Swin-B", "22K", "swin_base_384_22kto1k", 384, 88, 47.0, 84.7, 86.4, "swin_base_patch4_window12_384_22kto1k"),
    Peer("Swin-L", "22K", "swin_large_384", 384, 197, 103.9, 42.1, 87.3, "swin_large_patch4_window12_384_22kto1k"),
)


class Ablation(NamedTuple):
    """A row of Table 4, all with Swin-T: its keys, and top-1 and top-5 on ImageNet-1K."""

    name: str
    opts: tuple[str, ...]
    top1: float
    top5: float


TABLE4 = (
    Ablation("w/o shifting", ("MODEL.SWIN.SHIFT", "False"), 80.2, 95.1),
    Ablation("shifted windows", (), 81.3, 95.6),
    Ablation("no pos.", ("MODEL.SWIN.POSITION", "none"), 80.1, 94.9),
    Ablation("abs. pos.", ("MODEL.SWIN.POSITION", "abs"), 80.5, 95.2),
    Ablation("abs.+rel. pos.", ("MODEL.SWIN.POSITION", "abs+rel"), 81.3, 95.6),
    Ablation("rel. pos. w/o app.", ("MODEL.SWIN.POSITION", "rel_no_app"), 79.3, 94.7),
    Ablation("rel. pos.", ("MODEL.SWIN.POSITION", "rel"), 81.3, 95.6),
)

# Table 5: milliseconds of the attention of stages 1 to 4, then images/s of Swin-T, S and B; V100.
TABLE5 = {
    "sliding window (naive)": (122.5, 38.3, 12.1, 7.6, 183, 109, 77),
    "sliding window (kernel)": (7.6, 4.7, 2.7, 1.8, 488, 283, 187),
    "Performer": (4.8, 2.8, 1.8, 1.5, 638, 370, 241),
    "window (w/o shifting)": (2.8, 1.7, 1.2, 0.9, 770, 444, 280),
    "shifted window (padding)": (3.3, 2.3, 1.9, 2.2, 670, 371, 236),
    "shifted window (cyclic)": (3.0, 1.9, 1.3, 1.0, 755, 437, 278),
}

# Table 7: for each stage the downsampling rate and the side of the map; then by model and stage the side of the patches
# that are concatenated, channels, blocks and heads. Windows are 7 × 7.
TABLE7_STAGES = ((4, 56), (8, 28), (16, 14), (32, 7))
TABLE7 = {
    "Swin-T": ("swin_tiny", ((4, 96, 2, 3), (2, 192, 2, 6), (2, 384, 6, 12), (2, 768, 2, 24))),
    "Swin-S": ("swin_small", ((4, 96, 2, 3), (2, 192, 2, 6), (2, 384, 18, 12), (2, 768, 2, 24))),
    "Swin-B": ("swin_base", ((4, 128, 2, 4), (2, 256, 2, 8), (2, 512, 18, 16), (2, 1024, 2, 32))),
    "Swin-L": ("swin_large_22kto1k", ((4, 192, 2, 6), (2, 384, 2, 12), (2, 768, 18, 24), (2, 1536, 2, 48))),
}
