// The asset's bytes, as recon/viewer/pack.py writes them, become the texels that shader and sorter read.

/**
 * @typedef {object} Header
 * @property {number} count
 * @property {number} words 32-bit words of a packed record
 * @property {number[]} box least x y z, extent x y z
 * @property {number[]} time least, extent
 * @property {number[]} scale least, extent of ln scale
 * @property {number[]} color least, extent
 * @property {number} sh largest coefficient of degree 1
 */

/**
 * @typedef {object} Asset
 * @property {Header} header
 * @property {Uint32Array} data records of `stride` words, padded to whole rows of the texture
 * @property {number} stride words, a multiple of 4: one texel holds four
 * @property {number} rows of the texture
 */

export const TEXTURE_WIDTH = 2048; // texels

/** @param {string} text base64 @returns {Uint8Array} */
export function bytesOf(text) {
  const characters = atob(text.trim()), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** @param {Uint8Array} bytes @returns {Promise<Asset>} */
export async function decodeAsset(bytes) {
  try {
    return await decoded(bytes);
  } catch {
    throw new Error('no d2 viewer asset, or a damaged one');
  }
}

/** @param {Uint8Array} bytes @returns {Promise<Asset>} */
async function decoded(bytes) {
  const text = new TextDecoder(), length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(4, true);
  const header = JSON.parse(text.decode(bytes.subarray(8, 8 + length)));
  const { count, words, sh, box, time, scale, color } = header, size = count * words * 4;
  const numbers = [box, time, scale, color], zipped = bytes.subarray(8 + length);
  if (text.decode(bytes.subarray(0, 4)) !== 'D2V1' || `${numbers.map((part) => part.length)}` !== '6,2,2,2'
    || ![sh, ...numbers.flat()].every(Number.isFinite) || ![7, 10].includes(words) || count < 1 || count % 1
    || size > 1032 * zipped.length) throw 0; // gzip's limit
  const stream = new Blob([/** @type {BlobPart} */ (zipped)]).stream().pipeThrough(new DecompressionStream('gzip'));
  const reader = stream.getReader(), planes = new Uint8Array(size);
  let at = 0;
  for (let part; !(part = await reader.read()).done; at += part.value.length) planes.set(part.value, at);
  if (at !== size) throw 0;
  const stride = Math.ceil(words / 4) * 4, rows = Math.ceil((count * stride) / 4 / TEXTURE_WIDTH);
  const records = new Uint8Array(TEXTURE_WIDTH * rows * 16);
  for (let plane = 0; plane < words * 4; plane++) {
    const start = plane * count;
    for (let i = 0; i < count; i++) records[i * stride * 4 + plane] = planes[start + i];
  }
  return { header, data: new Uint32Array(records.buffer), stride, rows };
}
