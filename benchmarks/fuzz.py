"""Damages files in every way we can think of, and counts what a reader lets out besides its documented errors.

    python benchmarks/fuzz.py [--target all] [--n 20000] [--seconds 0] [--seed 0] [--index N] [--out FILE]

Targets: ply, splat, spz, glb, run, transforms, yaml, safetensors, image, colmap, cameras, html-payload, or all.

A mutation is a function of (target, seed, index): cut, flipped bits, spliced pieces, swapped words, edited numbers,
huge counts, one to four of them at a time; compressed formats are damaged inside of their gzip too.  A case passes when
the reader returns or raises D2Error within 10 seconds and within 1 GB more memory than before.  The asset of the HTML
viewer is read as the page reads it, by page/asset.js in node; without node that target is skipped aloud.
Exits with 1 when anything else came out; --index N shows one case.
"""

from __future__ import annotations

import collections
import gzip
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from fuzz_targets import Target, some_gaussians, targets

from d2 import fileio, machine
from d2.errors import D2Error
from d2.recon.gaussians import Gaussians4D
from d2.recon.viewer import pack, page

SECONDS = 10  # a case may take
MEMORY = 1 << 30  # bytes that a case may take more than was there before
NUMBERS = (b"0", b"-1", b"1e999", b"NaN", b"4294967296", b"900000000000", b"9" * 400, b"null", b"true", b'""')
PIECES = (
    b"\0", b"\xff" * 8, b"[", b"]", b"{", b"}", b'"', b",", b"\n", b"\r\n", b"../", b"&a [*a]",
    b"!!python/name:os.system ",
    b"element vertex 900000000000\n", b"property list uchar int x\n", b"end_header\n", b"format ascii 1.0\n",
)  # fmt: skip
WORDS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7F800000, 0x7FC00000, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def main(
    target: str = "all",
    n: int = 20000,
    seconds: float = 0,
    seed: int = 0,
    index: int | None = None,
    out: Path | None = None,
) -> None:
    with tempfile.TemporaryDirectory(prefix="d2-fuzz-") as text:
        place = Path(text)
        names = [*targets(place), "html-payload"] if target == "all" else [target]
        record = {name: fuzz(name, place, n, seconds, seed, index) for name in names}
    if out is not None:
        fileio.write_json(out, {"machine": machine.describe(), "targets": record})
    raise SystemExit(1 if any(found["undocumented"] for found in record.values()) else 0)


def fuzz(name: str, place: Path, n: int, seconds: float, seed: int, index: int | None = None) -> dict[str, Any]:
    """Up to n mutations of one kind of file, for at most `seconds` where that is not 0."""
    begin = time.monotonic()
    if name == "html-payload":
        outcomes = in_node(place, n if index is None else 1, seed, index or 0, seconds)
    else:
        cases = range(n) if index is None else range(index, index + 1)
        outcomes = in_python(targets(place)[name], name, place, cases, seed, seconds)
    tally = collections.Counter()
    for case, outcome in outcomes:
        tally["mutations"] += 1
        tally[outcome if outcome in ("read", "refused") else "undocumented"] += 1
        if outcome not in ("read", "refused"):
            print(f"{name} --seed {seed} --index {case}: {outcome}", file=sys.stderr, flush=True)
    record = {key: tally[key] for key in ("mutations", "read", "refused", "undocumented")}
    print(name, record, f"{time.monotonic() - begin:.1f} s", flush=True)
    return record


# -- damage ----------------------------------------------------------------------------------------------


def mutated(target: Target, name: str, seed: int, index: int) -> bytes:
    """A damaged file; the same for the same arguments."""
    rng = random.Random(f"{name}:{seed}:{index}")
    data = bytearray(rng.choice(target.seeds))
    inside = target.zipped and rng.random() < 0.7
    if inside:
        data = bytearray(gzip.decompress(data))
    for _ in range(rng.randint(1, 4)):
        rng.choice(WAYS)(data, rng)
    return gzip.compress(bytes(data), 1, mtime=0) if inside else bytes(data)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randint(0, len(data)) :]


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def splice(data: bytearray, rng: random.Random) -> None:
    a, b = (rng.randint(0, len(data)) for _ in range(2))
    at = rng.randint(0, len(data))
    data[at:at] = data[min(a, b) : max(a, b)][:4096]


def drop(data: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(data))
    del data[at : at + rng.choice((1, 2, 4, 16, 256))]


