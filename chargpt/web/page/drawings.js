/** Drawings of attention and of rows of numbers. */

import { svg } from "./dom.js";

const SMALL = 48; // characters of the context in a small picture of a head
const SMALL_WIDTH = 112;
const SMALL_HEIGHT = 40;
const CELL = 20; // width of a character in the large picture
const MOST_RISE = 96; // of its lines

/** Most characters in the large picture of a head. */
export const LONGEST = 40;

/** Draw one head's attention over the last characters, small. */
export function smallHead(weights) {
  const last = weights.slice(-SMALL);
  const drawing = svg("svg", { viewBox: `0 0 ${SMALL_WIDTH} ${SMALL_HEIGHT}`, "aria-hidden": "true" });
  const base = SMALL_HEIGHT - 5;
  const x = (i) =>
    SMALL_WIDTH - 4 - ((last.length - 1 - i) * (SMALL_WIDTH - 8)) / Math.max(last.length - 1, 1);
  drawing.append(svg("line.base", { x1: 4, x2: SMALL_WIDTH - 4, y1: base, y2: base }));
  last.forEach((weight, i) => {
    if (i < last.length - 1 && weight > 0.01) {
      drawing.append(arc(x(i), x(last.length - 1), base, SMALL_HEIGHT - 9, weight));
    }
  });
  drawing.append(
    svg("circle.self", { cx: x(last.length - 1), cy: base, r: 1.5 + 2.5 * Math.sqrt(last.at(-1)) }),
  );
  return drawing;
}

/**
 * Draw one head's attention as lines from the last character back to the others.
 * @param {Float32Array} weights - (n,)
 * @param {string[]} signs - (n,)
 * @param {string} label - for people who cannot see it
 */
export function largeHead(weights, signs, label) {
  const x = (i) => (i + 1) * CELL;
  const end = x(signs.length - 1);
  const read = [...weights.keys()].filter((i) => i < signs.length - 1 && weights[i] > 0.005);
  const rise = Math.max(24, ...read.map((i) => arcHeight(x(i), end, MOST_RISE)));
  const line = rise + 24; // where the characters stand
  const size = { width: end + CELL, height: line + 34 };
  const box = `0 0 ${size.width} ${size.height}`;
  const drawing = svg("svg", { viewBox: box, ...size, role: "img", "aria-label": label });
  for (const i of read) drawing.append(arc(x(i), end, line - 14, MOST_RISE, weights[i]));
  signs.forEach((seen, i) => {
    const glow = svg("rect.glow", { x: x(i) - CELL / 2, y: line - 12, width: CELL, height: 24, rx: 4 });
    glow.style.opacity = String(Math.min(1, weights[i] * 1.2));
    const kind = seen.length > 2 ? "text.glyph.long" : "text.glyph";
    drawing.append(glow, svg(kind, { x: x(i), y: line + 5, "text-anchor": "middle" }, seen));
    if (weights[i] >= 0.1) {
      const share = String(Math.round(100 * weights[i]));
      drawing.append(svg("text.weight", { x: x(i), y: line + 27, "text-anchor": "middle" }, share));
    }
  });
  return drawing;
}

function arcHeight(from, to, most) {
  return Math.min(most, 12 + (to - from) * 0.55);
}

/** Draw a line from a character to an earlier one; the more attention, the stronger. */
function arc(from, to, y, most, weight) {
  const top = y - arcHeight(from, to, most);
  const line = svg("path.arc", {
    d: `M${to.toFixed(1)},${y} C${to.toFixed(1)},${top.toFixed(1)} ${from.toFixed(1)},${top.toFixed(1)} ${from.toFixed(1)},${y}`,
  });
  line.style.strokeWidth = `${(0.6 + 3.4 * weight).toFixed(2)}px`;
  line.style.opacity = Math.min(1, 0.12 + weight * 1.3).toFixed(2);
  return line;
}

/** Draw numbers as coloured cells: one colour above zero, another below. */
export function strip(values, largest, label) {
  const [width, height] = [values.length * 4, 18];
  const drawing = svg("svg.strip-cells", {
    viewBox: `0 0 ${width} ${height}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `${values.length} numbers of ${label}`,
  });
  values.forEach((value, i) => {
    const cell = svg(value < 0 ? "rect.below" : "rect.above", { x: 4 * i, y: 0, width: 4, height });
    cell.style.opacity = Math.min(1, Math.abs(value) / (0.6 * largest)).toFixed(2);
    drawing.append(cell);
  });
  return drawing;
}
