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
  if (new TextDecoder().decode(bytes.subarray(0, 4)) !== 'D2V1') throw new Error('this is no d2 viewer asset');
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(4, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const planes = await unzipped(bytes.subarray(8 + length));
  if (planes.length !== header.count * header.words * 4) throw new Error('the asset is incomplete');
  const stride = Math.ceil(header.words / 4) * 4;
  const rows = Math.ceil((header.count * stride) / 4 / TEXTURE_WIDTH);
  const records = new Uint8Array(TEXTURE_WIDTH * rows * 16);
  for (let plane = 0; plane < header.words * 4; plane++) {
    const start = plane * header.count;
    for (let i = 0; i < header.count; i++) records[i * stride * 4 + plane] = planes[start + i];
  }
  return { header, data: new Uint32Array(records.buffer), stride, rows };
}

/** @param {Uint8Array} bytes @returns {Promise<Uint8Array>} */
async function unzipped(bytes) {
  const stream = new Blob([/** @type {BlobPart} */ (bytes)]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
