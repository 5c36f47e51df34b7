// Text to ids and back, one id per character (a Unicode code point), as in
// chargpt/data/tokenizer.py.

/** Maps the characters of a vocabulary to ids: character `characters[i]` has id `i`. */
export class Tokenizer {
  /**
   * @param {string[]} characters
   * @param {number | null} endOfTextId the token that ends a document, if there is one
   */
  constructor(characters, endOfTextId) {
    this.characters = characters;
    this.endOfTextId = endOfTextId;
    this.ids = new Map(characters.map((character, id) => [character, id]));
  }

  /**
   * Returns the ids of the characters that the model knows, and the distinct ones that it does not.
   * @param {string} text
   * @returns {{ids: number[], unknown: string[]}}
   */
  encode(text) {
    const ids = [];
    const unknown = new Set();
    for (const character of text) {
      const id = this.ids.get(character);
      if (id === undefined) unknown.add(character);
      else ids.push(id);
    }
    return { ids, unknown: [...unknown] };
  }

  /**
   * Returns the text of ids; end-of-text becomes nothing.
   * @param {number[]} ids
   * @returns {string}
   */
  decode(ids) {
    return ids.map((id) => (id === this.endOfTextId ? "" : this.characters[id])).join("");
  }

  /** The id that a text without characters follows: end-of-text, a newline, or the first one. */
  get startId() {
    return this.endOfTextId ?? this.ids.get("\n") ?? 0;
  }
}
