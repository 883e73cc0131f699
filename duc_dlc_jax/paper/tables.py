"""The figures of the paper's tables and its slips: the one place that has them.

Sediqi and Lee, 2021. Percent throughout; Final Score is (mIoU + PA) / 2.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table, in the paper's order.

    run: of configs/paper.py, for the paper's own network, and protocol, of `evaluate`, its testing.
    near: for other methods, the variant of configs/ablation_camvid.py that is closest.
    """

    method: str
    miou: float
    pa: float | None = None
    final: float | None = None
    run: str = ""
    protocol: str = ""
    near: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """server: its scores are a test server's, which our val scores are not. digits: after 0."""

    number: str
    title: str
    rows: tuple[Row, ...]
    server: bool = False
    digits: int = 2


def _ours(depth: int, multi: bool, miou: float, pa: float, final: float) -> Row:
    name = f"Ours({depth}) + {'MS' if multi else 'SS'}"
    protocol = "multi_scale" if multi else "single"
    return Row(name, miou, pa, final, f"ade20k_r{depth}", protocol)


TABLES = (
    Table(
        "I",
        "ResNets of several depths, ADE20K val, single and multi-scale",
        (
            _ours(50, False, 43.82, 81.23, 62.53),
            _ours(101, False, 44.21, 82.71, 63.46),
            _ours(152, False, 44.86, 82.91, 63.89),
            _ours(269, False, 46.26, 83.11, 64.69),
            _ours(50, True, 44.16, 81.70, 62.93),
            _ours(101, True, 45.41, 82.86, 64.14),
            _ours(152, True, 45.87, 83.66, 64.77),
            _ours(269, True, 47.16, 83.82, 65.49),
        ),
    ),
    Table(
        "II",
        "other methods, ADE20K val",
        (
            Row("SegNet", 21.64, 71.00, 46.32),
            Row("DilatedNet", 32.31, 73.55, 52.93),
            Row("CascadeNet", 34.90, 74.52, 54.71),
            Row("RefineNet", 40.70),
            Row("PSPNet", 43.29, 81.39, 62.34, near="pspnet"),
            Row("FastFCN", 44.34, 80.99, 62.67, near="jpu"),
            Row("EncNet", 44.65, 81.69, 63.17),
            Row("CPNet", 45.39, 81.04, 63.21),
            Row("CGBNet", 44.90, 82.10, 63.50, near="duc_ccl"),
            Row("ResNeSt", 46.91, 82.07, 64.49),
            Row("Ours (ResNet-101)", 46.41, 82.86, 64.64, "ade20k_r101", "multi_scale"),
        ),
    ),
    Table(
        "III",
        "other methods, PASCAL-Context val",
        (
            Row("DeepLabV2", 45.70),
            Row("RefineNet", 47.30),
            Row("PSPNet", 47.80, near="pspnet"),
            Row("EncNet", 51.70),
            Row("DUpsampling", 52.50, near="dupsampling"),
            Row("DANet", 52.60),
            Row("FastFCN", 53.10, 79.12, 66.11, near="jpu"),
            Row("CPNet", 53.90),
            Row("CGBNet", 53.40, 79.60, 66.50, near="duc_ccl"),
            Row("DRAN", 55.40, 79.60, 67.50),
            Row("Ours", 56.10, 81.62, 68.86, "pascal_context_r101", "multi_scale"),
        ),
    ),
    Table(
        "IV",
        "other methods, Cityscapes test server",
        (
            Row("DilatedNet", 66.8),
            Row("DeepLabV2", 70.4),
            Row("RefineNet", 73.6),
            Row("PSPNet", 78.4, near="pspnet"),
            Row("DenseASPP", 80.6, near="duc_dense_aspp"),
            Row("CGBNet", 81.2, near="duc_ccl"),
            Row("DRAN", 82.9),
            Row("Ours", 83.3, run="cityscapes_r101", protocol="multi_scale"),
        ),
        server=True,
        digits=1,
    ),
)

# What the trainings of configs/paper.py decide where the paper is silent.
LEFT_OPEN = (
    "Batch 16 [C]; ten times the rate for new layers [C]; base size 520 [C].",
    "Images are shrunk with a low-pass, `data.antialias`, as the code base's Pillow does [C]. It "
    "also blurs crops (p = 0.5, radius uniform in 0 to 1 pixel) [C]; off here, for the paper does "
    "not name it among its augmentations [I]: `--config.data.blur_probability=0.5`.",
    "ImageNet weights of torchvision's first recipe, with the plain stem [I]; the paper says "
    '"pre-trained". For ResNet-269 none are known by name.',
    "*SS* is `evaluate --protocol=single`; *MS* is `multi_scale`, whose scales 0.5 to 1.75 with "
    "flips are [C].",
    "No checkpoint is selected: the last step is tested [I].",
    "PASCAL-Context: ResNet-101 and multi-scale [I]; 59 classes.",
    "Cityscapes: ResNet-101, crops of 768 from a base size of 1024, fine annotations alone, "
    "multi-scale [I]; 240 epochs [C]. The code base rotates its crops by up to 10 degrees [C]; off "
    "here likewise [I]: `--config.data.rotate_degrees=10`. Its table has the rate 1e-2 for ADE20K "
    "and Cityscapes: `--config.optimizer.learning_rate=1e-2`.",
    "The network's own open choices: [network.md](../network.md).",
)

