/** The page: connects the controls, the text and the pictures to an engine that runs the model. */

import { Tokenizer } from "../engine/tokenizer.js";
import { byId, codePoint, count, element, nameOf } from "./dom.js";
import { InsideView } from "./inside_view.js";
import { showLearned } from "./learned_view.js";
import { lead, showCharacters, showModel } from "./model_view.js";
import { showNoOdds, showOdds } from "./odds_view.js";
import { checkArithmetic } from "./self_check.js";
import { buildKnobs, describe, readKnobs, setKnob } from "./settings.js";
import { fromHash, toHash } from "./state.js";
import { TextView } from "./text_view.js";

const LOOK_DELAY = 120; // milliseconds before the pictures follow the selection
const MOST_EARLIER = 20; // texts to keep links to

/** The same state (see `state.js`) gives the same text, so the address of the page holds it. */
export class Page {
  /** @param {LocalEngine|RemoteEngine} engine - see `engine/local_engine.js` */
  constructor(engine) {
    const { facts } = engine;
    this.engine = engine;
    this.endId = facts.end_of_text_id;
    this.tokenizer = new Tokenizer(facts.characters, this.endId);
    this.characterOf = (id) => (id === this.endId ? "" : facts.characters[id]);
    this.text = new TextView({ onLook: (index, selected) => this.look(index, selected) });
    this.inside = new InsideView({
      characterOf: this.characterOf,
      nHead: facts.config.n_head,
      onStep: (step) => this.step(step),
    });
    this.ids = []; // of the whole text; end-of-text stands between two texts
    this.records = []; // one per id, with holes where nothing was predicted
    this.path = [];
    this.end = null;
    this.stopper = null;
    this.writing = Promise.resolve();
  }

  /** Fill the page, and write the text that the address names, or a first one. */
  async start() {
    const { facts } = this.engine;
    byId("lead").textContent = lead(facts, this.engine.where);
    const starts = this.endId === null ? "" : " Every text starts as a document starts.";
    byId("prompt-about").textContent =
      `The text to continue. The model reads at most its last ${count(facts.config.block_size)} characters.${starts}`;
    showModel(facts.config, this.endId !== null);
    showCharacters(facts.characters, this.endId !== null);
    showLearned(facts.run);
    buildKnobs(() => this.describeSettings());
    this.listen();
    const state = fromHash(location.hash, facts.config.vocab_size);
    await this.restore(state ?? { ...this.newState(), prompt: "", colour: false });
    await checkArithmetic(this.engine);
  }

  /** Show the facts again, because the run has trained more. */
  refresh() {
    const { facts } = this.engine;
    byId("lead").textContent = lead(facts, this.engine.where);
    showLearned(facts.run);
  }

  listen() {
    const onClick = (id, act) => byId(id).addEventListener("click", act);
    byId("controls").addEventListener("submit", (event) => {
      event.preventDefault();
      this.restore(this.newState());
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.restore(this.newState());
    });
    byId("prompt").addEventListener("input", () => this.readPrompt());
    onClick("stop", () => this.stopper?.abort());
    onClick("another", () => {
      setKnob("seed", (readKnobs().seed + 1) % 2 ** 32);
      this.restore(this.newState());
    });
    onClick("more", () => this.extend({ at: this.ids.length, id: null }));
    onClick("copy", () => copy(this.plainText(), "copy"));
    onClick("link", () => copy(location.href, "link"));
    byId("colour").addEventListener("change", () => {
      this.text.setColour(byId("colour").checked);
      this.saveState();
    });
    for (const link of document.querySelectorAll("nav a, a.skip")) {
      link.addEventListener("click", (event) => goTo(event, link.getAttribute("href").slice(1)));
    }
    window.addEventListener("hashchange", ({ newURL }) => {
      const { hash } = new URL(newURL); // a text that has just ended may have changed the address since
      const state = fromHash(hash, this.engine.facts.config.vocab_size);
      if (state === null) this.saveState();
      else if (hash !== this.hash()) this.restore(state);
    });
  }

  describeSettings() {
    const settings = readKnobs();
    byId("settings-summary").textContent = describe(settings);
    const changed = this.settings && describe(settings) !== describe(this.settings);
    byId("changed").textContent = changed
      ? `This text keeps its settings (${describe(this.settings)}). Press Write to use the new ones.`
      : "";
  }

  // --- state

  /** Return the state for a new text: what the controls say. */
  newState() {
    const [prompt, colour] = [byId("prompt").value, byId("colour").checked];
    return { prompt, settings: readKnobs(), path: [], end: null, selected: null, colour };
  }

