/** The page: connects the controls, the text and the pictures to an engine that runs the model. */

import { Tokenizer } from "../engine/tokenizer.js";
import { byId, codePoint, count, element, nameOf } from "./dom.js";
import { InsideView } from "./inside_view.js";
import { showLearned } from "./learned_view.js";
import { lead, showCharacters, showModel } from "./model_view.js";
import { showNoOdds, showOdds } from "./odds_view.js";
import { buildKnobs, describe, fromHash, readKnobs, setKnob, toHash } from "./settings.js";
import { TextView } from "./text_view.js";

const LOOK_DELAY = 120; // milliseconds before the pictures follow the selection
const MOST_EARLIER = 20;

/**
 * The state of the page is a prompt, the settings, and a path: where the user chose another
 * character or continued the text. The same state gives the same text, so the URL holds it.
 */
export class Page {
  /** @param {LocalEngine} engine - see `engine/local_engine.js` */
  constructor(engine) {
    const { facts } = engine;
    this.engine = engine;
    this.tokenizer = new Tokenizer(facts.characters, facts.end_of_text_id);
    this.characterOf = (id) => (id === facts.end_of_text_id ? "" : facts.characters[id]);
    this.text = new TextView({ onLook: (index, selected) => this.look(index, selected) });
    this.inside = new InsideView({
      characterOf: this.characterOf,
      nLayer: facts.config.n_layer,
      nHead: facts.config.n_head,
    });
    this.path = [];
    this.ids = [];
    this.records = [];
    this.ended = false; // by end-of-text
    this.stopper = null;
    this.writing = Promise.resolve();
  }

  /** Fill the page, and write the text that the URL names, or a first one. */
  async start() {
    const { facts } = this.engine;
    const hasEndOfText = facts.end_of_text_id !== null;
    byId("lead").textContent = lead(facts);
    byId("prompt-about").textContent =
      `The text to continue. The model reads at most its last ${count(facts.config.block_size)} characters.` +
      (hasEndOfText ? " Every text starts as a document starts." : "");
    showModel(facts.config);
    showCharacters(facts.characters, hasEndOfText);
    showLearned(facts.run);
    buildKnobs(() => this.describeSettings());
    this.listen();
    const state = fromHash(location.hash, facts.config.vocab_size);
    await this.restore(
      state ?? { prompt: "", settings: readKnobs(), path: [], selected: null, colour: false },
    );
    await this.checkArithmetic();
  }

