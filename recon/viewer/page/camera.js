// Where the camera stands: an orbit around a target in the world of d2 (z up, azimuth 0 looks along +y from -y).

/** @typedef {{az: number, el: number, radius: number, target: number[], fov: number}} Pose angles in degrees */

const STEEPEST = 89; // degrees; beyond, "up" has no meaning
const DEGREE = Math.PI / 180;

/**
 * Comes as near as the picture's shape allows.
 * @param {Pose & {tall?: number, wide?: number}} pose with the distances at which a square one holds height and width
 * @param {number} width @param {number} height of the picture
 */
export function fit(pose, width, height) {
  const shorter = Math.min(width, height);
  if (pose.tall && pose.wide) pose.radius = Math.max((pose.tall * shorter) / height, (pose.wide * shorter) / width);
}

export class Camera {
  /** @param {Pose} home */
  constructor(home) {
    this.home = home;
    this.az = this.el = this.radius = this.fov = 0;
    this.target = [0, 0, 0];
    this.reset();
  }

  reset() {
    this.set(this.home);
  }

  /** @param {Partial<Pose>} pose */
  set(pose) {
    for (const key of /** @type {const} */ (['az', 'el', 'radius', 'fov'])) {
      const value = pose[key];
      if (typeof value === 'number' && Number.isFinite(value)) this[key] = value;
    }
    if (pose.target?.length === 3 && pose.target.every(Number.isFinite)) this.target = [...pose.target];
    this.az = ((this.az % 360) + 360) % 360;
    this.el = Math.max(-STEEPEST, Math.min(STEEPEST, this.el));
    this.radius = Math.max(this.home.radius / 20, Math.min(this.home.radius * 10, this.radius));
  }

  /** @returns {Pose} */
  get pose() {
    return { az: this.az, el: this.el, radius: this.radius, target: [...this.target], fov: this.fov };
  }

  /** @param {number} az @param {number} el degrees */
  orbit(az, el) {
    this.set({ az: this.az + az, el: this.el + el });
  }

  /** @param {number} factor of the distance */
  zoom(factor) {
    this.set({ radius: this.radius * factor });
  }

  /** @param {number} right @param {number} up fractions of the height of the picture */
  pan(right, up) {
    const { x, y } = this.axes(), size = 2 * this.radius * Math.tan((this.fov * DEGREE) / 2);
    this.target = this.target.map((value, i) => value + (x[i] * right + y[i] * up) * size);
  }

  /** Right, up and back of the camera, in the world. */
  axes() {
    const az = this.az * DEGREE, el = this.el * DEGREE;
    const z = [Math.sin(az) * Math.cos(el), -Math.cos(az) * Math.cos(el), Math.sin(el)];
    const x = [Math.cos(az), Math.sin(az), 0];
    const y = [-Math.sin(az) * Math.sin(el), Math.cos(az) * Math.sin(el), Math.cos(el)];
    return { x, y, z };
  }

  /** The field of view spans the shorter side. @param {number} width @param {number} height pixels @returns {import('./gl.js').View} */
  view(width, height) {
    const { x, y, z } = this.axes(), eye = this.target.map((value, i) => value + z[i] * this.radius);
    /** @param {number[]} a */
    const along = (a) => -(a[0] * eye[0] + a[1] * eye[1] + a[2] * eye[2]);
    const matrix = new Float32Array([x[0], y[0], z[0], 0, x[1], y[1], z[1], 0, x[2], y[2], z[2], 0,
      along(x), along(y), along(z), 1]);
    const focal = (0.5 * Math.min(width, height)) / Math.tan((this.fov * DEGREE) / 2);
    return { matrix, eye, back: z, near: Math.min(0.01, this.home.radius / 100), focal };
  }
}
