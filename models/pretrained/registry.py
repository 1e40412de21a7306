"""The released weights of Swin, Swin V2 and Swin-MLP: names, URLs, published accuracy, counts.

`python -m tools.models` lists them; a name works wherever a weight file does. Uncertain facts are left out: most files
have no published SHA-256, and the files hosted by timm and Hugging Face are conversions of the authors' files, where
Hugging Face does not always say of which file.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Release:
    """One released weight file.

    Attributes:
        origin: its weight format, one of utils.origins.ORIGINS.
        recipe: `configs/<recipe>.yaml` builds the model, except for the number of classes.
        top1, top5: published accuracy on ImageNet-1K in %; None if the classes are others or none is published.
        sha256: its first digits, as many as are known; "" if unknown.
    """

    name: str
    origin: str
    recipe: str
    classes: int
    url: str
    top1: float | None
    top5: float | None
    sha256: str = ""

    @property
    def file(self) -> str:
        """The name of the downloaded file; the URL's own name if that is unique."""
        url_name = self.url.rsplit("/", 1)[-1]
        if self.origin in ("original", "torchvision"):
            return url_name
        return f"{self.name.replace('/', '--')}--{url_name}"


_STORAGE = "https://github.com/SwinTransformer/storage/releases/download"
_HUB = "https://huggingface.co"

# Name (also of the file), tag of the GitHub release, recipe, top-1, top-5 (from the authors' model hub). Models whose
# name ends in 22k have the 21,841 classes of ImageNet-22K.
_ORIGINAL = (
    ("swin_tiny_patch4_window7_224", "v1.0.0", "swin_tiny", 81.2, 95.5),
    ("swin_small_patch4_window7_224", "v1.0.0", "swin_small", 83.2, 96.2),
    ("swin_base_patch4_window7_224", "v1.0.0", "swin_base", 83.5, 96.5),
    ("swin_base_patch4_window12_384", "v1.0.0", "swin_base_384", 84.5, 97.0),
    ("swin_tiny_patch4_window7_224_22k", "v1.0.8", "swin_tiny_22k", None, None),
    ("swin_tiny_patch4_window7_224_22kto1k_finetune", "v1.0.8", "swin_tiny_22kto1k", 80.9, 96.0),
    ("swin_small_patch4_window7_224_22k", "v1.0.8", "swin_small_22k", None, None),
    ("swin_small_patch4_window7_224_22kto1k_finetune", "v1.0.8", "swin_small_22kto1k", 83.2, 97.0),
    ("swin_base_patch4_window7_224_22k", "v1.0.0", "swin_base_22k", None, None),
    ("swin_base_patch4_window7_224_22kto1k", "v1.0.0", "swin_base_22kto1k", 85.2, 97.5),
    ("swin_base_patch4_window12_384_22k", "v1.0.0", "swin_base_384_22kto1k", None, None),
    ("swin_base_patch4_window12_384_22kto1k", "v1.0.0", "swin_base_384_22kto1k", 86.4, 98.0),
    ("swin_large_patch4_window7_224_22k", "v1.0.0", "swin_large_22k", None, None),
    ("swin_large_patch4_window7_224_22kto1k", "v1.0.0", "swin_large_22kto1k", 86.3, 97.9),
    ("swin_large_patch4_window12_384_22k", "v1.0.0", "swin_large_384", None, None),
    ("swin_large_patch4_window12_384_22kto1k", "v1.0.0", "swin_large_384", 87.3, 98.2),
    ("swin_tiny_c24_patch4_window8_256", "v1.0.5", "swin_tiny_c24", 81.6, 95.7),
    ("swinv2_tiny_patch4_window8_256", "v2.0.0", "swinv2_tiny_w8", 81.8, 95.9),
    ("swinv2_tiny_patch4_window16_256", "v2.0.0", "swinv2_tiny_w16", 82.8, 96.2),
    ("swinv2_small_patch4_window8_256", "v2.0.0", "swinv2_small_w8", 83.7, 96.6),
    ("swinv2_small_patch4_window16_256", "v2.0.0", "swinv2_small_w16", 84.1, 96.8),
    ("swinv2_base_patch4_window8_256", "v2.0.0", "swinv2_base_w8", 84.2, 96.9),
    ("swinv2_base_patch4_window16_256", "v2.0.0", "swinv2_base_w16", 84.6, 97.0),
    ("swinv2_base_patch4_window12_192_22k", "v2.0.0", "swinv2_base_22k", None, None),
    ("swinv2_base_patch4_window12to16_192to256_22kto1k_ft", "v2.0.0", "swinv2_base_w12to16_22kto1k", 86.2, 97.9),
    ("swinv2_base_patch4_window12to24_192to384_22kto1k_ft", "v2.0.0", "swinv2_base_w12to24_22kto1k", 87.1, 98.2),
    ("swinv2_large_patch4_window12_192_22k", "v2.0.0", "swinv2_large_22k", None, None),
    ("swinv2_large_patch4_window12to16_192to256_22kto1k_ft", "v2.0.0", "swinv2_large_w12to16_22kto1k", 86.9, 98.0),
    ("swinv2_large_patch4_window12to24_192to384_22kto1k_ft", "v2.0.0", "swinv2_large_w12to24_22kto1k", 87.6, 98.3),
    ("swin_mlp_tiny_c24_patch4_window8_256", "v1.0.5", "swin_mlp_tiny_c24", 79.4, 94.6),
    ("swin_mlp_tiny_c12_patch4_window8_256", "v1.0.5", "swin_mlp_tiny_c12", 79.6, 94.7),
    ("swin_mlp_tiny_c6_patch4_window8_256", "v1.0.5", "swin_mlp_tiny_c6", 79.7, 94.9),
    ("swin_mlp_base_patch4_window7_224", "v1.0.5", "swin_mlp_base", 81.3, 95.3),
)

