// Which part of a text the model reads to predict a character.
//
// Positions in a GPT-2 are learned and absolute, so a full context cannot slide. When block_size is
// full, the last half of it is re-read from position 0. Where a context begins depends only on the
// index of the character, so that a text continued from any place sees the same contexts again.

export class ContextPolicy {
  /**
   * @param {Tokenizer} tokenizer
   * @param {number} blockSize most tokens in a context
   */
  constructor({ endOfTextId, startId }, blockSize) {
    this.endOfTextId = endOfTextId;
    this.startId = startId;
    this.blockSize = blockSize;
  }

  /** Returns the index of the first character in the context of the character at `index`. */
  firstOf(index) {
    const hidden = this.endOfTextId === null ? 0 : 1; // end-of-text is the token before character 0
    return Math.max(0, contextStart(index + hidden, this.blockSize) - hidden);
  }

  /**
   * Returns the tokens of a context.
   * @param {number[]} text ids of at least `index` characters
   * @param {number} index of the character to predict
   * @param {number} first see `firstOf`
   */
  tokens(text, index, first) {
    const characters = text.slice(first, index);
    if (this.endOfTextId !== null && first === 0 && characters.length < this.blockSize) {
      return [this.endOfTextId, ...characters];
    }
    return index === 0 ? [this.startId] : characters;
  }
}

/** Returns the number of the first token in the context of token number `index`. */
function contextStart(index, blockSize) {
  if (index <= blockSize) return 0;
  const half = blockSize / 2;
  const rounded = Number.isInteger(half) ? half : 2 * Math.round(half / 2); // as Python rounds
  const kept = Math.max(1, rounded);
  const step = blockSize + 1 - kept; // tokens between two re-readings
  return step * Math.ceil((index - blockSize) / step);
}
