"""CamVid: what DUC and DLC are worth, against what they replace, trained alike.

Command   python -m duc_dlc_jax.ablate --config=configs/ablation_camvid.py --workdir=runs/ablation
          --config.init.weights=FILE --config.init.source=NAME --config.model.stride_on=1x1|3x3
          --config.train.epochs=N is the budget of every run
Data      python -m duc_dlc_jax.data.prepare --dataset=camvid --raw_dir=DIR --data_dir=data
Hardware  one accelerator with 40 GB or more
Score     docs/results/ablation.md: the runs that there are, of 24 epochs
"""

from duc_dlc_jax import config as base
from duc_dlc_jax.ablate.grid import Variant, parts


def get_config():
    config = base.load("configs/camvid.py")
    config.data.threads = 8
    config.data.prefetch = 8
    config.model.dtype = "bfloat16"
    config.eval.batch_size = 4
    config.train.epochs = 200.0
    config.train.eval_every = 500
    return config


def get_variants():
    """In the order in which they run: first the question, then what else the paper compares."""
    return [
        Variant("fcn", parts("none", "none"), 10, "classifier on layer4"),
        Variant("bilinear", parts("bilinear", "none"), 10, "DUC without guidance: the control"),
        Variant("duc", parts("duc", "none"), 10, "the guidance on top of the control"),
        Variant("dlc", parts("bilinear", "dlc"), 10, "DLC on top of the control"),
        Variant("duc_dlc", parts("duc", "dlc"), 10, "the paper's network"),
        Variant("deeplabv3", parts("none", "aspp", output_stride=16), 3, "at 1/16"),
        Variant("duc_aspp", parts("duc", "aspp")),
        Variant("duc_dense_aspp", parts("duc", "dense_aspp")),
        Variant("duc_ccl", parts("duc", "ccl")),
        Variant("duc_psp", parts("duc", "psp")),
        Variant("pixel_shuffle", parts("pixel_shuffle", "none", output_stride=8), 3, "Wang et al."),
        Variant("jpu", parts("jpu", "none"), note="FastFCN"),
        Variant("dupsampling", parts("dupsampling", "none")),
        Variant("guided_filter", parts("guided_filter", "none")),
        Variant("fcn_head", parts("none", "fcn"), note="3x3 before the classifier"),
        Variant("fcn_os8", parts("none", "fcn", output_stride=8), note="torchvision's FCN"),
        Variant("deeplabv3_os8", parts("none", "aspp", output_stride=8), note="torchvision's"),
        Variant("pspnet", parts("none", "psp", output_stride=8)),
        # What this project inferred about DUC
        Variant("duc_dlc_stride", parts("duc", "dlc", resize_grid="stride")),
        Variant("duc_dlc_kernel5", parts("duc", "dlc", guidance_kernel=5)),
        Variant("duc_dlc_half", parts("duc", "dlc", guidance_stride=2)),
        Variant("duc_dlc_coefficients", parts("duc", "dlc", duc_upsampled="coefficients")),
        Variant("duc_dlc_output", parts("duc", "dlc", duc_upsampled="output")),
        Variant("duc_dlc_narrow", parts("duc", "dlc", guidance_width=16)),
        Variant("duc_dlc_os16", parts("duc", "dlc", output_stride=16)),
    ]


def get_title():
    return "The full recipe: configs/camvid.py, 200 epochs, in bfloat16"


def get_comparisons():
    """Questions by family, answered by the second less the first, seed by seed."""
    return {
        "the parts": [
            ("fcn", "bilinear", "the 1/8 grid and the skip from layer2"),
            ("bilinear", "duc", "DUC's guidance by the image"),
            ("bilinear", "dlc", "DLC, without guidance"),
            ("dlc", "duc_dlc", "DUC's guidance, under DLC"),
            ("duc", "duc_dlc", "DLC, on DUC"),
            ("bilinear", "duc_dlc", "DUC's guidance and DLC"),
            ("fcn", "duc_dlc", "the paper's network against FCN"),
            ("deeplabv3", "duc_dlc", "the paper's network against DeepLabv3 at 1/16"),
        ],
        "contexts on DUC": [
            ("duc_aspp", "duc_dlc", "DLC against ASPP"),
            ("duc_dense_aspp", "duc_dlc", "DLC against DenseASPP"),
            ("duc_ccl", "duc_dlc", "DLC against CCL"),
            ("duc_psp", "duc_dlc", "DLC against pyramid pooling"),
        ],
        "upsamplings without context": [
            ("pixel_shuffle", "duc", "DUC against pixel shuffle"),
            ("jpu", "duc", "DUC against JPU"),
            ("dupsampling", "duc", "DUC against DUpsampling"),
            ("guided_filter", "duc", "DUC against the guided filter"),
        ],
        "published networks": [
            ("fcn_head", "duc_dlc", "against FCN with a 3x3 before the classifier"),
            ("fcn_os8", "duc_dlc", "against FCN at 1/8"),
            ("deeplabv3_os8", "duc_dlc", "against DeepLabv3 at 1/8"),
            ("pspnet", "duc_dlc", "against PSPNet"),
        ],
        "what was inferred about DUC": [
            ("duc_dlc", "duc_dlc_stride", "resize grid by strides, not corners"),
            ("duc_dlc", "duc_dlc_kernel5", "a guidance of 5x5, not 3x3"),
            ("duc_dlc", "duc_dlc_half", "a guidance at half the resolution"),
            ("duc_dlc", "duc_dlc_coefficients", "a and b upsampled, not I~"),
            ("duc_dlc", "duc_dlc_output", "O upsampled, not I~"),
            ("duc_dlc", "duc_dlc_narrow", "a guidance 16 wide, not 64"),
            ("duc_dlc", "duc_dlc_os16", "a backbone at 1/16, not 1/32"),
        ],
    }