# Name in timm, and the authors' file that it was converted from, according to timm's configurations.
_TIMM = (
    ("swin_tiny_patch4_window7_224.ms_in1k", "swin_tiny_patch4_window7_224"),
    ("swin_tiny_patch4_window7_224.ms_in22k", "swin_tiny_patch4_window7_224_22k"),
    ("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", "swin_tiny_patch4_window7_224_22kto1k_finetune"),
    ("swin_small_patch4_window7_224.ms_in1k", "swin_small_patch4_window7_224"),
    ("swin_small_patch4_window7_224.ms_in22k", "swin_small_patch4_window7_224_22k"),
    ("swin_small_patch4_window7_224.ms_in22k_ft_in1k", "swin_small_patch4_window7_224_22kto1k_finetune"),
    ("swin_base_patch4_window7_224.ms_in1k", "swin_base_patch4_window7_224"),
    ("swin_base_patch4_window7_224.ms_in22k", "swin_base_patch4_window7_224_22k"),
    ("swin_base_patch4_window7_224.ms_in22k_ft_in1k", "swin_base_patch4_window7_224_22kto1k"),
    ("swin_base_patch4_window12_384.ms_in1k", "swin_base_patch4_window12_384"),
    ("swin_base_patch4_window12_384.ms_in22k", "swin_base_patch4_window12_384_22k"),
    ("swin_base_patch4_window12_384.ms_in22k_ft_in1k", "swin_base_patch4_window12_384_22kto1k"),
    ("swin_large_patch4_window7_224.ms_in22k", "swin_large_patch4_window7_224_22k"),
    ("swin_large_patch4_window7_224.ms_in22k_ft_in1k", "swin_large_patch4_window7_224_22kto1k"),
    ("swin_large_patch4_window12_384.ms_in22k", "swin_large_patch4_window12_384_22k"),
    ("swin_large_patch4_window12_384.ms_in22k_ft_in1k", "swin_large_patch4_window12_384_22kto1k"),
    ("swinv2_tiny_window8_256.ms_in1k", "swinv2_tiny_patch4_window8_256"),
    ("swinv2_tiny_window16_256.ms_in1k", "swinv2_tiny_patch4_window16_256"),
    ("swinv2_small_window8_256.ms_in1k", "swinv2_small_patch4_window8_256"),
    ("swinv2_small_window16_256.ms_in1k", "swinv2_small_patch4_window16_256"),
    ("swinv2_base_window8_256.ms_in1k", "swinv2_base_patch4_window8_256"),
    ("swinv2_base_window16_256.ms_in1k", "swinv2_base_patch4_window16_256"),
    ("swinv2_base_window12_192.ms_in22k", "swinv2_base_patch4_window12_192_22k"),
    ("swinv2_base_window12to16_192to256.ms_in22k_ft_in1k", "swinv2_base_patch4_window12to16_192to256_22kto1k_ft"),
    ("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", "swinv2_base_patch4_window12to24_192to384_22kto1k_ft"),
    ("swinv2_large_window12_192.ms_in22k", "swinv2_large_patch4_window12_192_22k"),
    ("swinv2_large_window12to16_192to256.ms_in22k_ft_in1k", "swinv2_large_patch4_window12to16_192to256_22kto1k_ft"),
    ("swinv2_large_window12to24_192to384.ms_in22k_ft_in1k", "swinv2_large_patch4_window12to24_192to384_22kto1k_ft"),
)

