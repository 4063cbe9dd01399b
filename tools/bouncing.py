"""A small audio-visual world: shapes that bounce in a box, and are heard to.

Pure functions from a random generator to bodies, and from bodies to picture, sound and truth.
Lengths are in units of the box, 1 wide and 1 high with y upwards; seconds count from the first
frame. Nothing is simulated in steps, so that the times of impacts are exact.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.mux import SAMPLE_RATES_HZ
from pipeline.settings import ConfigError

GRAVITY = 3.5  # per s²: a fall through half the box takes half a second
FLOOR_RESTITUTION = 0.85
WALL_RESTITUTION = 0.9
REST_SPEED = 0.05  # a slower rebound stays on the floor; far below what is heard
AUDIBLE_SPEED = 0.35
LOUDEST_SPEED = 2.6  # a little above a fall through the whole box

# Impacts per second and the time between any two that a clip aims for: enough to learn from,
# and so far apart that each is one frame's and one ear's event.
MIN_RATE_HZ, MAX_RATE_HZ = 1.5, 2.5
MIN_GAP_S = 0.12
MAX_DRAWS = 400

BACKGROUND = (20, 20, 28)
COLOURS = {
    "red": (230, 50, 50), "green": (60, 200, 80), "blue": (70, 110, 250),
    "yellow": (240, 220, 60), "purple": (170, 70, 200), "white": (240, 240, 240),
}  # fmt: skip
RADIUS = {"small": 0.09, "large": 0.16}  # half the width and half the height
PITCH_FACTOR = {"small": 2.0, "large": 1.0}


@dataclass(frozen=True)
class Timbre:
    """A decaying sum of sines: lowest pitch, decay, and (ratio, share of amplitude) of each."""

    pitch_hz: float
    decay_s: float
    partials: tuple[tuple[float, float], ...]


TIMBRES = {
    "ball": Timbre(392.0, 0.07, ((1, 0.8), (2, 0.2))),
    "square": Timbre(262.0, 0.05, ((1, 0.5), (3, 0.25), (5, 0.15), (7, 0.1))),
    "triangle": Timbre(587.0, 0.09, ((1, 0.5), (2.76, 0.3), (5.4, 0.2))),
}
SHAPES = tuple(TIMBRES)
ATTACK_S = 0.001  # no click, still one instant
IMPACT_PEAK = 0.6  # leaves room for two tails under the loudest impact


@dataclass(frozen=True)
class ClipSettings:
    """What every clip of a folder has in common.

    Raises:
        ConfigError: a value that can't be drawn, encoded or heard.
    """

    seconds: float = 2.0
    size: int = 64
    fps: float = 16.0
    sample_rate: int = 16000
    seed: int = 0
    max_shapes: int = 2

    def __post_init__(self) -> None:
        if not 0.5 <= self.seconds <= 60:
            raise ConfigError(f"--seconds is {self.seconds}, expected 0.5 to 60")
        if self.size % 2 or not 16 <= self.size <= 1024:
            raise ConfigError(f"--size is {self.size}, expected an even number from 16 to 1024")
        if not 1 <= self.fps <= 120:
            raise ConfigError(f"--fps is {self.fps}, expected 1 to 120")
        if self.sample_rate not in SAMPLE_RATES_HZ:
            raise ConfigError(f"--sample-rate is {self.sample_rate}, one of {SAMPLE_RATES_HZ}")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}, expected 0 or more")
        if not 1 <= self.max_shapes <= len(SHAPES):
            raise ConfigError(f"--max-shapes is {self.max_shapes}, expected 1 to {len(SHAPES)}")


@dataclass(frozen=True)
class Leg:
    """The flight between two impacts, from ``start_s`` on; ``ay`` is 0 once at rest."""

    start_s: float
    x: float
    y: float
    vx: float
    vy: float
    ay: float = -GRAVITY

    def position(self, time_s: float) -> tuple[float, float]:
        """Return the centre at a second of the clip."""
        dt = time_s - self.start_s
        return self.x + self.vx * dt, self.y + self.vy * dt + self.ay * dt * dt / 2


@dataclass(frozen=True)
class Body:
    """One shape, its flight, and the (second, speed) of each of its audible impacts."""

    shape: str
    colour: str
    size: str
    legs: tuple[Leg, ...]
    impacts: tuple[tuple[float, float], ...]

    def position(self, time_s: float) -> tuple[float, float]:
        """Return the centre at a second of the clip."""
        return next(leg for leg in reversed(self.legs) if leg.start_s <= time_s).position(time_s)


# ---------------------------------------------------------------------------------------------
# Physics


def fly(leg: Leg, radius: float, seconds: float) -> tuple[list[Leg], list[tuple[float, float]]]:
    """Follow a body through its impacts; return its legs and (second, speed) of every impact."""
    legs, impacts = [leg], []
    while True:
        to_floor_s, to_wall_s = time_to_floor(leg, radius), time_to_wall(leg, radius)
        dt = min(to_floor_s, to_wall_s)
        time_s = leg.start_s + dt
        if time_s >= seconds:
            return legs, impacts
        x, y = leg.position(time_s)
        vx, vy, ay = leg.vx, leg.vy + leg.ay * dt, leg.ay
        if to_floor_s <= to_wall_s:
            impacts.append((time_s, -vy))
            y, vy = radius, -vy * FLOOR_RESTITUTION
            if vy < REST_SPEED:
                vy, ay = 0.0, 0.0
        else:
            impacts.append((time_s, abs(vx)))
            x, vx = (1 - radius if vx > 0 else radius), -vx * WALL_RESTITUTION
        leg = Leg(time_s, x, y, vx, vy, ay)
        legs.append(leg)


def time_to_floor(leg: Leg, radius: float) -> float:
    """Return the seconds from the leg's start to the floor, infinity at rest."""
    if leg.ay == 0:
        return math.inf
    height = max(leg.y - radius, 0.0)
    return (leg.vy + math.sqrt(leg.vy**2 + 2 * GRAVITY * height)) / GRAVITY


