/** Small helpers: elements, numbers and characters as people read them. */

/**
 * Make an element. Text is never parsed as HTML.
 * @param {string} tag - such as "p", or "p.note" for a class
 * @param {Object} properties - attributes; functions are event listeners ("click"), null is left out
 * @param {...(Node|string|null)} children
 * @returns {HTMLElement}
 */
export function element(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return complete(document.createElement(name), classes, properties, children);
}

/** Make an SVG element; see `element`. */
export function svg(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  return complete(
    document.createElementNS("http://www.w3.org/2000/svg", name),
    classes,
    properties,
    children,
  );
}

function complete(node, classes, properties, children) {
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== false) node.setAttribute(name, String(value));
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Return the element of the page with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Make a box that scrolls sideways, also with the keyboard. */
export function scroller(label, content) {
  return element("div.scroller", { tabindex: 0, role: "group", "aria-label": label }, content);
}

const ROUND = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** 1234567 -> "1,234,567" */
export function count(number) {
  return ROUND.format(number);
}

/** 818048 -> "818 thousand", 10800000 -> "10.8 million" */
export function rounded(number) {
  if (number >= 1e6) return `${(number / 1e6).toPrecision(3)} million`;
  return number >= 1e4 ? `${Math.round(number / 1e3)} thousand` : count(number);
}

/** 0.1234 -> "12.3 %", 0.0056 -> "0.56 %", 0.000001 -> "< 0.001 %" */
export function percent(share) {
  const value = 100 * share;
  if (value > 99.95) return value === 100 ? "100\u00a0%" : "> 99.9\u00a0%";
  if (value > 0 && value < 0.001) return "< 0.001\u00a0%";
  const digits = value >= 9.95 ? value.toFixed(1) : value > 0 ? value.toPrecision(2) : "0";
  return `${digits}\u00a0%`;
}

/** 93 -> "1 min 33 s" */
export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** Surprise of a probability, in bits: 1 is a coin flip. */
export function bits(probability) {
  return -Math.log2(Math.max(probability, 1e-30));
}

const NAMES = new Map([
  ["\n", "new line"],
  ["\t", "tab"],
  ["\r", "carriage return"],
  [" ", "space"],
  ["\u00a0", "no-break space"],
  ["\u3000", "wide space"],
]);
const SIGNS = new Map([
  ["\n", "↵"],
  ["\t", "⇥"],
  ["\r", "␍"],
  [" ", "␣"],
  ["\u00a0", "⍽"],
  ["\u3000", "□"],
]);
// Controls, changes of direction and lone surrogates could make one text look like another.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
const JOINERS = /[\u200c-\u200f]/u; // these are part of the spelling of some languages

/** Return a character as a sign that can be seen: "␣" for a space. */
export function sign(character) {
  if (character === "") return "∎"; // end-of-text
  const seen = SIGNS.get(character) ?? character;
  return HIDDEN.test(seen) ? codePoint(character) : seen;
}

// Letters that are written from right to left, which would turn a sentence around.
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

/** Return the name of a character for a sentence: "e", "space", "U+202E". */
export function nameOf(character) {
  if (character === "") return "end of text";
  if (NAMES.has(character)) return NAMES.get(character);
  if (HIDDEN.test(character)) return codePoint(character);
  return RIGHT_TO_LEFT.test(character) ? `\u2068${character}\u2069` : character; // isolated
}

/** Make an element that shows a character as a sign, for the eye only. */
export function signOf(character, tag = "span.sign") {
  const seen = sign(character);
  return element(seen.length > 2 ? `${tag}.long` : tag, { "aria-hidden": "true" }, seen);
}

/** Return a character as it stands in a text, or its code point if it would be hidden. */
export function inText(character) {
  if (character === "") return "∎\n"; // the next text begins on its own line
  if (character === "\n" || character === "\t" || JOINERS.test(character)) return character;
  return HIDDEN.test(character) ? codePoint(character) : character;
}

/** "é" -> "U+00E9" */
export function codePoint(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}