# Name, recipe, top-1, top-5 measured by torchvision. The part after the dash is the start of the SHA-256.
_TORCHVISION = (
    ("swin_t-704ceda3", "swin_tiny", 81.474, 95.776),
    ("swin_s-5e29d889", "swin_small", 83.196, 96.360),
    ("swin_b-68c6b09e", "swin_base", 83.582, 96.640),
    ("swin_v2_t-b137f0e2", "swinv2_tiny_w8", 82.072, 96.132),
    ("swin_v2_s-637d8ceb", "swinv2_small_w8", 83.712, 96.816),
    ("swin_v2_b-781e5279", "swinv2_base_w8", 84.112, 96.864),
)

# Name on Hugging Face, and an authors' file of the same architecture; if it is the only one, the weights are the same.
_HUGGING_FACE = (
    ("swin-tiny-patch4-window7-224", "swin_tiny_patch4_window7_224"),
    ("swin-small-patch4-window7-224", "swin_small_patch4_window7_224"),
    ("swin-base-patch4-window7-224", "swin_base_patch4_window7_224"),
    ("swin-base-patch4-window7-224-in22k", "swin_base_patch4_window7_224_22k"),
    ("swin-base-patch4-window12-384", "swin_base_patch4_window12_384"),
    ("swin-base-patch4-window12-384-in22k", "swin_base_patch4_window12_384_22k"),
    ("swin-large-patch4-window7-224", "swin_large_patch4_window7_224_22kto1k"),
    ("swin-large-patch4-window7-224-in22k", "swin_large_patch4_window7_224_22k"),
    ("swin-large-patch4-window12-384", "swin_large_patch4_window12_384_22kto1k"),
    ("swin-large-patch4-window12-384-in22k", "swin_large_patch4_window12_384_22k"),
    ("swinv2-tiny-patch4-window8-256", "swinv2_tiny_patch4_window8_256"),
    ("swinv2-tiny-patch4-window16-256", "swinv2_tiny_patch4_window16_256"),
    ("swinv2-small-patch4-window8-256", "swinv2_small_patch4_window8_256"),
    ("swinv2-small-patch4-window16-256", "swinv2_small_patch4_window16_256"),
    ("swinv2-base-patch4-window8-256", "swinv2_base_patch4_window8_256"),
    ("swinv2-base-patch4-window16-256", "swinv2_base_patch4_window16_256"),
    ("swinv2-base-patch4-window12-192-22k", "swinv2_base_patch4_window12_192_22k"),
    ("swinv2-base-patch4-window12to16-192to256-22kto1k-ft", "swinv2_base_patch4_window12to16_192to256_22kto1k_ft"),
    ("swinv2-base-patch4-window12to24-192to384-22kto1k-ft", "swinv2_base_patch4_window12to24_192to384_22kto1k_ft"),
    ("swinv2-large-patch4-window12-192-22k", "swinv2_large_patch4_window12_192_22k"),
    ("swinv2-large-patch4-window12to16-192to256-22kto1k-ft", "swinv2_large_patch4_window12to16_192to256_22kto1k_ft"),
    ("swinv2-large-patch4-window12to24-192to384-22kto1k-ft", "swinv2_large_patch4_window12to24_192to384_22kto1k_ft"),
)
# The authors have two files of each of these architectures, so the accuracy is uncertain.
_UNCERTAIN = ("swin-tiny-", "swin-small-", "swin-base-patch4-window7-224", "swin-base-patch4-window12-384")