def time_to_wall(leg: Leg, radius: float) -> float:
    """Return the seconds from the leg's start to the left or right wall."""
    if leg.vx == 0:
        return math.inf
    wall = 1 - radius if leg.vx > 0 else radius
    return max((wall - leg.x) / leg.vx, 0.0)


def draw_body(rng: np.random.Generator, shape: str, colour: str, size: str, seconds: float) -> Body:
    """Throw one shape from a random place, never so hard that it reaches the ceiling."""
    radius = RADIUS[size]
    x, y = rng.uniform(radius, 1 - radius), rng.uniform(0.3, 1 - radius)
    highest_vy = math.sqrt(2 * GRAVITY * (1 - radius - y))
    vx, vy = rng.choice((-1, 1)) * rng.uniform(0.3, 1.2), rng.uniform(-1.0, highest_vy)
    legs, impacts = fly(Leg(0.0, x, y, vx, vy), radius, seconds)
    audible = tuple(impact for impact in impacts if impact[1] >= AUDIBLE_SPEED)
    return Body(shape, colour, size, tuple(legs), audible)


def draw_world(rng: np.random.Generator, settings: ClipSettings) -> list[Body]:
    """Choose shapes, then throw them until their impacts are apart: the best of some draws."""
    num_shapes = int(rng.integers(1, settings.max_shapes + 1))
    looks = list(
        zip(
            rng.choice(SHAPES, num_shapes, replace=False).tolist(),
            rng.choice(tuple(COLOURS), num_shapes, replace=False).tolist(),
            rng.choice(tuple(RADIUS), num_shapes).tolist(),
            strict=True,
        )
    )
    best: tuple[float, list[Body]] = (math.inf, [])
    for _ in range(MAX_DRAWS):
        bodies = [draw_body(rng, *look, settings.seconds) for look in looks]
        fault = crowding(bodies, settings.seconds)
        if fault < best[0]:
            best = (fault, bodies)
        if fault == 0:
            break
    return best[1]


