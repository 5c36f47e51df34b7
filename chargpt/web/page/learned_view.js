/** How it learned: the loss curve with the texts written along it, and how good the model is. */

import { byId, count, duration, element, nameOf, percent, rounded, svg } from "./dom.js";

// The chart and its margins, in pixels; it is as wide as its place on the page.
const WIDEST = 720;
const HEIGHT = 300;
const LEFT = 46;
const BOTTOM = 40;
const TOP = 14;
const RIGHT = 16;
const LN2 = Math.log(2);

/** Show what is known about the training. */
export function showLearned(run) {
  const body = byId("learned-body");
  const width = Math.min(Math.max(body.clientWidth, 300), WIDEST);
  const record =
    run.validation.length > 1 || run.training.length > 1
      ? curve(run, width)
      : [element("p.note", {}, "There is no record of the training.")];
  body.replaceChildren(
    ...introduction(run),
    element(
      "div.halves",
      {},
      element("div", {}, ...record),
      element("div", {}, ...comparison(run), ...novelty(run)),
    ),
  );
}

function introduction(run) {
  const { summary } = run;
  const sentences = [];
  if (run.texts.length) {
    const documents = run.n_documents > 1 ? ` in ${count(run.n_documents)} documents` : "";
    sentences.push(
      `It was trained on ${run.texts.join(", ")}: ${count(run.n_characters)} characters${documents}.`,
    );
  } else {
    sentences.push("The model was made by another program: its training text is not known.");
  }
  if (summary.tokens && summary.train_seconds) {
    const passes = run.n_characters
      ? ` (its text ${(summary.tokens / (0.9 * run.n_characters)).toFixed(1)} times)`
      : "";
    sentences.push(
      `In ${duration(summary.train_seconds)} of training it saw ${rounded(summary.tokens)} characters${passes} in ${count(summary.steps)} steps, on ${summary.device} (${summary.precision}).`,
    );
  }
  const verdict = summary.verdict
    ? [element("p.verdict", {}, element("b", {}, "Verdict: "), `${summary.verdict}.`)]
    : [];
  return [element("p", {}, sentences.join(" ")), ...verdict];
}

// --- the curve

function curve(run, width) {
  const points = run.validation.length ? run.validation : run.training;
  const all = [...run.training, ...run.validation];
  const last = Math.max(...all.map((point) => point.step));
  const losses = all.map((point) => point.loss);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const pad = 0.06 * (high - low || 1);
  const x = (step) => LEFT + ((width - LEFT - RIGHT) * step) / last;
  const y = (loss) => TOP + ((HEIGHT - TOP - BOTTOM) * (high + pad - loss)) / (high - low + 2 * pad);
  const drawing = svg("svg.curve", {
    viewBox: `0 0 ${width} ${HEIGHT}`,
    role: "img",
    "aria-labelledby": "curve-about",
  });
  drawing.append(...axes({ low: low - pad, high: high + pad, last, x, y, width }));
  if (run.training.length > 1)
    drawing.append(
      svg("polyline.training", {
        points: run.training.map((p) => `${x(p.step).toFixed(1)},${y(p.loss).toFixed(1)}`).join(" "),
      }),
    );
  drawing.append(
    svg("polyline.validation", {
      points: points.map((p) => `${x(p.step).toFixed(1)},${y(p.loss).toFixed(1)}`).join(" "),
    }),
  );
  const dots = points.map((p) =>
    svg("circle.dot", { cx: x(p.step), cy: y(p.loss), r: points.length > 60 ? 1.5 : 3 }),
  );
  drawing.append(...dots);
  const marker = svg("circle.marker", { r: 6 });
  const guide = svg("line.guide", { y1: TOP, y2: HEIGHT - BOTTOM });
  drawing.append(guide, marker);
  return [
    element(
      "p",
      { id: "curve-about" },
      `Loss in nats per character: the lower, the better it predicts. It fell from ${points[0].loss.toFixed(2)} to ${points.at(-1).loss.toFixed(2)}` +
        (run.validation.length ? " on the part of the text that it was not trained on (dots)." : "."),
    ),
    drawing,
    ...scrubber(run, points, { drawing, marker, guide, x, y, width }),
  ];
}

