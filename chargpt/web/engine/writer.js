// Writes a text character by character, and says what the model thought of each.

import { ContextPolicy } from "./context.js";
import { uniform } from "./philox.js";
import { Probe } from "./probe.js";
import { draw, filterLogits, likeliest, softmax } from "./sampling.js";

/**
 * What the model thought of a character, or of the end-of-text token that ended a text.
 * @typedef {object} CharacterRecord
 * @property {number} index in the text, from 0
 * @property {number} id
 * @property {boolean} given whether it was there before the model wrote
 * @property {number} p its probability: temperature 1, unfiltered
 * @property {{ids: number[], p: number[]}} top the likeliest 12, unfiltered
 * @property {{p: number, top: number[]} | null} drawn the probabilities after the filters: its own,
 *   and those of `top`; null if given
 * @property {number} first index of the first character in the context it was predicted from
 */

export class Writer {
  /**
   * @param {Reader} reader
   * @param {Tokenizer} tokenizer
   * @param {number} blockSize most tokens in a context
   */
  constructor(reader, tokenizer, blockSize) {
    this.reader = reader;
    this.endOfTextId = tokenizer.endOfTextId;
    this.context = new ContextPolicy(tokenizer, blockSize);
  }

  /**
   * Yields a record for each given character from index `from` on, then for each new one. If the
   * model draws end-of-text, its record is the last one.
   *
   * A character depends on the text before it, the settings and its index, and on nothing else: a
   * text that is continued from any place gets the same characters again.
   * @param {{ids: number[], from: number, n: number, settings: Settings}} task n: how many to write
   * @param {AbortSignal} [signal] stops within a character
   * @returns {AsyncGenerator<CharacterRecord, "length" | "end_of_text">}
   */
  async *write({ ids, from, n, settings }, signal) {
    const text = [...ids];
    for (let index = from; index < ids.length + n; index++) {
      const given = index < ids.length;
      if (given && index === 0 && this.endOfTextId === null) continue; // nothing predicts it
      const first = this.context.firstOf(index);
      const logits = await this.reader.logits(this.context.tokens(text, index, first), { signal });
      const odds = softmax(logits);
      if (Number.isNaN(odds[0])) throw new Error("the model gives NaN: its weights are damaged");
      let filtered = null;
      if (!given) {
        filtered = softmax(filterLogits(logits, settings));
        text.push(draw(filtered, uniform(settings.seed, index)));
      }
      const id = text[index];
      const top = likeliest(odds);
      const drawn = filtered && { p: filtered[id], top: top.ids.map((each) => filtered[each]) };
      yield { index, id, given, p: odds[id], top, drawn, first };
      if (!given && id === this.endOfTextId) return "end_of_text";
    }
    return "length";
  }

  /**
   * Returns how the character at `index` was predicted; see `LocalEngine.inspect`.
   * @param {{ids: number[], index: number, first: number}} question
   */
  async inspect({ ids, index, first }) {
    const context = this.context.tokens(ids, index, first);
    const probe = new Probe();
    const logits = await this.reader.logits(context, { probe });
    return { context, ...probe.result, odds: likeliest(softmax(logits)) };
  }
}
