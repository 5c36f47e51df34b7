/** How it learned: the loss curve with the texts written along it, and how good the model is. */

import { byId, count, duration, element, inText, rounded, svg } from "./dom.js";

// The chart and its margins, in pixels; it is as wide as its place on the page.
const HEIGHT = 300;
const LEFT = 46;
const BOTTOM = 40;
const TOP = 14;
const RIGHT = 16;

const BITS_PER_NAT = 1 / Math.log(2);
const OVERFIT_BITS = 0.015; // a loss this far above its best is not noise, as in training/summary.py

/**
 * Show what is known about the training of `run`, which is a `Facts` of export/facts.py in JSON.
 * Shown again, it keeps the place in the training that the user looked at.
 */
export function showLearned(run) {
  const at = placeIn(run);
  const [left, right] = [element("div"), element("div", {}, ...comparison(run), ...novelty(run))];
  byId("learned-body").replaceChildren(...introduction(run), element("div.halves", {}, left, right));
  if (run.validation.length > 1) left.append(...curve(run, left.clientWidth || 500, at.index));
  else left.append(element("p.note", {}, noCurve(run)));
  if (at.focused) left.querySelector(".scrub input")?.focus({ preventScroll: true });
}

/** Return which evaluation to show: the one that is shown, or the newest if that is followed. */
function placeIn(run) {
  const slider = byId("learned-body").querySelector(".scrub input");
  const last = Math.max(run.validation.length - 1, 0);
  const follows = slider ? slider.value === slider.max : stepsSoFar(run) !== null;
  const index = follows ? last : Math.min(Number(slider?.value ?? 0), last);
  return { index, focused: slider !== null && slider === document.activeElement };
}

/** Return how many steps a run has trained that has not ended; null: it has ended. */
export function stepsSoFar(run) {
  const steps = [...run.training, ...run.validation].map((point) => point.step);
  return run.summary.steps === undefined && steps.length ? Math.max(...steps) : null;
}

function noCurve(run) {
  if (stepsSoFar(run) === null) return "There is no record of the training.";
  return "The curve appears after the second evaluation.";
}

function introduction(run) {
  const { summary } = run;
  const sentences = [];
  if (run.texts.length) {
    const held = Math.round(100 * run.validation_fraction);
    sentences.push(
      `Its text, ${run.texts.join(", ")}, has ${count(run.n_characters)} characters. It learned from ` +
        `${100 - held}\u00a0% of them and was tested on the rest.`,
    );
  } else {
    sentences.push("The model was made by another program: its training text is not known.");
  }
  if (summary.tokens && summary.train_seconds && run.n_characters) {
    const passes = summary.tokens / ((1 - run.validation_fraction) * run.n_characters);
    sentences.push(
      `In ${duration(summary.train_seconds)} it saw ${rounded(summary.tokens)} characters, its text ` +
        `${passes.toFixed(1)} times, in ${count(summary.steps)} steps.`,
    );
  }
  const steps = stepsSoFar(run);
  if (steps !== null) sentences.push(`Its training has not ended: ${count(steps)} steps so far.`);
  const verdict = verdictOf(run);
  return [
    element("p", {}, sentences.join(" ")),
    ...(verdict ? [element("p.verdict", {}, element("b", {}, verdict))] : []),
  ];
}

/** Return how good the model is and what would make it better; "" if that is not known. */
function verdictOf({ summary, val_loss: loss, checkpoint }) {
  if (loss === null) return "";
  const good =
    `On text that it had not seen, it needs ${(loss * BITS_PER_NAT).toFixed(2)} bits per character: like ` +
    `choosing among ${Math.exp(loss).toFixed(1)} equally likely characters each time.`;
  if (checkpoint !== "best" || typeof summary.final_val_loss !== "number") return good;
  const worse = (summary.final_val_loss - loss) * BITS_PER_NAT;
  if (worse > OVERFIT_BITS) {
    return `${good} After step ${count(summary.best_step)} it began to learn its text by heart, so this page has the model of that step. More text would help.`;
  }
  const improving = summary.stop_reason === "budget" && summary.best_step === summary.steps;
  return `${good} It ${improving ? "was still improving when training stopped: longer training would help" : "was no longer improving"}.`;
}

// --- the curve

