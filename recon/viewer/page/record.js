// Pictures and videos of what is shown: every frame drawn exactly, then encoded; in real time where that is missing.
import { webm } from './webm.js';

const FPS = 30;
const BULLET_SECONDS = 4;
const KEY_EVERY = 60; // frames
const CODECS = [
  { name: 'vp09.00.51.08', matroska: 'V_VP9' },
  { name: 'vp8', matroska: 'V_VP8' },
];

/** @typedef {(index: number, count: number) => void} Pose puts clip and camera where picture `index` shows them */

/**
 * How many pictures a video has and what each shows.
 * @param {string} take turntable, view or bullet @param {import('./player.js').Player} player
 * @returns {{count: number, pose: Pose}}
 */
export function plan(take, player) {
  const { camera } = player, az = camera.az, time = player.time;
  const seconds = player.still ? BULLET_SECONDS : player.seconds / player.speed;
  const plays = take === 'turntable' ? Math.max(1, Math.round(BULLET_SECONDS / seconds)) : 1;
  const length = take === 'bullet' ? BULLET_SECONDS : plays * seconds;
  const count = Math.max(2, Math.min(3000, Math.round(length * FPS)));
  return {
    count,
    pose: (index) => {
      const done = index / count;
      player.time = take === 'bullet' || player.still ? time : (done * plays) % 1;
      camera.set({ az: take === 'view' ? az : az + 360 * done });
    },
  };
}

/**
 * @param {import('./stage.js').Stage} stage @param {string} take
 * @param {(done: number) => void} progress 0..1 @param {() => boolean} cancelled
 * @returns {Promise<Blob | null>}
 */
export async function record(stage, take, progress, cancelled) {
  const { player } = stage, before = { pose: player.camera.pose, time: player.time, playing: player.playing };
  const { count, pose } = plan(take, player);
  stage.held = true; // nobody else draws
  stage.resize(1);
  stage.setSize(stage.canvas.width & ~1, stage.canvas.height & ~1);
  try {
    const codec = await codecFor(stage.canvas);
    const encode = codec ? encodeExactly : encodeLive;
    return await encode(stage, codec, count, pose, progress, cancelled);
  } finally {
    stage.held = false;
    player.camera.set(before.pose);
    player.time = before.time;
    player.playing = before.playing;
    stage.invalidate();
  }
}

/** @param {HTMLCanvasElement} canvas */
async function codecFor(canvas) {
  if (typeof VideoEncoder === 'undefined') return null;
  for (const codec of CODECS) {
    const config = configuration(codec.name, canvas);
    try {
      if ((await VideoEncoder.isConfigSupported(config)).supported) return { ...codec, config };
    } catch {
      // not known here: the next one
    }
  }
  return null;
}

/** @param {string} codec @param {HTMLCanvasElement} canvas */
function configuration(codec, { width, height }) {
  return { codec, width, height, bitrate: Math.max(2e6, width * height * FPS * 0.15), framerate: FPS };
}

/**
 * @param {import('./stage.js').Stage} stage @param {any} codec @param {number} count @param {Pose} pose
 * @param {(done: number) => void} progress @param {() => boolean} cancelled
 */
async function encodeExactly(stage, codec, count, pose, progress, cancelled) {
  /** @type {import('./webm.js').Chunk[]} */
  const chunks = [];
  /** @type {Error | null} */
  let failure = null;
  const encoder = new VideoEncoder({
    output: (chunk) => {
      const data = new Uint8Array(chunk.byteLength);
      chunk.copyTo(data);
      chunks.push({ data, time: Math.round(chunk.timestamp / 1000), key: chunk.type === 'key' });
    },
    error: (error) => { failure = error; },
  });
  encoder.configure(codec.config);
  const surface = opaque(stage.canvas);
  for (let index = 0; index < count && !failure; index++) {
    if (cancelled()) {
      encoder.close();
      return null;
    }
    pose(index, count);
    stage.drawExactly();
    const frame = new VideoFrame(surface.take(), { timestamp: (index * 1e6) / FPS, duration: 1e6 / FPS });
    encoder.encode(frame, { keyFrame: index % KEY_EVERY === 0 });
    frame.close();
    progress(index / count);
    do await new Promise((resume) => setTimeout(resume, 0)); // the page stays alive, the queue short
    while (encoder.encodeQueueSize > 4 && !failure);
  }
  if (!failure) await encoder.flush();
  if (failure) throw failure;
  encoder.close();
  const { width, height } = stage.canvas;
  return webm(chunks, { codec: codec.matroska, width, height, duration: (count * 1000) / FPS });
}

/**
 * @param {import('./stage.js').Stage} stage @param {any} codec @param {number} count @param {Pose} pose
 * @param {(done: number) => void} progress @param {() => boolean} cancelled
 */
async function encodeLive(stage, codec, count, pose, progress, cancelled) {
  const surface = opaque(stage.canvas), stream = surface.canvas.captureStream(FPS);
  const recorder = new MediaRecorder(stream);
  /** @type {Blob[]} */
  const parts = [];
  recorder.ondataavailable = (event) => parts.push(event.data);
  const stopped = new Promise((resolve) => { recorder.onstop = resolve; });
  recorder.start();
  for (let index = 0; index < count && !cancelled(); index++) {
    pose(index, count);
    stage.drawExactly();
    surface.take();
    progress(index / count);
    await new Promise((resume) => setTimeout(resume, 1000 / FPS));
  }
  recorder.stop();
  await stopped;
  for (const track of stream.getTracks()) track.stop();
  return cancelled() ? null : new Blob(parts, { type: recorder.mimeType });
}

/** A canvas that shows another one on the colour behind it: videos have no transparency. @param {HTMLCanvasElement} source */
function opaque(source) {
  const canvas = document.createElement('canvas');
  canvas.width = source.width;
  canvas.height = source.height;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d', { alpha: false }));
  return {
    canvas,
    take: () => {
      context.fillStyle = backgroundColor() || '#fff';
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(source, 0, 0);
      return canvas;
    },
  };
}

/** The colour behind the picture; null where it is transparent. */
function backgroundColor() {
  return document.documentElement.dataset.background === 'none' ? null : getComputedStyle(document.body).backgroundColor;
}

/** A PNG of this moment, transparent where the background is. @param {import('./stage.js').Stage} stage @returns {Promise<Blob | null>} */
export function snapshot(stage) {
  stage.resize(1);
  stage.drawExactly();
  const source = backgroundColor() ? opaque(stage.canvas).take() : stage.canvas;
  return new Promise((resolve) => source.toBlob(resolve, 'image/png'));
}

/** @param {Blob} blob @param {string} name */
export function save(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
