"""One job, many ranks: rank 0 runs it and gives lines of the matrix away, the others denoise and draw what they get.

Only rank 0 reads the input and touches the run folder; what the others need is the checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from d2.denoiser import Estimate, MatrixDenoiser, in_turn
from d2.errors import D2Error, WorkerError
from d2.models.blocks import Blend
from d2.models.conditioner import Conditioning, condition
from d2.pair import AXES, Model, Pair
from d2.shard import Group, share

NOTHING = torch.empty(0)
Share = dict[Model, list[int]]  # the lines of each model that a rank denoises

# -- rank 0 ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Shared:
    """All columns or all rows, whoever denoises them; a denoiser.MatrixDenoiser."""

    pair: LeadingPair
    model: Model
    number: int  # the first that the leader made is 1
    count: int  # of lines
    joined: bool  # whether lines look at each other, so that all of them stay on one rank
    guided_from: float
    build: Callable[[tuple[int, ...]], MatrixDenoiser]  # some of the lines, on this rank

    def __call__(self, x: Tensor, sigma: float) -> Estimate:
        views, frames = (self, None) if self.model == "view" else (None, self)
        return next(filter(None, self.pair.together(views, frames, x, sigma)))

    def bundles(self) -> list[list[int]]:
        """Lines that may not be torn apart."""
        lines = list(range(self.count))
        return [lines] if self.joined else [[line] for line in lines]


class LeadingPair(Pair):
    """Rank 0's pair of models: stands in for Pair, and gives lines and rows away."""

    def __init__(self, pair: Pair, group: Group) -> None:
        super().__init__(pair.settings, pair.specs, pair.paths, pair.device, pair.execution, pair.denoisers)
        self.group = group
        self.made = 0
        self.busy = False  # whether the others are in the middle of something

    def lines(
        self,
        model: Model,
        conditions: list[Conditioning],
        in_flight: int = 1,
        blend: Blend | None = None,
        guided_from: float = math.inf,
        shallow_at: Collection[float] = (),
    ) -> Shared:
        """As Pair.lines; everybody is sent the conditions."""
        here: dict[tuple[int, ...], MatrixDenoiser] = {}

        def build(chosen: tuple[int, ...]) -> MatrixDenoiser:
            if chosen not in here:
                some = [conditions[line] for line in chosen]
                here[chosen] = Pair.lines(self, model, some, in_flight, blend, guided_from, shallow_at)
            return here[chosen]

        self.made += 1
        command = {"do": "lines", "number": self.made, "model": model, "count": len(conditions)}
        options = {
            "in_flight": in_flight, "blend": blend and dataclasses.asdict(blend), "guided_from": guided_from,
            "shallow_at": list(shallow_at),
        }  # fmt: skip
        shapes = [list(part.shape) for part in _compact(conditions[0])]
        self.group.broadcast(command | options | {"shapes": shapes})
        for part in (part for line in conditions for part in _compact(line)):
            self.group.broadcast_tensor(part)
        return Shared(self, model, self.made, len(conditions), blend is not None, guided_from, build)

    def together(  # type: ignore[override]
        self, views: MatrixDenoiser | None, frames: MatrixDenoiser | None, x: Tensor, sigma: float
    ) -> tuple[Estimate | None, Estimate | None]:
        """Both models' estimates, by one exchange each way; lines of both are spread out together."""
        wanted = [model for model in (views, frames) if model is not None]
        models: dict[Model, Shared] = {model.model: model for model in wanted if isinstance(model, Shared)}
        if len(models) < len(wanted):
            return in_turn(views, frames, x, sigma)  # wrapped ones: each comes here on its own
        length: dict[Model, int] = {"view": x.shape[0], "frame": x.shape[1]}
        given = shares({name: model.bundles() for name, model in models.items()}, length, self.group.size)
        members = {name: 2 if sigma <= model.guided_from else 1 for name, model in models.items()}
        command = {
            "do": "denoise", "sigma": sigma, "cell": list(x.shape[2:]), "length": length, "shares": given,
            "members": members, "numbers": {name: model.number for name, model in models.items()},
        }  # fmt: skip
        sent = [_pack([_take(x, name, lines) for name, lines in mine.items()]) for mine in given]
        build = {name: model.build for name, model in models.items()}
        helped = any(given[1:])
        if helped:
            self._ask(command, sent)
        answers = [_denoise(command, 0, sent[0], build)]
        if helped:
            sizes = [sum(math.prod(shape) for shape in _answer_shapes(command, rank)) for rank in range(len(given))]
            answers += [self._noted(part) for part in self._hear([size + len(AXES) for size in sizes])]
        found = {name: Estimate(torch.empty_like(x), torch.empty_like(x)) for name in models}
        for rank, answer in enumerate(answers):
            blocks = _unpack(answer, _answer_shapes(command, rank))
            for (name, lines), block in zip(given[rank].items(), blocks, strict=True):
                _put(found[name].uncond, name, lines, block[0])
                _put(found[name].cond, name, lines, block[-1])
        return found.get("view"), found.get("frame")

    def decode_rows(self, latents: Tensor, chunk: int) -> Iterator[Tensor]:
        """As Pair.decode_rows; as many rows at a time as there are ranks."""
        size, stage = self.group.size, self.first_stage("frame")
        frames, _, h, w = latents.shape[1:]
        shape = [frames, 3, h * self.settings.factor, w * self.settings.factor]
        for start in range(0, len(latents), size):
            rows = latents[start : start + size]
            sent = [rows[rank].flatten() if rank < len(rows) else NOTHING for rank in range(size)]
            command = {"do": "decode", "row": list(rows.shape[1:]), "count": len(rows), "chunk": chunk}
            self._ask(command, sent)
            mine = stage.decode(rows[0], chunk)
            found = self._hear([math.prod(shape) * (rank < len(rows)) for rank in range(size)])
            yield mine
            yield from (pictures.view(shape) for pictures in found[: len(rows) - 1])

    def release(self) -> None:
        """Lets the UNets go, everywhere."""
        super().release()
        self.group.broadcast({"do": "release"})

    def _ask(self, command: dict[str, Any], sent: list[Tensor]) -> None:
        self.busy = True
        self.group.broadcast(command)
        self.group.scatter(sent, len(sent[0]))

    def _hear(self, sizes: list[int]) -> list[Tensor]:  # [n_r] for every rank but this one, on the CPU
        found = self.group.gather(NOTHING, [0, *sizes[1:]])
        self.busy = False
        return [part.cpu() for part in found[1:]]

    def _noted(self, answer: Tensor) -> Tensor:  # [n + 2] -> [n]
        """What stands at the end: how many lines in flight a rank's memory allowed, 0 for as many as asked for."""
        for axis, fewer in zip(AXES.values(), answer[-len(AXES) :].tolist(), strict=True):
            if fewer:
                self.in_flight[axis] = min(int(fewer), self.in_flight.get(axis, int(fewer)))
        return answer[: -len(AXES)]


