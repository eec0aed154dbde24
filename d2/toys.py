"""What a toy is: its build and colours, drawn at random but for ever the same, its bones and its motions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np

from d2.errors import InputError
from d2.toyrender import BOX, CAPSULE, ELLIPSOID, PATCH, PLAIN, STRIPES, TWO_TONE, Parts

Split = Literal["train", "validation", "test"]
Motion = Literal["walk", "wave_left", "wave_right", "hop", "twist", "nod"]
Shape = Literal["ellipsoid", "capsule", "box"]
Hat = Literal["none", "ball", "box", "stack"]
Ears = Literal["none", "round", "long"]
Prop = Literal["none", "ball", "box"]
BodyPattern = Literal["plain", "stripes", "patch", "two_tone"]
LimbPattern = Literal["plain", "stripes", "two_tone"]
Ink = tuple[float, float, float]  # red, green, blue in 0..1

PALETTE = (
    (0.90, 0.27, 0.24), (0.97, 0.58, 0.20), (0.98, 0.81, 0.28), (0.47, 0.76, 0.36), (0.18, 0.66, 0.62),
    (0.30, 0.62, 0.92), (0.32, 0.41, 0.82), (0.62, 0.43, 0.83), (0.95, 0.54, 0.70), (0.66, 0.46, 0.32),
)  # fmt: skip
CREAM, DARK, WHITE = (1.0, 0.93, 0.84), (0.13, 0.11, 0.16), (0.96, 0.96, 0.96)
SEED = 4  # of the whole box of toys; another number is another box
MAX_YAW = 0.4  # rad
FILL = (0.75, 0.81)  # height of the picture that a toy fills at phase 0
ROOT, TORSO, HEAD, ARM_LEFT, ARM_RIGHT, LEG_LEFT, LEG_RIGHT = range(BONES := 7)
SIDES = ((1, ARM_LEFT, LEG_LEFT), (-1, ARM_RIGHT, LEG_RIGHT))  # the toy's left is +x: it looks towards -y
ARMS, LEGS = [ARM_LEFT, ARM_RIGHT], [LEG_LEFT, LEG_RIGHT]
OUTWARDS = np.array([0, 0, 0, -1, 1, -1, 1])  # the sense about y in which each bone leaves the body


@dataclass(frozen=True)
class Toy:
    """One toy and how it moves; lengths in units of its own, which `render` scales to fill the picture."""

    motion: Motion
    amplitude: float  # of the motion, about 1; the pose at phase 0 does not depend on it
    yaw: float  # rad, the toy's turn on the spot
    shape: Shape
    body: tuple[float, float, float]  # half width, half depth, half height
    head: float  # radius
    arm: tuple[float, float]  # length, radius
    leg: tuple[float, float]  # length, radius
    hat: Hat
    ears: Ears
    prop: Prop
    prop_side: Literal["left", "right"]  # the hand that holds it
    body_pattern: BodyPattern
    arm_pattern: LimbPattern
    leg_pattern: LimbPattern
    inks: tuple[Ink, Ink, Ink, Ink, Ink]  # body, head, arms, legs, accent
    fill: float  # height of the picture that it fills at phase 0

    def moved(self, amplitude: float) -> Self:
        """The same toy with another amplitude of its motion."""
        return replace(self, amplitude=amplitude)


def sample_toy(split: Split, index: int) -> Toy:
    """The toy with a number in a split, always the same one; raises InputError for a split that is not there."""
    if split not in get_args(Split) or index < 0:
        raise InputError(f"toy {index} of split {split!r}: expected 0 or more, of {', '.join(get_args(Split))}")
    rng = np.random.default_rng([SEED, get_args(Split).index(split), index])
    u = rng.uniform
    chosen = rng.permutation(len(PALETTE))[:5]
    inks = np.clip(np.array(PALETTE)[chosen] + rng.normal(0, 0.02, (5, 3)), 0.05, 1)
    inks[1] = 0.5 * inks[1] + 0.5 * np.array(CREAM)  # faces are light, so that dark eyes can be seen on all of them
    sleeves = rng.random() < 0.4
    if sleeves:
        inks[2] = inks[0]
    ears = _pick(rng, Ears, (0.5, 0.3, 0.2))
    return Toy(
        motion=_pick(rng, Motion),
        amplitude=u(0.8, 1.2),
        yaw=u(-MAX_YAW, MAX_YAW),
        shape=_pick(rng, Shape),
        body=(u(0.27, 0.35), u(0.22, 0.28), u(0.31, 0.39)),
        head=u(0.28, 0.36),
        arm=(u(0.37, 0.43), u(0.085, 0.11)),
        leg=(u(0.30, 0.40), u(0.095, 0.125)),
        hat=_pick(rng, Hat) if ears == "none" else "none",
        ears=ears,
        prop=_pick(rng, Prop, (0.6, 0.2, 0.2)),
        prop_side="left" if rng.random() < 0.5 else "right",
        body_pattern=_pick(rng, BodyPattern, (0.3, 0.25, 0.3, 0.15)),
        arm_pattern="two_tone" if sleeves else _pick(rng, LimbPattern, (0.4, 0.2, 0.4)),
        leg_pattern=_pick(rng, LimbPattern, (0.5, 0.2, 0.3)),
        inks=tuple(tuple(map(float, ink)) for ink in inks),  # type: ignore[arg-type]
        fill=u(*FILL),
    )


def _pick(rng: np.random.Generator, options: Any, weights: Sequence[float] | None = None) -> Any:
    """One of the words of a Literal."""
    names = get_args(options)
    return names[rng.choice(len(names), p=weights)]


def pose(
    toy: Toy,
    phases: np.ndarray,  # [N]
) -> tuple[np.ndarray, np.ndarray]:  # bone to world: turns [N, BONES, 3, 3], origins [N, BONES, 3] in the toy's units
    """Where the bones are; at phase 0 whatever the amplitude, which scales the way from there."""
    rest, rest_lift = _angles(toy.motion, np.zeros(1))
    angles, lift = _angles(toy.motion, phases)
    local = _rotations(rest + toy.amplitude * (angles - rest))
    lift = rest_lift + toy.amplitude * (lift - rest_lift)
    turns, origins = np.empty((len(phases), BONES, 3, 3)), np.zeros((len(phases), BONES, 3))
    turns[:, ROOT] = _rotations(np.array([0, 0, toy.yaw]))
    origins[:, ROOT, 2] = lift
    for bone, (parent, joint) in _joints(toy).items():
        turns[:, bone] = turns[:, parent] @ local[:, bone]
        origins[:, bone] = origins[:, parent] + turns[:, parent] @ joint
    return turns, origins


def _angles(
    motion: Motion,
    phases: np.ndarray,  # [N]
) -> tuple[np.ndarray, np.ndarray]:  # [N, BONES, 3] rad about x (forwards), y (to the toy's right), z; lift [N]
    """The motions.  Each has a pose of its own at phase 0, so that one picture tells which it is."""
    c, s = np.cos(2 * np.pi * phases), np.sin(2 * np.pi * phases)
    angles, lift, spread = np.zeros((len(phases), BONES, 3)), np.zeros(len(phases)), np.zeros((len(phases), BONES))
    x, y, z = angles[..., 0], angles[..., 1], angles[..., 2]
    spread[:, ARMS], spread[:, LEGS] = 0.3, 0.1
    if motion == "walk":
        x[:, LEG_LEFT], x[:, LEG_RIGHT] = -0.6 * c, 0.6 * c
        x[:, ARM_LEFT], x[:, ARM_RIGHT] = 0.85 * c, -0.85 * c
        z[:, TORSO] = 0.12 * c
        lift += 0.05 * s * s  # legs that stand apart reach less far down
    elif motion in ("wave_left", "wave_right"):
        sign, arm = (1, ARM_LEFT) if motion == "wave_left" else (-1, ARM_RIGHT)
        spread[:, arm] = 2.25 + 0.5 * s
        y[:, HEAD], y[:, TORSO] = -0.12 * sign * s, 0.05 * sign * s
    elif motion == "hop":
        apart = 0.5 - 0.5 * c
        spread[:, ARMS] = 0.85 + 1.4 * apart[:, None]
        spread[:, LEGS] = 0.1 + 0.42 * apart[:, None]
        lift += 0.10 * s * s - 0.04 * apart
    elif motion == "twist":
        spread[:, ARMS] = 1.55
        z[:, TORSO], z[:, HEAD] = 0.65 * s, -0.25 * s
    else:
        x[:, ARMS] = -1.2 - 0.35 * s[:, None]
        spread[:, ARMS] = -0.1
        x[:, TORSO], x[:, HEAD] = 0.24 * s, 0.26 * s
    y += OUTWARDS * spread
    return angles, lift


def _rotations(angles: np.ndarray) -> np.ndarray:  # [..., 3] rad -> [..., 3, 3]
    """Turns about y, then x, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(np.cos(angles), -1, 0), np.moveaxis(np.sin(angles), -1, 0)
    rows = [
        [cz * cy - sz * sx * sy, -sz * cx, cz * sy + sz * sx * cy],
        [sz * cy + cz * sx * sy, cz * cx, sz * sy - cz * sx * cy],
        [-cx * sy, sx, cx * cy],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _joints(toy: Toy) -> dict[int, tuple[int, np.ndarray]]:
    """Bone -> its parent and where it hangs on it; parents first.  The torso's origin is between the hips."""
    width, _, height = toy.body
    joints = {TORSO: (ROOT, np.zeros(3)), HEAD: (TORSO, np.array([0, 0, 1.85 * height]))}
    for sign, arm, leg in SIDES:
        joints[arm] = TORSO, np.array([sign * 0.86 * width, 0, 1.40 * height])
        joints[leg] = ROOT, np.array([sign * 0.45 * width, 0, 0.18 * height])
    return joints


def assemble(toy: Toy) -> Parts:
    """The toy's solids, each in the frame of its bone, in the toy's units."""
    listed = [*_body(toy), *_limbs(toy), *_face(toy), *_headgear(toy), *_prop(toy)]
    return Parts(
        kinds=np.array([p.kind for p in listed]),
        bones=np.array([p.bone for p in listed]),
        centres=np.array([p.centre for p in listed], float),
        halves=np.array([p.half for p in listed], float),
        patterns=np.array([p.pattern for p in listed]),
        extents=np.array([p.extent for p in listed], float),
        inks=np.array([(p.ink, p.ink2) for p in listed], float),
    )


class Part(NamedTuple):
    """A solid and its colour, in the frame of its bone."""

    kind: int
    bone: int
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    ink: Ink
    pattern: int = PLAIN
    extent: float = 0.0
    ink2: Ink = WHITE


def _body(toy: Toy) -> list[Part]:
    width, depth, height = toy.body
    kind = {"ellipsoid": ELLIPSOID, "capsule": CAPSULE, "box": BOX}[toy.shape]
    half = {
        "ellipsoid": (width * 1.05, depth * 1.1, height),
        "capsule": (0.5 * (width + depth), 0.5 * (width + depth), height - 0.22),
        "box": (width * 0.86, depth * 0.82, height * 0.86),
    }[toy.shape]
    pattern, extent = {
        "plain": (PLAIN, 0.0), "stripes": (STRIPES, 5.0), "patch": (PATCH, 0.62), "two_tone": (TWO_TONE, -0.1),
    }[toy.body_pattern]  # fmt: skip
    belly = _mixed(toy.inks[0], CREAM, 0.75) if toy.body_pattern == "patch" else toy.inks[4]
    return [Part(kind, TORSO, (0, 0, height), half, toy.inks[0], pattern, extent, belly)]


def _limbs(toy: Toy) -> list[Part]:
    parts = []
    for _, arm, leg in SIDES:
        for bone, (length, thick), ink, name, ink2 in (
            (arm, toy.arm, toy.inks[2], toy.arm_pattern, toy.inks[1]),
            (leg, toy.leg, toy.inks[3], toy.leg_pattern, toy.inks[4]),
        ):
            pattern, extent = {"plain": (PLAIN, 0.0), "stripes": (STRIPES, 4.0), "two_tone": (TWO_TONE, -0.3)}[name]
            half = thick, thick, 0.5 * length
            parts.append(Part(CAPSULE, bone, (0, 0, -0.5 * length), half, ink, pattern, extent, ink2))
        length, thick = toy.leg
        shoe = _mixed(toy.inks[3], DARK, 0.35)
        parts.append(Part(ELLIPSOID, leg, (0, -0.06, -length - 0.03), (1.25 * thick, 0.19, thick), shoe))
    return parts


def _face(toy: Toy) -> list[Part]:
    r = toy.head
    parts = [Part(ELLIPSOID, HEAD, (0, 0, 0.86 * r), (1.06 * r, r, 0.98 * r), toy.inks[1])]
    for sign, *_ in SIDES:
        parts.append(Part(ELLIPSOID, HEAD, (sign * 0.38 * r, -0.83 * r, 1.0 * r), (0.065, 0.06, 0.085), DARK))
    muzzle = _mixed(toy.inks[1], WHITE, 0.6)
    return [
        *parts,
        Part(ELLIPSOID, HEAD, (0, -0.84 * r, 0.62 * r), (0.40 * r, 0.28 * r, 0.29 * r), muzzle),
        Part(ELLIPSOID, HEAD, (0, -1.09 * r, 0.72 * r), (0.07, 0.06, 0.055), _mixed(toy.inks[4], DARK, 0.15)),
    ]


def _headgear(toy: Toy) -> list[Part]:
    r, ink = toy.head, toy.inks[4]
    top = 1.8 * r
    hats = {
        "none": [],
        "ball": [Part(ELLIPSOID, HEAD, (0, 0, top + 0.10), (0.14, 0.14, 0.14), ink)],
        "box": [
            Part(BOX, HEAD, (0, 0, top - 0.07), (0.86 * r, 0.86 * r, 0.035), _mixed(ink, DARK, 0.25)),
            Part(BOX, HEAD, (0, 0, top + 0.06), (0.55 * r, 0.55 * r, 0.11), ink),
        ],
        "stack": [
            Part(ELLIPSOID, HEAD, (0, 0, top + 0.10 * k - 0.06), (0.72 * r - 0.065 * k, 0.72 * r - 0.065 * k, 0.085), i)
            for k, i in enumerate((ink, WHITE, ink))
        ],
    }[toy.hat]
    ears: list[tuple[tuple[float, float, float], tuple[float, float, float]]] = {
        "none": [],
        "round": [((0.72 * r, 0, 1.62 * r), (0.14, 0.07, 0.14))],
        "long": [((0.42 * r, 0.02, 2.10 * r), (0.085, 0.06, 0.23))],
    }[toy.ears]
    inner = _mixed(toy.inks[1], ink, 0.6)
    return hats + [
        Part(ELLIPSOID, HEAD, (sign * x, y, z), half, toy.inks[1], PATCH, 0.62, inner)
        for (x, y, z), half in ears
        for sign, *_ in SIDES
    ]


def _prop(toy: Toy) -> list[Part]:
    bone = ARM_LEFT if toy.prop_side == "left" else ARM_RIGHT
    centre = 0.0, -0.04, -toy.arm[0] - 0.06
    return {
        "none": [],
        "ball": [Part(ELLIPSOID, bone, centre, (0.13, 0.13, 0.13), toy.inks[4], STRIPES, 3.0, WHITE)],
        "box": [Part(BOX, bone, centre, (0.11, 0.11, 0.11), toy.inks[4])],
    }[toy.prop]


def _mixed(ink: Ink, other: Ink, share: float) -> Ink:
    red, green, blue = (a + share * (b - a) for a, b in zip(ink, other, strict=True))
    return red, green, blue
