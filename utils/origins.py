"""Libraries that publish Swin weights, each with its own weight format and evaluation preset."""

ORIGINS = ("original", "timm", "torchvision", "hf")  # "original": the code of the paper's authors; "hf": transformers

# torchvision's model names by MODEL.TYPE, channels of the first stage, and depths.
TORCHVISION_NAMES: dict[tuple[str, int, tuple[int, ...]], str] = {
    ("swin", 96, (2, 2, 6, 2)): "swin_t",
    ("swin", 96, (2, 2, 18, 2)): "swin_s",
    ("swin", 128, (2, 2, 18, 2)): "swin_b",
    ("swinv2", 96, (2, 2, 6, 2)): "swin_v2_t",
    ("swinv2", 96, (2, 2, 18, 2)): "swin_v2_s",
    ("swinv2", 128, (2, 2, 18, 2)): "swin_v2_b",
}
