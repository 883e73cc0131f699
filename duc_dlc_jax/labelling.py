"""Labels of images of any sizes by a network under a protocol, in batches of one padded size.

`evaluate`, `submit` and `predict` label through here, and therefore alike.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np

from duc_dlc_jax import metrics, protocols, sharding
from duc_dlc_jax.config import ConfigError
from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.export.runtimes import BundleModel
from duc_dlc_jax.inference import Labeller
from duc_dlc_jax.models.segmenter import Segmenter

Examples = list[dict[str, Any]]


def _raise(error: Exception, _: Examples) -> NoReturn:
    raise error


class Predictor:
    """Each process labels its own images on its own devices.

    Of the network it needs `apply(variables, images, valid=..., coarse=True)`, as Segmenter has it,
    `num_classes` and `resize_grid`.
    """

    def __init__(
        self,
        model: Segmenter,
        protocol: protocols.Protocol | None = None,
        batch_per_device: int = 1,
    ):
        self._mesh = sharding.make_mesh(devices=jax.local_devices())
        self._batch = batch_per_device * len(jax.local_devices())
        self.protocol = protocol or protocols.Protocol(
            grid=model.resize_grid, logit_stride=model.logit_stride
        )
        self._labeller = Labeller(model, self.protocol, self._mesh)
        self.compiling = (0.0, 0)  # seconds of the calls that compiled, and their images

    def batches(
        self,
        variables: dict[str, Any],
        examples: Iterable[dict[str, Any]],
        failed: Callable[[Exception, Examples], None] = _raise,
    ) -> Iterator[tuple[Examples, jax.Array]]:
        """variables: replicated over the global mesh. examples: `image` uint8 [H, W, 3] and, to be
        counted, `label` uint8 [H, W]. failed: called with an error and the examples that it keeps
        from being labelled; where it returns, the others follow.

        Yields examples of one padded size with their `prediction`, train ids uint8 [H, W], and
        their confusion matrix, int32 [K, K]; batches come in order of the image that fills them.
        """
        variables = sharding.local_copy(variables, self._mesh)
        for batch in _batches_of_one_size(examples, self._batch, self.protocol.padded_size):
            start, programs = time.monotonic(), self.programs()
            try:
                matrix, ids = self._label(variables, batch)
            except Exception as error:
                failed(error, batch)
                continue
            if self.programs() != programs:
                seconds, images = self.compiling
                self.compiling = (seconds + time.monotonic() - start, images + len(batch))
            for example, prediction in zip(batch, ids, strict=False):
                height, width = example["image"].shape[:2]
                example["prediction"] = prediction[:height, :width]
            yield batch, matrix

    def programs(self) -> dict[str, int]:
        """Programs compiled so far; see `Labeller.programs`."""
        return self._labeller.programs()

    def _label(self, variables, batch):
        """The last batch is filled up with ignored pixels."""
        sizes = [example["image"].shape[:2] for example in batch]
        padded = self.protocol.padded_size(sizes[0])
        images = np.zeros((self._batch, *padded, 3), np.uint8)
        labels = np.full((self._batch, *padded), IGNORE, np.uint8)
        for i, (example, (height, width)) in enumerate(zip(batch, sizes, strict=True)):
            images[i, :height, :width] = example["image"]
            if "label" in example:
                labels[i, :height, :width] = example["label"]
        sizes += sizes[:1] * (self._batch - len(batch))
        matrix, ids = self._labeller(variables, images, labels, sizes)
        return matrix, np.asarray(ids)


def _batches_of_one_size(examples, batch_size, padded_size):
    waiting = defaultdict(list)
    for example in examples:
        group = waiting[padded_size(example["image"].shape[:2])]
        group.append(dict(example))
        if len(group) == batch_size:
            yield list(group)
            group.clear()
    yield from (group for group in waiting.values() if group)


class BundlePredictor:
    """`Predictor` of a bundle: whole images at their own size, one by one, in its runtime."""

    def __init__(self, model: BundleModel, protocol: protocols.Protocol | None = None):
        """Raises ConfigError for a protocol that looks at parts or other sizes of an image."""
        self.protocol = protocol or protocols.Protocol()
        if not self.protocol.direct:
            raise ConfigError(
                f"{model.bundle.path} is a bundle, which labels whole images at their own size: "
                "--protocol=single. Other protocols take the workdir"
            )
        self._model, self._sizes = model, set()
        self.compiling = (0.0, 0)

    def batches(
        self,
        variables: dict[str, Any],
        examples: Iterable[dict[str, Any]],
        failed: Callable[[Exception, Examples], None] = _raise,
    ) -> Iterator[tuple[Examples, np.ndarray]]:
        """As `Predictor.batches`, of one example each and in their order; variables: not read."""
        for example in examples:
            size, start = example["image"].shape[:2], time.monotonic()
            try:
                ids = self._model(example["image"][None])[0]
            except Exception as error:
                failed(error, [example])
                continue
            if size not in self._sizes:
                self._sizes.add(size)
                seconds, images = self.compiling
                self.compiling = (seconds + time.monotonic() - start, images + 1)
            label = example.get("label", np.full_like(ids, IGNORE))
            matrix = metrics.host_confusion_matrix(label, ids, self._model.num_classes)
            yield [dict(example, prediction=ids)], matrix

    def programs(self) -> dict[str, int]:
        return {"network": len(self._sizes), "other": 0}


def make_predictor(
    model: Segmenter | BundleModel, protocol: protocols.Protocol | None, batch_per_device: int
) -> Predictor | BundlePredictor:
    if isinstance(model, BundleModel):
        return BundlePredictor(model, protocol)
    return Predictor(model, protocol, batch_per_device)
