"""The page of a grid: means, intervals and verdicts against plain formulas, and what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import pictures
from duc_dlc_jax.ablate import crops, report, statistics
from duc_dlc_jax.ablate.grid import Grid, Run, Variant, parts
from duc_dlc_jax.ablate.results import Results
from duc_dlc_jax.ablate.statistics import Difference, half_width, paired, verdicts
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import label_spec

GRID = Grid(
    (
        Variant("fcn", parts("none", "none"), 4),
        Variant("duc", parts("duc", "none"), 4),
        Variant("jpu", parts("jpu", "none"), 2),
    ),
    (("fcn", "duc", "the guidance"), ("duc", "jpu", "another")),
)


def result(variant: Variant, seed: int, miou: float, device="H100", **changes):
    """What a run writes, with made-up figures."""
    config = variant.config(config_lib.default(), seed)
    config.update_from_flattened_dict(changes)
    per_class = {"road": miou + 0.1, "pole": miou - 0.1, "boat": None}
    return json.loads(
        json.dumps(
            {
                "variant": variant.name,
                "seed": seed,
                "config": config.to_dict(),
                "steps": 40,
                "images": [320, 40],
                "hardware": {"device": device, "jax": "0.10"},
                "seconds": {"total": 90.0},
                "curve": [{"step": s, "loss": 0.5, "mIoU": miou, "PA": 0.9} for s in (20, 40)],
                "val": {
                    "mIoU": miou,
                    "PA": 0.9,
                    "protocol": "single scale",
                    "iou": per_class,
                    "pixels": {"road": 75, "pole": 25, "boat": 0},
                    "boundary": {
                        "mean_iou": miou / 2,
                        "mean_f": 0.3,
                        "widths": "boundary IoU: 0.02",
                        "iou": per_class,
                    },
                },
                "parameters": {"backbone": 1000, variant.name: 234},
                "macs": {"backbone": 2 * 10**9},
                "macs_image": [360, 480],
                "images_per_second": {"train": 100.0 + seed, "label": 50.0},
                "step_bytes_per_device": 2**31,
                "grids": {"image": [360, 480], "context (1/8)": [45, 60]},
            }
        )
    )


@pytest.fixture
def results(tmp_path):
    """Four seeds of fcn, three of duc, one of jpu; seed 3 of duc failed."""
    results = Results(tmp_path)
    results.write_grid(GRID)
    scores = {"fcn": (0.50, 0.52, 0.48, 0.51), "duc": (0.55, 0.569, 0.531), "jpu": (0.6,)}
    for variant in GRID.variants:
        for seed, miou in enumerate(scores[variant.name]):
            results.write(Run(variant, seed), result(variant, seed, miou))
    results.write_failure(Run(GRID.variants[1], 3), RuntimeError("out of memory"))
    return results


# Statistics


def test_paired_differences_by_their_formula():
    first, second = {0: 0.5, 1: 0.52, 2: 0.48, 7: 0.1}, {0: 0.55, 1: 0.569, 2: 0.531}
    found = paired(first, second)
    values = np.array([0.05, 0.049, 0.051])
    np.testing.assert_allclose(found.values, values)
    assert found.mean == pytest.approx(0.05)
    error = values.std(ddof=1) / math.sqrt(3)
    assert found.half_width == pytest.approx(4.302653 * error, rel=1e-6)  # t of 2 degrees, 97.5%
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_one_seed_has_no_interval():
    assert half_width([0.5]) == math.inf
    assert verdicts([Difference((0.5,)), Difference(())]) == ["too few seeds"] * 2
    assert Difference((0.5,)).p == 1


def test_equal_runs_are_not_told_apart_and_constant_shifts_are():
    assert verdicts([Difference((0.0, 0.0)), Difference((0.1, 0.1))]) == [
        "not told apart",
        "higher",
    ]


def test_holm_asks_more_of_many_questions():
    """p = 0.03 alone passes at 5%; beside a second question of p = 0.04 neither does."""
    rng = np.random.default_rng(0)

    def of_p(p):
        x = rng.normal(size=8)
        x = (x - x.mean()) / x.std(ddof=1)
        return Difference(tuple(x + stats.t.isf(p / 2, 7) / math.sqrt(8)))

    likely, other, sure = of_p(0.03), of_p(0.04), of_p(0.001)
    assert likely.p == pytest.approx(0.03)
    assert verdicts([likely]) == ["higher"]
    assert verdicts([likely, other]) == ["not told apart"] * 2
    assert verdicts([likely, sure]) == ["higher", "higher"]
    negative = Difference(tuple(-v for v in sure.values))
    assert verdicts([negative]) == ["lower"]


# The page


def test_the_page_says_what_was_found_and_what_was_not_done(results, tmp_path):
    output = tmp_path / "docs" / "page.md"
    report.write(results, output, "COMMAND")
    text = output.read_text()
    assert "$ COMMAND" in text
    assert "8 runs of 3 variants (8 on H100; JAX 0.10), 0.2 hours" in text
    mean, spread = np.mean([0.5, 0.52, 0.48, 0.51]), np.std([0.5, 0.52, 0.48, 0.51], ddof=1)
    assert f"| `fcn` | none, none | 1/8 | 4 | {mean:.4f} ± {spread:.4f} |" in text
    assert "| `jpu` | jpu, none | 1/8 | 1 | 0.6000 | 0.9000 |" in text
    half = 100 * half_width([0.05, 0.049, 0.051])
    assert f"| `duc` - `fcn` | the guidance | 3 | +5.00 ± {half:.2f}, higher |" in text
    assert "| `jpu` - `duc` | another | 1 | +5.00, too few seeds |" in text
    assert "- **PA**: not told apart: `duc` - `fcn`; too few seeds: `jpu` - `duc`." in text
    assert "- `jpu`: seed 1" in text
    assert "- `duc-seed3` failed: RuntimeError: out of memory" in text
    assert "| pole | 25.00% | 0.403 ± " in text
    assert text.index("| boat |") < text.index("| pole |") < text.index("| road |")


def test_plots_are_written_and_shown(results, tmp_path):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    output = tmp_path / "page.md"
    report.write(results, output, "COMMAND")
    shown = [line for line in output.read_text().splitlines() if line.startswith("![")]
    assert len(shown) == 4
    for line in shown:
        path = tmp_path / line.partition("(")[2].rstrip(")")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_rates_come_from_one_device(results):
    variant = GRID.variants[0]
    results.write(Run(variant, 0), result(variant, 0, 0.5, device="H200"))
    table = report.Table(GRID, results.all())
    assert table.device == "H100"
    assert table.rates("fcn")["train"] == 102  # the median of seeds 1, 2, 3


def test_runs_of_two_budgets_are_refused(results):
    variant = GRID.variants[0]
    other = result(variant, 3, 0.5, **{"train.epochs": 30.0, "data.dir": "elsewhere"})
    results.write(Run(variant, 3), other)
    with pytest.raises(ConfigError, match=r"runs of two budgets: train\.epochs is 120\.0 in duc-"):
        report.Table(GRID, results.all())


def test_a_workdir_without_runs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not the workdir of an ablation: no grid\.json"):
        report.write(Results(tmp_path), tmp_path / "page.md", "")
    with pytest.raises(ConfigError, match="no run has ended yet"):
        report.Table(GRID, [])
    with pytest.raises(ConfigError, match=r"grid\.json lacks: psp"):
        report.Table(GRID, [result(Variant("psp", {}), 0, 0.5)])


def test_a_grid_survives_its_file():
    assert Grid.from_json(GRID.to_json()) == GRID
    assert statistics.paired({}, {}).values == ()


# The crops


def with_crops(variant, seed, values):
    rows = [
        {"record": 10 * k, "name": f"image_{k}", "top": k, "left": 2, "side": 16, "boundary_iou": v}
        for k, v in enumerate(values)
    ]
    return result(variant, seed, 0.5) | {"crops": rows}


def test_crops_are_compared_seed_by_seed_and_shown(tmp_path):
    """Means over the crops .3 and .4 against .5 and .7: +25 points on average, in 2 of 3 crops."""
    results, fcn, duc = Results(tmp_path / "runs_of"), *GRID.variants[:2]
    results.write_grid(Grid(GRID.variants[:2], GRID.comparisons[:1]))
    scores = (
        (fcn, ((0.3, 0.3, None), (0.5, 0.3, None))),
        (duc, ((0.7, 0.3, None), (0.9, 0.5, None))),
    )
    spec, rng = label_spec("camvid"), np.random.default_rng(0)
    for variant, seeds in scores:
        for seed, values in enumerate(seeds):
            results.write(Run(variant, seed), with_crops(variant, seed, values))
    results.masks("label").parent.mkdir()
    for name in ("label", "fcn-seed0", "duc-seed0"):
        squares = [rng.integers(0, 11, (16, 16), np.uint8) for _ in range(3)]
        pictures.write_ids(results.masks(name), crops.strip(squares), spec)
    output = tmp_path / "page.md"
    report.write(results, output, "COMMAND")
    text = output.read_text()
    assert "| 1 | image_0, 2, 0 | 0.400 | 0.800 |" in text
    assert "|  | mean | 0.350 | 0.600 |" in text
    half = 100 * half_width([0.2, 0.3])
    assert (
        f"- `duc` - `fcn` (the guidance): higher in 2 of 3 crops; mean over the crops +25.00 ± "
        f"{half:.2f} points, 2 seeds, not told apart." in text
    )
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    assert text.index("## The same crops") < text.index("](page/crops.png)")
    assert (tmp_path / "page" / "crops.png").read_bytes().startswith(b"\x89PNG")


def test_runs_from_before_the_crops_have_none(results, tmp_path):
    report.write(results, tmp_path / "page.md", "COMMAND")
    assert "## The same crops" not in (tmp_path / "page.md").read_text()
