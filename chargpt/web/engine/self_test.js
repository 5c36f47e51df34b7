// Does this browser compute what the model computed in Python? And how fast?

import { fromBase64 } from "./weights.js";

const SPEED_MS = 300; // time spent writing, to measure the speed
const SETTINGS = { temperature: 0.8, topK: 0, topP: 1, minP: 0 };

/**
 * @param {Reader} reader
 * @param {Writer} writer
 * @param {{prompts: number[][], logits: string, tolerance: number}} expected contexts, and the
 *   logits after each in Python, (prompts, V) of float32 in base64
 * @param {() => Promise<void>} idle resolves when nothing is written: a test must not slow that down
 */
export async function selfTest(reader, writer, { prompts, logits, tolerance }, idle) {
  const wanted = new Float32Array(fromBase64(logits).buffer);
  const worst = { difference: 0, prompt: 0, token: 0 };
  for (const [prompt, context] of prompts.entries()) {
    await idle();
    const computed = await reader.logits(context);
    computed.forEach((logit, token) => {
      let difference = Math.abs(logit - wanted[prompt * computed.length + token]);
      if (Number.isNaN(difference)) difference = Infinity;
      if (difference > worst.difference) Object.assign(worst, { difference, prompt, token });
    });
  }
  await idle();
  const passed = worst.difference <= tolerance;
  return {
    largestDifference: worst.difference,
    tolerance,
    passed,
    where: `prompt ${worst.prompt + 1} of ${prompts.length}, token ${worst.token}`,
    charactersPerSecond: passed ? await speed(writer) : 0,
    backend: reader.model.backend,
  };
}

/** Returns how many characters the writer writes per second. */
async function speed(writer) {
  const start = performance.now();
  const elapsed = () => performance.now() - start;
  let characters = 0;
  for (let seed = 0; elapsed() < SPEED_MS; seed++) {
    // a text may end: then the next one starts
    const text = writer.write({ ids: [], from: 0, n: 1000, settings: { ...SETTINGS, seed } });
    for await (const _ of text) {
      characters++;
      if (elapsed() >= SPEED_MS) break;
    }
  }
  return (1000 * characters) / elapsed();
}
