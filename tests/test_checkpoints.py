"""What is kept, what is restored, and what a wrong checkpoint says."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.checkpoints import Checkpoints, checksums
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.errors import CheckpointError
from duc_dlc_jax.train_step import TrainState


def make_state(step, width=3, ema=False):
    params = {"backbone": {"kernel": jnp.full((2, width), float(step))}}
    stats = {"bn": {"mean": jnp.full((width,), step / 2)}}
    average = {"params": params, "batch_stats": stats} if ema else {}
    average = jax.tree.map(lambda x: x + 100, average)
    return TrainState(jnp.asarray(step, jnp.int32), params, stats, (params,), average)


def random_state(step):
    """Numbers that do not compress, so that a flipped bit of their file is one of theirs."""
    kernel = np.random.default_rng(step).integers(0, 2**31, (64, 64)).astype(np.int32)
    return make_state(step).replace(params={"backbone": {"kernel": jnp.asarray(kernel)}})


def like(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def save_scores(folder, scores, keep_latest=2, keep_best=1):
    saved = Checkpoints(folder, keep_latest, keep_best)
    for step, score in scores.items():
        metrics = None if score is None else {"final_score": score, "mIoU": score}
        saved.save(make_state(step), 8 * step, config_lib.default(), metrics)
    saved.wait()
    saved.close()
    return Checkpoints(folder, keep_latest, keep_best)


def steps(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir())


def test_falling_scores_keep_the_newest_and_the_best(tmp_path):
    saved = save_scores(tmp_path, {5: 0.9, 6: 0.8, 7: 0.7, 8: 0.6})
    assert steps(tmp_path) == [5, 7, 8]
    assert (saved.latest_step(), saved.best_step()) == (8, 5)


def test_rising_scores_keep_the_latest(tmp_path):
    saved = save_scores(tmp_path, {5: 0.6, 6: 0.7, 7: 0.8, 8: 0.9})
    assert steps(tmp_path) == [7, 8]
    assert (saved.latest_step(), saved.best_step()) == (8, 8)


def test_checkpoints_without_scores_do_not_pile_up_or_count_as_best(tmp_path):
    saved = save_scores(tmp_path, {1: None, 2: 0.5, 3: None, 4: None, 5: float("nan"), 6: None})
    assert steps(tmp_path) == [2, 5, 6]
    assert saved.best_step() == 2


def test_no_scores_at_all_best_is_latest(tmp_path):
    assert save_scores(tmp_path, {1: None, 2: None}).best_step() == 2


def test_round_trip(tmp_path):
    saved = save_scores(tmp_path, {3: 0.5})
    state, position = saved.restore(3, like(make_state(0)))
    assert position == 24
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))


def test_average_is_what_gets_evaluated_statistics_included(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(make_state(3, ema=True), 0, config_lib.default())
    saved.wait()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    variables = saved.restore_variables(3, sharding)
    np.testing.assert_array_equal(variables["params"]["backbone"]["kernel"], 103.0)
    np.testing.assert_array_equal(variables["batch_stats"]["bn"]["mean"], 101.5)


def test_missing_step_is_an_error_that_lists_what_there_is(tmp_path):
    saved = save_scores(tmp_path, {3: 0.5})
    with pytest.raises(FileNotFoundError, match=r"step 4 .*there: 3"):
        saved.restore(4, like(make_state(0)))


def test_another_shape_is_named_with_both_shapes(tmp_path):
    saved = save_scores(tmp_path, {3: 0.5})
    with pytest.raises(ValueError, match=r"kernel is \(2, 3\) float32 in the .* and \(2, 4\)"):
        saved.restore(3, like(make_state(0, width=4)))


def test_an_absent_part_is_named(tmp_path):
    saved = save_scores(tmp_path, {3: 0.5})
    with pytest.raises(ValueError, match=r"ema/.* is absent in the checkpoint"):
        saved.restore(3, like(make_state(0, ema=True)))


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 1
    elif kind == "truncated":
        content = content[: len(content) // 2]
    else:
        path.unlink()
        return
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, kind, caplog):
    """Whichever file it is: the newest as it was saved, or the one before with a warning."""
    saved = Checkpoints(tmp_path / "run")
    for step in (2, 3):
        saved.save(random_state(step), 8 * step, config_lib.default(), {"final_score": 0.5})
    saved.close()
    folder = tmp_path / "run" / "checkpoints"
    files = [p for p in sorted((folder / "3").rglob("*")) if p.is_file() and p.stat().st_size]
    used = {2: 0, 3: 0}
    for path in files:
        workdir = tmp_path / "damaged"
        shutil.copytree(tmp_path / "run", workdir)
        damage(workdir / path.relative_to(tmp_path / "run"), kind)
        caplog.clear()
        reopened = Checkpoints(workdir, training=True)
        state, position = reopened.restore_latest(like(random_state(0)))
        step = int(state.step)
        jax.tree.map(np.testing.assert_array_equal, state, random_state(step))
        assert position == 8 * step
        used[step] += 1
        if step == 2:
            assert "checkpoints/3 is damaged and moved to" in caplog.text
            assert (workdir / "unreadable" / "3").is_dir()
            reopened.save(random_state(3), 24, config_lib.default())  # the way is free again
            reopened.wait()
            assert reopened.latest_step() == 3
        reopened.close()
        shutil.rmtree(workdir)
    print(f"{kind}: {used[3]} files do not matter, {used[2]} gave way")
    assert used[2] >= 4


def test_a_flipped_bit_of_an_array_is_noticed_by_its_checksum(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(random_state(3), 24, config_lib.default())
    saved.close()
    kernel = np.asarray(random_state(3).params["backbone"]["kernel"]).tobytes()
    (path,) = (
        p
        for p in (tmp_path / "checkpoints" / "3" / "state").rglob("*")
        if p.is_file() and p.parent.name == "d" and kernel[2000:2004] in p.read_bytes()
    )
    content = bytearray(path.read_bytes())
    content[content.index(kernel[2000:2004])] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoints/3 is damaged"):
        Checkpoints(tmp_path).restore(3, like(random_state(0)))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of the run can be read: .*unreadable"
    ):
        Checkpoints(tmp_path, training=True).restore_latest(like(random_state(0)))


def test_checksums_change_with_any_word():
    state = random_state(1)
    before = checksums(state)["params/backbone/kernel"]
    kernel = state.params["backbone"]["kernel"]
    assert before != checksums(random_state(2))["params/backbone/kernel"]
    for place in ((0, 0), (31, 7), (63, 63)):
        assert checksums({"k": kernel.at[place].set(kernel[place] ^ (1 << 30))})["k"] != before


def test_another_structure_is_not_passed_over(tmp_path):
    """The one before would fit, but using it would lose work without a word."""
    saved = Checkpoints(tmp_path)
    saved.save(make_state(2), 0, config_lib.default())
    saved.save(make_state(3, width=4), 0, config_lib.default())
    saved.close()
    reopened = Checkpoints(tmp_path, training=True)
    with pytest.raises(ConfigError, match=r"/3 does not fit .*\(2, 4\) float32 in the"):
        reopened.restore_latest(like(make_state(0)))
    assert steps(tmp_path) == [2, 3]


def test_another_dtype_is_no_damage(tmp_path):
    """Numbers that were read as float64 have other checksums than those that were saved."""
    save_scores(tmp_path, {3: None}).close()
    narrow = like(make_state(0))
    wide = narrow.replace(
        params=jax.tree.map(lambda x: x.update(dtype=np.dtype("float64")), narrow.params)
    )
    with (
        Checkpoints(tmp_path, training=True) as saved,
        pytest.raises(ConfigError, match=r"kernel is \(2, 3\) float32 .* and \(2, 3\) float64"),
    ):
        saved.restore_latest(wide)
    assert steps(tmp_path) == [3]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    saved = save_scores(tmp_path, {2: None})
    assert not saved.has_scores(2)
    saved.save(make_state(2), 16, config_lib.default(), {"final_score": 0.5})
    saved.wait()
    assert Checkpoints(tmp_path).has_scores(2)


def test_what_a_killed_save_left_is_removed_by_training_alone(tmp_path):
    save_scores(tmp_path, {2: 0.5}).close()
    left = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp-7"
    shutil.copytree(tmp_path / "checkpoints" / "2", left)
    Checkpoints(tmp_path).close()
    assert left.is_dir()
    with Checkpoints(tmp_path, training=True) as saved:
        assert saved.latest_step() == 2
        saved.save(make_state(3), 24, config_lib.default())  # removing goes on beside training
    assert not left.exists()
