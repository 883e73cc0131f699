"""The largest batch per device: as many images as the compiled training step has memory for.

Memory grows with the batch nearly in a line, so that three to five programs find it; the step is
then run at the batch that was found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from duc_dlc_jax import config as config_lib
from duc_dlc_jax.benchmark import floor, model, networks

FREE = 0.05  # of a device's memory, which `forecast` leaves as well
WITHIN = 0.05  # the largest batch is found to this share


def limit(gib: float) -> int:
    """Bytes that a program may need: of `gib`, or for 0 of what JAX may have of the first device.

    Raises ConfigError where the device does not say.
    """
    device = jax.local_devices()[0]
    memory = gib * 2**30 or (device.memory_stats() or {}).get("bytes_limit")
    if not memory:
        raise config_lib.ConfigError(
            f"--what=memory: {device.device_kind} does not say its memory; --memory_gib=16"
        )
    return int((1 - FREE) * memory)


def next_batch(tried: Mapping[int, int], limit: int) -> int | None:
    """The batch to compile next, or None where the largest is known to `WITHIN`, or one image.

    tried: bytes by batch, of one or more. Between two batches memory is taken to be a line; from
    one alone, all of it to be the images', which tells too few.
    """
    low = max((n for n in tried if tried[n] <= limit), default=0)
    high = min((n for n in tried if tried[n] > limit), default=None)
    step = max(int(WITHIN * low), 1)
    if high is not None and high - low <= step:
        return None
    first, *rest = sorted(tried, key=lambda n: abs(tried[n] - limit))
    if rest and tried[first] != tried[rest[0]]:
        slope = (tried[rest[0]] - tried[first]) / (rest[0] - first)
        guess = int(first + (limit - tried[first]) / slope)
    else:
        guess = first * limit // tried[first]
    return max(low + step, guess if high is None else min(guess, high - 1))


def largest(
    config: ml_collections.ConfigDict,
    ceilings: floor.Ceilings,
    limit: int,
    tried: dict[int, int],
    keep: Callable[[dict[str, Any]], Any],
) -> dict[str, Any]:
    """{tried, limit_bytes, images_per_device} and, at this batch, `model.timed_step`'s figures.

    tried: {images per device: bytes as compiled}, of programs that are known already; `keep` gets
    what is known after each program. A batch begins at that of `config` and goes in steps of
    train.accumulate images per device. {failed: why} where a program could not be compiled or run.
    """
    parts, devices = config.train.accumulate, jax.device_count()
    each = {n // parts: size for n, size in tried.items()}  # by images of a part
    first = max(config.train.batch_size // (parts * devices), 1)
    best: tuple[model.Work, model.Step] | None = None

    def program(images: int) -> tuple[model.Work, model.Step]:
        changed = config.copy_and_resolve_references()
        changed.train.batch_size = images * parts * devices
        work = model.Work(changed, ceilings=ceilings)
        return work, work.step()

    def known() -> dict[str, Any]:
        most = max((n for n in each if each[n] <= limit), default=0)
        sizes = {str(n * parts): each[n] for n in sorted(each)}
        return {"limit_bytes": limit, "images_per_device": most * parts, "tried": sizes}

    try:
        while images := next_batch(each, limit) if each else first:
            compiled = program(images)
            each[images] = compiled[1].peak_bytes
            print(f"  {images * parts} images: {each[images] / 2**20:,.0f} MiB", flush=True)
            keep(known())
            best = compiled if each[images] <= limit else best
            del compiled  # its state lies on the devices
        if not (most := known()["images_per_device"]):
            return known()
        return known() | model.timed_step(*(best or program(most // parts)), 3, 2)
    except RuntimeError as error:  # XLA's are
        return known() | networks.failed(error)


def show(name: str, row: dict[str, Any]) -> None:
    images = f"{row['images_per_device']} images per device in {row['limit_bytes'] / 2**30:.1f} GiB"
    failed = f"; failed: {row['failed']}" if "failed" in row else ""
    rate = f", {row['images_per_second']:.1f} images/s" if "images_per_second" in row else ""
    print(f"memory, {name}: {images}{rate}{failed}", flush=True)
