/** Start the page of `chargpt serve`: its engine computes on the server. */

import { RemoteEngine } from "../engine/remote_engine.js";
import { withKey } from "./api_key.js";
import { byId, element, inText } from "./dom.js";
import { Page, showTrouble } from "./page.js";

const query = new URLSearchParams(location.search);

/** Open the model that the address names, and show the newest state of its run. */
async function openModel() {
  const engine = await withKey(() => RemoteEngine.open(query.get("model")));
  document.title = document.querySelector("h1").textContent = shown(engine.facts.name);
  byId("lead").after(choice(engine));
  const page = new Page(engine);
  const started = page.start();
  engine.watch(() => page.refresh(), showConnection);
  return started;
}

function shown(name) {
  return [...name].map(inText).join("");
}

/** Make the choice of a model, and the link to two side by side. */
function choice({ facts, model }) {
  const compare = element("a", { href: "compare" }, "Two side by side");
  if (facts.models.length < 2) return element("p.choice", {}, compare);
  const options = facts.models.map((name) =>
    element("option", { value: name, selected: name === model }, shown(name)),
  );
  const change = (event) => location.assign(`?${new URLSearchParams({ model: event.target.value })}`);
  const select = element("select", { id: "models", change }, ...options);
  return element("p.choice", {}, element("label", { for: "models" }, "Model "), select, compare);
}

/** Say that the server does not answer, until it does. */
function showConnection(error) {
  if (error !== null) showTrouble(error);
  else byId("trouble").hidden = true;
}

/** In a frame of the comparison, show only the text and its odds, in full height. */
function fitFrame() {
  document.documentElement.classList.add("frame");
  new ResizeObserver(() => {
    window.frameElement.style.height = `${document.body.offsetHeight}px`;
  }).observe(document.body);
}

byId("self-test").textContent = ""; // the page has nothing to check: the server computes
if (window.frameElement) fitFrame();
openModel().catch(showTrouble);
