// A page served while the fit runs: asks how far it is and fetches the model when there is a newer one.
import { decodeAsset } from './asset.js';
import { element } from './controls.js';
import { showFacts } from './facts.js';

const EVERY = 2000; // milliseconds

/** @param {import('./stage.js').Stage} stage */
export function follow(stage) {
  let version = '';
  const ask = async () => {
    let state;
    try {
      state = await (await fetch('status.json', { cache: 'no-store' })).json();
      if (state.version && state.version !== version) {
        const answer = await fetch('asset.bin', { cache: 'no-store' });
        if (answer.ok) {
          stage.show(await decodeAsset(new Uint8Array(await answer.arrayBuffer())));
          version = state.version;
        }
      }
      showFacts(state);
      element('message').textContent = version ? '' : state.message;
    } catch {
      if (!version) element('message').textContent = 'Waiting for the server';
    }
    if (!state?.done) setTimeout(ask, EVERY);
  };
  return ask();
}
