"""Prepared records to batches: every batch is a function of (seed, step) and nothing else.

Row r of step s has the global position p = s * batch_size + r. Its epoch is p // n and its record
the (p % n)-th of that epoch's permutation, so batches run across epoch borders, nothing is dropped
and nothing depends on the number of processes, workers or threads, or on where a run was resumed.
Augmentation is drawn from (seed, epoch, record).

No TensorFlow here.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import json
import pathlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data import builders, codec
from duc_dlc_jax.data.labels import IGNORE, LabelSpec
from duc_dlc_jax.data.transforms import Augmentation, train_transform

if TYPE_CHECKING:
    import grain  # imported where used: 2 s


class Records:
    """Random access to the decoded examples of one split; see `open_records`.

    Pickles as a folder and a split: every worker process opens the files for itself.

    Attributes:
      spec: the label specification written beside the records.
      labelled: whether every image of the split has labels.
    """

    def __init__(self, folder: pathlib.Path, split: str, in_memory: bool = False):
        self.folder, self.split, self.in_memory = folder, split, in_memory
        self.spec = LabelSpec.from_json((folder / builders.SPEC_FILE).read_text())
        row = json.loads((folder / builders.SUMMARY_FILE).read_text())[split]
        self._length, self.labelled = row["images"], row["labelled"] == row["images"]
        self._open()

    def _open(self) -> None:
        self._source, self._cache, self._lock = None, {}, threading.Lock()

    def __getstate__(self) -> dict:
        hidden = ("_source", "_cache", "_lock")
        return {k: v for k, v in self.__dict__.items() if k not in hidden}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns image uint8 [H, W, 3], label uint8 [H, W] (all 255 without labels) and name.

        Raises:
          RuntimeError: the record cannot be read; names it.
        """
        if index in self._cache:
            return self._cache[index]
        try:
            example = self._decode(index)
        except Exception as error:
            raise RuntimeError(f"record {index} of {self.folder}, {self.split}: {error}") from error
        if self.in_memory:
            self._cache[index] = example
        return example

    def _decode(self, index: int) -> dict[str, Any]:
        record = self._raw()[index]
        name = record["name"].decode()
        image = codec.decode_image(record["image"], name)
        if record["label"]:
            label = codec.decode_label(record["label"], name)
        else:
            label = np.full(image.shape[:2], IGNORE, np.uint8)
        return {"image": image, "label": label, "name": name}

    def _raw(self):
        with self._lock:
            if self._source is None:
                import tensorflow_datasets as tfds  # late: 0.7 s

                builder: Any = tfds.builder_from_directory(str(self.folder))
                self._source = builder.as_data_source(self.split)
        return self._source


def open_records(data: Any, split: str) -> Records:
    """Opens one split of a prepared data set; `data` is `config.data` (name, dir, in_memory).

    Raises:
      FileNotFoundError: not prepared; gives the folder and the command that prepares it.
      ConfigError: no such split; lists those there are.
    """
    folder = builders.prepared_dir(data.dir, data.name)
    if not (folder / builders.SUMMARY_FILE).is_file():
        raise FileNotFoundError(
            f"no prepared records of {data.name!r} in {folder}. Prepare them: "
            f"{builders.prepare_command(data.name, data.dir)}"
        )
    splits = json.loads((folder / builders.SUMMARY_FILE).read_text())
    if split not in splits:
        raise ConfigError(f"no split {split!r} in {folder}; it has: {', '.join(splits)}")
    return Records(folder, split, data.in_memory)


class _Positions:
    """This process's rows of all steps, in order: what grain reads by index."""

    def __init__(self, records, config, seed, batch_size, steps, process_index, process_count):
        self._records, self._config, self._seed = records, config, seed
        self._batch, self._rows = batch_size, batch_size // process_count
        self._steps, self._first_row = steps, process_index * self._rows

    def __len__(self) -> int:
        return len(self._steps) * self._rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        step = self._steps[index // self._rows]
        epoch, offset = divmod(
            step * self._batch + self._first_row + index % self._rows, len(self._records)
        )
        record = int(permutation(self._seed, epoch, len(self._records))[offset])
        example = self._records[record]
        rng = np.random.default_rng([self._seed, epoch, record])
        try:
            image, label = train_transform(example["image"], example["label"], rng, self._config)
        except Exception as error:
            raise RuntimeError(f"record {record}, {example['name']}: {error}") from error
        return {"image": image, "label": label, "record": np.array(record, np.int32)}


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

    `data` is `config.data`: the fields of `Augmentation`, threads, workers and prefetch.

    Process p holds the rows [p B / P, (p + 1) B / P) of each global batch of B: concatenated in
    process order they are the batch a single process would see. The result is a grain iterator
    (get_state, set_state, close; grain.checkpoint). Its state counts batches since `start_step`;
    since batches depend on nothing but the step, starting at `start_step` equals resuming there,
    also on another number of processes.

    Yields:
      image uint8 [b, C, C, 3], label uint8 [b, C, C], record int32 [b]; b = B / P.

    Raises:
      ConfigError: the batch does not divide, or the split has no labels or no images.
    """
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
    import grain

    positions = _Positions(
        records,
        Augmentation.from_config(data),
        seed,
        batch_size,
        range(start_step, steps),
        process_index,
        process_count,
    )
    local = batch_size // process_count
    # Batched before it is split among workers, so that a batch is one element of grain's order.
    batches = grain.MapDataset.source(positions).batch(local)
    batches = batches.to_iter_dataset(
        grain.ReadOptions(
            num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads)
        )
    )
    if data.workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, parsed or not
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(
            num_workers=data.workers, per_worker_buffer_size=data.prefetch
        )
        batches = batches.mp_prefetch(workers)
    return iter(batches)


def eval_examples(
    records: Records, process_index: int = 0, process_count: int = 1, threads: int = 2
) -> Iterator[dict[str, Any]]:
    """Yields this process's records p, p + P, ... whole and in order, decoded ahead in threads.

    Over all processes each record comes exactly once; processes may differ by one in number.
    """
    indices = range(process_index, len(records), process_count)
    ahead = 2 * threads
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        waiting = collections.deque(pool.submit(records.__getitem__, i) for i in indices[:ahead])
        for following in [*indices[ahead:], *[None] * len(waiting)]:
            if following is not None:
                waiting.append(pool.submit(records.__getitem__, following))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
