"""What is kept, what is restored, and what a wrong checkpoint says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.checkpoints import Checkpoints
from duc_dlc_jax.train_step import TrainState


def make_state(step, width=3, ema=False):
    params = {"backbone": {"kernel": jnp.full((2, width), float(step))}}
    stats = {"bn": {"mean": jnp.full((width,), step / 2)}}
    average = {"params": params, "batch_stats": stats} if ema else {}
    average = jax.tree.map(lambda x: x + 100, average)
    return TrainState(jnp.asarray(step, jnp.int32), params, stats, (params,), average)


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
    with pytest.raises(ValueError, match=r"kernel is \(2, 3\) in the checkpoint and \(2, 4\)"):
        saved.restore(3, like(make_state(0, width=4)))


def test_an_absent_part_is_named(tmp_path):
    saved = save_scores(tmp_path, {3: 0.5})
    with pytest.raises(ValueError, match=r"ema/.* is absent in the checkpoint"):
        saved.restore(3, like(make_state(0, ema=True)))
