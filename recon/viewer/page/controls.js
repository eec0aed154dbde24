// Buttons, slider, panels and keys: native elements, each bound to one thing the player or the camera does.
import { followPointers } from './pointer.js';

/** @template {HTMLElement} [T=HTMLElement] @param {string} id @returns {T} */
export function element(id) {
  return /** @type {T} */ (document.getElementById(id));
}

/** @param {string} id @returns {HTMLButtonElement} */
const button = (id) => element(id);
/** @param {string} id @returns {HTMLSelectElement} */
const choice = (id) => element(id);

const ORBIT_STEP = 5; // degrees, of an arrow key
const PANELS = ['settings', 'info'];

/**
 * @typedef {object} Controlled
 * @property {import('./player.js').Player} player
 * @property {import('./camera.js').Camera} camera
 * @property {Record<string, import('./camera.js').Pose>} views by the name shown
 * @property {() => void} changed draw and remember
 * @property {() => void} compare
 */

export class Controls {
  /** @param {Controlled} what */
  constructor(what) {
    this.what = what;
    const { player, camera } = what, changed = () => this.changed();
    /** @type {HTMLInputElement} */
    this.slider = element('time');
    this.shown = '';
    this.actions = {
      play: () => player.play(),
      back: () => player.step(-1),
      forth: () => player.step(1),
      turn: () => player.turn(),
      bullet: () => player.bullet(),
      reset: () => { player.touch(); camera.reset(); },
      compare: () => what.compare(),
      full: () => fullScreen(),
      settings: () => this.toggle('settings'),
      info: () => this.toggle('info'),
    };
    for (const [id, action] of Object.entries(this.actions)) button(id).onclick = () => { action(); changed(); };
    this.slider.oninput = () => { player.seek(+this.slider.value); changed(); };
    this.bindChoices();
    addEventListener('keydown', (event) => this.key(event));
    document.addEventListener('fullscreenchange', () => this.update());
    button('full').hidden = !document.fullscreenEnabled;
    const still = player.still;
    for (const id of ['play', 'back', 'forth', 'timeline']) element(id).hidden = still;
    if (!still) this.slider.step = String(1 / Math.max(1000, player.frames - 1));
    followPointers(element('canvas'), camera, () => { player.touch(); this.close(); changed(); }, changed);
    element('canvas').ondblclick = () => { camera.reset(); changed(); };
    this.update();
  }

  bindChoices() {
    const { player, camera, views } = this.what, changed = () => this.changed(), preset = choice('preset');
    for (const name of ['Free', ...Object.keys(views)]) preset.add(new Option(name));
    preset.onchange = () => {
      player.touch();
      if (views[preset.value]) camera.set(views[preset.value]);
      changed();
    };
    choice('speed').onchange = () => { player.speed = +choice('speed').value; };
    choice('repeat').onchange = () => {
      player.repeat = /** @type {'loop' | 'ping-pong' | 'once'} */ (choice('repeat').value);
      player.direction = 1;
    };
    choice('background').onchange = () => this.look(choice('background').value, choice('theme').value);
    choice('theme').onchange = () => this.look(choice('background').value, choice('theme').value);
    matchMedia('(prefers-color-scheme: dark)').onchange = () => this.look();
    this.look();
  }

  /** @param {string} background @param {string} theme */
  look(background = choice('background').value, theme = choice('theme').value) {
    const root = document.documentElement.dataset, dark = matchMedia('(prefers-color-scheme: dark)').matches;
    choice('background').value = background;
    choice('theme').value = theme;
    root.background = background;
    root.theme = theme === 'auto' ? (dark ? 'dark' : 'light') : theme;
    this.changed();
  }

  changed() {
    this.update();
    this.what.changed();
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const target = /** @type {HTMLElement} */ (event.target), { player, camera } = this.what;
    if (event.ctrlKey || event.metaKey || event.altKey || target.tagName === 'SELECT') return;
    if (target.tagName === 'BUTTON' && (event.key === ' ' || event.key === 'Enter')) return;
    if (target === this.slider && /^(Arrow|Home|End|Page)/.test(event.key)) return;
    /** @param {number} az @param {number} el */
    const orbit = (az, el) => () => { player.touch(); camera.orbit(az * ORBIT_STEP, el * ORBIT_STEP); };
    /** @param {number} factor */
    const zoom = (factor) => () => { player.touch(); camera.zoom(factor); };
    const { actions } = this;
    /** @type {Record<string, () => void>} */
    const keys = {
      ' ': actions.play, ',': actions.back, '.': actions.forth, t: actions.turn, b: actions.bullet, r: actions.reset,
      c: actions.compare, f: actions.full, i: actions.info, Escape: () => this.close(),
      ArrowLeft: orbit(-1, 0), ArrowRight: orbit(1, 0), ArrowUp: orbit(0, 1), ArrowDown: orbit(0, -1),
      '+': zoom(0.9), '=': zoom(0.9), '-': zoom(1 / 0.9),
    };
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
    this.changed();
  }

  /** @param {string} id */
  toggle(id) {
    const open = element(`panel-${id}`).hidden;
    this.close();
    element(`panel-${id}`).hidden = !open;
    this.update();
  }

  close() {
    for (const id of PANELS) element(`panel-${id}`).hidden = true;
    this.update();
  }

  /** Brings everything shown in step with the state. */
  update() {
    const { player, camera, views } = this.what;
    const seconds = (player.time * player.seconds).toFixed(2), whole = player.seconds.toFixed(2);
    if (document.activeElement !== this.slider || +this.slider.value !== player.time) {
      this.slider.value = String(player.time);
    }
    const pressed = [player.playing, player.turning, player.bulletLeft > 0, !!document.fullscreenElement,
      ...PANELS.map((id) => !element(`panel-${id}`).hidden), nameOf(camera.pose, views)];
    const shown = [seconds, ...pressed].join();
    if (shown === this.shown) return; // a frame of the screen mostly changes nothing here
    this.shown = shown;
    element('clock').textContent = `${seconds} / ${whole} s`;
    this.slider.setAttribute('aria-valuetext', `${seconds} of ${whole} seconds`);
    const play = button('play');
    play.setAttribute('aria-label', player.playing ? 'Pause' : 'Play');
    play.title = `${player.playing ? 'Pause' : 'Play'} (space)`;
    play.querySelector('use')?.setAttribute('href', player.playing ? '#i-pause' : '#i-play');
    button('turn').setAttribute('aria-pressed', String(player.turning));
    button('bullet').setAttribute('aria-pressed', String(player.bulletLeft > 0));
    button('full').setAttribute('aria-pressed', String(!!document.fullscreenElement));
    for (const id of PANELS) button(id).setAttribute('aria-expanded', String(!element(`panel-${id}`).hidden));
    choice('preset').value = nameOf(camera.pose, views);
  }
}

/** @param {import('./camera.js').Pose} pose @param {Record<string, import('./camera.js').Pose>} views */
function nameOf(pose, views) {
  /** @param {import('./camera.js').Pose} other */
  const same = (other) => Math.abs(other.az - pose.az) < 0.01 && Math.abs(other.el - pose.el) < 0.01
    && Math.abs(other.radius - pose.radius) < 1e-3 * pose.radius
    && other.target.every((value, i) => Math.abs(value - pose.target[i]) < 1e-3 * pose.radius);
  return Object.keys(views).find((name) => same(views[name])) || 'Free';
}

async function fullScreen() {
  try {
    if (document.fullscreenElement) await document.exitFullscreen();
    else await document.documentElement.requestFullscreen();
  } catch {
    // refused, for instance inside a frame that does not allow it: the page stays as it is
  }
}