  hash() {
    const { prompt, settings, path, end } = this;
    return toHash({
      prompt,
      settings,
      path,
      end,
      selected: this.text.selected,
      colour: byId("colour").checked,
    });
  }

  saveState() {
    if (!this.settings) return;
    try {
      history.replaceState(null, "", this.hash());
    } catch {
      // Some browsers forbid it for files; then only "Copy a link" lacks the state.
    }
  }

  /** Keep a link to the text, so that the user can come back to it. */
  remember() {
    const list = byId("earlier-list");
    const words = this.plainText().trim().replace(/\s+/g, " ");
    const name = words.length > 60 ? `${words.slice(0, 60)}…` : words || "(nothing)";
    if (list.firstElementChild?.textContent !== name) {
      list.prepend(element("li", {}, element("a", { href: this.hash(), dir: "auto" }, name)));
    }
    if (list.children.length > MOST_EARLIER) list.lastElementChild.remove();
    byId("earlier").hidden = list.children.length < 2;
  }

  plainText() {
    return this.ids.map((id) => (id === this.endId ? "\n" : this.characterOf(id))).join("");
  }

  // --- writing

  /** Read the prompt; say which of its characters the model does not know. */
  readPrompt() {
    const { ids, unknown } = this.tokenizer.encode(byId("prompt").value);
    const names = unknown.slice(0, 8).map((c) => `“${nameOf(c)}” (${codePoint(c)})`);
    const others = unknown.length > 8 ? " and others" : "";
    byId("unknown").textContent = unknown.length
      ? `The model has never seen ${names.join(", ")}${others}: it knows only the ` +
        `${count(this.tokenizer.characters.length)} characters at the end of this page. They are left out.`
      : "";
    return ids;
  }

  /** Write the text of a state. */
  restore({ prompt, settings, path, end, selected, colour }) {
    byId("prompt").value = prompt;
    byId("colour").checked = colour;
    this.text.setColour(colour);
    for (const [name, value] of Object.entries(settings)) setKnob(name, value);
    const ids = this.readPrompt();
    return this.exclusively(async (signal) => {
      Object.assign(this, { prompt, settings, path: [], end, nGiven: ids.length });
      this.describeSettings();
      this.forget();
      this.setText(ids, 0, "given");
      let reason = "length";
      for (const step of [...path, null]) {
        const until = this.ids.length + settings.length;
        const stop = Math.min(until, step?.at ?? until, end ?? until);
        if (stop > this.records.length) reason = await this.continueText(stop, signal);
        if (step === null || step.at > this.ids.length || signal.aborted) break;
        this.take(step);
      }
      this.text.box.scrollTop = 0;
      const index = selected !== null && selected < this.ids.length ? selected : this.interesting();
      if (index !== null) this.text.select(index);
      return reason;
    });
  }

  /** Continue the text from a new step of its path. */
  extend(step) {
    return this.exclusively(async (signal) => {
      if (step.at > this.ids.length) return "stopped"; // of a text that is no longer there
      this.end = null;
      this.take(step);
      if (step.id !== null) this.text.select(step.at);
      this.text.box.focus({ preventScroll: true });
      return this.continueText(this.ids.length + this.settings.length, signal);
    });
  }

  /** Take a step of the path: cut the text there, and put another character in its place. */
  take({ at, id }) {
    this.path = [...this.path.filter((step) => step.at < at), { at, id }];
    if (id !== null) this.setText([...this.ids.slice(0, at), id], at, "chosen");
  }

  /** Do a piece of writing, after the one before has stopped. */
  exclusively(work) {
    this.stopper?.abort();
    const stopper = new AbortController();
    this.stopper = stopper;
    this.busy(true);
    this.writing = this.writing.then(async () => {
      if (stopper !== this.stopper) return; // another one has been asked for
      try {
        this.finish(await work(stopper.signal), stopper.signal);
      } catch (error) {
        showTrouble(error);
        byId("status").textContent = "Not finished.";
      } finally {
        if (stopper === this.stopper) this.busy(false);
      }
    });
    return this.writing;
  }

  /** Replace the text from a position on. */
  setText(ids, from, kind) {
    this.ids = ids;
    this.records.length = Math.min(this.records.length, from);
    this.text.cut(from);
    this.text.add(ids.slice(from).map((id) => ({ character: this.characterOf(id), kind })));
  }

