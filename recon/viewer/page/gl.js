// The WebGL 2 half: every Gaussian is cut at the time shown, projected and blended far to near.
import { TEXTURE_WIDTH } from './asset.js';

/** @typedef {{matrix: Float32Array, eye: number[], back: number[], near: number, focal: number}} View focal in pixels */

// The mathematics of recon/raster/project.py: velocity form, EWA projection, low-pass 0.3 px², limits of the slope.
const VERTEX = `#version 300 es
precision highp float; precision highp int; precision highp usampler2D;
uniform usampler2D records;
uniform mat4 view;
uniform vec3 eye, boxMin, boxSize;
uniform vec2 size, timeRange, scaleRange, colorRange;
uniform float focal, near, time, shRange;
uniform int texels;
in vec2 corner; in uint index;
out vec2 offset; out vec4 color;

vec3 tens(uint w) { return vec3(w & 1023u, (w >> 10) & 1023u, (w >> 20) & 1023u) / 1023.; }
uvec4 fetch(int k) { return texelFetch(records, ivec2(k & ${TEXTURE_WIDTH - 1}, k / ${TEXTURE_WIDTH}), 0); }
mat3 rotation(vec4 q) {
  float w = q.x, x = q.y, y = q.z, z = q.w;
  return mat3(1. - 2. * (y * y + z * z), 2. * (x * y + w * z), 2. * (x * z - w * y),
              2. * (x * y - w * z), 1. - 2. * (x * x + z * z), 2. * (y * z + w * x),
              2. * (x * z + w * y), 2. * (y * z - w * x), 1. - 2. * (x * x + y * y));
}
vec4 quaternion(uint w) {
  vec3 r = (tens(w) * 2. - 1.) * .70710678;
  float largest = sqrt(max(0., 1. - dot(r, r)));
  uint which = w >> 30;
  if (which == 0u) return vec4(largest, r);
  if (which == 1u) return vec4(r.x, largest, r.yz);
  if (which == 2u) return vec4(r.xy, largest, r.z);
  return vec4(r, largest);
}
vec3 coefficient(uint w) { return (tens(w) * 2. - 1.) * shRange; }

void main() {
  gl_Position = vec4(0., 0., 2., 1.);
  int k = int(index) * texels;
  uvec4 a = fetch(k), b = fetch(k + 1);
  float dt = time - (timeRange.x + timeRange.y * float(a.y >> 16) / 65535.);
  vec2 v = unpackHalf2x16(a.z), w = unpackHalf2x16(a.w);
  vec3 place = boxMin + boxSize * vec3(a.x & 65535u, a.x >> 16, a.y & 65535u) / 65535. + dt * vec3(v, w.x);
  float u = dt * w.y, alpha = float(b.z >> 24) / 255. * exp(-.5 * u * u);
  if (alpha < 1. / 255.) return;
  vec3 p = (view * vec4(place, 1.)).xyz;
  float depth = -p.z;
  if (depth < near) return;

  vec2 limit = .65 * size / focal, slope = clamp(p.xy / depth, -limit, limit);
  vec3 scales = exp(scaleRange.x + scaleRange.y * tens(b.y));
  mat3 R = rotation(quaternion(b.x)), S = mat3(scales.x, 0., 0., 0., scales.y, 0., 0., 0., scales.z);
  float f = focal / depth;
  mat3 J = mat3(f, 0., 0., 0., f, 0., f * slope.x, f * slope.y, 0.);
  mat3 M = transpose(J * mat3(view) * R * S);
  float xx = dot(M[0], M[0]) + .3, xy = dot(M[0], M[1]), yy = dot(M[1], M[1]) + .3;
  float mid = .5 * (xx + yy), spread = length(vec2(.5 * (xx - yy), xy));
  float major = mid + spread, minor = max(mid - spread, .1);
  vec2 axis = abs(xy) < 1e-6 ? (xx >= yy ? vec2(1., 0.) : vec2(0., 1.)) : normalize(vec2(xy, major - xx));

  offset = corner * sqrt(2. * log(255. * alpha));
  vec2 pixels = offset.x * sqrt(major) * axis + offset.y * sqrt(minor) * vec2(-axis.y, axis.x);
  vec3 rgb = colorRange.x + colorRange.y * vec3(b.z & 255u, (b.z >> 8) & 255u, (b.z >> 16) & 255u) / 255.;
  if (texels == 3) {
    uvec4 c = fetch(k + 2);
    vec3 d = normalize(place - eye);
    rgb += .4886025 * (-d.y * coefficient(b.w) + d.z * coefficient(c.x) - d.x * coefficient(c.y));
  }
  color = vec4(max(rgb, 0.), alpha);
  gl_Position = vec4((p.xy / depth * focal + pixels) * 2. / size, 0., 1.);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec2 offset; in vec4 color; out vec4 result;
void main() {
  float alpha = min(.999, color.a * exp(-.5 * dot(offset, offset)));
  if (alpha < 1. / 255.) discard;
  result = vec4(color.rgb * alpha, alpha);
}`;

