"""Street-like scenes, drawn: large, small and thin objects for tests and demos without downloads.

Train ids: 0 sky, 1 building, 2 road, 3 sidewalk, 4 tree, 5 car, 6 pole, 7 sign; 255 is ignored.
"""

from __future__ import annotations

import cv2
import numpy as np

from duc_dlc_jax.data.labels import IGNORE

COUNTS = {"train": 200, "val": 40}
HEIGHT, WIDTH = 192, 256  # pixels
SKY, BUILDING, ROAD, SIDEWALK, TREE, CAR, POLE, SIGN = range(8)

_WALLS = ((150, 85, 65), (185, 165, 130), (135, 120, 115), (200, 190, 175), (120, 75, 70))
_BODIES = (
    (190, 30, 30),
    (30, 60, 170),
    (225, 225, 228),
    (30, 30, 35),
    (230, 170, 20),
    (20, 110, 120),
)
_SIGNS = ((205, 25, 30), (25, 75, 200), (245, 205, 20))


def draw(split: str, index: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws one scene; the same arguments give the same pixels.

    Returns:
      RGB uint8 [192, 256, 3] and raw ids (equal to train ids) uint8 [192, 256].
    """
    rng = np.random.default_rng([seed, list(COUNTS).index(split), index])
    scene = _Scene(rng)
    scene.sky()
    scene.buildings()
    scene.ground()
    for depth in np.sort(rng.uniform(0.15, 0.9, rng.integers(5, 10))):  # far ones first
        kind = rng.choice(["tree", "car", "pole", "post"], p=[0.25, 0.3, 0.15, 0.3])
        getattr(scene, str(kind))(float(depth))
    if rng.random() < 0.3:
        scene.bonnet()
    return scene.photograph(), scene.label


class _Scene:
    """The planes being painted: colour, class, and how grainy each surface is (grey levels)."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        self.label = np.full((HEIGHT, WIDTH), IGNORE, np.uint8)
        self.grain = np.zeros((HEIGHT, WIDTH), np.uint8)
        self.horizon = int(rng.uniform(0.38, 0.52) * HEIGHT)
        self.vanish = rng.uniform(0.3, 0.7) * WIDTH
        self.left = rng.uniform(-0.25, 0.25) * WIDTH  # the road's edges on the bottom row
        self.right = rng.uniform(0.75, 1.25) * WIDTH

    def fill(self, points, colour, label: int, grain: int = 6) -> None:
        """Paints a polygon [(x, y), ...], in pixels, on the three planes."""
        polygon = [np.rint(np.array(points)).astype(np.int32)]
        for plane, value in ((self.image, colour), (self.label, label), (self.grain, grain)):
            cv2.fillPoly(plane, polygon, tuple(map(int, np.atleast_1d(value))))

    def box(self, x0, y0, x1, y1, colour, label: int, grain: int = 6) -> None:
        self.fill([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, label, grain)

    def disc(self, x, y, radius, colour, label: int, grain: int = 6) -> None:
        angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        ring = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
        self.fill(ring, colour, label, grain)

    def shade(self, colour, spread: float = 18.0) -> np.ndarray:
        """Returns a colour near the given one."""
        return np.clip(np.array(colour) + self.rng.normal(0, spread / 2, 3), 0, 255)

    def sky(self) -> None:
        top = self.shade((95, 150, 225), 30)
        low = self.shade((205, 215, 225), 30)
        ramp = np.linspace(0, 1, HEIGHT)[:, None, None] ** 0.7
        self.image[:] = np.broadcast_to(top * (1 - ramp) + low * ramp, self.image.shape)
        clouds = self._noise(8)[..., None] * 25
        self.image[:] = np.clip(self.image + clouds.clip(0), 0, 255)
        self.label[:] = SKY
        self.grain[:] = 2

    def buildings(self) -> None:
        rng = self.rng
        x = -rng.uniform(0, 30)
        while x < WIDTH:
            width = rng.uniform(30, 75)
            if rng.random() < 0.85:  # else a gap
                side = min(abs(x + width / 2 - self.vanish) / (0.6 * WIDTH), 1.0)
                height = self.horizon * rng.uniform(0.35, 0.65 + 0.3 * side)
                self._building(x, self.horizon - height, x + width)
            x += width + rng.choice([0, 0, 8])
        self.box(
            -1, self.horizon - 9, WIDTH, self.horizon + 4, self.shade((120, 110, 105)), BUILDING, 10
        )

    def _building(self, x0: float, y0: float, x1: float) -> None:
        wall = self.shade(_WALLS[self.rng.integers(len(_WALLS))])
        self.box(x0, y0, x1, self.horizon + 4, wall, BUILDING, 10)
        pane = self.shade((60, 70, 85) if self.rng.random() < 0.7 else (225, 215, 160))
        pitch = self.rng.integers(9, 14)
        for x in np.arange(x0 + 4, x1 - 6, pitch):
            for y in np.arange(y0 + 5, self.horizon - 12, pitch + 2):
                self.box(x, y, x + pitch * 0.45, y + pitch * 0.6, pane, BUILDING, 8)

    def _road_edges(self, y: float) -> tuple[float, float]:
        t = (y - self.horizon) / (HEIGHT - self.horizon)
        left, right = self.left - self.vanish, self.right - self.vanish
        return self.vanish + t * left, self.vanish + t * right

    def ground(self) -> None:
        top, bottom = self.horizon + 3, HEIGHT + 2
        self.box(-1, top, WIDTH, bottom, self.shade((185, 170, 160)), SIDEWALK, 9)
        for t in np.linspace(0.05, 1, 9) ** 2:  # joints between the slabs
            y = top + t * (bottom - top)
            self.box(-1, y, WIDTH, y + 0.6, self.shade((140, 130, 122)), SIDEWALK, 9)
        (a, b), (c, d) = self._road_edges(top), self._road_edges(bottom)
        tar = self.shade((82, 82, 90))
        self.fill([(a - 2, top), (b + 2, top), (d, bottom), (c, bottom)], tar, ROAD, 7)
        for t in np.arange(self.rng.uniform(0.05, 0.2), 1.0, 0.22):
            y0, y1 = (top + s * (bottom - top) for s in (t, min(t + 0.1, 1.0)))
            x0, x1 = (sum(self._road_edges(y)) / 2 for y in (y0, y1))
            w0, w1 = 0.5 + 2 * t, 0.7 + 2 * t
            quad = [(x0 - w0, y0), (x0 + w0, y0), (x1 + w1, y1), (x1 - w1, y1)]
            self.fill(quad, (225, 225, 220), ROAD, 7)

    def _beside(self, depth: float) -> tuple[float, float]:
        """Returns a foot point (x, y) on the sidewalk at a depth of 0 (horizon) to 1 (near)."""
        y = self.horizon + 4 + depth * 0.75 * (HEIGHT - self.horizon)
        left, right = self._road_edges(y)
        spans = [(6.0, left - 6), (right + 6, WIDTH - 6.0)]
        spans = [s for s in spans if s[1] > s[0]] or [(6.0, WIDTH - 6.0)]
        low, high = spans[self.rng.integers(len(spans))]
        return float(self.rng.uniform(low, high)), y

    def tree(self, depth: float) -> None:
        x, y = self._beside(depth)
        size = 16 + 26 * depth
        self.box(
            x - size * 0.1, y - size * 1.4, x + size * 0.1, y, self.shade((85, 60, 40)), TREE, 10
        )
        leaf = self.shade((55, 105, 40), 28)
        for _ in range(9):
            dx, dy = self.rng.normal(0, 0.32, 2) * size
            radius = size * self.rng.uniform(0.3, 0.5)
            self.disc(x + dx, y - 1.7 * size + dy, radius, self.shade(leaf, 22), TREE, 26)

    def car(self, depth: float) -> None:
        y = self.horizon + 10 + depth * 0.8 * (HEIGHT - self.horizon)
        left, right = self._road_edges(y)
        x = self.rng.uniform(max(left, 0) + 8, max(min(right, WIDTH) - 8, max(left, 0) + 9))
        w, h = 13 + 24 * depth, 9 + 16 * depth  # half width, height of the body
        body = self.shade(_BODIES[self.rng.integers(len(_BODIES))])
        roof = [(x - 0.9 * w, y - h), (x - 0.6 * w, y - 1.7 * h), (x + 0.6 * w, y - 1.7 * h)]
        for dx in (-0.65 * w, 0.65 * w):
            self.disc(x + dx, y - 0.1 * h, 0.28 * h, (25, 25, 25), CAR)
        self.fill([*roof, (x + 0.9 * w, y - h)], body * 0.85, CAR)
        self.box(x - w, y - h, x + w, y - 0.15 * h, body, CAR)
        self.box(x - 0.6 * w, y - 1.55 * h, x + 0.6 * w, y - 1.05 * h, (70, 85, 100), CAR)
        for dx in (-0.85 * w, 0.85 * w):  # lamps
            self.disc(x + dx, y - 0.65 * h, 0.13 * h, (250, 235, 190), CAR)

    def pole(self, depth: float, height: float = 0.0) -> tuple[float, float]:
        """Draws a lamp post 4 to 6 pixels wide; returns its top (x, y)."""
        x, y = self._beside(depth)
        half = 1.5 + 1.0 * depth
        top = max(y - (height or self.rng.uniform(70, 90) + 45 * depth), 4)
        tone = self.shade((52, 58, 60) if self.rng.random() < 0.7 else (215, 218, 215), 12)
        self.box(x - half, top, x + half, y, tone, POLE, 4)
        return x, top

    def post(self, depth: float) -> None:
        """Draws a traffic sign of 14 to 24 pixels on a pole."""
        x, top = self.pole(depth, height=45 + 45 * depth)
        radius = 7 + 5 * depth
        colour = self.shade(_SIGNS[self.rng.integers(len(_SIGNS))], 14)
        y = top + radius * 0.6
        shape = self.rng.integers(3)
        if shape == 0:
            self.disc(x, y, radius, colour, SIGN, 4)
        elif shape == 1:
            self.box(x - radius, y - radius, x + radius, y + radius, colour, SIGN, 4)
        else:
            points = [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
            self.fill(points, colour, SIGN, 4)
        self.box(x - radius * 0.5, y - 1, x + radius * 0.5, y + 1, (245, 245, 240), SIGN, 4)

    def bonnet(self) -> None:
        """The camera's own car along the bottom: outside the classes, ignored."""
        points = [(20, HEIGHT), (60, HEIGHT - 14), (WIDTH - 60, HEIGHT - 14), (WIDTH - 20, HEIGHT)]
        self.fill(points, self.shade((70, 25, 80)), IGNORE)

    def _noise(self, cells: int) -> np.ndarray:
        """Returns smooth noise of unit variance before smoothing, float32 [H, W]."""
        coarse = self.rng.normal(size=(cells, cells)).astype(np.float32)
        return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)

    def photograph(self) -> np.ndarray:
        """Adds texture, cast shadows, light and sensor noise; RGB uint8 [H, W, 3]."""
        rng = self.rng
        fine = cv2.resize(
            rng.normal(size=(HEIGHT // 2, WIDTH // 2)).astype(np.float32), (WIDTH, HEIGHT)
        )
        light = np.clip(1 + 0.12 * self._noise(4), 0.6, 1.4)
        below = np.arange(HEIGHT)[:, None] > self.horizon
        light = np.where(below & (self._noise(6) > 0.7), light * 0.72, light)
        tint = rng.uniform(0.7, 1.15) * (1 + rng.uniform(-0.08, 0.08, 3))
        pixels = (self.image + (fine * self.grain)[..., None]) * light[..., None] * tint
        pixels = cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), 0.5)
        pixels += rng.normal(0, rng.uniform(2, 6), pixels.shape)
        return np.clip(pixels, 0, 255).astype(np.uint8)
