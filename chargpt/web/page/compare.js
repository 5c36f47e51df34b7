/** Two texts side by side: two frames with the page of a model, written with one prompt and seed. */

import { RemoteEngine } from "../engine/remote_engine.js";
import { withKey } from "./api_key.js";
import { byId, element } from "./dom.js";
import { KNOBS, within } from "./settings.js";
import { toHash } from "./state.js";

const SIDES = ["left", "right"];
const SHARED = ["seed", "length"];
const form = byId("controls");

/** Fill the form, and write what the address says. */
async function compare() {
  const { facts } = await withKey(() => RemoteEngine.open(null));
  byId("shared").append(...knobs(true).map((knob) => field(knob, knob.name)));
  byId("sides").append(...SIDES.map((side, i) => column(side, facts.models, i)));
  restoreForm();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    writeBoth();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  byId("another").addEventListener("click", () => {
    byId("seed").value = String((value("seed") + 1) % 2 ** 32);
    writeBoth();
  });
  byId("stop").addEventListener("click", () => {
    for (const side of SIDES) byId(side).contentDocument.getElementById("stop")?.click();
  });
  window.addEventListener("hashchange", () => {
    restoreForm();
    writeBoth();
  });
  writeBoth();
}

function knobs(shared) {
  return KNOBS.filter((knob) => SHARED.includes(knob.name) === shared);
}

/** Make the label and the input of a setting; `name` is that of the input. */
function field(knob, name, initial = knob.initial) {
  const { min, max, step } = knob;
  const input = element("input", { type: "number", id: name, name, min, max, step, value: initial });
  input.addEventListener("change", () => {
    input.value = String(within(knob, input.value));
  });
  return element("span.field", {}, element("label", { for: name }, knob.label), input);
}

/** Make a side: its model, its settings and its text. */
function column(side, models, i) {
  const options = models.map((name) => element("option", { value: name }, name));
  const select = element("select", { id: `${side}.model`, name: `${side}.model` }, ...options);
  select.value = models[Math.min(i, models.length - 1)];
  const warmer = models.length === 1 && i === 1; // otherwise both would write the same
  const settings = knobs(false).map((knob) => {
    const initial = warmer && knob.name === "temperature" ? 1.2 : knob.initial;
    return field(knob, `${side}.${knob.name}`, initial);
  });
  const title = side === "left" ? "Left" : "Right";
  return element(
    "fieldset.side",
    {},
    element("legend", {}, title),
    element(
      "div.fields",
      {},
      element("span.field", {}, element("label", { for: select.id }, "Model"), select),
      ...settings,
    ),
    element("iframe", { id: side, title: `${title} text` }),
  );
}

/** Return the value of a setting. */
function value(name) {
  const knob = KNOBS.find((each) => each.name === name.split(".").at(-1));
  return within(knob, form.elements.namedItem(name).value);
}

/** Write both texts, and keep the form in the address. */
function writeBoth() {
  const fields = [...form.elements].filter((input) => input.name);
  const hash = new URLSearchParams(fields.map((input) => [input.name, input.value]));
  history.replaceState(null, "", `#${hash}`);
  const prompt = byId("prompt").value;
  for (const side of SIDES) {
    const settings = Object.fromEntries(
      KNOBS.map(({ name }) => [name, value(SHARED.includes(name) ? name : `${side}.${name}`)]),
    );
    const state = toHash({ prompt, settings, path: [], end: null, selected: null, colour: false });
    const query = new URLSearchParams({ model: form.elements.namedItem(`${side}.model`).value });
    byId(side).contentWindow.location.replace(`${new URL("./", location.href)}?${query}${state}`);
  }
}

/** Set the form to what the address says. */
function restoreForm() {
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    const input = form.elements.namedItem(name);
    if (input?.name !== name) continue;
    const known = input.tagName !== "SELECT" || [...input.options].some((each) => each.value === text);
    if (known) input.value = text;
  }
}

compare().catch((error) => {
  byId("trouble").textContent = `Something went wrong: ${error.message}`;
  byId("trouble").hidden = false;
});
