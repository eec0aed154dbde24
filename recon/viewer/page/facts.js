// The information panel: what the asset is, how good it is, who made it.
import { element } from './controls.js';

/** @typedef {{facts: [string, string][], credits: string, curve: number[][]}} Told curve: [iteration, dB] */

/** @param {Told} told */
export function showFacts({ facts, credits, curve }) {
  element('facts').replaceChildren(...facts.flatMap(([label, value]) => [tag('dt', label), tag('dd', value)]));
  element('credits').textContent = credits;
  element('curve').replaceChildren(...(curve.length > 1 ? [plot(curve)] : []));
}

/** @param {string} name @param {string} text */
function tag(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

/** @param {number} bytes */
export function fileSize(bytes) {
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Quality over the iterations. @param {number[][]} curve @returns {SVGElement} */
function plot(curve) {
  const xs = curve.map(([x]) => x), ys = curve.map(([, y]) => y);
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const points = curve.map(([x, y]) =>
    `${(4 + (280 * (x - left)) / (right - left || 1)).toFixed(1)},${(68 - (50 * (y - low)) / (high - low || 1)).toFixed(1)}`);
  const label = `Quality from ${ys[0].toFixed(1)} to ${ys.at(-1)?.toFixed(1)} dB over ${right} iterations`;
  const svg = shape('svg', { viewBox: '0 0 288 90', role: 'img', 'aria-label': label });
  const from = shape('text', { x: '4', y: '86' }), to = shape('text', { x: '284', y: '86', 'text-anchor': 'end' });
  from.textContent = `${ys[0].toFixed(1)} dB`;
  to.textContent = `${ys.at(-1)?.toFixed(1)} dB at iteration ${right}`;
  svg.append(shape('polyline', { points: points.join(' ') }), from, to);
  return svg;
}

/** @param {string} name @param {Record<string, string>} attributes @returns {SVGElement} */
function shape(name, attributes) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
