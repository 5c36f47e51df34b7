/** The model: its parts with their real sizes, and its vocabulary. */

import { drawModel } from "./diagram.js";
import { stepsSoFar } from "./learned_view.js";
import { byId, codePoint, count, element, nameOf, percent, rounded, scroller, sign } from "./dom.js";

const MOST_CHARACTERS = 2000; // of the vocabulary, to show
const GPT2_PAPER =
  "https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf";

/**
 * Return what the model is, for the top of the page.
 * @param {{run: object}} facts
 * @param {string} where - a sentence about where it computes
 */
export function lead({ run }, where) {
  const steps = stepsSoFar(run);
  const documents = run.n_documents > 1 ? ` in ${count(run.n_documents)} documents` : "";
  const read = run.texts.length
    ? ` that learned from ${run.texts.join(", ")} (${rounded(run.n_characters)} characters${documents})`
    : "";
  return (
    `A GPT-2 with ${rounded(run.n_params)} parameters${read} and predicts the next character. ` +
    (steps === null ? "" : `It has trained ${count(steps)} steps so far. `) +
    where
  );
}

/** Show the parts of the model and where its parameters are. */
export function showModel(config, hasEndOfText) {
  const parts = partsOf(config);
  const total = sumOf(parts);
  const shares = new Map(parts.map((part) => [part.name, part.parameters / total]));
  const inLayers = sumOf(parts.filter((part) => part.inLayer)) / total;
  const token = "A token is a character or end-of-text, which stands between two texts.";
  byId("model-body").replaceChildren(
    element(
      "p",
      {},
      "It is a ",
      element("a", { href: GPT2_PAPER, rel: "noreferrer" }, "GPT-2"),
      `, small: training chose ${count(total)} numbers, its parameters; ${percent(inLayers)} of them are ` +
        `in its ${config.n_layer} layers. It sees at most ${count(config.block_size)} characters at a time. ` +
        `A row of ${config.d_model} numbers, the residual stream, runs from top to bottom; each part reads ` +
        "it and adds to it. In the drawing, parts with more colour hold more parameters.",
    ),
    element(
      "div.model-parts",
      {},
      scroller("Drawing of the model", drawModel(config, shares)),
      element(
        "div",
        {},
        element("p.note", {}, `The ${config.n_layer} layers are alike; their parameters are added up.`),
        scroller("Parts of the model", partsTable(parts)),
        hasEndOfText ? element("p.note", {}, token) : null,
      ),
    ),
  );
}

function sumOf(parts) {
  return parts.reduce((sum, part) => sum + part.parameters, 0);
}

function partsTable(parts) {
  const largest = Math.max(...parts.map((part) => part.parameters));
  const rows = parts.map((part) => {
    const share = element("span.share");
    share.style.width = `${(100 * part.parameters) / largest}%`;
    const bar = part.parameters ? element("span.bar", { "aria-hidden": "true" }, share) : null;
    return element(
      part.inLayer ? "tr.in-layer" : "tr",
      {},
      element("th", { scope: "row" }, part.title, element("span.what", {}, part.about)),
      element("td.size", {}, part.shape),
      element("td.parameters", {}, part.parameters ? count(part.parameters) : "–", bar),
    );
  });
  const top = ["Part", "Size", "Parameters"].map((name) => element("th", { scope: "col" }, name));
  return element(
    "table.parts",
    {},
    element("thead", {}, element("tr", {}, ...top)),
    element("tbody", {}, ...rows),
  );
}

/** Return the parts from top to bottom; those of the layers stand for all layers together. */
function partsOf(config) {
  const { vocab_size: V, block_size: T, n_layer: N, n_head: H, d_model: C, d_ff: F } = config;
  const bias = config.bias ? 1 : 0;
  const norm = C * (1 + bias);
  const norms = config.norm_placement === "sandwich" ? 4 : 2;
  const where = { pre: "before", post: "after", sandwich: "before and after" }[config.norm_placement];
  const once = { inLayer: false };
  const each = { inLayer: true };
  return [
    {
      ...once,
      name: "embedding",
      title: "Token embedding",
      about: "A row of numbers for each character.",
      shape: `${V} × ${C}`,
      parameters: V * C,
    },
    {
      ...once,
      name: "positions",
      title: "Position embedding",
      about: "A row for each place in the context.",
      shape: `${T} × ${C}`,
      parameters: T * C,
    },
    {
      ...each,
      name: "attention",
      title: `${N} × attention`,
      about: `${H} heads of size ${C / H} look back at earlier characters.`,
      shape: `${C} × ${3 * C}, ${C} × ${C}`,
      parameters: N * (4 * C * C + bias * 4 * C),
    },
    {
      ...each,
      name: "feedForward",
      title: `${N} × feed-forward`,
      about: `Works on each place alone, through ${F} units with the curve ${config.activation_function}.`,
      shape: `${C} × ${F}, ${F} × ${C}`,
      parameters: N * (2 * C * F + bias * (F + C)),
    },
    {
      ...each,
      name: "norms",
      title: `${N} × LayerNorms`,
      about: `Keep the numbers in range, ${where} attention and feed-forward.`,
      shape: `${norms} × ${C}`,
      parameters: N * norms * norm,
    },
    {
      ...once,
      name: "finalNorm",
      title: "Final LayerNorm",
      about: "The same, once more.",
      shape: `${C}`,
      parameters: norm,
    },
    {
      ...once,
      name: "output",
      title: "Output",
      about: "Compares the result with each character; it is the token embedding again.",
      shape: `${C} × ${V}`,
      parameters: 0,
    },
    {
      ...once,
      name: "softmax",
      title: "Softmax",
      about: "Turns the comparison into odds that add up to 100 %.",
      shape: `${V}`,
      parameters: 0,
    },
  ];
}

/** Show the vocabulary. */
export function showCharacters(characters, hasEndOfText) {
  const items = characters.slice(0, MOST_CHARACTERS).map((character) => {
    const name = nameOf(character);
    return element(
      "li",
      { title: `${name} (${codePoint(character)})` },
      element("span", { "aria-hidden": "true" }, sign(character)),
      element("span.only-read", {}, name),
    );
  });
  if (hasEndOfText) items.push(element("li.end", {}, "∎ end of text"));
  const end =
    "It also knows end-of-text, ∎, which stands before and after each text that it read. Every text starts " +
    "after it, and the model ends a text by picking it; then the page lets it write the next one.";
  const more = characters.length > MOST_CHARACTERS ? `The first ${count(MOST_CHARACTERS)} are shown.` : "";
  byId("characters-body").replaceChildren(
    element(
      "p",
      {},
      `The model knows the ${count(characters.length)} different characters of its training text and no ` +
        "others. A character of the prompt that is not here cannot be read: it is left out, and the page says so.",
    ),
    element("p", {}, hasEndOfText ? end : ""),
    element("ul.characters", {}, ...items),
    element("p.note", {}, more),
  );
}