def crowding(bodies: list[Body], seconds: float) -> float:
    """Return how far a world is from well-spaced impacts, 0 for a good one."""
    times = sorted(time_s for body in bodies for time_s, _ in body.impacts)
    fewest, most = math.ceil(MIN_RATE_HZ * seconds), math.floor(MAX_RATE_HZ * seconds)
    miscount = max(fewest - len(times), len(times) - most, 0)
    gaps = np.diff([0.0, *times, seconds])
    return miscount + float(np.maximum(MIN_GAP_S - gaps, 0).sum() / MIN_GAP_S)


# ---------------------------------------------------------------------------------------------
# Picture, sound and truth


def draw_frames(bodies: list[Body], settings: ClipSettings) -> np.ndarray:
    """Draw the world at every instant k / fps, uint8 [T, S, S, 3], edges smoothed."""
    num_frames = max(round(settings.seconds * settings.fps), 1)
    size = settings.size
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    frames = np.empty((num_frames, size, size, 3), dtype=np.uint8)
    for number in range(num_frames):
        picture = np.full((size, size, 3), BACKGROUND, dtype=np.float32)
        for body in bodies:
            x, y = body.position(number / settings.fps)
            outside = distance(body, (centres - x)[None, :], (1 - centres - y)[:, None])
            cover = np.clip(0.5 - outside * size, 0, 1)[:, :, None]
            picture += cover * (np.array(COLOURS[body.colour], dtype=np.float32) - picture)
        frames[number] = picture.round()
    return frames


def distance(body: Body, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return how far each pixel lies outside the shape (negative inside), [S, S]."""
    radius = RADIUS[body.size]
    if body.shape == "ball":
        return np.hypot(dx, dy) - radius
    if body.shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius
    # A triangle on its base, as wide as high: touches floor and walls where the others do.
    return np.maximum(-dy - radius, (2 * np.abs(dx) + dy - radius) / math.sqrt(5))


def loudness(speed: float) -> float:
    """Return an impact's amplitude in (0, 1]; the power keeps the weakest well heard."""
    return min(speed / LOUDEST_SPEED, 1.0) ** 0.7


def draw_sound(bodies: list[Body], settings: ClipSettings) -> np.ndarray:
    """Sound every audible impact at its instant, float32 [N] in [-1, 1]."""
    seconds = np.arange(round(settings.seconds * settings.sample_rate)) / settings.sample_rate
    sound = np.zeros(len(seconds))
    for body in bodies:
        timbre = TIMBRES[body.shape]
        for time_s, speed in body.impacts:
            heard = seconds >= time_s
            since_s = seconds[heard] - time_s
            envelope = np.exp(-since_s / timbre.decay_s) * np.minimum(since_s / ATTACK_S, 1)
            tone = np.zeros(len(since_s))
            for ratio, share in timbre.partials:
                pitch_hz = timbre.pitch_hz * PITCH_FACTOR[body.size] * ratio
                if pitch_hz < settings.sample_rate / 2:
                    tone += share * np.sin(2 * np.pi * pitch_hz * since_s)
            sound[heard] += IMPACT_PEAK * loudness(speed) * envelope * tone
    return sound.clip(-1, 1).astype(np.float32)


def describe(bodies: list[Body]) -> str:
    """Return the caption, e.g. "a small red ball and a large blue square bounce"."""
    names = [f"a {body.size} {body.colour} {body.shape}" for body in bodies]
    return " and ".join(names) + (" bounces" if len(names) == 1 else " bounce")


def truth(bodies: list[Body], settings: ClipSettings) -> dict[str, Any]:
    """Return what the clip's JSON file says, impacts in the order of time."""
    impacts = [
        {"time_s": time_s, "object": number, "speed": speed, "loudness": loudness(speed)}
        for number, body in enumerate(bodies)
        for time_s, speed in body.impacts
    ]
    looks = [{"shape": b.shape, "colour": b.colour, "size": b.size} for b in bodies]
    return {
        **asdict(settings),
        "caption": describe(bodies),
        "objects": looks,
        "impacts": sorted(impacts, key=lambda impact: impact["time_s"]),
    }