# (recipe, number of classes) to parameters and multiply-adds per image, as counted; a test counts them again.
COUNTED = {
    ("swin_tiny", 1000): (28_288_354, 4_490_566_656),
    ("swin_tiny_22k", 21841): (44_315_083, 4_506_572_544),
    ("swin_tiny_22kto1k", 1000): (28_288_354, 4_490_566_656),
    ("swin_small", 1000): (49_606_258, 8_740_875_264),
    ("swin_small_22k", 21841): (65_632_987, 8_756_881_152),
    ("swin_small_22kto1k", 1000): (49_606_258, 8_740_875_264),
    ("swin_base", 1000): (87_768_224, 15_430_946_816),
    ("swin_base_22k", 21841): (109_130_249, 15_452_288_000),
    ("swin_base_22kto1k", 1000): (87_768_224, 15_430_946_816),
    ("swin_large_22k", 21841): (228_565_093, 34_507_771_392),
    ("swin_large_22kto1k", 1000): (196_532_476, 34_475_759_616),
    ("swin_base_384", 1000): (87_903_584, 47_083_134_976),
    ("swin_base_384_22kto1k", 1000): (87_903_584, 47_083_134_976),
    ("swin_base_384_22kto1k", 21841): (109_265_609, 47_104_476_160),
    ("swin_large_384", 1000): (196_735_516, 103_919_087_616),
    ("swin_large_384", 21841): (228_768_133, 103_951_099_392),
    ("swin_tiny_c24", 1000): (28_306_432, 5_921_028_096),
    ("swinv2_tiny_w8", 1000): (28_347_154, 5_921_028_096),
    ("swinv2_tiny_w16", 1000): (28_347_154, 6_600_505_344),
    ("swinv2_small_w8", 1000): (49_728_418, 11_507_841_024),
    ("swinv2_small_w16", 1000): (49_728_418, 12_640_303_104),
    ("swinv2_base_w8", 1000): (87_918_816, 20_276_289_536),
    ("swinv2_base_w16", 1000): (87_918_816, 21_786_238_976),
    ("swinv2_base_22k", 21841): (109_280_841, 11_776_967_680),
    ("swinv2_base_w12to16_22kto1k", 1000): (87_918_816, 21_786_238_976),
    ("swinv2_base_w12to24_22kto1k", 1000): (87_918_816, 54_727_254_016),
    ("swinv2_large_22k", 21841): (228_772_549, 25_989_047_808),
    ("swinv2_large_w12to16_22kto1k", 1000): (196_739_932, 47_476_862_976),
    ("swinv2_large_w12to24_22kto1k", 1000): (196_739_932, 115_385_266_176),
    ("swin_mlp_tiny_c24", 1000): (20_386_632, 4_026_906_624),
    ("swin_mlp_tiny_c12", 1000): (21_152_072, 4_026_906_624),
    ("swin_mlp_tiny_c6", 1000): (22_682_952, 4_026_906_624),
    ("swin_mlp_base", 1000): (60_659_416, 10_412_086_144),
}


def _releases() -> tuple[Release, ...]:
    originals = {}
    for name, tag, recipe, top1, top5 in _ORIGINAL:
        classes, url = 21841 if name.endswith("_22k") else 1000, f"{_STORAGE}/{tag}/{name}.pth"
        originals[name] = Release(name, "original", recipe, classes, url, top1, top5)
    releases = list(originals.values())
    for name, source in _TIMM:
        original = originals[source]
        url = f"{_HUB}/timm/{name}/resolve/main/model.safetensors"
        releases.append(replace(original, name=f"timm/{name}", origin="timm", url=url))
    for file, recipe, top1, top5 in _TORCHVISION:
        name, _, sha256 = file.partition("-")
        url = f"https://download.pytorch.org/models/{file}.pth"
        releases.append(Release(f"torchvision/{name}", "torchvision", recipe, 1000, url, top1, top5, sha256))
    for name, source in _HUGGING_FACE:
        original = originals[source]
        top1, top5 = (None, None) if name.startswith(_UNCERTAIN) else (original.top1, original.top5)
        url = f"{_HUB}/microsoft/{name}/resolve/main/pytorch_model.bin"
        releases.append(replace(original, name=f"microsoft/{name}", origin="hf", url=url, top1=top1, top5=top5))
    return tuple(releases)


RELEASES = _releases()


def find(name: str) -> Release | None:
    """The release with this name or URL, or None."""
    return next((release for release in RELEASES if name in (release.name, release.url)), None)
