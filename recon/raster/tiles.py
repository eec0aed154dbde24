"""CPU kernels over 8×8 pixel tiles: bin splats into depth-ordered lists, composite front to back, and back.

alpha = min(0.999, opacity exp(-s)), s the half-conic form; alpha < 1/255 is skipped; a pixel is done before
the splat that would bring its transmittance to 1e-4 or less (gsplat classic).  Gaussian outer, pixel
inner, branch-free over structure-of-arrays lanes that stay in L1.  Loop indices over lanes are unsigned:
signed ones make numba add wrap-around checks that stop vectorisation.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from d2.recon.raster.project import ALPHA_MIN, POISONED, SPLAT_FLOATS

f4, u8 = np.float32, np.uint64
TILE = 8  # pixels a side
LANES = TILE * TILE
CHECK = 31  # every 32 splats: is any pixel of the tile still alive?
ALPHA_MAX, T_MIN = f4(0.999), f4(1e-4)
ZERO, HALF, ONE = f4(0), f4(0.5), f4(1)
# Inputs are finite by construction (project() saw to it), so all reorderings are welcome here.
FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "afn", "reassoc"}

# exp(-s) = p(s/8)^8 on 0 ≤ s ≤ 6, beyond which alpha < 1/255: a degree-5 fit, relative error 3e-6.
_S_MAX, _EIGHTH = f4(6), f4(1 / 8)
_x = np.linspace(0, 6 / 8, 4001)
_P0, _P1, _P2, _P3, _P4, _P5 = np.polynomial.Chebyshev.fit(_x, np.exp(-_x), 5).convert(
    kind=np.polynomial.Polynomial
).coef.astype(f4)  # fmt: skip


@njit(fastmath=FAST)
def _exp_negative(s):
    v = min(s, _S_MAX) * _EIGHTH
    e = _P0 + v * (_P1 + v * (_P2 + v * (_P3 + v * (_P4 + v * _P5))))
    e = e * e
    e = e * e
    return e * e


@njit
def _tile_range(rects, i):
    return (
        rects[i, 0] // TILE,
        (rects[i, 1] - 1) // TILE + 1,
        rects[i, 2] // TILE,
        (rects[i, 3] - 1) // TILE + 1,
    )


@njit(parallel=True, cache=True)
def bin_splats(order, rects, keys, tiles_x, tiles_y, chunks):
    """Depth-ordered tile lists by one counting sort, shared by `chunks` threads (any number, same result).

    order [M]: visible Gaussians front to back; keys [N]: drawn if less than POISONED.  Returns offsets [tiles + 1];
    ids [L], the Gaussian of every entry of every tile's list; slots [L], the entry's row when rows are grouped by
    Gaussian; and starts [N + 1], where each Gaussian's rows begin.
    """
    N, M, T = keys.shape[0], order.shape[0], tiles_x * tiles_y
    starts = np.zeros(N + 1, np.int64)
    for i in range(N):
        starts[i + 1] = starts[i]
        if keys[i] < POISONED:
            x0, x1, y0, y1 = _tile_range(rects, i)
            starts[i + 1] += (x1 - x0) * (y1 - y0)
    fill = np.zeros((chunks, T), np.int64)
    for k in prange(chunks):
        for n in range(M * k // chunks, M * (k + 1) // chunks):
            x0, x1, y0, y1 = _tile_range(rects, order[n])
            for ty in range(y0, y1):
                for tx in range(x0, x1):
                    fill[k, ty * tiles_x + tx] += 1
    offsets = np.zeros(T + 1, np.int64)
    for t in range(T):
        offsets[t + 1] = offsets[t]
        for k in range(chunks):
            count = fill[k, t]
            fill[k, t] = offsets[t + 1]
            offsets[t + 1] += count
    ids, slots = np.empty(starts[N], np.int32), np.empty(starts[N], np.int32)
    for k in prange(chunks):
        for n in range(M * k // chunks, M * (k + 1) // chunks):
            i = order[n]
            x0, x1, y0, y1 = _tile_range(rects, i)
            slot = starts[i]
            for ty in range(y0, y1):
                for tx in range(x0, x1):
                    t = ty * tiles_x + tx
                    q = fill[k, t]
                    ids[q], slots[q] = i, slot
                    fill[k, t] = q + 1
                    slot += 1
    return offsets, ids, slots, starts


# Lanes of a tile's flat buffer, 64 floats each.
_X, _Y, _T, _ALIVE, _R, _G, _B, _Q = (u8(k * LANES) for k in range(8))


@njit
def _start_tile(buffer):
    for p in range(LANES):
        buffer[_X + u8(p)], buffer[_Y + u8(p)] = f4(p % TILE) + HALF, f4(p // TILE) + HALF
        buffer[_T + u8(p)], buffer[_ALIVE + u8(p)] = ONE, ONE
        buffer[_R + u8(p)], buffer[_G + u8(p)], buffer[_B + u8(p)] = ZERO, ZERO, ZERO


@njit
def _any_alive(buffer):
    most = ZERO
    for p in range(LANES):
        most = max(most, buffer[_ALIVE + u8(p)])
    return most > ZERO


@njit(parallel=True, fastmath=FAST, cache=True)
def composite(offsets, ids, rects, splats, image, transmittance):
    """Fills image [H, W, 3], without background, and transmittance [H, W] that is left for it."""
    height, width = transmittance.shape
    tiles_x = (width + TILE - 1) // TILE
    for t in prange(offsets.shape[0] - 1):
        left, top = (t % tiles_x) * TILE, (t // tiles_x) * TILE
        buffer = np.empty(7 * LANES, f4)
        _start_tile(buffer)
        for q in range(offsets[t], offsets[t + 1]):
            i = ids[q]
            mx, my = splats[i, 0] - f4(left), splats[i, 1] - f4(top)
            ha, b, hc, o = splats[i, 2], splats[i, 3], splats[i, 4], splats[i, 5]
            red, green, blue = splats[i, 6], splats[i, 7], splats[i, 8]
            for p in range(u8(max(rects[i, 2] - top, 0) * TILE), u8(min(rects[i, 3] - top, TILE) * TILE)):
                dx, dy = mx - buffer[_X + p], my - buffer[_Y + p]
                s = dx * (ha * dx + b * dy) + hc * dy * dy
                alpha = min(ALPHA_MAX, o * _exp_negative(s))
                alpha = alpha if (alpha >= ALPHA_MIN) & (s >= ZERO) else ZERO
                T = buffer[_T + p]
                alive = buffer[_ALIVE + p] if T - T * alpha > T_MIN else ZERO
                weight = alpha * alive * T
                buffer[_ALIVE + p] = alive
                buffer[_T + p] = T - weight
                buffer[_R + p] += weight * red
                buffer[_G + p] += weight * green
                buffer[_B + p] += weight * blue
            if (q - offsets[t]) & CHECK == CHECK and not _any_alive(buffer):
                break
        for y in range(min(TILE, height - top)):
            for x in range(min(TILE, width - left)):
                p = u8(y * TILE + x)
                image[top + y, left + x, 0] = buffer[_R + p]
                image[top + y, left + x, 1] = buffer[_G + p]
                image[top + y, left + x, 2] = buffer[_B + p]
                transmittance[top + y, left + x] = buffer[_T + p]


@njit
def _load_gradient(buffer, image, transmittance, g_image, g_alpha, left, top):
    """Colour lanes take dL/dimage; Q starts as ⟨dL/dC, C⟩ - T_final dL/dalpha: what all splats leave behind."""
    for y in range(min(TILE, image.shape[0] - top)):
        for x in range(min(TILE, image.shape[1] - left)):
            p, py, px = u8(y * TILE + x), top + y, left + x
            r, g, b = g_image[py, px, 0], g_image[py, px, 1], g_image[py, px, 2]
            buffer[_R + p], buffer[_G + p], buffer[_B + p] = r, g, b
            color = r * image[py, px, 0] + g * image[py, px, 1] + b * image[py, px, 2]
            buffer[_Q + p] = color - transmittance[py, px] * g_alpha[py, px]


@njit(parallel=True, fastmath=FAST, cache=True)
def composite_backward(offsets, ids, slots, rects, splats, image, transmittance, g_image, g_alpha, rows):
    """Fills rows[slots[q]] with the gradient of one splat within one tile (fields as in a splat).

    Front to back like the forward pass: with Q_k = Σ_{j>k} w_j ⟨g, c_j⟩ - T_final dL/dalpha,
    dL/dalpha_k = T_k ⟨g, c_k⟩ - Q_k / (1 - alpha_k), so one scalar a pixel replaces a stored list.
    """
    tiles_x = (transmittance.shape[1] + TILE - 1) // TILE
    for t in prange(offsets.shape[0] - 1):
        left, top = (t % tiles_x) * TILE, (t // tiles_x) * TILE
        buffer = np.empty(8 * LANES, f4)
        _start_tile(buffer)
        buffer[_Q : _Q + u8(LANES)] = ZERO
        _load_gradient(buffer, image, transmittance, g_image, g_alpha, left, top)
        done = False
        for q in range(offsets[t], offsets[t + 1]):
            row = slots[q]
            if done:
                for k in range(SPLAT_FLOATS):
                    rows[row, k] = ZERO
                continue
            i = ids[q]
            mx, my = splats[i, 0] - f4(left), splats[i, 1] - f4(top)
            ha, b, hc, o = splats[i, 2], splats[i, 3], splats[i, 4], splats[i, 5]
            red, green, blue = splats[i, 6], splats[i, 7], splats[i, 8]
            s_0 = s_x = s_y = s_xx = s_xy = s_yy = g_r = g_g = g_b = ZERO
            for p in range(u8(max(rects[i, 2] - top, 0) * TILE), u8(min(rects[i, 3] - top, TILE) * TILE)):
                dx, dy = mx - buffer[_X + p], my - buffer[_Y + p]
                s = dx * (ha * dx + b * dy) + hc * dy * dy
                bare = o * _exp_negative(s)
                alpha = min(ALPHA_MAX, bare)
                alpha = alpha if (alpha >= ALPHA_MIN) & (s >= ZERO) else ZERO
                T = buffer[_T + p]
                alive = buffer[_ALIVE + p] if T - T * alpha > T_MIN else ZERO
                alpha *= alive
                weight = alpha * T
                buffer[_ALIVE + p] = alive
                buffer[_T + p] = T - weight
                r, g, bl = buffer[_R + p], buffer[_G + p], buffer[_B + p]
                shade = r * red + g * green + bl * blue
                Q = buffer[_Q + p] - weight * shade
                buffer[_Q + p] = Q
                g_r += weight * r
                g_g += weight * g
                g_b += weight * bl
                # -dL/ds; none flows where alpha is skipped or clamped.
                v = (T * shade - Q / (ONE - alpha)) * bare
                v = v if (alpha > ZERO) & (bare <= ALPHA_MAX) else ZERO
                vx, vy = v * dx, v * dy
                s_0 += v
                s_x += vx
                s_y += vy
                s_xx += vx * dx
                s_xy += vx * dy
                s_yy += vy * dy
            rows[row, 0] = -(ha + ha) * s_x - b * s_y
            rows[row, 1] = -b * s_x - (hc + hc) * s_y
            rows[row, 2], rows[row, 3], rows[row, 4] = -s_xx, -s_xy, -s_yy
            rows[row, 5] = s_0 / o
            rows[row, 6], rows[row, 7], rows[row, 8] = g_r, g_g, g_b
            done = (q - offsets[t]) & CHECK == CHECK and not _any_alive(buffer)
