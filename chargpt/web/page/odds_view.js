/** Look at a character: its odds, the alternatives, and a button on each to branch there. */

import { bits, byId, element, nameOf, percent, signOf } from "./dom.js";

/**
 * Show the odds of a character.
 * @param {Object} record - see `LocalEngine.write`
 * @param {{characterOf: function(number): string, endId: number|null, onBranch: function(number, number): void}} options
 */
export function showOdds(record, { characterOf, endId, onBranch }) {
  const name = nameOf(characterOf(record.id));
  const what = record.given ? "The text continued with" : "Drawn:";
  const head = element(
    "p.odds-head",
    {},
    signOf(characterOf(record.id), "span.big"),
    element(
      "span",
      {},
      `${what} ${name}. `,
      element("b", {}, percent(record.p)),
      ` = ${bits(record.p).toFixed(1)} bits of surprise.`,
    ),
  );
  const drawn = new Map(record.drawn ? record.drawn.ids.map((id, i) => [id, record.drawn.p[i]]) : []);
  const rows = record.top.ids.map((id, i) => ({ id, p: record.top.p[i], drawn: drawn.get(id) ?? 0 }));
  if (!record.top.ids.includes(record.id))
    rows.push({ id: record.id, p: record.p, drawn: drawn.get(record.id) ?? 0 });
  const largest = Math.max(...rows.map((row) => Math.max(row.p, row.drawn)));
  const list = element("ul.bars");
  for (const row of rows) {
    const isThis = row.id === record.id;
    const canBranch = !isThis && row.id !== endId;
    const bar = element("span.bar", { "aria-hidden": "true" });
    const share = element("span.share");
    share.style.width = `${(100 * row.p) / largest}%`;
    bar.append(share);
    if (record.drawn) {
      const mark = element("span.drawn");
      mark.style.left = `${(100 * row.drawn) / largest}%`;
      bar.append(mark);
    }
    const character = nameOf(characterOf(row.id));
    const content = [
      signOf(characterOf(row.id)),
      bar,
      element("span.number", { "aria-hidden": "true" }, percent(row.p)),
    ];
    const label = `${character}, ${percent(row.p)}`;
    list.append(
      element(
        isThis ? "li.this" : "li",
        {},
        canBranch
          ? element(
              "button",
              {
                type: "button",
                "aria-label": `Continue with ${label} instead`,
                title: `Continue with ${character} instead`,
                click: () => onBranch(record.index, row.id),
              },
              ...content,
            )
          : element(
              "span.row",
              { "aria-label": isThis ? `${label}, in the text` : label, role: "img" },
              ...content,
            ),
      ),
    );
  }
  const about = record.drawn
    ? "Bars: the model's odds. Lines: the odds after the settings, from which it was drawn. Click a character to continue the text with it."
    : "Bars: the model's odds. Click a character to continue the text with it.";
  byId("odds-body").replaceChildren(head, list, element("p.note", {}, about));
}

/** Show why there are no odds. */
export function showNoOdds(sentence) {
  byId("odds-body").replaceChildren(element("p.note", {}, sentence));
}