const UNIFORMS = ['view', 'eye', 'boxMin', 'boxSize', 'size', 'timeRange', 'scaleRange', 'colorRange', 'focal', 'near',
  'time', 'shRange', 'texels'];

export class Renderer {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    const gl = canvas.getContext('webgl2', { alpha: true, premultipliedAlpha: true, antialias: false, depth: false });
    if (!gl) throw new Error('WebGL 2 is missing');
    this.gl = gl;
    this.count = 0;
    /** @type {import('./asset.js').Asset | null} */
    this.asset = null;
    /** @type {WebGLTexture | null} */
    this.texture = null;
    /** @type {Record<string, WebGLUniformLocation | null>} */
    this.at = {};
    this.prepare();
  }

  /** Compiles and allocates; again after the browser took the context away. */
  prepare() {
    const gl = this.gl, program = gl.createProgram();
    gl.attachShader(program, this.shader(gl.VERTEX_SHADER, VERTEX));
    gl.attachShader(program, this.shader(gl.FRAGMENT_SHADER, FRAGMENT));
    gl.bindAttribLocation(program, 0, 'corner');
    gl.bindAttribLocation(program, 1, 'index');
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program) || 'no shader');
    gl.useProgram(program);
    this.at = Object.fromEntries(UNIFORMS.map((name) => [name, gl.getUniformLocation(program, name)]));
    gl.bindVertexArray(gl.createVertexArray());
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
    this.orderBuffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, this.orderBuffer);
    gl.enableVertexAttribArray(1);
    gl.vertexAttribIPointer(1, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(1, 1);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.clearColor(0, 0, 0, 0);
    this.texture = gl.createTexture();
    this.count = 0;
    if (this.asset) this.load(this.asset);
  }

  /** @param {number} kind @param {string} source @returns {WebGLShader} */
  shader(kind, source) {
    const gl = this.gl, shader = /** @type {WebGLShader} */ (gl.createShader(kind));
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader) || 'no shader');
    return shader;
  }

  /** @param {import('./asset.js').Asset} asset */
  load(asset) {
    const gl = this.gl, { header } = asset;
    if (asset.rows > gl.getParameter(gl.MAX_TEXTURE_SIZE)) throw new Error('too many Gaussians for this graphics card');
    this.asset = asset;
    gl.bindTexture(gl.TEXTURE_2D, this.texture);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32UI, TEXTURE_WIDTH, asset.rows, 0, gl.RGBA_INTEGER, gl.UNSIGNED_INT,
      asset.data);
    gl.bufferData(gl.ARRAY_BUFFER, header.count * 4, gl.DYNAMIC_DRAW);
    const { at } = this;
    gl.uniform3fv(at.boxMin, header.box.slice(0, 3));
    gl.uniform3fv(at.boxSize, header.box.slice(3));
    gl.uniform2fv(at.timeRange, header.time);
    gl.uniform2fv(at.scaleRange, header.scale);
    gl.uniform2fv(at.colorRange, header.color);
    gl.uniform1f(at.shRange, header.sh);
    gl.uniform1i(at.texels, asset.stride / 4);
    this.count = 0;
  }

  /** @param {Uint32Array} order */
  order(order) {
    this.count = order.length;
    this.gl.bufferSubData(this.gl.ARRAY_BUFFER, 0, order);
  }

  /** @param {View} view @param {number} time */
  draw(view, time) {
    const { gl, at } = this;
    gl.viewport(0, 0, gl.canvas.width, gl.canvas.height);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniformMatrix4fv(at.view, false, view.matrix);
    gl.uniform3fv(at.eye, view.eye);
    gl.uniform1f(at.near, view.near);
    gl.uniform2f(at.size, gl.canvas.width, gl.canvas.height);
    gl.uniform1f(at.focal, view.focal);
    gl.uniform1f(at.time, time);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.count);
  }

  /** @returns {Uint8Array} RGBA, premultiplied, bottom row first; right after draw() */
  pixels() {
    const { gl } = this, { width, height } = gl.canvas, data = new Uint8Array(width * height * 4);
    gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data);
    return data;
  }
}
