/** A drawing of the model: what flows where, with real sizes; more colour means more parameters. */

import { percent, svg } from "./dom.js";

const STREAM = 46; // x of the residual stream
const BOX = 104; // x of the boxes beside it
const BOX_WIDTH = 208;
const DIAGRAM_WIDTH = BOX + BOX_WIDTH + 14;

/**
 * Draw a model.
 * @param {Object} config - GPT2Config
 * @param {Map<string, number>} shares - of the parameters, by part: embedding, positions, attention,
 *   feedForward; a layer's parts are those of all layers together
 * @returns {SVGElement}
 */
export function drawModel(config, shares) {
  const {
    vocab_size: V,
    block_size: T,
    n_layer: N,
    n_head: H,
    d_model: C,
    d_ff: F,
    norm_placement: placement,
  } = config;
  const parts = [];
  let y = 22;
  parts.push(words(STREAM, y, `up to ${T} characters`, "start"));
  y += 14;
  const top = y;
  parts.push(...box(y, "Token embedding", `${V} × ${C}`, shares.get("embedding")), ...toStream(y + 20));
  y += 54;
  parts.push(...box(y, "+ Position embedding", `${T} × ${C}`, shares.get("positions")), ...toStream(y + 20));
  y += 62;
  const layerTop = y - 8;
  for (const [title, detail, share] of [
    ["Attention", `${H} heads of size ${C / H}`, shares.get("attention")],
    ["Feed-forward", `${C} → ${F} → ${C}`, shares.get("feedForward")],
  ]) {
    const [nodes, height] = sublayer(y, title, detail, share, placement, `${percent(share / N)} each`);
    parts.push(...nodes);
    y += height;
  }
  parts.push(
    svg("rect.repeat", { x: 12, y: layerTop, width: DIAGRAM_WIDTH - 20, height: y - layerTop - 4, rx: 10 }),
    words(DIAGRAM_WIDTH - 16, y - 12, `× ${N} layers`, "end", "times"),
  );
  y += 12;
  parts.push(...chip(y, STREAM - 30, "LayerNorm"));
  y += 34;
  parts.push(...box(y, "Output (token embedding)", `${C} × ${V}`, 0), ...fromStream(y + 20));
  const bottom = y + 20;
  y += 66;
  parts.push(
    arrow(BOX + 104, y - 26, BOX + 104, y - 14),
    words(BOX + 104, y, `softmax: odds of ${V} characters`, "middle"),
  );
  const stream = svg("line.stream", { x1: STREAM, x2: STREAM, y1: top + 20, y2: bottom });
  return svg(
    "svg.diagram",
    {
      viewBox: `0 0 ${DIAGRAM_WIDTH} ${y + 12}`,
      width: DIAGRAM_WIDTH,
      height: y + 12,
      role: "img",
      "aria-label": `The model: embeddings, ${N} layers of attention and feed-forward along the residual stream, final LayerNorm, output, softmax. The table beside it has the same parts.`,
    },
    stream,
    ...parts,
  );
}

/** A sublayer with its LayerNorms: it reads the stream, and its result is added to the stream. */
function sublayer(top, title, detail, share, placement, label) {
  const parts = [];
  let y = top + 8;
  const reads = y;
  if (placement !== "post") {
    parts.push(...chip(y, BOX, "LayerNorm"));
    y += 26;
  }
  parts.push(...box(y, title, detail, share, label));
  y += 46;
  if (placement === "sandwich") {
    parts.push(...chip(y, BOX, "LayerNorm"));
    y += 26;
  }
  const adds = y + 4;
  const inner = placement === "post" ? reads + 18 : reads + 10;
  parts.push(
    svg("path.flow", { d: `M${STREAM},${inner - 10} H${BOX - 18} V${inner}` }),
    arrow(BOX - 18, inner, BOX, inner),
    svg("path.flow", { d: `M${BOX + 30},${y - 6} V${adds}` }),
    arrow(BOX + 30, adds, STREAM + 9, adds),
    svg("circle.plus", { cx: STREAM, cy: adds, r: 9 }),
    words(STREAM, adds + 5, "+", "middle", "plus-sign"),
  );
  y = adds + 18;
  if (placement === "post") {
    parts.push(...chip(y - 4, STREAM - 30, "LayerNorm"));
    y += 24;
  }
  return [parts, y - top];
}

function box(y, title, detail, share, label = percent(share)) {
  const fill = svg("rect.fill", { x: BOX, y, width: BOX_WIDTH, height: 40, rx: 7 });
  fill.style.opacity = String(Math.min(1, share * 1.5));
  const parts = [
    svg("rect.box", { x: BOX, y, width: BOX_WIDTH, height: 40, rx: 7 }),
    fill,
    words(BOX + 10, y + 17, title, "start", "title"),
    words(BOX + 10, y + 33, detail, "start"),
  ];
  if (share) parts.push(words(BOX + BOX_WIDTH - 10, y + 33, label, "end"));
  return parts;
}

function chip(y, x, label) {
  return [svg("rect.chip", { x, y, width: 84, height: 20, rx: 10 }), words(x + 42, y + 14, label, "middle")];
}

const toStream = (y) => [arrow(BOX, y, STREAM + 2, y)];
const fromStream = (y) => [arrow(STREAM, y, BOX - 2, y)];

/** Draw a horizontal or vertical line that ends in an arrow. */
function arrow(x1, y1, x2, y2) {
  const [dx, dy] = [5 * Math.sign(x2 - x1), 5 * Math.sign(y2 - y1)];
  const head = `M${x2 - dx - dy},${y2 - dy - dx} L${x2},${y2} L${x2 - dx + dy},${y2 - dy + dx}`;
  return svg("path.flow", { d: `M${x1},${y1} L${x2},${y2} ${head}` });
}

function words(x, y, text, anchor, kind = "") {
  return svg(kind ? `text.${kind}` : "text", { x, y, "text-anchor": anchor }, text);
}
