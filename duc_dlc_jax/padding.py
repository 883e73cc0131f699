"""Which sizes to pad images to, so that few programs serve many sizes at little extra work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

MOST_PROGRAMS = 12
STEP = 32  # pixels that padded sides are a multiple of
MOST_CANDIDATES = 200  # merging takes their square in memory

Size = tuple[int, int]  # height and width in pixels


def plan(sizes: Mapping[Size, int], most: int) -> tuple[Size, ...]:
    """At most `most` padded sizes, each image's being the smallest that holds it.

    sizes: how many images have each size. Sizes are rounded up to `STEP` pixels, then the two are
    merged whose common size adds the fewest pixels, until few enough are left: no optimum, but a
    function of the sizes alone, so that every host comes to the same.
    """
    step, wanted = STEP, _rounded(sizes, STEP)
    while len(wanted) > MOST_CANDIDATES:
        step *= 2
        wanted = _rounded(sizes, step)
    shapes = np.array(sorted(wanted), np.int64)
    images = np.array([wanted[height, width] for height, width in shapes.tolist()], np.int64)
    while len(shapes) > most:
        both = np.maximum(shapes[:, None], shapes[None])  # [n, n, 2]
        work = images * shapes.prod(1)
        added = both.prod(2) * (images[:, None] + images[None]) - work[:, None] - work[None]
        np.fill_diagonal(added, np.iinfo(np.int64).max)
        i, j = np.unravel_index(added.argmin(), added.shape)
        shapes[i], images[i] = both[i, j], images[i] + images[j]
        shapes, images = np.delete(shapes, j, 0), np.delete(images, j)
    return tuple(sorted({(int(height), int(width)) for height, width in shapes}))


def smallest(shapes: tuple[Size, ...], size: Size) -> Size:
    """The shape of the fewest pixels that holds `size`; `size` itself where none does."""
    holding = [s for s in shapes if s[0] >= size[0] and s[1] >= size[1]]
    return min(holding, key=lambda s: (s[0] * s[1], s), default=size)


def _rounded(sizes: Mapping[Size, int], step: int) -> Counter[Size]:
    counts: Counter[Size] = Counter()
    for (height, width), images in sizes.items():
        counts[-(-height // step) * step, -(-width // step) * step] += images
    return counts