function axes({ low, high, last, x, y, width }) {
  const parts = [];
  for (const loss of ticks(low, high, 5)) {
    parts.push(
      svg("line.grid", { x1: LEFT, x2: width - RIGHT, y1: y(loss), y2: y(loss) }),
      svg("text.tick", { x: LEFT - 6, y: y(loss) + 4, "text-anchor": "end" }, loss.toFixed(1)),
    );
  }
  for (const step of ticks(0, last, 5))
    parts.push(
      svg("text.tick", { x: x(step), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, count(step)),
    );
  parts.push(svg("text.tick", { x: width - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, "training steps"));
  return parts;
}

/** Return about `n` round numbers between two limits. */
function ticks(low, high, n) {
  const rough = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step) found.push(value);
  return found;
}

/** A slider along the training, with the text that the model wrote there. */
function scrubber(run, points, { drawing, marker, guide, x, y, width }) {
  const byStep = new Map(run.samples.map((sample) => [sample.step, sample.text]));
  const label = element("p.at", { "aria-live": "polite" });
  const sample = element("blockquote.sample", { dir: "auto" });
  const slider = element("input", {
    type: "range",
    min: 0,
    max: points.length - 1,
    value: 0,
    "aria-label": "Evaluation during training",
  });
  const show = (i) => {
    const { step, loss } = points[i];
    for (const [name, value] of [
      ["cx", x(step)],
      ["cy", y(loss)],
    ])
      marker.setAttribute(name, value);
    for (const name of ["x1", "x2"]) guide.setAttribute(name, x(step));
    slider.value = String(i);
    const text = byStep.get(step);
    label.textContent = `After ${count(step)} steps (${rounded(step * run.tokens_per_step)} characters): ${loss.toFixed(3)} nats = ${(loss / LN2).toFixed(2)} bits per character${text === undefined ? "" : ". It wrote:"}`;
    slider.setAttribute("aria-valuetext", label.textContent);
    sample.textContent = text ?? "";
    sample.hidden = text === undefined;
  };
  const nearest = (event) => {
    const box = drawing.getBoundingClientRect();
    const at = ((event.clientX - box.left) * width) / box.width;
    const away = points.map((point) => Math.abs(x(point.step) - at));
    show(away.indexOf(Math.min(...away)));
  };
  drawing.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") nearest(event);
  });
  drawing.addEventListener("pointerdown", nearest);
  slider.addEventListener("input", () => show(Number(slider.value)));
  show(run.samples.length > 1 ? 0 : points.length - 1);
  return [element("label.scrub", {}, "Move through the training ", slider), label, sample];
}

// --- how good it is

function comparison(run) {
  const rows = run.baselines.map((baseline) => ({ name: baseline.name, bits: baseline.bits_per_char }));
  if (run.val_loss !== null) rows.push({ name: "this model", bits: run.val_loss / LN2, isModel: true });
  if (!rows.length) return run.note ? [element("p.note", {}, `No comparison: ${run.note}.`)] : [];
  rows.sort((a, b) => b.bits - a.bits);
  const largest = rows[0].bits;
  const list = element("ul.bars.compared");
  for (const row of rows) {
    const share = element("span.share");
    share.style.width = `${(100 * row.bits) / largest}%`;
    list.append(
      element(
        row.isModel ? "li.this" : "li",
        {},
        element(
          "span.row",
          {},
          element("span.label", {}, row.name),
          element("span.bar", { "aria-hidden": "true" }, share),
          element("span.number", {}, row.bits.toFixed(2)),
        ),
      ),
    );
  }
  return [
    element("h3", {}, "Beside simple methods"),
    element(
      "p",
      {},
      `Bits per character on text it was not trained on; fewer are better. ${explainBits(run)}`,
    ),
    list,
    element(
      "p.note",
      {},
      "Letter frequencies know how common each character is. An n-gram model counts what follows the last five. xz and bz2 are file compressors, given the training part first.",
    ),
  ];
}

function explainBits(run) {
  if (run.val_loss === null) return "";
  return `This model's ${(run.val_loss / LN2).toFixed(2)} bits are like choosing among ${Math.exp(run.val_loss).toFixed(1)} equally likely characters each time.`;
}

function novelty(run) {
  if (!run.novelty)
    return run.note && run.baselines.length
      ? [element("h3", {}, "Does it copy?"), element("p.note", {}, `Not measured: ${run.note}.`)]
      : [];
  const { verdict, copies, samples } = run.novelty;
  const parts = [
    element("h3", {}, "Does it copy?"),
    element("p", {}, `${verdict} Measured on ${count(samples.n_characters)} characters that it wrote.`),
  ];
  if (copies.length) {
    parts.push(
      element(
        "p",
        {},
        `Its longest copy, ${count([...copies[0].text].length)} characters: `,
        element(
          "q.copy",
          { dir: "auto" },
          [...copies[0].text]
            .map((c) => (c === "\n" ? " ↵ " : nameOf(c).length > 1 && c !== " " ? "·" : c))
            .join(""),
        ),
      ),
    );
  }
  return parts;
}