  /** Write until the text has `length` ids, one document after another; resolves to why it ended. */
  async continueText(length, signal) {
    let reason;
    do {
      reason = await this.engine.write({
        ids: this.ids,
        from: this.records.length,
        n: Math.max(0, length - this.ids.length),
        settings: this.settings,
        signal,
        onRecords: (records) => this.addRecords(records),
      });
    } while (reason === "end_of_text" && this.ids.length < length && !signal.aborted);
    return reason;
  }

  addRecords(records) {
    const fresh = records.filter((record) => record.index >= this.ids.length);
    this.ids = [...this.ids, ...fresh.map((record) => record.id)];
    this.text.add(fresh.map(({ id }) => ({ character: this.characterOf(id), kind: "written" })));
    for (const record of records) {
      this.records[record.index] = record;
      this.text.mark(record.index, record.p);
      if (record.index === this.text.selected) this.look(record.index, true);
    }
    if (fresh.length === 0)
      byId("status").textContent = `Reading: ${count(this.records.length)} of ${count(this.ids.length)} …`;
  }

  busy(on) {
    byId("stop").disabled = !on;
    for (const id of ["more", "copy", "link"]) byId(id).disabled = on;
    byId("text").setAttribute("aria-busy", String(on));
    if (!on) return;
    byId("status").textContent = "Writing …";
    byId("trouble").hidden = true;
  }

  finish(reason, signal) {
    if (signal.aborted) {
      this.end = this.ids.length;
      if (this.stopper.signal !== signal) return; // for another text
    }
    const n = this.ids.length - this.nGiven;
    const ends = this.ids.slice(this.nGiven).filter((id) => id === this.endId).length;
    const texts = ends > 1 ? ` in ${count(ends + (reason === "end_of_text" ? 0 : 1))} texts` : "";
    const characters = n - ends === 1 ? "character" : "characters";
    const stopped = signal.aborted ? ", then stopped" : "";
    byId("status").textContent = `${count(n - ends)} ${characters} written${texts}${stopped}.`;
    this.saveState();
    this.remember();
  }

  /** Return an index worth a look: a new character that was likely, with real alternatives. */
  interesting() {
    let best = null;
    for (let i = this.nGiven + 8; i < Math.min(this.nGiven + 200, this.records.length); i++) {
      const away = Math.abs(this.records[i].p - 0.3);
      if (best === null || away < Math.abs(this.records[best].p - 0.3)) best = i;
    }
    return best ?? (this.records.length ? this.records.length - 1 : null);
  }

  // --- looking

  /** Show a character's odds at once, and its way through the model when it is selected. */
  look(index, selected) {
    const record = this.records[index];
    if (record) {
      const onBranch = (at, id) => this.extend({ at, id });
      showOdds(record, { characterOf: this.characterOf, endId: this.endId, onBranch });
    } else if (index === 0 && this.endId === null) {
      showNoOdds("Nothing stands before the first character, so the model did not predict it.");
    } else {
      showNoOdds(index === null ? "Select a character of the text." : "Not read yet.");
    }
    if (!selected) return;
    clearTimeout(this.looking);
    if (record) {
      this.text.announce(record, this.characterOf);
      this.looking = setTimeout(() => this.lookInside(record), LOOK_DELAY);
    } else {
      this.inside.showNothing("The model did not predict this character.");
    }
    if (byId("stop").disabled) this.saveState();
  }

  async lookInside(record) {
    try {
      const { ids } = this;
      const inspection = await this.engine.inspect({ ids, index: record.index, first: record.first });
      if (this.records[this.text.selected] === record) this.inside.show(inspection, record);
    } catch (error) {
      showTrouble(error);
    }
  }

  /** Select the next or the previous character. */
  step(by) {
    const index = (this.text.selected ?? 0) + by;
    if (index >= 0 && index < this.ids.length) this.text.select(index);
  }

  /** Remove what is shown of a text that is no longer there. */
  forget() {
    clearTimeout(this.looking);
    showNoOdds("Writing …");
    this.inside.showNothing("Writing …");
  }
}

/** Show an error to the user. */
export function showTrouble(error) {
  byId("trouble").textContent = `Something went wrong: ${error.message ?? error}`;
  byId("trouble").hidden = false;
}

/** Scroll to a part of the page, without the address, which holds the text. */
function goTo(event, id) {
  event.preventDefault();
  const heading = byId(`${id}-heading`) ?? byId(id);
  heading.tabIndex = -1;
  heading.focus({ preventScroll: true });
  heading.scrollIntoView();
}

async function copy(text, id) {
  const button = byId(id);
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser did not allow it";
  }
  setTimeout(() => {
    button.textContent = label;
  }, 1500);
}
