// What moves by itself: time, the turntable, bullet time.
const TURN_SECONDS = 12; // of the turntable
const BULLET_SECONDS = 4; // of one turn around a frozen moment

export class Player {
  /** @param {{seconds: number, frames: number}} clip @param {import('./camera.js').Camera} camera */
  constructor(clip, camera) {
    this.seconds = Math.max(clip.seconds, 1e-3);
    this.frames = clip.frames;
    this.camera = camera;
    this.time = 0; // 0..1
    this.playing = false;
    this.speed = 1;
    /** @type {'loop' | 'ping-pong' | 'once'} */
    this.repeat = 'loop';
    this.direction = 1;
    this.turning = false;
    this.bulletLeft = 0; // degrees still to turn
    this.playAfterBullet = false;
  }

  get still() {
    return this.frames < 2;
  }

  get moving() {
    return this.playing || this.turning || this.bulletLeft > 0;
  }

  /** @param {number} time 0..1 */
  seek(time) {
    this.playing = false;
    this.time = Math.max(0, Math.min(1, time));
  }

  /** @param {number} frames */
  step(frames) {
    const last = Math.max(1, this.frames - 1);
    this.seek(Math.round(this.time * last + frames) / last);
  }

  play(on = !this.playing) {
    if (this.still) return;
    if (on && this.repeat === 'once' && this.time >= 1) this.time = 0;
    this.endBullet();
    this.playing = on;
  }

  turn(on = !this.turning) {
    this.endBullet();
    this.turning = on;
  }

  bullet() {
    if (this.bulletLeft > 0) {
      this.endBullet();
      return;
    }
    this.playAfterBullet = this.playing;
    this.playing = this.turning = false;
    this.bulletLeft = 360;
  }

  endBullet() {
    if (this.bulletLeft > 0) this.playing = this.playAfterBullet;
    this.bulletLeft = 0;
  }

  /** A hand on the picture: what turns by itself lets go. */
  touch() {
    this.turning = false;
    this.endBullet();
  }

  /** @param {number} seconds since the last step */
  advance(seconds) {
    if (this.playing) this.advanceTime((seconds * this.speed) / this.seconds);
    if (this.turning) this.camera.orbit((360 / TURN_SECONDS) * seconds, 0);
    if (this.bulletLeft > 0) {
      const angle = Math.min(this.bulletLeft, (360 / BULLET_SECONDS) * seconds);
      this.camera.orbit(angle, 0);
      if (angle === this.bulletLeft) this.endBullet();
      else this.bulletLeft -= angle;
    }
  }

  /** @param {number} step of the clip */
  advanceTime(step) {
    const next = this.time + step * this.direction;
    if (next >= 0 && next <= 1) {
      this.time = next;
    } else if (this.repeat === 'loop') {
      this.time = ((next % 1) + 1) % 1;
    } else if (this.repeat === 'ping-pong') {
      this.direction = -this.direction;
      this.time = Math.max(0, Math.min(1, next > 1 ? 2 - next : -next));
    } else {
      this.time = 1;
      this.playing = false;
    }
  }
}
