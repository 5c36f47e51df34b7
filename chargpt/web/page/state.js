/** The state of the page as the part of its address after #, so that a link or a refresh repeats it. */

import { KNOBS, within } from "./settings.js";

const NAMES_IN_ADDRESS = { topK: "top_k", topP: "top_p", minP: "min_p" };

/**
 * What repeats a text.
 * @typedef {object} State
 * @property {string} prompt
 * @property {Settings} settings
 * @property {{at: number, id: number|null}[]} path where the text was cut to continue with another
 *   character, or continued (null), in order
 * @property {number|null} end where the writing was stopped
 * @property {number|null} selected index of a character
 * @property {boolean} colour whether the text is coloured
 */

/** @param {State} state */
export function toHash({ prompt, settings, path, end, selected, colour }) {
  const words = new URLSearchParams({ prompt });
  for (const knob of KNOBS) {
    if (knob.name === "seed" || settings[knob.name] !== knob.initial) {
      words.set(NAMES_IN_ADDRESS[knob.name] ?? knob.name, String(settings[knob.name]));
    }
  }
  const steps = path.map(({ at, id }) => (id === null ? `${at}` : `${at}.${id}`));
  if (steps.length) words.set("path", steps.join("_"));
  if (end !== null) words.set("end", String(end));
  if (selected !== null) words.set("at", String(selected));
  if (colour) words.set("colour", "1");
  return `#${words}`;
}

/**
 * Read what `toHash` wrote; nonsense gives initial values.
 * @returns {State|null} null: the address holds no state
 */
export function fromHash(hash, vocabSize) {
  const words = new URLSearchParams(hash.replace(/^#/, ""));
  if (!words.has("prompt")) return null;
  const settings = KNOBS.map((knob) => [
    knob.name,
    within(knob, words.get(NAMES_IN_ADDRESS[knob.name] ?? knob.name)),
  ]);
  return {
    prompt: words.get("prompt"),
    settings: Object.fromEntries(settings),
    path: readPath(words.get("path") ?? "", vocabSize),
    end: readIndex(words.get("end")),
    selected: readIndex(words.get("at")),
    colour: words.get("colour") === "1",
  };
}

function readPath(text, vocabSize) {
  const path = [];
  for (const step of text.split("_")) {
    const [at, id] = step.split(".").map(readIndex);
    const inOrder = at !== null && (path.length === 0 || at > path.at(-1).at);
    if (inOrder && (id === undefined || (id !== null && id < vocabSize))) path.push({ at, id: id ?? null });
  }
  return path;
}

function readIndex(text) {
  return text !== null && /^\d{1,7}$/.test(text) ? Number(text) : null;
}