  listen() {
    byId("controls").addEventListener("submit", (event) => {
      event.preventDefault();
      this.write();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.write();
      }
    });
    byId("prompt").addEventListener("input", () => this.readPrompt());
    byId("stop").addEventListener("click", () => this.stopper?.abort());
    byId("again").addEventListener("click", () => this.write());
    byId("another").addEventListener("click", () => {
      setKnob("seed", (readKnobs().seed + 1) % 2 ** 32);
      this.write();
    });
    byId("more").addEventListener("click", () => this.extend({ at: this.ids.length, id: null }));
    byId("colour").addEventListener("change", () => {
      this.text.setColour(byId("colour").checked);
      this.saveState();
    });
    byId("copy").addEventListener("click", () => copy(this.tokenizer.decode(this.ids), "copy"));
    byId("link").addEventListener("click", () => copy(location.href, "link"));
    window.addEventListener("hashchange", () => {
      const state = fromHash(location.hash, this.engine.facts.config.vocab_size);
      if (state) this.restore(state);
    });
  }

  describeSettings() {
    byId("settings-summary").textContent = describe(readKnobs());
  }

  // --- writing

  /** Read the prompt; say which of its characters the model does not know. */
  readPrompt() {
    const { ids, unknown } = this.tokenizer.encode(byId("prompt").value);
    const names = unknown
      .slice(0, 8)
      .map((c) => `“${nameOf(c)}” (${codePoint(c)})`)
      .join(", ");
    byId("unknown").textContent = unknown.length
      ? `The model has never seen ${names}${unknown.length > 8 ? " and others" : ""}: it knows only the ${count(this.tokenizer.characters.length)} characters at the end of this page. They are left out.`
      : "";
    return ids;
  }

  /** Write from the prompt with the settings of the controls. */
  write() {
    return this.restore({
      prompt: byId("prompt").value,
      settings: readKnobs(),
      path: [],
      selected: null,
      colour: byId("colour").checked,
    });
  }

  /** Write the text of a state. */
  restore({ prompt, settings, path, selected, colour }) {
    byId("prompt").value = prompt;
    for (const [name, value] of Object.entries(settings)) setKnob(name, value);
    byId("colour").checked = colour;
    this.text.setColour(colour);
    this.describeSettings();
    const ids = this.readPrompt();
    return this.exclusively(async (signal) => {
      [this.prompt, this.settings] = [prompt, settings];
      this.path = [];
      this.nGiven = ids.length;
      this.setText(ids, 0);
      let reason = "";
      for (const step of [...path, null]) {
        const n = step ? Math.min(step.at - this.ids.length, settings.length) : settings.length;
        if (n > 0 || this.path.length === 0) reason = await this.continueText(Math.max(n, 0), signal);
        if (!step || signal.aborted) break;
        this.take(step);
      }
      if (selected !== null && selected < this.ids.length) this.text.select(selected, { scroll: true });
      return reason;
    });
  }

  /** Take a step of the path: cut the text there, and choose another character. */
  take({ at, id }) {
    if (at > this.ids.length) return;
    this.path = [...this.path.filter((step) => step.at < at), { at, id }];
    if (id !== null) this.setText([...this.ids.slice(0, at), id], at, true);
  }

  /** Continue the text from a new step. */
  extend(step) {
    return this.exclusively(async (signal) => {
      this.take(step);
      if (step.id !== null) this.text.select(step.at);
      return this.continueText(this.settings.length, signal);
    });
  }

  /** Run one piece of writing after stopping the one before. */
  exclusively(work) {
    this.stopper?.abort();
    const stopper = new AbortController();
    this.stopper = stopper;
    this.writing = this.writing.then(async () => {
      if (stopper.signal.aborted) return;
      this.busy(true);
      try {
        this.finish(await work(stopper.signal));
      } catch (error) {
        showTrouble(error);
      } finally {
        this.busy(false);
      }
    });
    return this.writing;
  }

  /** Replace the text from a position on. */
  setText(ids, from, chosen = false) {
    this.ids = ids;
    this.records.length = Math.min(this.records.length, from);
    this.text.cut(from);
    this.text.add(ids.slice(from).map((id) => ({ character: this.characterOf(id), given: true, chosen })));
  }

  /** Write `n` characters more; resolves to why it ended. */
  async continueText(n, signal) {
    const from = this.records.length;
    return this.engine.write({
      ids: this.ids,
      from,
      n,
      settings: this.settings,
      signal,
      onRecords: (records) => this.addRecords(records),
    });
  }

  addRecords(records) {
    const fresh = records.filter((record) => !record.given && record.index >= this.ids.length);
    this.ids = [...this.ids, ...fresh.map((record) => record.id)];
    this.text.add(fresh.map((record) => ({ character: this.characterOf(record.id), given: false })));
    for (const record of records) {
      this.records[record.index] = record;
      this.text.mark(record.index, record.p);
    }
    if (this.text.selected === null) byId("text").scrollTop = byId("text").scrollHeight;
  }

  busy(on) {
    byId("stop").disabled = !on;
    for (const id of ["copy", "link"]) byId(id).disabled = on || this.ids.length === 0;
    byId("more").disabled = on || this.ended; // the same random number would end the text again
    byId("text").setAttribute("aria-busy", String(on));
    if (on) byId("status").textContent = "Writing …";
  }

  finish(reason) {
    const n = this.ids.length - this.nGiven;
    this.ended = reason === "end_of_text";
    const why = { end_of_text: "the model ended the text", stopped: "stopped" }[reason];
    byId("status").textContent = `${count(n)} characters written${why ? `: ${why}` : ""}.`;
    if (this.text.selected === null && this.records.length) {
      this.text.select(this.interesting(), { quiet: false });
    }
    this.saveState();
    this.remember();
  }

  /** Keep a link to the text, so that the user can come back to it. */
  remember() {
    const words = this.tokenizer.decode(this.ids).trim().replace(/\s+/g, " ");
    const link = element(
      "a",
      { href: this.hash(), dir: "auto" },
      words.length > 60 ? `${words.slice(0, 60)}…` : words || "(nothing)",
    );
    const list = byId("earlier-list");
    list.prepend(element("li", {}, link));
    if (list.children.length > MOST_EARLIER) list.lastElementChild.remove();
    byId("earlier").hidden = list.children.length < 2;
  }

  /** Return an index worth a look: the most surprising of the new characters. */
  interesting() {
    let best = this.records.length - 1;
    for (let i = this.nGiven + 8; i < this.records.length; i++) {
      if (this.records[i] && this.records[i].p < (this.records[best]?.p ?? 1)) best = i;
    }
    return best;
  }

  // --- looking

  /** Show a character: at once its odds, and its way through the model when it is selected. */
  look(index, selected) {
    clearTimeout(this.looking);
    if (index === null || index >= this.ids.length) return showNoOdds("Select a character of the text.");
    const record = this.records[index];
    if (!record) return this.lookAtNothing(index);
    showOdds(record, {
      characterOf: this.characterOf,
      endId: this.engine.facts.end_of_text_id,
      onBranch: (at, id) => this.extend({ at, id }),
    });
    if (selected) {
      this.text.announce(record, this.characterOf);
      this.saveState();
      this.looking = setTimeout(() => this.lookInside(record), LOOK_DELAY);
    }
    return undefined;
  }

  lookAtNothing(index) {
    const sentence =
      index === 0
        ? "Nothing stands before the first character, so the model did not predict it."
        : "This character is too far back: the model did not read what stands before it.";
    showNoOdds(sentence);
    this.inside.showNothing(sentence);
  }

  async lookInside(record) {
    try {
      const inspection = await this.engine.inspect({
        ids: this.ids,
        index: record.index,
        first: record.first,
      });
      if (this.text.selected === record.index) this.inside.show(inspection, record);
    } catch (error) {
      showTrouble(error);
    }
  }

  /** Keep the state in the URL, so that a refresh or a link repeats the text. */
  saveState() {
    if (!this.settings) return;
    try {
      history.replaceState(null, "", this.hash());
    } catch {
      // Some browsers forbid it for files; then only "Copy a link" lacks the state.
    }
  }

  hash() {
    return toHash({
      prompt: this.prompt,
      settings: this.settings,
      path: this.path,
      selected: this.text.selected,
      colour: byId("colour").checked,
    });
  }

  /** Compare the page's arithmetic with PyTorch's, and say the result. */
  async checkArithmetic() {
    const { largestDifference, tolerance, passed, charactersPerSecond, backend } =
      await this.engine.selfTest();
    byId("self-test").textContent = passed
      ? `Checked: the model of this page and the trained one in PyTorch agree; on ten texts their logits differ by at most ${largestDifference.toPrecision(2)} (allowed: ${tolerance.toPrecision(2)}). ` +
        `This device computes ${count(charactersPerSecond)} characters per second (${backend}).`
      : `The page does NOT compute what the trained model does: logits differ by ${largestDifference.toPrecision(3)} (allowed: ${tolerance.toPrecision(2)}). Do not trust its texts on this device.`;
    byId("self-test").classList.toggle("warning", !passed);
  }
}

/** Show an error to the user. */
export function showTrouble(error) {
  byId("trouble").textContent = `Something went wrong: ${error.message ?? error}`;
  byId("trouble").hidden = false;
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
