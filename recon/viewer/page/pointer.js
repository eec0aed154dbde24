// Hands on the picture: one finger or button orbits, two or the right one pan, pinch and wheel zoom.
const DEGREES_ACROSS = 200; // of orbit, for a drag over the height of the picture
const WHEEL = 0.0012; // ln of the distance, a pixel

/**
 * @param {HTMLElement} surface @param {import('./camera.js').Camera} camera
 * @param {() => void} touched before the first change of a gesture @param {() => void} changed
 */
export function followPointers(surface, camera, touched, changed) {
  /** @type {Map<number, {x: number, y: number}>} */
  const down = new Map();

  surface.addEventListener('pointerdown', (event) => {
    surface.setPointerCapture(event.pointerId);
    down.set(event.pointerId, { x: event.clientX, y: event.clientY });
    touched();
  });
  for (const name of /** @type {const} */ (['pointerup', 'pointercancel', 'lostpointercapture'])) {
    surface.addEventListener(name, (event) => down.delete(event.pointerId));
  }
  surface.addEventListener('pointermove', (event) => {
    const before = down.get(event.pointerId);
    if (!before) return;
    const now = { x: event.clientX, y: event.clientY }, height = surface.clientHeight || 1;
    const dx = (now.x - before.x) / height, dy = (now.y - before.y) / height;
    const spread = distance(down);
    down.set(event.pointerId, now);
    if (down.size === 2) {
      camera.zoom(spread / Math.max(1, distance(down)));
      camera.pan(-dx / 2, dy / 2); // the other finger does the other half
    } else if (event.buttons & 6 || event.shiftKey || event.ctrlKey) {
      camera.pan(-dx, dy);
    } else {
      camera.orbit(-dx * DEGREES_ACROSS, dy * DEGREES_ACROSS);
    }
    changed();
  });
  surface.addEventListener('wheel', (event) => {
    event.preventDefault();
    touched();
    const pixels = event.deltaY * (event.deltaMode === 1 ? 16 : 1);
    camera.zoom(Math.exp(Math.max(-300, Math.min(300, pixels)) * WHEEL));
    changed();
  }, { passive: false });
  surface.addEventListener('contextmenu', (event) => event.preventDefault());
}

/** @param {Map<number, {x: number, y: number}>} points */
function distance(points) {
  const [a, b] = [...points.values()];
  return b ? Math.hypot(a.x - b.x, a.y - b.y) : 1;
}
