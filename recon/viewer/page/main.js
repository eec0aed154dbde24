// Puts the viewer together from what the page holds.
import { bytesOf, decodeAsset } from './asset.js';
import { Camera, fit } from './camera.js';
import { Player } from './player.js';
import { Stage } from './stage.js';
import { Controls, element } from './controls.js';
import { Comparison } from './compare.js';
import { apply, asked, remember } from './address.js';
import { fileSize, showFacts } from './facts.js';
import { follow } from './live.js';
import { record, save, snapshot } from './record.js';

/**
 * @typedef {object} About what recon/viewer/page.py tells the page
 * @property {string} name for files @property {{seconds: number, frames: number}} clip
 * @property {import('./camera.js').Pose} home @property {Record<string, import('./camera.js').Pose>} views
 * @property {[string, string][]} facts @property {string} credits @property {number[][]} curve
 * @property {import('./compare.js').Sheet} [input] @property {import('./compare.js').Sheet} [pictures]
 * @property {string} [asset] address of the binary, where it is not in the page @property {boolean} live
 */

/** @type {About} */
const about = JSON.parse(element('about').textContent || '');
const root = document.documentElement, pageSize = root.outerHTML.length;
const view = element('view');
for (const pose of [about.home, ...Object.values(about.views)]) fit(pose, view.clientWidth || 1, view.clientHeight || 1);
const camera = new Camera(about.home), player = new Player(about.clip, camera);
/** @type {Stage | null} */
let stage = null;

function changed() {
  stage?.invalidate();
  remember(player);
}

/** @param {string} text */
function say(text) {
  element('message').textContent = text;
}

const comparison = new Comparison({ input: about.input, views: about.pictures }, player, changed);
const controls = new Controls({
  player, camera, views: about.views, changed, compare: () => comparison.toggle(),
});

/** @param {'frame' | 'drawn' | 'lost' | 'restored'} event */
function heard(event) {
  controls.update();
  comparison.update();
  if (event === 'drawn') {
    root.classList.add('ready');
    performance.mark('first picture');
  }
  if (event === 'lost') say('The graphics card was taken away; waiting for it');
  if (event === 'restored') say('');
}

function begin() {
  const wanted = asked(), placed = apply(wanted, player);
  const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  const autoplay = wanted.get('autoplay') ?? (placed || still ? '0' : '1');
  root.classList.toggle('bare', wanted.get('ui') === '0');
  controls.look(wanted.get('bg') || 'auto', wanted.get('theme') || 'auto');
  if (wanted.get('compare') === '1') comparison.toggle();
  if (autoplay !== '0') player.play(true);
  if (autoplay !== '0' && !placed && !comparison.on) player.turn(true);
  addEventListener('hashchange', () => { apply(asked(), player); changed(); });
}

async function assetBytes() {
  if (!about.asset) return bytesOf(element('asset').textContent || '');
  const answer = await fetch(about.asset);
  if (!answer.ok) throw new Error(`${about.asset} is missing`);
  return new Uint8Array(await answer.arrayBuffer());
}

function bindSaving() {
  const button = /** @type {HTMLButtonElement} */ (element('record'));
  let recording = false;
  button.onclick = async () => {
    if (!stage) return;
    if (recording) {
      recording = false; // the loop sees it
      return;
    }
    recording = true;
    player.touch();
    try {
      const take = /** @type {HTMLSelectElement} */ (element('take')).value;
      const blob = await record(stage, take, (done) => { button.textContent = `Stop (${Math.round(done * 100)} %)`; },
        () => !recording);
      if (blob) save(blob, `${about.name}.webm`);
    } catch (error) {
      say(`This browser could not record: ${error instanceof Error ? error.message : error}`);
    }
    recording = false;
    button.textContent = 'Record video';
  };
  element('snapshot').onclick = async () => {
    const blob = stage && (await snapshot(stage));
    if (blob) save(blob, `${about.name}.png`);
    changed();
  };
}

/** @param {Stage} on */
function exposeForTests(on) {
  Object.assign(window, {
    __viewer: {
      player, camera, stage: on, record,
      /** Draws one moment from one place at once. @param {{t?: number} & Partial<import('./camera.js').Pose>} what */
      render(what) {
        player.touch();
        player.seek(what.t ?? player.time);
        camera.set(what);
        on.resize(1);
        const start = performance.now(), count = on.drawExactly(), { width, height } = on.canvas;
        return { width, height, count, ms: performance.now() - start, pixels: on.renderer.pixels() };
      },
    },
  });
}

async function main() {
  try {
    begin();
    stage = new Stage(/** @type {HTMLCanvasElement} */ (element('canvas')), player, heard);
  } catch (error) {
    const missing = error instanceof Error && error.message === 'WebGL 2 is missing';
    say(missing ? 'This browser does not offer WebGL 2, which the moving picture needs' : String(error));
    element('canvas').hidden = true;
    root.classList.add('bare');
    return;
  }
  bindSaving();
  exposeForTests(stage);
  if (about.live) {
    await follow(stage);
    return;
  }
  try {
    const bytes = await assetBytes();
    stage.show(await decodeAsset(bytes));
    const size = about.asset ? bytes.length : pageSize;
    showFacts({ ...about, facts: [...about.facts, ['File size', fileSize(size)]] });
  } catch (error) {
    say(`The asset cannot be shown: ${error instanceof Error ? error.message : error}`);
  }
}

main();
