// The input beside the asset at the same time, and the reference views as a strip to jump along.
import { element } from './controls.js';

/**
 * @typedef {object} Sheet pictures in one image, row by row
 * @property {string} src @property {number} columns @property {number} width @property {number} height of one, pixels
 * @property {import('./camera.js').Pose[]} poses where each was seen from; one for all: a clip from one camera
 * @property {number[]} times 0..1, of each
 */

export class Comparison {
  /** @param {{input?: Sheet, views?: Sheet}} sheets @param {import('./player.js').Player} player @param {() => void} changed */
  constructor({ input, views }, player, changed) {
    this.input = input;
    this.player = player;
    this.on = false;
    this.shown = -1;
    this.image = new Image();
    element('compare').hidden = !input;
    if (views) fillStrip(views, player, changed);
    this.views = views;
  }

  toggle() {
    if (!this.input) return;
    this.on = !this.on;
    this.shown = -1;
    if (!this.image.src) {
      this.image.onload = () => { this.shown = -1; this.update(); };
      this.image.src = this.input.src;
    }
    document.documentElement.classList.toggle('comparing', this.on);
    element('input').hidden = !this.on;
    element('strip').hidden = !(this.on && this.views);
    element('compare').setAttribute('aria-pressed', String(this.on));
    if (!this.on) return;
    this.player.touch();
    this.player.camera.set(this.input.poses[0]);
    this.update();
  }

  /** Shows the frame nearest to the player's time. */
  update() {
    const { input, player } = this;
    if (!this.on || !input || !this.image.complete) return;
    const index = nearest(input.times, player.time);
    if (index === this.shown) return;
    this.shown = index;
    /** @type {HTMLCanvasElement} */
    const canvas = element('input-picture');
    canvas.width = input.width;
    canvas.height = input.height;
    const x = (index % input.columns) * input.width, y = Math.floor(index / input.columns) * input.height;
    canvas.getContext('2d')?.drawImage(this.image, x, y, input.width, input.height, 0, 0, input.width, input.height);
  }
}

/** @param {Sheet} views @param {import('./player.js').Player} player @param {() => void} changed */
function fillStrip(views, player, changed) {
  const rows = Math.ceil(views.poses.length / views.columns), strip = element('strip');
  strip.style.setProperty('--sheet', `url("${views.src}")`); // one copy of it, for all
  strip.replaceChildren(...views.poses.map((pose, index) => {
    const button = document.createElement('button'), { style } = button;
    button.type = 'button';
    button.setAttribute('aria-label', `View at ${Math.round(pose.az)} degrees`);
    style.backgroundSize = `${views.columns * 100}% ${rows * 100}%`;
    const column = index % views.columns, row = Math.floor(index / views.columns);
    style.backgroundPosition = `${percent(column, views.columns)} ${percent(row, rows)}`;
    button.onclick = () => {
      player.touch();
      player.seek(views.times[index]);
      player.camera.set(pose);
      changed();
    };
    return button;
  }));
}

/** @param {number} index @param {number} count */
function percent(index, count) {
  return `${count > 1 ? (100 * index) / (count - 1) : 0}%`;
}

/** @param {number[]} times @param {number} time */
function nearest(times, time) {
  let best = 0;
  times.forEach((other, index) => { if (Math.abs(other - time) < Math.abs(times[best] - time)) best = index; });
  return best;
}
