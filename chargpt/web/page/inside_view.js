/** See inside: the way of one prediction through the model. */

import { byId, element, inText, nameOf, percent, scroller, sign, signOf } from "./dom.js";
import { LONGEST, largeHead, smallHead, strip } from "./drawings.js";

const LOGIT_LENS = "https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens";

/** Shows what `LocalEngine.inspect` returned; keeps which head is chosen. */
export class InsideView {
  /**
   * @param {object} options
   * @param {(id: number) => string} options.characterOf
   * @param {number} options.nHead - heads per layer
   * @param {(by: number) => void} options.onStep - when the user asks for a neighbour
   */
  constructor({ characterOf, nHead, onStep }) {
    Object.assign(this, { characterOf, nHead, onStep });
    [this.layer, this.head] = [0, 0];
    this.chosenByUser = false;
  }

  /** Show a sentence in place of the pictures. */
  showNothing(sentence) {
    delete byId("inside-body").dataset.index;
    byId("inside-body").replaceChildren(element("p.note", {}, sentence));
  }

  /**
   * Show a prediction.
   * @param {object} inspection - see `LocalEngine.inspect`
   * @param {CharacterRecord} record - of the predicted character
   */
  show(inspection, record) {
    this.inspection = inspection;
    this.record = record;
    if (!this.chosenByUser) [this.layer, this.head] = mostPointed(inspection.layers);
    byId("inside-body").replaceChildren(this.headline(), this.embedding(), this.attention(), this.lens());
    byId("inside-body").dataset.index = String(record.index);
    this.drawHead();
  }

  name(id) {
    return nameOf(this.characterOf(id));
  }

  headline() {
    const { context } = this.inspection;
    const before = context
      .slice(-20)
      .map((id) => inText(this.characterOf(id)).replace(/\n/g, "↵"))
      .join("");
    const button = (label, by, text) =>
      element(
        "button",
        { type: "button", "aria-label": label, title: label, click: () => this.onStep(by) },
        text,
      );
    return element(
      "div.headline",
      {},
      button("Previous character", -1, "‹"),
      button("Next character", 1, "›"),
      element(
        "p",
        {},
        "How ",
        element("b", {}, this.name(this.record.id)),
        " was predicted after ",
        element("q.before", { dir: "auto" }, `${context.length > 20 ? "…" : ""}${before}`),
        ".",
      ),
    );
  }

  // --- embedding

  embedding() {
    const { context, embedding } = this.inspection;
    const last = context.at(-1);
    const rows = [
      [`the character ${this.name(last)}`, embedding.token],
      [`+ position ${context.length}`, embedding.position],
      ["= enters the first layer", embedding.sum],
    ];
    const largest = Math.max(...rows.flatMap(([, values]) => Array.from(values, Math.abs)));
    const strips = rows.map(([label, values]) =>
      element("div.strip", {}, element("span.strip-label", {}, label), strip(values, largest, label)),
    );
    const size = embedding.token.length;
    return element(
      "div.step",
      {},
      element("h3", {}, "1. From a character to numbers"),
      element(
        "p",
        {},
        `The prediction of ${this.name(this.record.id)} starts from the character before it, ` +
          `${this.name(last)}. The model knows no letters: each character is a row of ${size} learned ` +
          "numbers, and so is each position. Their sum enters the first layer.",
      ),
      ...strips,
      element("p.note", {}, "One cell per number. Green: above zero; pink: below; stronger: larger."),
    );
  }

  // --- attention

  attention() {
    const { layers, context } = this.inspection;
    const top = element("tr", {}, element("td"));
    for (let h = 0; h < this.nHead; h++) top.append(element("th", { scope: "col" }, `head ${h + 1}`));
    const body = element("tbody");
    layers.forEach((layer, l) => {
      const row = element("tr", {}, element("th", { scope: "row" }, `layer ${l + 1}`));
      layer.attention.forEach((weights, h) => row.append(element("td", {}, this.headButton(weights, l, h))));
      body.append(row);
    });
    const table = element("table.heads", {}, element("thead", {}, top), body);
    this.large = element("div.large-head");
    const ends = context.filter((id) => this.characterOf(id) === "").length;
    const what = ends
      ? `${context.length} tokens of the context (end-of-text is one, too)`
      : `${context.length} characters of the context`;
    return element(
      "div.step",
      {},
      element("h3", {}, "2. What it looks back at"),
      element(
        "p",
        {},
        `In each layer, ${this.nHead} heads read the ${what}. A head gives each of them a share of its ` +
          "attention, 100 % in all, and brings back a mixture of what they hold.",
      ),
      element(
        "div.halves.heads-and-one",
        {},
        element(
          "div",
          {},
          element(
            "p.note",
            {},
            "Each picture is a head. Its lines lead back from the last character, at the right, to those it reads, at most 48 back. Choose one.",
          ),
          scroller("Heads of all layers", table),
        ),
        this.large,
      ),
    );
  }