# (place, what the paper has, what this project does)
SLIPS = (
    (
        "Abstract; Table I",
        'The "new record of 82.86%" PA on ADE20K is ResNet-101\'s; Table I has 83.82 for '
        "ResNet-269.",
        "Rows are compared depth by depth.",
    ),
    (
        "II; Fig. 1",
        "The text calls the network of Fig. 1(a) DeepLabv3+, its caption DeepLabv3.",
        "`context=aspp` is DeepLabv3's, without v3+'s decoder.",
    ),
    (
        "III.A, eq. 1 to 3",
        "a and b are of a window k and a pixel i at once in eq. 1, of a pixel in eq. 3, where O "
        "has no index. What stands for the guidance I_h among the features is not said.",
        "O = a * G~ + b at each cell, G~ the guidance features brought to I_m's grid.",
    ),
    (
        "III.A",
        "Making the guided filter a learnable layer is credited to Xu et al. [37], whose deep "
        "edge-aware filters are another thing; it is Wu et al.'s [34], as section II says.",
        "`upsampling=guided_filter` is Wu et al.'s.",
    ),
    (
        "III.B, Fig. 3",
        '"A convolution layer with stride 4" from full resolution gives 1/4; the size that the '
        "text wants, that of I_m (C3), is 1/8.",
        "The stride-4 convolution, then bilinear to I_m's grid; `guidance_stride=2` starts from "
        "half the resolution.",
    ),
    (
        "III.B",
        '"A bilinear interpolation is used to upsample the obtained guidance map with the '
        'low-resolution feature map" does not say which of a, b, O or I~ is upsampled.',
        "I~, before a and b; `duc_upsampled` also has a and b, or O.",
    ),
    (
        "III.B",
        'Depths "[52, 101, 152, and 269]"; V.B and Table I have 50.',
        "50.",
    ),
    (
        "III.C",
        "ASPP's rates 6, 12, 18, 24 are DeepLabv2's, on 1/8; the 1/16 grid in the same paragraph "
        "is DeepLabv3's, whose rates there are 6, 12, 18.",
        "`context=aspp` has DeepLabv3's.",
    ),
    (
        "III.C",
        'Atrous convolution enlarges the receptive field "exponentially"; by eq. 4 it grows '
        "linearly with the rate.",
        "Eq. 4, and a measured field (docs/network.md).",
    ),
    (
        "III.C",
        '"Based on Equation 3" a rate of 24 has the field 49: it is equation 4.',
        "Eq. 4.",
    ),
    (
        "III.C",
        "CCL's receptive field of 49: eq. 4 and 5 give 45 for its rates and four 3x3 "
        "convolutions. DLC's 79 does follow.",
        "45 for the chain as described; `context=ccl` measures 43, by its own structure.",
    ),
    ("III.C", '"The DCU".', "DUC."),
    (
        "III.C",
        '"Compared to DenseASPP, we use a 1x1 convolution before the input of each dilated '
        'convolution": DenseASPP has these too, 512 wide; its 6.48M parameters count them.',
        "Smaller are DLC's 1x1, 128 wide, and its input, which a 1x1 reduces first.",
    ),
    (
        "III.C",
        '"We omit the dilation rate of 24 in our DUC module".',
        "DLC: its rates are 3, 6, 12, 18.",
    ),
    (
        "IV.A",
        "ADE20K has 3,169 labels here; how many are trained and scored is not said.",
        "The 150 of SceneParse150.",
    ),
    (
        "IV.A",
        "ADE20K's test set is 3,000 images; the release has 3,352.",
        "The release's.",
    ),
    (
        "IV.A; V.B",
        'PASCAL-Context is "59 class labels, including one background class", then "all 59 '
        'classes, plus one background class".',
        "`pascal_context` trains 59 and ignores the background, `pascal_context_60` counts it; "
        "`evaluate` names both figures.",
    ),
    (
        "IV.B",
        '"Random vertical flipping": the code base that the hyper-parameters come from flips '
        "left-right.",
        "`data.flip=left_right`; `up_down` is the paper's word.",
    ),
    (
        "IV.B",
        "Epochs are given for ADE20K and PASCAL-Context alone, and no batch size.",
        "Cityscapes 240 epochs, batch 16, as in the code base.",
    ),
    (
        "IV.C, eq. 6",
        "P is the number of pixels and the probability at once, the index j occurs in no term, "
        "and nothing divides the sum.",
        "The mean over the pixels that are not ignored of -log of the label's probability.",
    ),
    (
        "V.A",
        '"Figure shows ..." without a number, and "Error! Reference source not found."',
        "Fig. 6 and 7.",
    ),
    (
        "Tables I and II",
        "ResNet-101, multi-scale: mIoU 45.41 in the one, 46.41 in the other; each Final Score "
        "fits its own.",
        "Both are listed; one run stands beside both.",
    ),
    (
        "V.B; Table II",
        '"We report new records" with 46.41 mIoU; ResNeSt has 46.91 in the same table. Only PA '
        "is higher.",
        "Nothing hangs on it.",
    ),
    (
        "Tables III and IV",
        'Neither depth nor scales of "Ours"; for Cityscapes not whether the coarse annotations '
        "were used.",
        "ResNet-101, multi-scale, fine annotations alone.",
    ),
)
