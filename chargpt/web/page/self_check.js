/** Does this browser compute what the trained model does? */

import { byId, count } from "./dom.js";

/** Compare the engine with PyTorch's results in the page, and say how they differ. */
export async function checkArithmetic(engine) {
  const result = await engine.selfTest();
  if (result === null) {
    byId("self-test").textContent = "The server computes with the trained model itself, in chargpt.";
    return;
  }
  const { largestDifference, tolerance, passed, charactersPerSecond, backend } = result;
  const differ = `before they become probabilities, its results differ by at most ${largestDifference.toPrecision(2)}`;
  byId("self-test").textContent = passed
    ? `Checked on ten texts: this page computes what the trained model does in PyTorch; ${differ} ` +
      `(allowed: ${tolerance.toPrecision(2)}). This device computes ${count(charactersPerSecond)} ` +
      `characters per second (${backend}).`
    : `This page does NOT compute what the trained model does: ${differ} (allowed: ` +
      `${tolerance.toPrecision(2)}). Do not trust its texts on this device.`;
  byId("self-test").classList.toggle("warning", !passed);
}