def shares(
    bundles: Mapping[Model, list[list[int]]],  # of each model: lines that may not be torn apart
    length: dict[Model, int],  # pictures in a line of each
    ranks: int,
) -> list[Share]:
    """Who denoises what: the pictures of both models together, as even as whole lines allow."""
    pieces: list[tuple[Model, list[int]]] = [(model, bundle) for model, found in bundles.items() for bundle in found]
    given: list[Share] = []
    for mine in share([length[model] * len(bundle) for model, bundle in pieces], ranks):
        lines: Share = {}
        for model, bundle in (pieces[piece] for piece in mine):
            lines.setdefault(model, []).extend(bundle)
        given.append(lines)
    return given


# -- the other ranks ---------------------------------------------------------------------------------------------------


def serve(pair: Pair, group: Group) -> None:
    """Does what rank 0 says until it says stop; tells it why where that fails."""
    builders: dict[int, _Builder] = {}
    stage = None
    try:
        while (command := group.broadcast())["do"] != "stop":
            if command["do"] == "lines":
                # A model's former lines are not asked for again.
                builders = {n: b for n, b in builders.items() if b.model != command["model"]}
                builders[command["number"]] = _Builder(pair, command, _conditions(pair, group, command))
            elif command["do"] == "denoise":
                mine = command["shares"][group.rank]
                sizes = [math.prod(shape) for shape in _shapes(command, group.rank)]
                packed = group.scatter([], sum(sizes)).cpu()
                build = {name: builders[number] for name, number in command["numbers"].items() if name in mine}
                answer = _denoise(command, group.rank, packed, build)
                fewer = torch.tensor([float(pair.in_flight.get(axis, 0)) for axis in AXES.values()])
                group.gather(torch.cat([answer, fewer]), [])
            elif command["do"] == "decode":
                busy = group.rank < command["count"]
                row = group.scatter([], math.prod(command["row"]) * busy)
                stage = stage or pair.first_stage("frame")
                pictures = stage.decode(row.view(command["row"]), command["chunk"]) if busy else NOTHING
                group.gather(pictures.flatten(), [])
            else:
                pair.release()
                builders = {}
    except WorkerError:
        raise
    except D2Error as error:
        group.fail(error)
        raise


