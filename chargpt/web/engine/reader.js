// Gives a model its context. What it has read stays in the cache, so a longer context costs only
// the tokens that are new.

import { makePause } from "./pause.js";

export class Reader {
  /** @param {GPT2} model */
  constructor(model) {
    this.model = model;
    this.tokens = []; // in the cache, from position 0
    this.pause = makePause();
    this.turn = Promise.resolve();
  }

  /**
   * Returns the logits of the token after a context. Several calls at the same time take turns.
   * @param {number[]} context at least one and at most block_size ids
   * @param {{signal?: AbortSignal, probe?: Probe | null}} options `signal` stops the reading before
   *   the next token; `probe` notes how the last token was read
   * @returns {Promise<Float32Array>} (V,)
   */
  async logits(context, { signal, probe = null } = {}) {
    const before = this.turn;
    let endTurn;
    this.turn = new Promise((resolve) => (endTurn = resolve));
    await before;
    try {
      await this.read(context, signal, probe);
      return this.model.predict();
    } finally {
      endTurn();
    }
  }

  async read(context, signal, probe) {
    const last = context.length - 1;
    const known = Math.min(commonLength(this.tokens, context), last); // the last one is always read
    this.tokens.length = known;
    for (let position = known; position <= last; position++) {
      await this.pause(); // other messages come first, such as one to stop
      signal?.throwIfAborted();
      this.model.read(context[position], position, position === last ? probe : null);
      this.tokens.push(context[position]);
    }
  }
}

function commonLength(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n;
}
