"""The page of a grid: means, intervals and verdicts against plain formulas, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import pictures
from duc_dlc_jax.ablate import crops, grid, plots, report
from duc_dlc_jax.ablate.__main__ import write_report
from duc_dlc_jax.ablate.grid import Grid, Run, Variant, parts
from duc_dlc_jax.ablate.results import Results
from duc_dlc_jax.ablate.significance import (
    Difference,
    corrected,
    half_width,
    paired,
    smallest,
    verdicts,
)
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import label_spec
from repository import ROOT

GRID = Grid(
    (
        Variant("fcn", parts("none", "none"), 4),
        Variant("duc", parts("duc", "none"), 4),
        Variant("jpu", parts("jpu", "none"), 2),
        Variant("psp", parts("none", "psp"), 2),
    ),
    {
        "the parts": (("fcn", "duc", "the guidance"), ("duc", "jpu", "another")),
        "others": (("fcn", "psp", "a third"), ("duc", "psp", "a fourth")),
    },
    "Reduced protocol",
    {"train.epochs": 200.0, "data.crop_size": 480},
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
    for variant in GRID.variants[:3]:
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


def of_p(p: float) -> Difference:
    """Eight values of spread 1 whose mean has this p-value."""
    x = np.random.default_rng(0).normal(size=8)
    x = (x - x.mean()) / x.std(ddof=1)
    return Difference(tuple(x + stats.t.isf(p / 2, 7) / math.sqrt(8)))


def test_holm_asks_more_of_many_questions():
    """p = 0.03 alone passes at 5%; beside a second question of p = 0.04 neither does."""
    likely, other, sure = of_p(0.03), of_p(0.04), of_p(0.001)
    assert likely.p == pytest.approx(0.03)
    assert verdicts([likely]) == ["higher"]
    assert verdicts([likely, other]) == ["not told apart"] * 2
    assert verdicts([likely, sure]) == ["higher", "higher"]
    negative = Difference(tuple(-v for v in sure.values))
    assert verdicts([negative]) == ["lower"]


def test_questions_without_runs_count_as_asked():
    """So that a verdict stays as it is when their runs arrive and say nothing."""
    likely, absent, nothing = of_p(0.03), Difference(()), of_p(0.9)
    assert verdicts([likely, absent]) == ["not told apart", "too few seeds"]
    assert corrected([likely, absent, absent]) == pytest.approx([0.09, 1, 1])
    assert corrected([likely, absent, of_p(0.02)]) == pytest.approx([0.06, 1, 0.06])
    assert corrected([likely, nothing])[0] == corrected([likely, absent])[0]
    assert corrected([]) == []


def test_the_smallest_difference_is_just_told_apart():
    """Of four questions, moved to a hair above and below it."""
    difference, others = of_p(0.5), [Difference(())] * 3
    least = smallest(difference, 4)
    for factor, expected in ((1.001, "higher"), (0.999, "not told apart")):
        shift = factor * least - difference.mean
        moved = Difference(tuple(value + shift for value in difference.values))
        assert verdicts([moved, *others])[0] == expected
    assert smallest(Difference((0.5,)), 4) == math.inf


# The page


def test_the_page_says_what_was_found_and_what_was_not_done(results, tmp_path):
    output = tmp_path / "docs" / "page.md"
    report.write(results, output, "COMMAND")
    text = output.read_text()
    assert "$ COMMAND" in text
    assert "8 runs of 3 variants (8 on H100; JAX 0.10; the code of 8 is not recorded), 0.2" in text
    mean, spread = np.mean([0.5, 0.52, 0.48, 0.51]), np.std([0.5, 0.52, 0.48, 0.51], ddof=1)
    assert f"| `fcn` | none, none | 1/8 | 4 | {mean:.4f} ± {spread:.4f} |" in text
    assert "| `jpu` | jpu, none | 1/8 | 1 | 0.6000 | 0.9000 |" in text
    half = 100 * half_width([0.05, 0.049, 0.051])
    row = f"| `duc` - `fcn` | the guidance | 3 | +5.00 ± {half:.2f}, p < 0.001, higher |"
    assert row in text
    assert "Holm over 2 questions in each score." in text
    assert "| `jpu` - `duc` | another | 1 | +5.00, too few seeds |" in text
    assert "- `jpu`: seed 1" in text
    assert "- `duc-seed3` failed: RuntimeError: out of memory" in text
    assert "| pole | 25.00% | 0.403 ± " in text
    assert text.index("| boat |") < text.index("| pole |") < text.index("| road |")


def test_the_verdict_is_in_words_and_comes_first(results, tmp_path):
    report.write(results, tmp_path / "page.md", "COMMAND")
    text = (tmp_path / "page.md").read_text()
    assert text.index("## Verdict") < text.index("## Scores and costs")
    half = 100 * half_width([0.05, 0.049, 0.051])
    least = 100 * smallest(Difference((0.05, 0.049, 0.051)), 2)
    assert (
        f"- The guidance (`duc` - `fcn`, 3 seeds): mIoU +5.00 ± {half:.2f}, **higher**; "
        f"boundary IoU +2.50 ± {half / 2:.2f}, **higher**." in text
    )
    assert "- exceeds the noise of the seeds, upwards: the guidance." in text
    assert "- has too few seeds: another." in text
    assert f"a mean difference in mIoU had to reach {least:.1f} points" in text
    assert "No runs answer yet: others (2 questions)." in text
    assert "The highest mean mIoU of the 3 variants with runs is that of `jpu`, 0.6000" in text
    assert report.answers.UNLIKE not in text


def test_the_page_names_its_protocol_and_where_the_budget_is_another(results, tmp_path):
    report.write(results, tmp_path / "page.md", "COMMAND")
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert lines[2] == "**Reduced protocol.**"
    assert lines[4] == (
        "**Not with the configuration's budget: these runs have train.epochs=120.0 (200.0 there).**"
    )
    results.write_grid(dataclasses.replace(GRID, title="", recipe={"train.epochs": 120.0}))
    report.write(results, tmp_path / "page.md", "COMMAND")
    assert (tmp_path / "page.md").read_text().splitlines()[2].startswith("Made from")


def test_a_later_family_has_its_own_correction_and_no_columns(results, tmp_path):
    variant = GRID.variants[3]
    for seed in range(2):
        results.write(Run(variant, seed), result(variant, seed, 0.4 + 0.01 * seed))
    report.write(results, tmp_path / "page.md", "COMMAND")
    text = (tmp_path / "page.md").read_text()
    assert text.count("Holm over 2 questions in each score.") == 2
    assert "| `psp` - `duc` | a fourth | 2 |" in text
    assert "- A third (`psp` - `fcn`, 2 seeds): mIoU -10.50 ±" in text
    assert "| class | share of pixels | `fcn` | `duc` | `jpu` |" in text
    assert "| `psp` | none, psp |" in text


@pytest.mark.parametrize("name", ["ablation", "ablation_small", "scenes"])
def test_the_committed_pages_are_what_their_commands_write(name):
    """Their text: what draws the plots has other versions elsewhere."""
    home = ROOT / "docs" / "results"
    written = (home / f"{name}.md").read_text()
    command = written.partition("\n$ ")[2].partition("\n")[0]
    assert f"--workdir=docs/results/{name} --output=docs/results/{name}.md" in command
    found = Results(home / name)
    config = re.search(r"--config=(\S+)", command).group(1)
    assert found.grid() == grid.load(str(ROOT / config)), f"run {command}"
    table = report.Table(found.grid(), found.all())
    drawn = plots.plots(table, found)
    assert written == report.page(table, found, command, name, drawn), f"run {command}"
    assert all((home / name / plot.name).exists() for plot in drawn)


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


def test_rates_are_those_of_a_device_that_has_them(results, tmp_path):
    """Most runs had an H100 and no rates."""
    for path in results.folder.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"images_per_second": {}}))
    report.write(results, tmp_path / "page.md", "COMMAND")
    text = (tmp_path / "page.md").read_text()
    assert "There are no rates in the files, out of which they are taken where" in text
    assert "train images/s" not in text
    duc = GRID.variants[1]
    for seed in range(3):
        row = result(duc, seed, 0.55, device="H200") | {"step_bytes_per_device": 3 * 2**30}
        results.write(Run(duc, seed), row)
    report.write(results, tmp_path / "page.md", "COMMAND")
    text = (tmp_path / "page.md").read_text()
    assert "Rates are those of H200" in text
    assert "`fcn`, `jpu`: no rates in the files" in text
    assert "| 101 | 50 | 3.0 GiB | H200 |" in text
    assert "| - | - | 2.0 GiB | H100 |" in text
    assert "| `duc` - `fcn`† |" in text
    assert report.answers.UNLIKE_SAID in text


def test_memory_is_said_by_device(results):
    fcn = GRID.variants[0]
    row = result(fcn, 0, 0.5, device="H200") | {"step_bytes_per_device": 3 * 2**30}
    results.write(Run(fcn, 0), row)
    found = report.Table(GRID, results.all()).memory("fcn")
    assert found == {"H200": 3 * 2**30, "H100": 2**31}
    assert report._memory(found) == "3.0 GiB on H200, 2.0 GiB on H100"


def test_differences_between_commits_are_marked_where_both_are_known(results):
    def code(commit):
        return {"code": {"version": "0.1.0", "commit": commit, "dirty": True}}

    fcn, duc = GRID.variants[:2]
    results.write(Run(fcn, 1), result(fcn, 1, 0.5) | code("a" * 40))
    assert not report.Table(GRID, results.all()).unlike("fcn", "duc")
    results.write(Run(duc, 0), result(duc, 0, 0.5) | code("b" * 40))
    assert not report.Table(GRID, results.all()).unlike("fcn", "duc")  # of another seed
    results.write(Run(duc, 1), result(duc, 1, 0.5) | code("b" * 40))
    table = report.Table(GRID, results.all())
    assert table.unlike("fcn", "duc")
    every = [r for runs in table.runs.values() for r in runs]
    assert "2 by version 0.1.0, commit bbbbbbbb with changes" in report._codes(every)
    assert "the code of 5 is not recorded" in report._codes(every)


def test_a_processor_has_its_model_and_the_cores_that_it_might_use(results):
    fcn = GRID.variants[0]
    known = {"platform": "cpu", "cpu": "EPYC", "cores": 8, "usable_cores": 1, "jax": "0.10"}
    row = result(fcn, 0, 0.5) | {"hardware": known | {"device": "cpu"}}
    assert (report.device(row), report.host(row)) == ("EPYC, 1 of 8 cores", "")
    old = result(fcn, 0, 0.5, device="cpu")
    assert (report.device(old), report.host(old)) == ("cpu", "")
    beside = row | {"hardware": known | {"device": "H100", "platform": "gpu"}}
    assert (report.device(beside), report.host(beside)) == ("H100", "EPYC, 1 of 8 cores")


def test_runs_of_two_budgets_are_refused(results):
    variant = GRID.variants[0]
    other = result(variant, 3, 0.5, **{"train.epochs": 30.0, "data.dir": "elsewhere"})
    results.write(Run(variant, 3), other)
    with pytest.raises(ConfigError, match=r"runs of two budgets: train\.epochs is 120\.0 in duc-"):
        report.Table(GRID, results.all())


def test_runs_with_and_without_initial_weights_are_refused(results):
    """Or from two files; where a file is does not matter, nor what an old run does not say."""
    fcn = GRID.variants[0]
    given = {"init.weights": "elsewhere/one.npz"}
    results.write(Run(fcn, 3), result(fcn, 3, 0.5, **given))
    with pytest.raises(ConfigError, match=r"budgets: init\.weights is '' in duc-seed0 and 'a f"):
        report.Table(GRID, results.all())
    rows = [result(fcn, 0, 0.5, **{"init.weights": "one.npz"}), result(fcn, 1, 0.5, **given)]
    report.Table(GRID, rows)
    report.Table(GRID, [rows[0] | {"weights_sha256": "a" * 64}, rows[1]])
    digests = [row | {"weights_sha256": x * 64} for row, x in zip(rows, "ab", strict=True)]
    with pytest.raises(ConfigError, match=r"init\.weights, by SHA-256, is 'aaa.* 'bbb.* fcn-seed1"):
        report.Table(GRID, digests)


def test_a_workdir_without_runs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not the workdir of an ablation: no grid\.json"):
        report.write(Results(tmp_path), tmp_path / "page.md", "")
    with pytest.raises(ConfigError, match="no run has ended yet"):
        report.Table(GRID, [])
    with pytest.raises(FileNotFoundError):
        write_report(Results(tmp_path / "mistyped"), str(tmp_path / "page.md"), GRID, "")
    assert not (tmp_path / "mistyped").exists()


def test_runs_that_are_not_the_grids_are_refused(results, tmp_path):
    """Nor do they lose their own grid.json; and a variant is what it was when it was run."""
    with pytest.raises(ConfigError, match=r"the grid lacks: ccl; each grid has a --workdir of it"):
        report.Table(GRID, [result(Variant("ccl", {}), 0, 0.5)])
    with pytest.raises(ConfigError, match="the grid lacks: jpu"):
        write_report(results, str(tmp_path / "page.md"), Grid(GRID.variants[:2]), "")
    assert results.grid() == GRID
    other = dataclasses.replace(GRID.variants[0], changes=parts("none", "aspp"))
    with pytest.raises(ConfigError, match=r"fcn-seed0 was run with model\.context='none'; now it"):
        report.Table(dataclasses.replace(GRID, variants=(other, *GRID.variants[1:])), results.all())


def test_a_run_that_was_cut_off_in_a_copy_is_named(results):
    path = results.folder / "fcn-seed1.json"
    path.write_text(path.read_text()[:99])
    with pytest.raises(ConfigError, match=r"fcn-seed1\.json is no whole run: .* Copy it again, or"):
        results.all()


def test_a_grid_survives_its_file():
    assert Grid.from_json(GRID.to_json()) == GRID
    old = {"variants": [], "comparisons": [["fcn", "duc", "why"]]}  # without title and families
    assert Grid.from_json(json.dumps(old)) == Grid((), {"": (("fcn", "duc", "why"),)})
    assert paired({}, {}).values == ()


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
    results.write_grid(Grid(GRID.variants[:2], {"": GRID.comparisons["the parts"][:1]}))
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
    assert "|  | mean | 0.350 | 0.600 |\n\nVerdicts as above, after Holm's correction" in text
    half = 100 * half_width([0.2, 0.3])
    assert (
        f"- `duc` - `fcn` (the guidance): higher in 2 of 3 crops; mean over the crops +25.00 ± "
        f"{half:.2f} points, 2 seeds, not told apart." in text
    )
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    assert text.index("## The same crops") < text.index("](page/crops.png)")
    assert (tmp_path / "page" / "crops.png").read_bytes().startswith(b"\x89PNG")


def test_crops_are_compared_over_the_seeds_that_both_have():
    """Seed 0 alone: seed 1 of the first would turn both crops around."""
    fcn, duc = GRID.variants[:2]
    rows = [with_crops(fcn, 0, (0.3, 0.3)), with_crops(fcn, 1, (0.9, 0.9))]
    rows.append(with_crops(duc, 0, (0.4, 0.2)))
    assert "higher in 1 of 2 crops; mean over the crops +0.00 points, 1 seed," in report._crops(
        report.Table(Grid(GRID.variants[:2], {"": GRID.comparisons["the parts"][:1]}), rows)
    )


def test_runs_from_before_the_crops_have_none(results, tmp_path):
    report.write(results, tmp_path / "page.md", "COMMAND")
    assert "## The same crops" not in (tmp_path / "page.md").read_text()
