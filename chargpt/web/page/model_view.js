/** The model: its parts with their real sizes, and its vocabulary. */

import { drawModel } from "./diagram.js";
import { byId, codePoint, count, element, nameOf, percent, rounded, sign } from "./dom.js";

const GPT2_PAPER =
  "https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf";

/** Show the parts of the model and where its parameters are. */
export function showModel(config) {
  const parts = partsOf(config);
  const total = parts.reduce((sum, part) => sum + part.times * part.parameters, 0);
  const largest = Math.max(...parts.map((part) => part.times * part.parameters));
  const body = element("tbody");
  for (const part of parts) {
    const all = part.times * part.parameters;
    const share = element("span.share");
    share.style.width = `${(100 * all) / largest}%`;
    body.append(
      element(
        part.times > 1 || part.inLayer ? "tr.in-layer" : "tr",
        {},
        element("th", { scope: "row" }, part.name),
        element("td", {}, part.about),
        element("td.size", {}, part.shape),
        element(
          "td.parameters",
          {},
          all ? count(all) : "–",
          all ? element("span.bar", { "aria-hidden": "true" }, share) : null,
        ),
      ),
    );
  }
  const inLayers = parts
    .filter((part) => part.inLayer)
    .reduce((sum, part) => sum + part.times * part.parameters, 0);
  const of = (name) =>
    parts.filter((part) => part.key === name).reduce((sum, part) => sum + part.times * part.parameters, 0) /
    total;
  const drawing = drawModel(config, {
    embedding: of("embedding"),
    positions: of("positions"),
    attention: of("attention"),
    feedForward: of("feedForward"),
  });
  const heads = ["Part", "What it does", "Size", "Parameters"].map((name) =>
    element("th", { scope: "col" }, name),
  );
  const table = element(
    "table.parts",
    {},
    element(
      "caption",
      {},
      `The parts from top to bottom. The ${config.n_layer} layers are alike; their parameters are added up.`,
    ),
    element("thead", {}, element("tr", {}, ...heads)),
    body,
  );
  byId("model-body").replaceChildren(
    element(
      "p",
      {},
      "It is a ",
      element("a", { href: GPT2_PAPER, rel: "noreferrer" }, "GPT-2"),
      `, small: training chose ${count(total)} numbers, ${percent(of("attention") + of("feedForward"))} of them in its ${config.n_layer} layers. It sees at most ${count(config.block_size)} characters at a time. `,
      `A row of ${config.d_model} numbers, the residual stream, runs from top to bottom; each part reads it and adds to it. In the drawing, darker parts hold more parameters.`,
    ),
    element(
      "div.model-parts",
      {},
      element("div.scroller", { tabindex: 0, role: "group", "aria-label": "Drawing of the model" }, drawing),
      element("div.scroller", { tabindex: 0, role: "group", "aria-label": "Parts of the model" }, table),
    ),
  );
}

function partsOf(config) {
  const { vocab_size: V, block_size: T, n_layer: N, n_head: H, d_model: C, d_ff: F } = config;
  const bias = config.bias ? 1 : 0;
  const norm = C * (1 + bias);
  const norms = { pre: "before", post: "after", sandwich: "before and after" }[config.norm_placement];
  const perSublayer = config.norm_placement === "sandwich" ? 2 : 1;
  const inLayer = true;
  return [
    {
      key: "embedding",
      name: "Token embedding",
      about: "A row of numbers for each token.",
      shape: `${V} × ${C}`,
      times: 1,
      parameters: V * C,
    },
    {
      key: "positions",
      name: "Position embedding",
      about: "A row for each place in the context.",
      shape: `${T} × ${C}`,
      times: 1,
      parameters: T * C,
    },
    {
      key: "attention",
      name: `${N} × attention`,
      about: `${H} heads of size ${C / H}: look back at earlier characters.`,
      shape: `${C} × ${3 * C}, ${C} × ${C}`,
      times: N,
      parameters: 4 * C * C + bias * 4 * C,
      inLayer,
    },
    {
      key: "feedForward",
      name: `${N} × feed-forward`,
      about: `Works on each place alone, through ${F} units (${config.activation_function}).`,
      shape: `${C} × ${F}, ${F} × ${C}`,
      times: N,
      parameters: 2 * C * F + bias * (F + C),
      inLayer,
    },
    {
      name: `${N} × LayerNorms`,
      about: `Keep the numbers in range, ${norms} each of both.`,
      shape: `${2 * perSublayer} × ${C}`,
      times: N,
      parameters: 2 * perSublayer * norm,
      inLayer,
    },
    { name: "Final LayerNorm", about: "The same, once more.", shape: `${C}`, times: 1, parameters: norm },
    {
      name: "Head",
      about: "Compares the result with each token; it is the token embedding again.",
      shape: `${C} × ${V}`,
      times: 1,
      parameters: 0,
    },
    {
      name: "Softmax",
      about: "Turns the comparison into odds that add up to 100 %.",
      shape: `${V}`,
      times: 1,
      parameters: 0,
    },
  ];
}

const MOST_CHARACTERS = 2000;

/** Show the vocabulary. */
export function showCharacters(characters, hasEndOfText) {
  const list = element("ul.characters");
  for (const character of characters.slice(0, MOST_CHARACTERS)) {
    const title = `${nameOf(character)} (${codePoint(character)})`;
    list.append(
      element(
        "li",
        { title },
        element("span", { "aria-hidden": "true" }, sign(character)),
        element("span.only-read", {}, nameOf(character)),
      ),
    );
  }
  if (hasEndOfText) list.append(element("li.end", { title: "end of text" }, "end of text"));
  const sentences = [
    `The model knows the ${count(characters.length)} different characters of its training text and no others. ` +
      "A character of the prompt that is not here cannot be read: it is left out, and the page says so.",
  ];
  if (hasEndOfText) {
    sentences.push(
      "It also knows end-of-text, a token that stands before and after each document. Every text starts after it, and the model ends a text by drawing it; it shows as nothing.",
    );
  }
  const more =
    characters.length > MOST_CHARACTERS
      ? element("p.note", {}, `The first ${count(MOST_CHARACTERS)} are shown.`)
      : null;
  byId("characters-body").replaceChildren(
    ...sentences.map((sentence) => element("p", {}, sentence)),
    list,
    ...(more ? [more] : []),
  );
}

/** Return one sentence about the model and its text for the top of the page. */
export function lead(facts) {
  const run = facts.run;
  const read = run.texts.length
    ? ` that has read ${run.texts.join(", ")} (${rounded(run.n_characters)} characters${run.n_documents > 1 ? ` in ${count(run.n_documents)} documents` : ""})`
    : "";
  return (
    `A GPT-2 with ${rounded(run.n_params)} parameters${read} and predicts the next character. ` +
    "It runs in this page, on your device: nothing is sent anywhere."
  );
}