class _Builder:
    """Makes, and keeps, the denoiser of some lines out of all conditions."""

    def __init__(self, pair: Pair, command: dict[str, Any], conditions: list[Conditioning]) -> None:
        self.pair, self.model, self.conditions = pair, command["model"], conditions
        blend = command["blend"] and Blend(**command["blend"])
        self.options = command["in_flight"], blend, command["guided_from"], command["shallow_at"]
        self.made: dict[tuple[int, ...], MatrixDenoiser] = {}

    def __call__(self, chosen: tuple[int, ...]) -> MatrixDenoiser:
        if chosen not in self.made:
            self.made[chosen] = self.pair.lines(self.model, [self.conditions[line] for line in chosen], *self.options)
        return self.made[chosen]


def _conditions(pair: Pair, group: Group, command: dict[str, Any]) -> list[Conditioning]:
    found = []
    for _ in range(command["count"]):
        token, latent, vector = (group.broadcast_tensor(torch.empty(shape)) for shape in command["shapes"])
        found.append(condition(token, latent, vector).to(pair.device, pair.execution.dtype))
    return found


# -- what goes over the wire -------------------------------------------------------------------------------------------


def _compact(line: Conditioning) -> list[Tensor]:  # [1, D], [1, C, h, w], [T, A]
    """A line's condition without its repetition over pictures."""
    return [part.float().cpu() for part in (line.crossattn[:, 0], line.concat[:, 0], line.vector[0])]


def _take(x: Tensor, model: Model, lines: list[int]) -> Tensor:  # [V, F, C, h, w] -> [n, T, C, h, w]
    return x[lines] if model == "frame" else x[:, lines].transpose(0, 1)


def _put(x: Tensor, model: Model, lines: list[int], block: Tensor) -> None:
    if model == "frame":
        x[lines] = block
    else:
        x[:, lines] = block.transpose(0, 1)


def _shapes(command: dict[str, Any], rank: int) -> list[tuple[int, ...]]:
    """Of the blocks of lines that a rank is sent, one a model: (n, T, C, h, w)."""
    mine, length = command["shares"][rank], command["length"]
    return [(len(lines), length[model], *command["cell"]) for model, lines in mine.items()]


def _answer_shapes(command: dict[str, Any], rank: int) -> list[tuple[int, ...]]:
    """Of the blocks that it sends back: the unconditional estimate, where it is used, and the conditional one."""
    members = [command["members"][model] for model in command["shares"][rank]]
    return [(count, *shape) for count, shape in zip(members, _shapes(command, rank), strict=True)]


def _denoise(
    command: dict[str, Any],
    rank: int,
    packed: Tensor,  # [n]
    build: Mapping[Any, Callable[[tuple[int, ...]], MatrixDenoiser]],
) -> Tensor:  # [m], packed
    """What a rank makes of the lines that it was sent."""
    mine = command["shares"][rank]
    answers = []
    for (model, lines), block in zip(mine.items(), _unpack(packed, _shapes(command, rank)), strict=True):
        part = block if model == "frame" else block.transpose(0, 1)
        estimate = build[model](tuple(lines))(part, command["sigma"])
        both = estimate if command["members"][model] == 2 else estimate[1:]
        answers += [half if model == "frame" else half.transpose(0, 1) for half in both]
    return _pack(answers)


def _pack(blocks: list[Tensor]) -> Tensor:
    return torch.cat([block.flatten() for block in blocks]) if blocks else NOTHING


def _unpack(packed: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    parts = packed.split([math.prod(shape) for shape in shapes]) if shapes else ()
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
