"""When a profiler trace begins and ends; that of a training: tests/test_end_to_end.py."""

import jax
import pytest

from duc_dlc_jax import profiling
from duc_dlc_jax.config import ConfigError
from runs import tiny_config


def test_a_run_that_ends_in_between_leaves_what_there_is(tmp_path):
    trace = profiling.Trace(str(tmp_path))
    for number in range(profiling.FIRST + 2):
        trace.before(number)
        trace.after(number, jax.numpy.ones(3) * number)
    assert not list(tmp_path.rglob("*.xplane.pb"))
    trace.close()
    trace.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_no_folder_no_trace_and_none_in_an_object_store(tmp_path):
    trace = profiling.Trace(tiny_config(tmp_path).profile)
    for number in range(30):
        trace.before(number)
        trace.after(number, None)
    trace.close()
    with pytest.raises(ConfigError, match=r"config\.profile"):
        profiling.Trace("gs://bucket/trace")
