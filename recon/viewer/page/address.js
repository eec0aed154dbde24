// The address holds the state: ?autoplay=0&ui=0&t=…&az=… as an embedding page asks, #t=…&az=… as the viewer left it.

const QUIET = 400; // milliseconds without a change before the hash is written

/** What the address asks for; the hash, being newer, wins. @returns {URLSearchParams} */
export function asked() {
  const wanted = new URLSearchParams(location.search);
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) wanted.set(key, value);
  return wanted;
}

/**
 * @param {URLSearchParams} wanted @param {import('./player.js').Player} player
 * @returns {boolean} whether it names a place or a moment
 */
export function apply(wanted, player) {
  /** @param {string} key */
  const number = (key) => (wanted.has(key) && wanted.get(key) !== '' ? Number(wanted.get(key)) : NaN);
  const time = number('t');
  if (Number.isFinite(time)) player.seek(time);
  const target = ['x', 'y', 'z'].map(number);
  player.camera.set({ az: number('az'), el: number('el'), radius: number('r'), target });
  return Number.isFinite(time) || ['az', 'el', 'r'].some((key) => Number.isFinite(number(key)));
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let timer;

/** Writes time and camera into the hash once nothing changes any more. @param {import('./player.js').Player} player */
export function remember(player) {
  clearTimeout(timer);
  timer = setTimeout(() => {
    if (player.moving) return;
    const { az, el, radius, target } = player.camera.pose;
    /** @param {number} value */
    const short = (value) => String(+value.toFixed(4));
    const state = { t: player.time, az, el, r: radius, x: target[0], y: target[1], z: target[2] };
    const hash = Object.entries(state).map(([key, value]) => `${key}=${short(value)}`).join('&');
    try {
      history.replaceState(null, '', `#${hash}`);
    } catch {
      // some frames may not touch their address
    }
  }, QUIET);
}
