// A WebM file around encoded pictures: one video track, a cluster for every key frame.

/** @typedef {{data: Uint8Array, time: number, key: boolean}} Chunk time in milliseconds */

const UNKNOWN_SIZE_LIMIT = 2 ** 32;

/**
 * @param {Chunk[]} chunks the first is a key frame
 * @param {{codec: string, width: number, height: number, duration: number}} track codec as Matroska names it; milliseconds
 * @returns {Blob}
 */
export function webm(chunks, { codec, width, height, duration }) {
  const head = master(0x1a45dfa3, [number(0x4286, 1), number(0x42f7, 1), number(0x42f2, 4), number(0x42f3, 8),
    text(0x4282, 'webm'), number(0x4287, 4), number(0x4285, 2)]);
  const info = master(0x1549a966, [number(0x2ad7b1, 1000000), real(0x4489, duration), text(0x4d80, 'd2'),
    text(0x5741, 'd2')]);
  const video = master(0xe0, [number(0xb0, width), number(0xba, height)]);
  const tracks = master(0x1654ae6b, [master(0xae, [number(0xd7, 1), number(0x73c5, 1), number(0x9c, 0),
    text(0x86, codec), number(0x83, 1), video])]);
  const segment = master(0x18538067, [info, tracks, ...clusters(chunks)]);
  return new Blob(/** @type {BlobPart[]} */ ([head, segment]), { type: 'video/webm' });
}

/** @param {Chunk[]} chunks */
function clusters(chunks) {
  /** @type {Chunk[][]} */
  const groups = [];
  for (const chunk of chunks) {
    const last = groups.at(-1);
    // Times within a cluster have 16 bits and a sign.
    if (!last || chunk.key || chunk.time - last[0].time > 30000) groups.push([chunk]);
    else last.push(chunk);
  }
  return groups.map((group) => master(0x1f43b675, [number(0xe7, group[0].time),
    ...group.map((chunk) => block(chunk, chunk.time - group[0].time))]));
}

/** @param {Chunk} chunk @param {number} offset */
function block(chunk, offset) {
  return node(0xa3, join([new Uint8Array([0x81, offset >> 8, offset & 255, chunk.key ? 0x80 : 0]), chunk.data]));
}

/** @param {number} id @param {Uint8Array[]} children */
function master(id, children) {
  return node(id, join(children));
}

/** @param {number} id @param {number} value */
function number(id, value) {
  return node(id, bigEndian(value));
}

/** @param {number} id @param {string} value */
function text(id, value) {
  return node(id, new TextEncoder().encode(value));
}

/** @param {number} id @param {number} value */
function real(id, value) {
  const data = new DataView(new ArrayBuffer(8));
  data.setFloat64(0, value);
  return node(id, new Uint8Array(data.buffer));
}

/** @param {number} id @param {Uint8Array} content */
function node(id, content) {
  if (content.length >= UNKNOWN_SIZE_LIMIT) throw new Error('the video is too long');
  const size = new DataView(new ArrayBuffer(8));
  size.setUint32(0, 0x01000000); // a length of eight bytes
  size.setUint32(4, content.length);
  return join([bigEndian(id), new Uint8Array(size.buffer), content]);
}

/** @param {number} value */
function bigEndian(value) {
  const bytes = [];
  for (let rest = Math.round(value); rest > 0 || !bytes.length; rest = Math.floor(rest / 256)) bytes.unshift(rest % 256);
  return new Uint8Array(bytes);
}

/** @param {Uint8Array[]} parts */
function join(parts) {
  const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}