/** The curves of losses over steps, in bits per character. */
function curve(run, width, index) {
  const inBits = (points) => points.map(({ step, loss }) => ({ step, bits: loss * BITS_PER_NAT }));
  const [training, validation] = [inBits(run.training), inBits(run.validation)];
  const all = [...training, ...validation];
  const last = Math.max(...all.map((point) => point.step));
  const [low, high] = [Math.min(...all.map((p) => p.bits)), Math.max(...all.map((p) => p.bits))];
  const pad = 0.06 * (high - low || 1);
  const x = (step) => LEFT + ((width - LEFT - RIGHT) * step) / last;
  const y = (bits) => TOP + ((HEIGHT - TOP - BOTTOM) * (high + pad - bits)) / (high - low + 2 * pad);
  const line = (kind, points) =>
    svg(`polyline.${kind}`, {
      points: points.map((p) => `${x(p.step).toFixed(1)},${y(p.bits).toFixed(1)}`).join(" "),
    });
  const dots = validation.map((p) =>
    svg("circle.dot", { cx: x(p.step), cy: y(p.bits), r: validation.length > 60 ? 1.5 : 3 }),
  );
  const drawing = svg(
    "svg.curve",
    { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-labelledby": "curve-about" },
    ...axes({ low: low - pad, high: high + pad, last, x, y, width }),
    line("training", training),
    line("validation", validation),
    ...dots,
  );
  const [first, end] = [validation[0], validation.at(-1)];
  const when = stepsSoFar(run) === null ? "at the end" : "now";
  const about =
    `Bits per character: the fewer, the better it predicts. Dots: on text that it does not learn from, ` +
    `${first.bits.toFixed(2)} after ${count(first.step)} steps and ${end.bits.toFixed(2)} ${when}. ` +
    "Thin line: on the text that it learns from.";
  return [
    element("p", { id: "curve-about" }, about),
    drawing,
    ...scrubber({ run, validation, drawing, x, y, width, index }),
  ];
}

function axes({ low, high, last, x, y, width }) {
  const across = ticks(low, high, 5).flatMap((bits) => [
    svg("line.grid", { x1: LEFT, x2: width - RIGHT, y1: y(bits), y2: y(bits) }),
    svg("text.tick", { x: LEFT - 6, y: y(bits) + 4, "text-anchor": "end" }, bits.toFixed(1)),
  ]);
  const steps = ticks(0, last, width > 450 ? 5 : 3).map((step) =>
    svg("text.tick", { x: x(step), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, count(step)),
  );
  const name = { x: width - RIGHT, y: HEIGHT - 6, "text-anchor": "end" };
  return [...across, ...steps, svg("text.tick", name, "training steps")];
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
function scrubber({ run, validation, drawing, x, y, width, index }) {
  const texts = new Map(run.samples.map((sample) => [sample.step, sample.text]));
  const label = element("p.at");
  const sample = element("blockquote.sample", { dir: "auto" });
  const slider = element("input", { type: "range", min: 0, max: validation.length - 1, value: 0 });
  const marker = svg("circle.marker", { r: 6 });
  const guide = svg("line.guide", { y1: TOP, y2: HEIGHT - BOTTOM });
  drawing.append(guide, marker);
  const show = (i) => {
    const { step, bits } = validation[i];
    marker.setAttribute("cx", x(step));
    marker.setAttribute("cy", y(bits));
    for (const name of ["x1", "x2"]) guide.setAttribute(name, x(step));
    slider.value = String(i);
    const text = texts.get(step);
    const here =
      run.checkpoint === "best" && step === run.summary.best_step ? " This page has this model." : "";
    label.textContent =
      `After ${count(step)} steps (${rounded(step * run.tokens_per_step)} characters): ${bits.toFixed(2)} ` +
      `bits per character.${here}${text === undefined ? "" : " It wrote:"}`;
    slider.setAttribute("aria-valuetext", label.textContent);
    sample.textContent = [...(text ?? "")].map(inText).join("");
    sample.hidden = text === undefined;
  };
  const showNearest = (event) => {
    const box = drawing.getBoundingClientRect();
    const at = ((event.clientX - box.left) * width) / box.width;
    const away = validation.map((point) => Math.abs(x(point.step) - at));
    show(away.indexOf(Math.min(...away)));
  };
  drawing.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse") showNearest(event);
  });
  drawing.addEventListener("pointerdown", showNearest);
  slider.addEventListener("input", () => show(Number(slider.value)));
  show(index);
  return [element("label.scrub", {}, "Move through the training ", slider), label, sample];
}

// --- how good it is

const EXPLAINED = {
  "letters by frequency": "knowing only how common each character is",
  bz2: "the file compressor bz2, given the training text",
  xz: "the file compressor xz, given the training text",
};

function comparison(run) {
  const heading = element("h3", {}, "Compared with simple methods");
  if (!run.baselines.length) {
    return [heading, element("p.note", {}, `Not measured: ${run.note}.`)];
  }
  const rows = run.baselines.map(({ name, bits_per_char: bits }) => ({ name: explain(name), bits }));
  if (run.val_loss !== null)
    rows.push({ name: "this model", bits: run.val_loss * BITS_PER_NAT, isModel: true });
  rows.sort((a, b) => b.bits - a.bits);
  const items = rows.map((row) => {
    const share = element("span.share");
    share.style.width = `${(100 * row.bits) / rows[0].bits}%`;
    return element(
      row.isModel ? "li.this" : "li",
      {},
      element(
        "span.row",
        {},
        element("span.label", {}, row.name),
        element("span.bar", { "aria-hidden": "true" }, share),
        element("span.number", {}, row.bits.toFixed(2)),
      ),
    );
  });
  return [
    heading,
    element("p", {}, "Bits per character on the text that it did not learn from; fewer are better."),
    element("ul.bars.compared", {}, ...items),
  ];
}

function explain(name) {
  const order = /^order-(\d+) n-gram$/.exec(name);
  return order ? `counting what follows each ${order[1]} characters` : (EXPLAINED[name] ?? name);
}

function novelty(run) {
  const heading = element("h3", {}, "Does it copy?");
  if (!run.novelty)
    return run.baselines.length ? [heading, element("p.note", {}, `Not measured: ${run.note}.`)] : [];
  const { verdict, copies, samples, thresholds } = run.novelty;
  if (!copies.length || samples.longest_text < thresholds[1]) return [heading, element("p", {}, verdict)];
  const longest = [...copies[0].text];
  const shown = longest.map((c) => (c === "\n" ? " ↵ " : inText(c))).join("");
  return [
    heading,
    element("p", {}, verdict),
    element(
      "p",
      {},
      `Its longest copy, ${count(longest.length)} characters: `,
      element("q.copy", { dir: "auto" }, shown),
    ),
  ];
}