  headButton(weights, l, h) {
    return element(
      "button.head",
      {
        type: "button",
        "aria-pressed": l === this.layer && h === this.head,
        "aria-label": `layer ${l + 1}, head ${h + 1}: ${this.mostRead(weights)}`,
        title: this.mostRead(weights),
        click: (event) => {
          this.chosenByUser = true;
          [this.layer, this.head] = [l, h];
          for (const other of byId("inside-body").querySelectorAll("button.head"))
            other.setAttribute("aria-pressed", "false");
          event.currentTarget.setAttribute("aria-pressed", "true");
          this.drawHead();
        },
      },
      smallHead(weights),
    );
  }

  /** "62 % to e, 1 back; 11 % to space, 5 back" */
  mostRead(weights) {
    const { context } = this.inspection;
    return largestOf(weights, 2)
      .map((i) => {
        const back = weights.length - 1 - i;
        const where = back === 0 ? "the last character" : `${back} back`;
        return `${percent(weights[i])} to ${this.name(context[i])}, ${where}`;
      })
      .join("; ");
  }

  /** Draw the chosen head over the characters. */
  drawHead() {
    const { layers, context } = this.inspection;
    const weights = layers[this.layer].attention[this.head];
    const title = `Layer ${this.layer + 1}, head ${this.head + 1}`;
    const reads = this.mostRead(weights);
    const shown = Math.min(context.length, LONGEST);
    const skipped = context.length - shown;
    const beyond = weights.slice(0, skipped).reduce((sum, weight) => sum + weight, 0);
    const about = skipped
      ? `The last ${shown} characters are shown; the ${skipped} before them get ${percent(beyond)}.`
      : "All characters of the context are shown.";
    const signs = context.slice(skipped).map((id) => sign(this.characterOf(id)));
    const drawing = largeHead(weights.slice(skipped), signs, `${title}: ${reads}`);
    const box = scroller("Attention over the characters", drawing);
    this.large.replaceChildren(element("p", {}, element("b", {}, title), `: ${reads}. ${about}`), box);
    box.scrollLeft = box.scrollWidth; // the last character
  }

  // --- logit lens

  lens() {
    const { lens0, layers, odds } = this.inspection;
    const stages = [
      { label: "after the embedding", guess: lens0 },
      ...layers.map((layer, i) => ({
        label: `after layer ${i + 1}`,
        guess: layer.lens,
        sizes: [layer.attentionNorm, layer.feedForwardNorm],
      })),
    ];
    const columns = ["likeliest", "2nd", "3rd", "4th", "5th", "attention", "feed-forward"];
    const top = columns.map((name) => element("th", { scope: "col" }, name));
    const table = element("table.lens", {}, element("thead", {}, element("tr", {}, element("td"), ...top)));
    const body = element("tbody");
    const { id } = this.record;
    for (const { label, guess, sizes } of stages) {
      const row = element("tr", {}, element("th", { scope: "row" }, label));
      for (let i = 0; i < Math.min(5, guess.ids.length); i++) {
        const cell = element(
          guess.ids[i] === id ? "td.this" : "td",
          { title: percent(guess.p[i]) },
          signOf(this.characterOf(guess.ids[i])),
          element("span.only-read", {}, this.name(guess.ids[i])),
          element("span.number", {}, percent(guess.p[i])),
        );
        cell.style.setProperty("--share", String(guess.p[i]));
        row.append(cell);
      }
      for (const size of sizes ?? []) row.append(element("td.added", {}, `× ${size.toFixed(2)}`));
      body.append(row);
    }
    table.append(body);
    const place = odds.ids.indexOf(id);
    const end =
      place >= 0
        ? `The character of the text, ${this.name(id)}, ended as number ${place + 1} with ${percent(odds.p[place])}.`
        : `The character of the text, ${this.name(id)}, was not among the ${odds.ids.length} likeliest.`;
    return element(
      "div.step",
      {},
      element("h3", {}, "3. How the prediction forms"),
      element(
        "p",
        {},
        "Every layer adds to the same row of numbers. Read as a prediction after each layer (a “logit lens”, ",
        element("a", { href: LOGIT_LENS, rel: "noreferrer" }, "nostalgebraist 2020"),
        "), it shows the answer taking shape. The last line is what the model says. ",
        end,
      ),
      element(
        "p.note",
        {},
        "Left: the five likeliest characters, if the model stopped there. Right: how large the " +
          "update of attention and of feed-forward was; × 0.5 is half as large as the row it was added to.",
      ),
      scroller("Predictions after each layer", table),
    );
  }
}

/** Return layer and head with the most attention on one character, but not on the last three. */
function mostPointed(layers) {
  let best = [layers.length - 1, 0];
  let most = -1;
  layers.forEach((layer, l) =>
    layer.attention.forEach((weights, h) => {
      const top = Math.max(...weights.slice(0, -3), 0);
      if (top > most) [most, best] = [top, [l, h]];
    }),
  );
  return best;
}

function largestOf(values, n) {
  return Array.from(values.keys())
    .sort((a, b) => values[b] - values[a])
    .slice(0, n);
}
