/** The settings of a text, as controls. */

import { byId, element } from "./dom.js";

/** Each setting: its limits, what it does in one sentence, and where that was published. */
export const KNOBS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    initial: 0.8,
    about:
      "Below 1, likely characters become likelier; above 1, unlikely ones do; 0 always takes the likeliest.",
    source: ["Ackley, Hinton & Sejnowski 1985", "https://doi.org/10.1207/s15516709cog0901_7"],
  },
  {
    name: "topK",
    label: "Top-k",
    min: 0,
    max: 100,
    step: 1,
    initial: 0,
    about: "Pick only from the k likeliest characters; 0 picks from all.",
    source: ["Fan, Lewis & Dauphin 2018", "https://arxiv.org/abs/1805.04833"],
  },
  {
    name: "topP",
    label: "Top-p",
    min: 0.05,
    max: 1,
    step: 0.05,
    initial: 1,
    about: "Pick only from the likeliest characters that together have this probability; 1 picks from all.",
    source: ["Holtzman et al. 2020", "https://arxiv.org/abs/1904.09751"],
  },
  {
    name: "minP",
    label: "Min-p",
    min: 0,
    max: 1,
    step: 0.01,
    initial: 0,
    about: "Pick only characters with at least this share of the likeliest one's probability.",
    source: ["Nguyen et al. 2024", "https://arxiv.org/abs/2407.01082"],
  },
  {
    name: "seed",
    label: "Seed",
    min: 0,
    max: 2 ** 32 - 1,
    step: 1,
    initial: 1337,
    about:
      "Character number i is picked by random number i of this seed: the same seed writes the same text.",
    source: ["Salmon et al. 2011 (Philox)", "https://doi.org/10.1145/2063384.2063405"],
  },
  {
    name: "length",
    label: "Length",
    min: 1,
    max: 20000,
    step: 1,
    initial: 500,
    about: "The most characters to write at a time.",
    source: null,
  },
];

/** Build the controls; `onChange` is called when one has changed. */
export function buildKnobs(onChange) {
  for (const knob of KNOBS) {
    const about = element("p.note", { id: `${knob.name}-about` }, `${knob.about} `);
    if (knob.source) about.append(element("a", { href: knob.source[1], rel: "noreferrer" }, knob.source[0]));
    const isRange = knob.max <= 100;
    const limits = { min: knob.min, max: knob.max, step: knob.step, value: knob.initial };
    const number = element("input", {
      type: "number",
      id: knob.name,
      ...limits,
      "aria-describedby": `${knob.name}-about`,
    });
    const range = isRange
      ? element("input", { type: "range", ...limits, "aria-label": knob.label, tabindex: -1 })
      : null;
    number.addEventListener("input", () => {
      if (range) range.value = number.value;
    });
    number.addEventListener("change", () => {
      number.value = String(valueOf(knob));
      if (range) range.value = number.value;
      onChange();
    });
    range?.addEventListener("input", () => {
      number.value = range.value;
      onChange();
    });
    const head = element(
      "div.knob-head",
      {},
      element("label", { for: knob.name }, knob.label),
      range ?? "",
      number,
    );
    byId("knobs").append(element("div.knob", {}, head, about));
  }
}

function valueOf(knob) {
  return within(knob, byId(knob.name).value);
}

/** Return a number within the limits of a setting; nonsense gives the initial value. */
export function within(knob, text) {
  const value = text === "" || text === null ? NaN : Number(text);
  if (!Number.isFinite(value)) return knob.initial;
  const limited = Math.min(Math.max(value, knob.min), knob.max);
  return knob.step === 1 ? Math.round(limited) : limited;
}

/** Return all settings: {temperature, topK, topP, minP, seed, length}. */
export function readKnobs() {
  return Object.fromEntries(KNOBS.map((knob) => [knob.name, valueOf(knob)]));
}

/** Set one control. */
export function setKnob(name, value) {
  const input = byId(name);
  input.value = String(value);
  const range = input.parentElement.querySelector("input[type=range]");
  if (range) range.value = String(value);
}

/** Return one line about the settings: "temperature 0.8, seed 1337". */
export function describe(settings) {
  const parts = [`temperature ${settings.temperature}`];
  if (settings.topK > 0) parts.push(`top-k ${settings.topK}`);
  if (settings.topP < 1) parts.push(`top-p ${settings.topP}`);
  if (settings.minP > 0) parts.push(`min-p ${settings.minP}`);
  return [...parts, `seed ${settings.seed}`, `${settings.length} characters`].join(", ");
}
