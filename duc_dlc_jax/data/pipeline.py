"""Prepared records to batches: every batch is a function of (seed, step) and nothing else.

Row r of step s has the global position p = s * batch_size + r. Its epoch is p // n and its record
the (p % n)-th of that epoch's permutation, so batches run across epoch borders, nothing is dropped
and nothing depends on the number of processes, workers or threads, or on where a run was resumed.
Augmentation is drawn from (seed, epoch, record). Under class-uniform sampling a share of the
positions takes another record instead, drawn from (seed, position).

No TensorFlow here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.in_flight import InFlight
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.data.records import RecordError, Records
from duc_dlc_jax.data.threads import in_order
from duc_dlc_jax.data.transforms import Augmentation, train_transform

if TYPE_CHECKING:
    import grain  # imported where used: 2 s


@dataclasses.dataclass(frozen=True)
class Draw:
    """What a row of a batch shows: a crop of a record, drawn from `rng`, that holds `focus`."""

    record: int
    rng: np.random.Generator
    focus: tuple[int, int] | None  # (y, x) in pixels; None: any crop


class Positions:
    """This process's rows of the batches of the steps `steps`, in order.

    data: `config.data`. Process p has the rows [p B / P, (p + 1) B / P) of each batch of B. Raises
    ConfigError where the batch does not divide, or the split has no labels or no images.
    """

    def __init__(
        self,
        data: Any,
        records: Records,
        seed: int,
        batch_size: int,
        steps: range,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size < 1 or batch_size % process_count:
            raise ConfigError(
                f"train.batch_size = {batch_size} is not divisible by {process_count} processes: "
                f"{batch_size} = {process_count} x {batch_size // process_count} + "
                f"{batch_size % process_count}"
            )
        if not len(records) or not records.labelled:
            raise ConfigError(
                f"split {records.split!r} of {records.folder} has {len(records)} images"
                f"{'' if records.labelled else ' without labels'}: it cannot train; set "
                "data.train_split to another"
            )
        self.rows = batch_size // process_count
        self._count, self._seed, self._batch, self._steps = len(records), seed, batch_size, steps
        self._first_row = process_index * self.rows
        share = data.class_uniform_share
        self._by_class = ClassUniform(records.class_points(), share, seed) if share else None

    def __len__(self) -> int:
        return len(self._steps) * self.rows

    def __getitem__(self, index: int) -> Draw:
        step = self._steps[index // self.rows]
        position = step * self._batch + self._first_row + index % self.rows
        epoch, offset = divmod(position, self._count)
        record, focus = int(permutation(self._seed, epoch, self._count)[offset]), None
        keys = [self._seed, epoch, record]
        if self._by_class and (drawn := self._by_class.draw(position)):
            record, focus = drawn
            keys = [self._seed, epoch, record, position]
        return Draw(record, np.random.default_rng(keys), focus)


class _Crops:
    """The crops of `Positions`: what grain reads by index."""

    def __init__(self, positions: Positions, records: Records, data: Any):
        self._positions, self._records = positions, records
        self._augmentation = Augmentation.from_config(data)
        self._mask_bad = data.bad_records == "mask"

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        draw = self._positions[int(index)]
        record = draw.record

        def row(image, label, valid, bad: bool) -> dict[str, np.ndarray]:
            named = {"image": image, "label": label, "valid": valid}
            return named | {"record": np.array(record, np.int32), "bad": np.array(bad)}

        def read(box):
            region = self._records.region(record, box)
            return region["image"], region["label"]

        in_flight = self._records.in_flight
        try:
            with in_flight.reading(record) if in_flight else contextlib.nullcontext():
                size = self._records.size(record)
                crop = train_transform(read, size, draw.rng, self._augmentation, draw.focus)
                return row(*crop, bad=False)
        except Exception as error:
            if not isinstance(error, RecordError):
                where = f"record {record} of {self._records.folder}, {self._records.split}"
                error = RecordError(f"{where}: {type(error).__name__}: {error}")
            if not self._mask_bad:
                raise error from error.__cause__
            logging.warning("masked: %s", error)
        size = self._augmentation.crop
        label = np.full(size, IGNORE, np.uint8)
        return row(np.zeros((*size, 3), np.uint8), label, np.array(size, np.int32), bad=True)


class ClassUniform:
    """Draws a record and a pixel in it so that every class is as likely as any other.

    After Zhu et al., 2019, who draw half of an epoch this way.
    """

    def __init__(self, points: np.ndarray, share: float, seed: int):
        """points: `Records.class_points`; share: of the positions that are drawn, 0 to 1."""
        order = np.argsort(points[:, 1], kind="stable")
        self._points, self._share, self._seed = points[order], share, seed
        self._starts = np.flatnonzero(np.diff(self._points[:, 1], prepend=-1))
        self._ends = np.append(self._starts[1:], len(points))

    def draw(self, position: int) -> tuple[int, tuple[int, int]] | None:
        """Returns (record, (y, x)) for a position, or None where the epoch's own record stays."""
        rng = np.random.default_rng([self._seed, position, 1])
        if not len(self._points) or rng.random() >= self._share:
            return None
        chosen = rng.integers(len(self._starts))
        point = self._points[rng.integers(self._starts[chosen], self._ends[chosen])]
        return int(point[0]), (int(point[2]), int(point[3]))


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns the order of the records in one epoch, int64 [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def train_iterator(
    data: Any,
    records: Records,
    *,
    seed: int,
    batch_size: int,
    steps: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Iterates over this process's rows of the training batches of steps start_step..steps - 1.

    `data` is `config.data`: the fields of `Augmentation`, class_uniform_share, bad_records,
    threads, workers and prefetch.

    Process p holds the rows [p B / P, (p + 1) B / P) of each global batch of B: concatenated in
    process order they are the batch a single process would see. The result is a grain iterator
    (get_state, set_state, close; grain.checkpoint). Its state counts batches since `start_step`;
    since batches depend on nothing but the step, starting at `start_step` equals resuming there,
    also on another number of processes.

    Yields:
      image uint8 [b, C, D, 3], label uint8 [b, C, D], valid int32 [b, 2] (height and width of the
      unpadded part), record int32 [b], bad bool [b]; b = B / P, C x D the crop.
      A bad record (data.bad_records = "mask") is black and all ignored, in its own place.

    Raises:
      RecordError: from `next`: a record that cannot be read or cropped; names it.
      ConfigError: the batch does not divide, or the split has no labels or no images.
    """
    import grain

    steps_left = range(start_step, steps)
    positions = Positions(data, records, seed, batch_size, steps_left, process_index, process_count)
    # Batched before it is split among workers, so that a batch is one element of grain's order.
    crops = _Crops(positions, records, data)
    batches = grain.MapDataset.source(crops).batch(positions.rows)
    batches = batches.to_iter_dataset(
        grain.ReadOptions(
            num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads)
        )
    )
    if data.workers:
        records.in_flight = InFlight()
        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, parsed or not
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(
            num_workers=data.workers, per_worker_buffer_size=data.prefetch
        )
        batches = batches.mp_prefetch(workers)
    return iter(batches)


def free_shared_memory() -> None:
    """Frees what closed iterators shared with their workers, where nobody else holds a batch.

    It would outlive the process: grain keeps the last batches in cycles, and has a thread to free
    them, which ends with the process, done or not.
    """
    from grain._src.python.ipc import shared_memory_array

    gc.collect()
    if thread := shared_memory_array.SharedMemoryArray._del_thread_pool:
        thread.apply(int)  # it takes one after the other


def with_record(error: Exception, records: Records) -> Exception:
    """Returns an error of a training iterator, with the record in it that a dead worker had read.

    A worker process that is killed, or crashes in a codec, cannot say so itself.
    """
    lost = records.in_flight.left_behind() if records.in_flight else []
    if isinstance(error, RecordError) or not lost:
        return error
    named = ", ".join(f"{index} ({records.name(index)})" for index in lost)
    return RecordError(
        f"{error} It was reading record {named} of {records.folder}, {records.split}."
    )


def eval_examples(
    records: Records, process_index: int = 0, process_count: int = 1, threads: int = 2
) -> Iterator[dict[str, Any]]:
    """This process's records p, p + P, ... whole and in order, decoded ahead in threads.

    Over all processes each record comes exactly once; processes may differ by one in number.
    """
    indices = range(process_index, len(records), process_count)
    return in_order(records.__getitem__, indices, threads)
