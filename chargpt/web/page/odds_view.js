/** Look at a character: its odds, and the alternatives, each with a button to continue with it. */

import { bits, byId, element, nameOf, percent, signOf } from "./dom.js";

/**
 * Show the odds of a character.
 * @param {CharacterRecord} record - see `engine/writer.js`
 * @param {object} options
 * @param {(id: number) => string} options.characterOf
 * @param {number|null} options.endId - of end-of-text, which cannot be chosen
 * @param {(index: number, id: number) => void} options.onBranch - when the user chooses another one
 */
export function showOdds(record, { characterOf, endId, onBranch }) {
  const rows = record.top.ids.map((id, i) => ({ id, p: record.top.p[i], after: record.drawn?.top[i] }));
  if (!record.top.ids.includes(record.id)) {
    rows.push({ id: record.id, p: record.p, after: record.drawn?.p });
  }
  const largest = Math.max(...rows.flatMap((row) => [row.p, row.after ?? 0]));
  const items = rows.map((row) => {
    const isThis = row.id === record.id;
    const name = nameOf(characterOf(row.id));
    const label = `${name}, ${percent(row.p)}`;
    const content = [
      signOf(characterOf(row.id)),
      bar(row, largest),
      element("span.number", { "aria-hidden": "true" }, percent(row.p)),
    ];
    if (isThis || row.id === endId) {
      const about = isThis ? `${label}, in the text` : label;
      return element(
        isThis ? "li.this" : "li",
        {},
        element("span.row", { role: "img", "aria-label": about }, ...content),
      );
    }
    const title = `Continue with ${name} instead`;
    const click = () => onBranch(record.index, row.id);
    return element(
      "li",
      {},
      element(
        "button",
        { type: "button", "aria-label": `${title}: ${percent(row.p)}`, title, click },
        ...content,
      ),
    );
  });
  const key = record.drawn ? "Bars: the model. Lines: after the settings, which decide. " : "";
  byId("odds-body").replaceChildren(
    element(
      "div.odds-head",
      {},
      signOf(characterOf(record.id), "span.big"),
      sentence(record, characterOf(record.id)),
    ),
    element("ul.bars", {}, ...items),
    element("p.note", {}, `${key}Click a character to continue the text with it instead.`),
  );
}

/** Show why there are no odds. */
export function showNoOdds(reason) {
  byId("odds-body").replaceChildren(element("p.note", {}, reason));
}

function sentence(record, character) {
  const name = nameOf(character);
  const what = record.given
    ? `In the text: ${name}.`
    : character === ""
      ? "The model ended the text here."
      : `Picked: ${name}.`;
  const after = record.drawn ? `, after the settings ${percent(record.drawn.p)}` : "";
  return element(
    "p",
    {},
    `${what} The model gave it `,
    element("b", {}, percent(record.p)),
    ` (${bits(record.p).toFixed(1)} bits of surprise; 1 bit is a coin flip)${after}.`,
  );
}

function bar(row, largest) {
  const share = element("span.share");
  share.style.width = `${(100 * row.p) / largest}%`;
  const drawing = element("span.bar", { "aria-hidden": "true" }, share);
  if (row.after !== undefined) {
    const mark = element("span.drawn");
    mark.style.left = `${(100 * row.after) / largest}%`;
    drawing.append(mark);
  }
  return drawing;
}
