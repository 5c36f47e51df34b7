/** The text: one element per character, which can be coloured, pointed at and selected. */

import { bits, byId, element, inText, nameOf, percent } from "./dom.js";

const LEVELS = [1, 2, 3, 4, 6, 8, 10]; // least bits of each colour, as in `chargpt eval --surprise`

/** Shows characters and says which one is looked at. */
export class TextView {
  /**
   * @param {{onLook: function(number|null, boolean): void}} options - called with the index of the
   *   character that is pointed at or selected, and whether it is selected
   */
  constructor({ onLook }) {
    this.box = byId("text");
    this.pick = byId("pick");
    this.onLook = onLook;
    this.spans = [];
    this.selected = null;
    this.pointed = null;
    this.box.addEventListener("pointermove", (event) => this.point(event));
    this.box.addEventListener("pointerleave", () => this.pointAt(this.selected));
    this.box.addEventListener("click", (event) => this.click(event));
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.pick.addEventListener("keydown", (event) => this.key(event));
    this.pick.addEventListener("input", () => this.select(Number(this.pick.value)));
    this.buildLegend();
  }

  /** Remove the characters from `length` on. */
  cut(length) {
    for (const span of this.spans.splice(length)) span.remove();
    if (this.selected !== null && this.selected >= length) this.selected = null;
    if (this.pointed !== null && this.pointed >= length) this.pointed = null;
    this.update();
  }

  /**
   * Add characters. The box follows them if its end was in sight and nothing is selected.
   * @param {{character: string, kind: "given"|"chosen"|"written"}[]} items
   */
  add(items) {
    const { box } = this;
    const follows = this.selected === null && box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    const fragment = document.createDocumentFragment();
    for (const { character, kind } of items) {
      const seen = inText(character);
      const span = element(`span.${kind}`, {}, seen);
      if (character === "\n") span.classList.add("line");
      if (character === "") span.classList.add("end");
      else if (seen !== character) span.classList.add("hidden-character");
      span.index = this.spans.length;
      this.spans.push(span);
      fragment.append(span);
    }
    box.append(fragment);
    if (follows) box.scrollTop = box.scrollHeight;
    this.update();
  }

  /** Colour a character by its surprise. */
  mark(index, probability) {
    const surprise = bits(probability);
    const level = LEVELS.filter((least) => surprise >= least).length;
    if (level) this.spans[index].dataset.level = String(level);
  }

  update() {
    this.pick.max = String(Math.max(this.spans.length - 1, 0));
    this.pick.disabled = this.spans.length === 0;
  }

  /** Select a character, and bring it into view. */
  select(index) {
    this.spans[this.selected]?.classList.remove("selected");
    this.selected = this.pointed = index;
    this.spans[index].classList.add("selected");
    this.pick.value = String(index);
    this.show(this.spans[index]);
    this.onLook(index, true);
  }

  /** Say what is selected to people who cannot see it. */
  announce(record, characterOf) {
    const character = nameOf(characterOf(record.id));
    this.pick.setAttribute(
      "aria-valuetext",
      `character ${record.index + 1}: ${character}, ${percent(record.p)}`,
    );
  }

  show(span) {
    // Only the box scrolls, not the page.
    const [top, bottom] = [span.offsetTop, span.offsetTop + span.offsetHeight];
    if (top < this.box.scrollTop) this.box.scrollTop = top - 8;
    else if (bottom > this.box.scrollTop + this.box.clientHeight)
      this.box.scrollTop = bottom - this.box.clientHeight + 8;
  }

  point(event) {
    if (event.target.index !== undefined && event.pointerType !== "touch") this.pointAt(event.target.index);
  }

  pointAt(index) {
    if (index === this.pointed) return;
    this.pointed = index;
    this.onLook(index, false);
  }

  click(event) {
    const index = event.target.index;
    if (index !== undefined) this.select(index);
  }

  key(event) {
    const last = this.spans.length - 1;
    if (last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.selected ?? last;
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last };
    moves.ArrowUp = this.lineAway(at, -1);
    moves.ArrowDown = this.lineAway(at, 1);
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.select(Math.min(Math.max(moves[event.key], 0), last));
    this.pick.focus(); // its value is what a screen reader says
  }

  /** Return the index of the character above or below another one. */
  lineAway(index, direction) {
    const from = this.spans[index];
    let best = index;
    for (let i = index + direction; i >= 0 && i < this.spans.length; i += direction) {
      const rows = direction * (this.spans[i].offsetTop - from.offsetTop);
      if (rows <= 0) continue;
      if (best !== index && this.spans[i].offsetTop !== this.spans[best].offsetTop) break;
      const away = (other) => Math.abs(this.spans[other].offsetLeft - from.offsetLeft);
      if (best === index || away(i) < away(best)) best = i;
    }
    return best;
  }

  /** Switch the colours on or off. */
  setColour(on) {
    this.box.classList.toggle("coloured", on);
    byId("legend").hidden = !on;
  }

  buildLegend() {
    const legend = byId("legend");
    legend.append("Bits of surprise: ");
    LEVELS.forEach((least, i) =>
      legend.append(
        element("span", { "data-level": i + 1 }, i + 1 === LEVELS.length ? `${least}+` : String(least)),
        " ",
      ),
    );
    legend.append("1 bit is a coin flip; 6 bits are one of 64 equally likely characters.");
  }
}
