// The picture: draws when something changed, asks the worker for the order, keeps the frame rate by resolution.
import { BackgroundSorter, makeSorter } from './sort.js';
import { Renderer } from './gl.js';

const SLOW = 1 / 24, FAST = 1 / 50; // seconds a picture
const LEAST_SCALE = 0.4;
const MAX_PIXEL_RATIO = 2; // sharper screens gain nothing that shows
const IDLE_FRAMES = 12; // without a change, until the picture is drawn at full resolution again

export class Stage {
  /**
   * @param {HTMLCanvasElement} canvas @param {import('./player.js').Player} player
   * @param {(event: 'frame' | 'drawn' | 'lost' | 'restored') => void} tell
   */
  constructor(canvas, player, tell) {
    this.canvas = canvas;
    this.player = player;
    this.tell = tell;
    this.renderer = new Renderer(canvas);
    /** @type {import('./asset.js').Asset | null} */
    this.asset = null;
    /** @type {BackgroundSorter | null} */
    this.sorter = null;
    /** @type {ReturnType<typeof makeSorter> | null} */
    this.exact = null;
    this.scale = 1;
    this.lost = this.held = false;
    this.last = this.pending = this.idle = 0;
    this.pace = FAST;
    this.sortedKey = '';
    this.drawn = 0;
    canvas.addEventListener('webglcontextlost', (event) => {
      event.preventDefault();
      this.lost = true;
      tell('lost');
    });
    canvas.addEventListener('webglcontextrestored', () => {
      this.renderer.prepare();
      this.lost = false;
      this.sortedKey = '';
      tell('restored');
      this.invalidate();
    });
    new ResizeObserver(() => this.invalidate()).observe(canvas);
  }

  /** @param {import('./asset.js').Asset} asset */
  show(asset) {
    this.asset = asset;
    this.exact = null;
    this.sorter?.stop();
    this.sorter = new BackgroundSorter(asset, (order, key) => this.receive(order, key));
    this.sortedKey = '';
    if (!this.lost) this.renderer.load(asset);
    if (this.drawn) this.drawExactly(); // a newer model takes the old one's place without a blank between
    this.invalidate();
  }

  /** Something changed: draws with the next frame of the screen. */
  invalidate() {
    this.idle = 0;
    this.pending ||= requestAnimationFrame((now) => this.frame(now));
  }

  /** @param {number} now milliseconds */
  frame(now) {
    this.pending = 0;
    const { player } = this, seconds = Math.min(0.1, (now - this.last) / 1000);
    this.last = now;
    if (this.held || this.lost || !this.asset) return;
    const moved = player.moving;
    if (moved) player.advance(seconds);
    this.keepPace(seconds, moved);
    this.resize(this.scale);
    const view = this.view(), key = [...view.matrix, player.time].join();
    if (key !== this.sortedKey) this.sorter?.request({ back: view.back, time: player.time, key });
    this.renderer.draw(view, player.time);
    if (this.renderer.count && !this.drawn++) this.tell('drawn');
    this.tell('frame');
    if (player.moving || moved || this.idle++ < IDLE_FRAMES) this.pending ||= requestAnimationFrame((t) => this.frame(t));
  }

  /** @param {Uint32Array} order @param {string} key */
  receive(order, key) {
    if (this.held || this.lost) return;
    this.renderer.order(order);
    this.sortedKey = key;
    this.invalidate();
  }

  /** @param {number} seconds @param {boolean} moving */
  keepPace(seconds, moving) {
    if (!moving) {
      if (this.idle >= IDLE_FRAMES - 1) this.scale = 1;
      return;
    }
    this.pace += 0.1 * (seconds - this.pace);
    if (this.pace > SLOW && this.scale > LEAST_SCALE) this.rescale(0.8);
    else if (this.pace < FAST && this.scale < 1) this.rescale(1.25);
  }

  /** @param {number} factor */
  rescale(factor) {
    this.scale = Math.max(LEAST_SCALE, Math.min(1, this.scale * factor));
    this.pace = (SLOW + FAST) / 2; // time to show its effect
  }

  /** @param {number} scale */
  resize(scale) {
    const ratio = Math.min(devicePixelRatio || 1, MAX_PIXEL_RATIO) * scale;
    this.setSize(Math.round(this.canvas.clientWidth * ratio), Math.round(this.canvas.clientHeight * ratio));
  }

  /** @param {number} width @param {number} height pixels */
  setSize(width, height) {
    if (this.canvas.width !== Math.max(1, width)) this.canvas.width = Math.max(1, width);
    if (this.canvas.height !== Math.max(1, height)) this.canvas.height = Math.max(1, height);
  }

  view() {
    return this.player.camera.view(this.canvas.width, this.canvas.height);
  }

  /** Draws this very moment from this very place, at once, without the worker. @returns {number} Gaussians drawn */
  drawExactly() {
    const { asset, renderer } = this;
    if (!asset || this.lost) return 0;
    this.exact ||= makeSorter(asset.data, asset.stride, asset.header);
    const view = this.view(), order = this.exact(view.back, this.player.time);
    renderer.order(order);
    renderer.draw(view, this.player.time);
    this.sortedKey = [...view.matrix, this.player.time].join();
    return order.length;
  }
}