def word(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((4, 8))
    at = rng.choice((0, 4, 8, rng.randint(0, len(data))))
    data[at : at + size] = struct.pack("<Q", rng.choice(WORDS))[:size]


def piece(data: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, min(len(data), rng.choice((64, 1024, len(data)))))
    data[at : at + rng.choice((0, 1, 4))] = rng.choice(PIECES)


def number(data: bytearray, rng: random.Random) -> None:
    """A number of a text becomes another one, or no number."""
    digits, before = b"0123456789", b" :[,-\n"
    starts = [k for k in range(min(len(data), 20000)) if data[k] in digits and (k == 0 or data[k - 1] in before)]
    if starts:
        at = end = rng.choice(starts)
        while end < len(data) and data[end] in b"0123456789.eE+-":
            end += 1
        data[at:end] = rng.choice(NUMBERS)


def line(data: bytearray, rng: random.Random) -> None:
    """Lines of the first kilobytes change places, or one stands twice."""
    lines = bytes(data[:4096]).split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = (lines[b], lines[a]) if rng.random() < 0.5 else (lines[a], lines[a])
    data[:4096] = b"\n".join(lines)


WAYS = (cut, flip, flip, splice, drop, word, piece, number, number, line)


# -- readers ---------------------------------------------------------------------------------------------


def in_python(
    target: Target, name: str, place: Path, cases: range, seed: int, seconds: float
) -> Iterator[tuple[int, str]]:
    """What each case did: read, refused, or what came out instead."""
    file, begin = place / f"case{target.suffix}", time.monotonic()
    with bounded():
        for index in cases:
            if seconds and time.monotonic() - begin > seconds:
                return
            file.write_bytes(mutated(target, name, seed, index))
            signal.alarm(SECONDS)
            try:
                target.read(file)
                outcome = "read"
            except D2Error as error:
                outcome = "refused" if str(error).isprintable() else f"unprintable {error!r}"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error} at {traceback.extract_tb(error.__traceback__)[-1]}"
            finally:
                signal.alarm(0)
            yield index, outcome


class bounded:
    """Within: an alarm raises TimeoutError, and memory beyond MEMORY more is MemoryError."""

    def __enter__(self) -> None:
        self.limits, self.handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, self.limits[1]))
        signal.signal(signal.SIGALRM, self.late)

    def __exit__(self, *exception: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.limits)
        signal.signal(signal.SIGALRM, self.handler)

    def late(self, *arguments: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")


def in_node(place: Path, n: int, seed: int, first: int, seconds: float) -> Iterator[tuple[int, str]]:
    """The same for the asset in a page, by the page's own module."""
    node = shutil.which("node")
    if node is None:
        print("html-payload: skipped, node is not installed", file=sys.stderr)
        return
    gaussians = Gaussians4D.still(some_gaussians(3, 4))
    target = Target([pack.pack(gaussians), pack.pack(gaussians, 1)], ".bin", lambda path: None)
    module = Path(page.__file__).parent / "page" / "asset.js"
    script = place / "read.mjs"
    script.write_text(module.read_text() + READ_ALL)
    begin = time.monotonic()
    for start in range(first, first + n, 500):
        if seconds and time.monotonic() - begin > seconds:
            return
        cases = range(start, min(start + 500, first + n))
        sent = "".join(mutated_asset(target, seed, k).hex() + "\n" for k in cases)
        call = [node, "--max-old-space-size=1024", str(script)]
        done = subprocess.run(call, input=sent, capture_output=True, text=True, timeout=60 + SECONDS * len(cases))
        outcomes = done.stdout.splitlines()
        outcomes += [f"node ended with {done.returncode}: {done.stderr[-300:]}"] * (len(outcomes) < len(cases))
        yield from zip(cases, outcomes, strict=False)


def mutated_asset(target: Target, seed: int, index: int) -> bytes:
    """Half of them with their parts damaged one by one: the header, or what is within the gzip."""
    rng = random.Random(f"asset:{seed}:{index}")
    if rng.random() < 0.5:
        return mutated(target, "html-payload", seed, index)
    data = rng.choice(target.seeds)
    length = struct.unpack_from("<I", data, 4)[0]
    header, planes = bytearray(data[8 : 8 + length]), bytearray(gzip.decompress(data[8 + length :]))
    rng.choice(WAYS)(header if rng.random() < 0.7 else planes, rng)
    return data[:4] + struct.pack("<I", len(header)) + header + gzip.compress(bytes(planes), 1, mtime=0)


READ_ALL = """
import { readFileSync } from 'node:fs';
for (const line of readFileSync(0, 'utf8').split('\\n').slice(0, -1)) {
  let outcome = 'read';
  try {
    const { header, data, stride, rows } = await decodeAsset(Uint8Array.from(Buffer.from(line, 'hex')));
    const sane = header.count > 0 && Number.isInteger(header.count) && [7, 10].includes(header.words)
      && data.length === rows * TEXTURE_WIDTH * 4 && data.length >= header.count * stride
      && [...header.box, ...header.time, ...header.scale, ...header.color, header.sh].every(Number.isFinite)
      && header.box.length === 6 && header.time.length === 2 && header.scale.length === 2 && header.color.length === 2;
    if (!sane) outcome = 'took nonsense: ' + JSON.stringify({ ...header, stride, rows });
  } catch (error) {
    outcome = error instanceof Error && error.message.startsWith('no d2 viewer asset') ? 'refused'
      : `${error}`.replaceAll('\\n', ' ');
  }
  console.log(outcome);
}
"""


if __name__ == "__main__":
    typer.run(main)
