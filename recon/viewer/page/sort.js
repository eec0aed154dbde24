// Which Gaussians are seen at a moment, far to near: on the page for one exact picture, in a worker while it moves.

/**
 * Self-contained, because the worker gets it as text.
 * @param {Uint32Array} data @param {number} stride @param {import('./asset.js').Header} header
 * @returns {(back: ArrayLike<number>, time: number) => Uint32Array} indices for a view direction (camera's z, world)
 */
export function makeSorter(data, stride, header) {
  const n = header.count, [x0, y0, z0, dx, dy, dz] = header.box;
  const place = new Float32Array(3 * n), velocity = new Float32Array(3 * n);
  const peak = new Float32Array(n), inverse = new Float32Array(n), faintness = new Float32Array(n);

  /** @param {number} bits a half float */
  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15));
  };
  for (let i = 0; i < n; i++) {
    const o = i * stride, a = data[o], b = data[o + 1], c = data[o + 2], d = data[o + 3];
    place[3 * i] = x0 + (dx * (a & 65535)) / 65535;
    place[3 * i + 1] = y0 + (dy * (a >>> 16)) / 65535;
    place[3 * i + 2] = z0 + (dz * (b & 65535)) / 65535;
    peak[i] = header.time[0] + (header.time[1] * (b >>> 16)) / 65535;
    velocity[3 * i] = half(c & 65535);
    velocity[3 * i + 1] = half(c >>> 16);
    velocity[3 * i + 2] = half(d & 65535);
    inverse[i] = half(d >>> 16);
    faintness[i] = 2 * Math.log(data[o + 6] >>> 24); // opacity × 255 exp(-½ z²) ≥ 1  ⇔  z² ≤ this
  }

  const depth = new Float32Array(n), kept = new Uint32Array(n), counts = new Uint32Array(65536);
  return (back, time) => {
    let seen = 0, low = Infinity, high = -Infinity;
    for (let i = 0, j = 0; i < n; i++, j += 3) {
      const dt = time - peak[i], z = dt * inverse[i];
      if (!(z * z <= faintness[i])) continue;
      const along = back[0] * (place[j] + dt * velocity[j]) + back[1] * (place[j + 1] + dt * velocity[j + 1])
        + back[2] * (place[j + 2] + dt * velocity[j + 2]);
      depth[seen] = along;
      kept[seen++] = i;
      if (along < low) low = along;
      if (along > high) high = along;
    }
    // A counting sort over 16 bits of depth; its order is stable, so equal depths keep the order of the file.
    const order = new Uint32Array(seen), scale = 65535 / Math.max(high - low, 1e-9);
    counts.fill(0);
    for (let i = 0; i < seen; i++) counts[((depth[i] - low) * scale) | 0]++;
    for (let i = 0, before = 0; i < 65536; i++) {
      const here = counts[i];
      counts[i] = before;
      before += here;
    }
    for (let i = 0; i < seen; i++) order[counts[((depth[i] - low) * scale) | 0]++] = kept[i];
    return order;
  };
}

/** Sorts in a worker; while it is busy only the latest request waits. */
export class BackgroundSorter {
  /** @param {import('./asset.js').Asset} asset @param {(order: Uint32Array, key: string) => void} deliver */
  constructor(asset, deliver) {
    const source = `${makeSorter.toString()}
      let sort;
      onmessage = ({ data: m }) => {
        if (m.data) { sort = makeSorter(m.data, m.stride, m.header); return; }
        const order = sort(m.back, m.time);
        postMessage({ order, key: m.key }, [order.buffer]);
      };`;
    const url = URL.createObjectURL(new Blob([source], { type: 'text/javascript' }));
    this.worker = new Worker(url);
    URL.revokeObjectURL(url);
    this.busy = false;
    /** @type {{back: number[], time: number, key: string} | null} */
    this.waiting = null;
    const copy = asset.data.slice();
    this.worker.postMessage({ data: copy, stride: asset.stride, header: asset.header }, [copy.buffer]);
    this.worker.onmessage = ({ data }) => {
      this.busy = false;
      deliver(data.order, data.key);
      if (this.waiting) this.request(this.waiting);
    };
  }

  /** @param {{back: number[], time: number, key: string}} what */
  request(what) {
    this.waiting = this.busy ? what : null;
    if (this.busy) return;
    this.busy = true;
    this.worker.postMessage(what);
  }

  stop() {
    this.worker.terminate();
  }
}
